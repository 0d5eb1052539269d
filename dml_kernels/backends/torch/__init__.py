"""The ``torch`` backend: a loop over bank chunks in plain PyTorch, with hand-written first and second derivatives.

It runs where no compiled backend can, on any device and dtype for which PyTorch has products. Memory is bounded: a few
temporaries of N x chunk, where N x chunk is about ``tiles.CHUNK_ELEMENTS`` for a bank of any size. The same call gives
the same bits at the same number of threads, because PyTorch's products split their sums by that number.

| file | what is there |
|---|---|
| `tiles.py` | rows and chunks, scores, gradients from their derivative |
| `normalize.py`, `distance.py`, `logsumexp.py`, `hinge.py`, `argmax.py` | the ops |
| `policies.py` | logits other than linear: pooled centres, Circle's weights |
| `double.py` | double backward |
| `listed.py` | scores of listed pairs |
| `by_class.py`, `positives.py`, `triplets.py` | sums over positives found by class, and over triplets |
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...ops.signatures import OPS as ALL
from ...ops.signatures import Bank, Spec
from .argmax import masked_argmax_fwd
from .distance import normalized_distance_bwd, normalized_distance_dbl, normalized_distance_fwd
from .double import masked_logsumexp_dbl
from .hinge import masked_hinge_sum_bwd, masked_hinge_sum_dbl, masked_hinge_sum_fwd, positive_scores
from .listed import pair_scores_bwd, pair_scores_differentiable_bwd, pair_scores_fwd
from .logsumexp import masked_logsumexp_bwd, masked_logsumexp_fwd
from .normalize import normalize_bwd, normalize_dbl, normalize_fwd
from .positives import positive_pair_sum_bwd, positive_pair_sum_fwd
from .triplets import triplet_sum_bwd, triplet_sum_fwd

__all__ = [
    "can_run", "describe", "fuses", "keeps_mean", "masked_argmax_fwd", "masked_hinge_sum_bwd", "masked_hinge_sum_dbl",
    "masked_hinge_sum_fwd", "masked_logsumexp_bwd", "masked_logsumexp_dbl", "masked_logsumexp_fwd", "name",
    "normalize_bwd", "normalize_dbl", "normalize_fwd", "normalized_distance_bwd", "normalized_distance_dbl",
    "normalized_distance_fwd", "pair_scores_bwd", "pair_scores_differentiable_bwd", "pair_scores_fwd",
    "positive_pair_sum_bwd", "positive_pair_sum_fwd", "positive_scores", "triplet_sum_bwd", "triplet_sum_fwd",
]  # fmt: skip

name = "torch"
OPS = tuple(ALL)
OPTIONS = ("sums", "keep", "policy", "policy_params", "exclude", "first_class")
METRICS = ("dot", "sqeuclidean", "euclidean")


def can_run(op: str, device: torch.device, dtype: torch.dtype, asked: Mapping[str, object]) -> str | None:
    return None


def describe() -> str:
    return "chunk loop in plain PyTorch, bounded memory"


def fuses(loss: str, inputs: object) -> bool:
    return False


def keeps_mean(bank: Bank, spec: Spec) -> bool:
    return False

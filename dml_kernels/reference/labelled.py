"""Dense pairs of a labelled batch, for the references of the pair losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import matrix
from .sets import sets


class LabelledPairs(NamedTuple):
    """s (N, M) scores, larger is closer; same, different (N, M) bool; y (N,)."""

    s: Tensor
    same: Tensor
    different: Tensor
    y: Tensor

    @staticmethod
    def of(
        embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None, ref_labels: Tensor | None, distance: Any
    ) -> LabelledPairs:
        """All pairs of the batch with itself, without each row's own copy, or with the references.

        A row labelled -100 is in no pair.
        """
        own = ref_emb is None
        w, c = (embeddings, labels) if ref_emb is None or ref_labels is None else (ref_emb, ref_labels)
        s = matrix.scores(embeddings, w, distance.metric, distance.normalize_embeddings)
        same, different = sets(labels, c, len(c), torch.arange(len(labels), device=labels.device) if own else None)
        return LabelledPairs(s, same, different, labels)


def mean_of_positive(terms: Tensor) -> Tensor:
    """The mean of the terms above 0; without any, a 0 that is connected to the graph."""
    return terms[terms > 0].mean() if (terms > 0).any() else terms.sum() * 0


def mean(terms: Tensor, like: Tensor) -> Tensor:
    """The mean of the terms; without any, a 0 that is connected to ``like``."""
    return terms.mean() if terms.numel() else like.sum() * 0

"""Distances by the names people use: each names a metric of the ops, and says which way it runs.

The ops compare by a score s that is larger for closer points (u.p, -|u - p|, -|u - p|^2). A loss written on scores
serves every distance; what a user states as a distance or a similarity, a margin say, ``threshold`` turns into a score.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import functional
from .ops.contract import check_number


class Distance(torch.nn.Module):
    """One metric of the ops: ``distance(x, w)`` is the (N, M) matrix, a loss takes only ``metric`` and ``normalize``.

    Attributes:
        metric: ``cosine``, ``dot``, ``euclidean`` or ``sqeuclidean``, as :func:`functional.normalized_distance` has it.
        normalize_embeddings: unit vectors are compared.
        is_inverted: larger values are closer points, as for similarities.
    """

    metric: str
    normalize_embeddings: bool = True
    is_inverted: bool = False

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        """All N x M values, for who wants the matrix; no loss here builds it."""
        ref_emb = query_emb if ref_emb is None else ref_emb
        return functional.normalized_distance(query_emb, ref_emb, self.metric, normalize=self.normalize_embeddings)

    def threshold(self, value: float) -> float:
        """The score at which this distance, or similarity, has the value."""
        value = check_number("a margin", value)
        return value if self.is_inverted else -value

    def extra_repr(self) -> str:
        """What ``print(distance)`` shows."""
        return f"metric={self.metric}, normalize_embeddings={self.normalize_embeddings}"


class LpDistance(Distance):
    """Euclidean distance |u - p| of unit vectors; with ``power=2`` its square; of the vectors as they are with
    ``normalize_embeddings=False``.

    Raises:
        ValueError: another p than 2 or power than 1 or 2, which no kernel here streams.
    """

    def __init__(self, normalize_embeddings: bool = True, p: float = 2, power: float = 1):
        super().__init__()
        if p != 2 or power not in (1, 2):
            raise ValueError(f"LpDistance streams p=2 with power 1 or 2; got p={p}, power={power}")
        self.normalize_embeddings, self.p, self.power = normalize_embeddings, p, power
        self.metric = "euclidean" if power == 1 else "sqeuclidean"


class CosineSimilarity(Distance):
    """u.p of unit vectors."""

    metric = "cosine"
    is_inverted = True


class DotProductSimilarity(Distance):
    """x.w of unit vectors, as theirs is by default; with ``normalize_embeddings=False`` of the vectors as they are."""

    is_inverted = True

    def __init__(self, normalize_embeddings: bool = True):
        super().__init__()
        self.normalize_embeddings = normalize_embeddings
        self.metric = "cosine" if normalize_embeddings else "dot"


def accept(
    distance: Any, default: Distance, only: tuple[type[Distance], ...] = (Distance,), user: str = ""
) -> Distance:
    """A distance for a loss or miner: ours, or pytorch-metric-learning's of the same name and settings.

    Args:
        distance: what the caller was given; None for ``default``.
        only: the kinds that make sense there. user: who asks, for the message.

    Raises:
        ValueError, TypeError: a kind that no kernel streams, or that makes no sense there; the message names those
            that do.
    """
    if distance is None:
        return default
    if not isinstance(distance, Distance):
        distance = _translated(distance)
    if not isinstance(distance, only):
        names = " or ".join(kind.__name__ for kind in only)
        raise ValueError(f"{user or 'this loss'} is defined on {names}; got {type(distance).__name__}")
    return distance


def _translated(theirs: Any) -> Distance:
    name, unit = type(theirs).__name__, getattr(theirs, "normalize_embeddings", True)
    if name == "LpDistance":
        return LpDistance(unit, theirs.p, theirs.power)
    if name in ("CosineSimilarity", "DotProductSimilarity"):
        if theirs.power != 1:
            raise ValueError(f"{name} with power={theirs.power} is not streamed; use power=1")
        return CosineSimilarity() if name == "CosineSimilarity" else DotProductSimilarity(unit)
    raise TypeError(
        f"distance must be LpDistance, CosineSimilarity or DotProductSimilarity (of dml_kernels.distances or "
        f"pytorch_metric_learning.distances); got {name}"
    )

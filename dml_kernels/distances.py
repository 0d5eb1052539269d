"""Distances by the names people use: each names a metric of the ops, and says which way it runs.

The ops compare by a score s that is larger for closer points (u.p, -|u - p|, -|u - p|^2). A loss written on scores
serves every distance; what a user states as a distance or a similarity, a margin say, ``threshold`` turns into a score.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import functional
from .foreign import pml_name
from .ops.contract import check_number

# What pytorch-metric-learning's distances are set up by.
SETTINGS = ("normalize_embeddings", "p", "power", "is_inverted")


class Distance(torch.nn.Module):
    """One metric of the ops: ``distance(x, w)`` is the (N, M) matrix, a loss takes only ``metric`` and ``normalize``.

    Attributes:
        metric: ``cosine``, ``dot``, ``euclidean`` or ``sqeuclidean``, as :func:`functional.normalized_distance` has it;
            follows the settings below, which may be assigned.
        normalize_embeddings: unit vectors are compared.
        p: of the norm, 2. power: of the value.
        is_inverted: larger values are closer points, as for similarities.

    Raises:
        ValueError: a setting, given or assigned, that no kernel here streams.
    """

    metric: str
    normalize_embeddings: bool = True
    p: float = 2
    power: float = 1
    is_inverted: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTINGS:
            settings = {key: getattr(self, key) for key in SETTINGS} | {name: value}
            self.metric = self.metric_of(**settings)
        super().__setattr__(name, value)

    def metric_of(self, normalize_embeddings: bool, p: float, power: float, is_inverted: bool) -> str:
        """The metric that these settings make; refuses those that make none."""
        return self.metric

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

    metric = "euclidean"

    def __init__(self, normalize_embeddings: bool = True, p: float = 2, power: float = 1):
        super().__init__()
        self.normalize_embeddings, self.p, self.power = normalize_embeddings, p, power

    def metric_of(self, normalize_embeddings: bool, p: float, power: float, is_inverted: bool) -> str:
        """By the power."""
        if p != 2 or power not in (1, 2) or is_inverted:
            raise ValueError(f"LpDistance streams p=2 with power 1 or 2, is_inverted=False; got p={p}, power={power}, "
                             f"is_inverted={is_inverted}")  # fmt: skip
        return "euclidean" if power == 1 else "sqeuclidean"


class DotProductSimilarity(Distance):
    """x.w of unit vectors, as pytorch-metric-learning has it; with ``normalize_embeddings=False`` of the vectors as
    they are.

    Raises:
        ValueError: another power than 1, or another norm than p=2.
    """

    metric = "cosine"
    is_inverted = True

    def __init__(self, normalize_embeddings: bool = True):
        super().__init__()
        self.normalize_embeddings = normalize_embeddings

    def metric_of(self, normalize_embeddings: bool, p: float, power: float, is_inverted: bool) -> str:
        """By whether vectors are normalised."""
        if (p, power, is_inverted) != (2, 1, True):
            raise ValueError(f"{type(self).__name__} streams p=2, power=1, is_inverted=True; got p={p}, power={power}, "
                             f"is_inverted={is_inverted}")  # fmt: skip
        return "cosine" if normalize_embeddings else "dot"


class CosineSimilarity(DotProductSimilarity):
    """u.p of unit vectors.

    Raises:
        ValueError: ``normalize_embeddings=False``: that is DotProductSimilarity; another power than 1.
    """

    def __init__(self) -> None:
        super().__init__()

    def metric_of(self, normalize_embeddings: bool, p: float, power: float, is_inverted: bool) -> str:
        """Cosine."""
        if not normalize_embeddings:
            raise ValueError("CosineSimilarity compares unit vectors; use "
                             "DotProductSimilarity(normalize_embeddings=False)")  # fmt: skip
        return super().metric_of(normalize_embeddings, p, power, is_inverted)


def accept(
    distance: Any, default: Distance, only: tuple[type[Distance], ...] = (Distance,), user: str = ""
) -> Distance:
    """A distance for a loss or miner: ours, or one of pytorch-metric-learning's own classes, turned into ours.

    Args:
        distance: what the caller was given; None for ``default``.
        only: the kinds that make sense there. user: who asks, for the message.

    Raises:
        ValueError, TypeError: a kind that no kernel streams, any other class, or one that makes no sense there; the
            message names those that do.
    """
    if distance is None:
        return default
    if not isinstance(distance, Distance):
        distance = _translated(distance)
    kind = type(distance)
    if kind.forward.__module__ != __name__:
        raise TypeError(f"distance must be computed by its metric; {kind.__name__} defines a forward of its own, which "
                        "no loss or miner calls")  # fmt: skip
    if not isinstance(distance, only):
        names = " or ".join(kind.__name__ for kind in only)
        raise ValueError(f"{user or 'this loss'} is defined on {names}; got {type(distance).__name__}")
    return distance


def _translated(theirs: Any) -> Distance:
    name = pml_name(theirs, "distances")
    if name not in ("LpDistance", "CosineSimilarity", "DotProductSimilarity"):
        kind = type(theirs)
        raise TypeError(
            "distance must be LpDistance, CosineSimilarity or DotProductSimilarity (of dml_kernels.distances or "
            f"pytorch_metric_learning.distances); got {kind.__module__}.{kind.__qualname__}. What another class "
            "computes, no kernel streams: use one of these, or pytorch-metric-learning's loss"
        )
    ours: Distance = globals()[name]()
    for setting in SETTINGS:
        setattr(ours, setting, getattr(theirs, setting))
    return ours

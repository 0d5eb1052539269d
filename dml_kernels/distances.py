"""Distances, under pytorch-metric-learning's names: each selects a metric of the ops.

The ops compare by a score s that is larger for closer points (u.p, -|u - p|, -|u - p|^2), so a loss written on scores
works with every distance. ``Distance.threshold`` turns a value that a user states as a distance or a similarity, such
as a margin, into a score.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .elsewhere import explain
from .foreign import pml_name
from .ops.checks import check_flag, check_number
from .ops.contract import accumulate_dtype, check_pair, product_dtype
from .ops.normalized_distance import normalized_distance
from .records import Recorded

# The settings of a distance in pytorch-metric-learning.
SETTINGS = ("normalize_embeddings", "p", "power", "is_inverted")


# The most elements of unit vectors that are held at a time: 16 MB in fp32.
UNIT_ELEMENTS = 1 << 22


def cosines(x: Tensor, w: Tensor) -> Tensor:
    """All N x M cosines, as ``torch.nn.functional.normalize`` and a matrix product give them: normalise, then multiply.

    :func:`functional.normalized_distance` multiplies first, which rounds differently: a cosine near 0 then differs in
    the last digits from ``F.normalize(x) @ F.normalize(w).T``. Without gradient the copies of ``w`` stay within a few
    tiles of 16 MB.

    Args:
        x: (N, D) floating point.
        w: (M, D) floating point.

    Returns:
        (N, M), in the dtype of the product.
    """
    check_pair(x, w, ("embeddings", "ref_emb"))
    dtype = product_dtype(x, w)
    acc = accumulate_dtype(dtype)
    multiplied = acc if dtype == torch.float16 else dtype  # the CPU adds fp16 up in fp16

    def unit(rows: Tensor) -> Tensor:
        return torch.nn.functional.normalize(rows.to(acc), dim=1).to(multiplied)

    u = unit(x)
    parts = [(u @ unit(part).t()).to(dtype) for part in w.split(max(1, UNIT_ELEMENTS // w.size(1)))]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class Distance(Recorded):
    """One metric of the ops. ``distance(x, w)`` returns the (N, M) matrix; losses only read the metric and settings.

    It has the methods of a distance in pytorch-metric-learning, so the losses, miners and trainers of that package
    accept it.

    Args:
        normalize_embeddings: as the attribute below; None: the default of the class.
        p: as the attribute below.
        power: as the attribute below.
        collect_stats: accepted as in pytorch-metric-learning; nothing of a step is recorded, because norms would take a
            pass over the embeddings.

    Attributes:
        metric: ``cosine``, ``dot``, ``euclidean`` or ``sqeuclidean``, as in :func:`functional.normalized_distance`. It
            follows from the settings below, which may be assigned.
        normalize_embeddings: whether unit vectors are compared.
        p: the order of the norm; only 2 is computed.
        power: the exponent of the distance.
        is_inverted: whether larger values mean closer points, as with similarities.

    Raises:
        ValueError: a setting, given or assigned, that no kernel here streams.
    """

    metric: str
    normalize_embeddings: bool = True
    p: float = 2
    power: float = 1
    is_inverted: bool = False

    def __init__(self, normalize_embeddings: bool | None = None, p: float = 2, power: float = 1,
                 collect_stats: bool | None = None):  # fmt: skip
        super().__init__(collect_stats)
        if normalize_embeddings is not None:
            self.normalize_embeddings = check_flag("normalize_embeddings", normalize_embeddings)
        self.p, self.power = check_number("p", p), check_number("power", power)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTINGS:
            settings = {key: getattr(self, key) for key in SETTINGS} | {name: value}
            self.metric = self.metric_of(**settings)
        super().__setattr__(name, value)

    def metric_of(self, normalize_embeddings: bool, p: float, power: float, is_inverted: bool) -> str:
        """The metric of these settings; a ValueError if no metric has them."""
        return self.metric

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        """The matrix of all values, which no loss of this package builds.

        Args:
            query_emb: (N, D) floating point.
            ref_emb: (M, D) floating point; None: ``query_emb``.

        Returns:
            (N, M), the distance or similarity of each pair of rows.
        """
        ref_emb = query_emb if ref_emb is None else ref_emb
        if self.metric == "cosine":
            return cosines(query_emb, ref_emb)
        return normalized_distance(query_emb, ref_emb, self.metric, normalize=self.normalize_embeddings)

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """The values of corresponding rows, (N,).

        As in pytorch-metric-learning, the vectors are not normalised, and the power is not applied.

        Args:
            query_emb: (N, D) floating point.
            ref_emb: (N, D) floating point.
        """
        if self.is_inverted:
            return torch.linalg.vecdot(query_emb, ref_emb)
        return torch.nn.functional.pairwise_distance(query_emb, ref_emb, p=self.p)

    def smallest_dist(self, *args: Any, **kwargs: Any) -> Any:
        """The closest: ``torch.min`` of distances, ``torch.max`` of similarities."""
        return (torch.max if self.is_inverted else torch.min)(*args, **kwargs)

    def largest_dist(self, *args: Any, **kwargs: Any) -> Any:
        """The furthest: ``torch.max`` of distances, ``torch.min`` of similarities."""
        return (torch.min if self.is_inverted else torch.max)(*args, **kwargs)

    def margin(self, x: Any, y: Any) -> Any:
        """How much further x is than y: x - y for distances, y - x for similarities."""
        return y - x if self.is_inverted else x - y

    def normalize(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
        """Unit vectors along ``dim``."""
        return torch.nn.functional.normalize(embeddings, p=self.p, dim=dim, **kwargs)

    def maybe_normalize(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
        """Unit vectors along ``dim`` if this distance compares unit vectors, else the vectors as they are."""
        return self.normalize(embeddings, dim, **kwargs) if self.normalize_embeddings else embeddings

    def get_norm(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
        """Norms along ``dim``."""
        return torch.linalg.vector_norm(embeddings, ord=self.p, dim=dim, **kwargs)

    def threshold(self, value: float) -> float:
        """The score of a pair at this distance, or with this similarity: -value, or value."""
        value = check_number("a margin", value)
        return value if self.is_inverted else -value

    def extra_repr(self) -> str:
        """What ``print(distance)`` shows."""
        return f"metric={self.metric}, normalize_embeddings={self.normalize_embeddings}"


class LpDistance(Distance):
    """Euclidean distance |u - p| of unit vectors, or its square with ``power=2``.

    With ``normalize_embeddings=False`` it compares the vectors as they are.

    Raises:
        ValueError: p other than 2, or power other than 1 or 2, which no kernel here streams.
    """

    metric = "euclidean"

    def metric_of(self, normalize_embeddings: bool, p: float, power: float, is_inverted: bool) -> str:
        """``euclidean`` for power 1, ``sqeuclidean`` for power 2."""
        if p != 2 or power not in (1, 2) or is_inverted:
            raise ValueError(f"LpDistance streams p=2 with power 1 or 2, is_inverted=False; got p={p}, power={power}, "
                             f"is_inverted={is_inverted}")  # fmt: skip
        return "euclidean" if power == 1 else "sqeuclidean"


class DotProductSimilarity(Distance):
    """Dot product x.w of unit vectors, as in pytorch-metric-learning.

    With ``normalize_embeddings=False`` it compares the vectors as they are.

    Raises:
        ValueError: power other than 1, or p other than 2.
    """

    metric = "cosine"
    is_inverted = True

    def metric_of(self, normalize_embeddings: bool, p: float, power: float, is_inverted: bool) -> str:
        """``cosine`` where vectors are normalised, else ``dot``."""
        if (p, power, is_inverted) != (2, 1, True):
            raise ValueError(f"{type(self).__name__} streams p=2, power=1, is_inverted=True; got p={p}, power={power}, "
                             f"is_inverted={is_inverted}")  # fmt: skip
        return "cosine" if normalize_embeddings else "dot"


class CosineSimilarity(DotProductSimilarity):
    """Dot product u.p of unit vectors.

    Raises:
        ValueError: ``normalize_embeddings=False``, which is DotProductSimilarity; power other than 1.
    """

    def metric_of(self, normalize_embeddings: bool, p: float, power: float, is_inverted: bool) -> str:
        """Always ``cosine``."""
        if not normalize_embeddings:
            raise ValueError("CosineSimilarity compares unit vectors; use "
                             "DotProductSimilarity(normalize_embeddings=False)")  # fmt: skip
        return super().metric_of(normalize_embeddings, p, power, is_inverted)


def accept(
    distance: Any, default: Distance, only: tuple[type[Distance], ...] = (Distance,), user: str = ""
) -> Distance:
    """A distance for a loss or miner: one of this module, or one of pytorch-metric-learning converted to it.

    Args:
        distance: what the caller was given; None: ``default``.
        default: the distance of the caller where none is given.
        only: the classes that the caller supports.
        user: the name of the caller, for the message.

    Raises:
        ValueError: settings that no kernel streams, or a class that the caller does not support.
        TypeError: an object of any other class, or one that defines its own ``forward``. The message names what is
            accepted.
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


def _translated(original: Any) -> Distance:
    name = pml_name(original, "distances")
    if name not in ("LpDistance", "CosineSimilarity", "DotProductSimilarity"):
        kind = type(original)
        raise TypeError(
            "distance must be LpDistance, CosineSimilarity or DotProductSimilarity (of dml_kernels.distances or "
            f"pytorch_metric_learning.distances); got {kind.__module__}.{kind.__qualname__}. What another class "
            "computes, no kernel streams: use one of these, or pytorch-metric-learning's loss"
        )
    ours: Distance = globals()[name]()
    for setting in SETTINGS:
        setattr(ours, setting, getattr(original, setting))
    return ours


explain(__name__)

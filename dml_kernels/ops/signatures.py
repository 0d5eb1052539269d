"""What each op takes, stated once: a NamedTuple of its tensors and one of its numbers.

The registered schemas are derived from these (``library.register``), autograd Functions take the tensors one by one and
the numbers as one argument, and a backend's method takes both tuples. Specs are made by keyword, so that a new number
cannot be mistaken for another.

Backends know the metrics ``dot``, ``sqeuclidean`` and ``euclidean``, and ``normalize`` for unit vectors. In all of
them x is (N, D), w (M, D), y (N,) and c (M,) int64 labels, and exclude (N,) int64 the bank index that is left out for
the row, -1 for none; where c is None, each bank entry's label is its own index. ``first_class`` is -1 where the bank
holds all classes; from 0 on it is the label of the bank's first entry (c is then None), and a row whose label the bank
does not hold has no positive in it.

Where w is None the batch is its own bank: c is None too and means y, and the row's own copy is left out unless ``own``.
A backend gets these tensors explicitly (ops/own_bank.py): w is x, c is y, and exclude is (N, 2) if the own copy
is left out in addition to ``exclude``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The tensor of normalize."""

    x: Tensor


class NormalizeSpec(NamedTuple):
    """The number of normalize, and the backend."""

    eps: float
    backend: str


class Matrices(NamedTuple):
    """The tensors of normalized_distance."""

    x: Tensor
    w: Tensor


class DistanceSpec(NamedTuple):
    """The numbers of normalized_distance, the product dtype, and the backend."""

    metric: str
    normalize: bool
    eps: float
    dtype: torch.dtype
    backend: str = ""


class Listed(NamedTuple):
    """The tensors of pair_scores; rows (P,) and cols (P,), int64, name the pairs."""

    x: Tensor
    w: Tensor
    rows: Tensor
    cols: Tensor


class ScoresSpec(NamedTuple):
    """The numbers of pair_scores, and the dtype of its arithmetic."""

    metric: str
    normalize: bool
    eps: float
    dtype: torch.dtype


class Bank(NamedTuple):
    """The tensors of masked_logsumexp, a comparison of rows with a bank; scale () or (N,); col_bias (M,).

    Where K centres of a class are pooled, w is (M K, D), class by class, and a column is a class.
    """

    x: Tensor
    w: Tensor | None
    y: Tensor
    c: Tensor | None = None
    exclude: Tensor | None = None
    scale: Tensor | None = None
    col_bias: Tensor | None = None


class Spec(NamedTuple):
    """The numbers of masked_logsumexp: how a score becomes a logit, the product dtype, and the backend.

    ``logit`` is (k_same, o_same, k_different, o_different) in z = k scale_i (s - o) + col_bias_j. Under the policy
    ``quadratic`` it holds the policy's signs and offsets, and k is multiplied by the policy's weight. ``sums`` says
    that the plain sums of both sets are needed. ``keep`` says that a gradient in x will be needed, so that a backend
    may keep what makes it cheaper (``choice.keeps_mean``).
    """

    metric: str
    normalize: bool
    logit: list[float]
    eps: float
    ignore_index: int
    dtype: torch.dtype
    backend: str = ""
    sums: bool = False
    keep: bool = False
    policy: str = "linear"
    policy_params: list[float] = []  # noqa: RUF012 (never changed)
    own: bool = False
    first_class: int = -1

    @property
    def centres(self) -> int:
        """The number of bank rows in a column: K where centres are pooled, else 1."""
        return int(self.policy_params[0]) if self.policy.endswith("_pool") else 1


class Hinged(NamedTuple):
    """The tensors of masked_hinge_sum; the thresholds of both sets are (), (N,) or None each."""

    x: Tensor
    w: Tensor | None
    y: Tensor
    c: Tensor | None
    exclude: Tensor | None
    t_same: Tensor | None
    t_different: Tensor | None


class HingeSpec(NamedTuple):
    """The numbers of masked_hinge_sum; ``hinge`` is (k_same, o_same, k_different, o_different)."""

    metric: str
    normalize: bool
    hinge: list[float]
    relative: bool
    eps: float
    ignore_index: int
    dtype: torch.dtype
    backend: str = ""
    own: bool = False
    first_class: int = -1


class Lines(NamedTuple):
    """The arguments of masked_hinge_sum in a backend: terms relu(k s + offset), with k and offset (N,) for each set."""

    x: Tensor
    w: Tensor
    y: Tensor
    c: Tensor | None
    exclude: Tensor | None
    k: tuple[float, float]
    offset: tuple[Tensor, Tensor]


class Slopes(NamedTuple):
    """The gradients on the scores of masked_hinge_sum, (N,) each: on positive terms of same, and of different.

    ``positive``, if not None, is the gradient at the bank entry of the row's label, even if that entry is excluded.
    """

    same: Tensor
    different: Tensor
    positive: Tensor | None


class Search(NamedTuple):
    """The tensors of masked_argmax; (low, high) is an open interval of scores, each (N,) or None."""

    x: Tensor
    w: Tensor | None
    y: Tensor
    c: Tensor | None
    exclude: Tensor | None
    low: Tensor | None
    high: Tensor | None


class ArgmaxSpec(NamedTuple):
    """The numbers of masked_argmax; ``wanted`` and ``largest`` are for same and different."""

    metric: str
    normalize: bool
    wanted: list[bool]
    largest: list[bool]
    noise: bool
    seed: int
    cutoffs: list[float]
    eps: float
    ignore_index: int
    dtype: torch.dtype
    backend: str = ""
    own: bool = False
    first_class: int = -1

    def empty_score(self, which: int) -> float:
        """The score of a set without candidates, worse than any other."""
        return -torch.inf if self.largest[which] or self.noise else torch.inf


class Proxied(NamedTuple):
    """The tensors of proxy_nca.

    y names rows of w or is ignore_index; scale, () or (N,), multiplies the factor in the spec; weight (N,) is of rows.
    """

    x: Tensor
    w: Tensor
    y: Tensor
    scale: Tensor | None
    weight: Tensor | None


class ProxySpec(NamedTuple):
    """The numbers of proxy_nca, the product dtype, and the backend."""

    factor: float
    exclude_positive: bool
    label_smoothing: float
    eps: float
    ignore_index: int
    reduction: str
    dtype: torch.dtype
    backend: str = ""
    first_class: int = -1

    @property
    def lse(self) -> Spec:
        """The numbers of the masked_logsumexp that the loss is made of."""
        return Spec(
            metric="sqeuclidean", normalize=True, logit=[self.factor, 0.0, self.factor, 0.0], eps=self.eps,
            ignore_index=self.ignore_index, dtype=self.dtype, sums=self.label_smoothing > 0, backend=self.backend,
            first_class=self.first_class,
        )  # fmt: skip


class Clustered(NamedTuple):
    """The tensors of magnet.

    clusters (N,), int64, are the clusters of the rows, and classes (K,), int64, the classes of the clusters. centers
    (K, D) and variance () are None where those of the batch are used.
    """

    x: Tensor
    clusters: Tensor
    classes: Tensor
    centers: Tensor | None
    variance: Tensor | None


class MagnetSpec(NamedTuple):
    """The numbers of magnet, the product dtype, and the backend."""

    alpha: float
    normalize: bool
    min_variance: float
    eps: float
    ignore_index: int
    reduction: str
    dtype: torch.dtype
    backend: str = ""


class Pairs(NamedTuple):
    """The tensors of positive_pair_sum: u (N,), and v (M,) or None."""

    x: Tensor
    w: Tensor | None
    y: Tensor
    c: Tensor | None
    exclude: Tensor | None
    u: Tensor
    v: Tensor | None


class PairSpec(NamedTuple):
    """The numbers of positive_pair_sum: the term and its parameters, the comparison, and the product dtype."""

    kind: str
    params: list[float]
    metric: str
    normalize: bool
    eps: float
    ignore_index: int
    dtype: torch.dtype
    backend: str = ""
    own: bool = False


class Points(NamedTuple):
    """The tensors of triplet_sum."""

    x: Tensor
    w: Tensor | None
    y: Tensor
    c: Tensor | None
    exclude: Tensor | None


class TripletSpec(NamedTuple):
    """The numbers of triplet_sum: the term, the comparison, and the product dtype."""

    margin: float
    smooth: bool
    swap: bool
    metric: str
    normalize: bool
    eps: float
    ignore_index: int
    dtype: torch.dtype
    backend: str = ""
    own: bool = False


# Every op that a backend is chosen for, by its name in the registry and in the methods of a backend.
OPS: dict[str, tuple[type, type]] = {
    "normalize": (Rows, NormalizeSpec),
    "normalized_distance": (Matrices, DistanceSpec),
    "masked_logsumexp": (Bank, Spec),
    "masked_hinge_sum": (Hinged, HingeSpec),
    "masked_argmax": (Search, ArgmaxSpec),
    "proxy_nca": (Proxied, ProxySpec),
    "magnet": (Clustered, MagnetSpec),
    "positive_pair_sum": (Pairs, PairSpec),
    "triplet_sum": (Points, TripletSpec),
}

"""Index tuples: triplets from a miner's pairs, random triplets, and weights of rows by how often they are listed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.checks import check_integer
from ..ops.contract import values_can_be_read
from .batch import Batch
from .class_ranges import ClassRanges
from .sets import IGNORE_INDEX


def check_per_anchor(value: int | str) -> int | str:
    """Checks the number of random triplets of each anchor: ``all``, or a positive integer."""
    if isinstance(value, str):
        if value != "all":
            raise ValueError(f"triplets_per_anchor must be 'all' or a positive integer; got {value!r}")
        return value
    return check_integer("triplets_per_anchor", value, 1)


def as_triplets(tuples: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The triplets (a, p, n) of a miner's tuple. Pairs form every triplet with a common anchor; O(triplets) memory."""
    if len(tuples) == 3:
        return tuples[0], tuples[1], tuples[2]
    a1, p, a2, n = tuples
    a2, order = a2.sort(stable=True)
    start = torch.searchsorted(a2, a1)
    many = torch.searchsorted(a2, a1, right=True) - start
    pair = torch.repeat_interleave(many)
    within = torch.arange(pair.numel(), device=pair.device) - (many.cumsum(0) - many)[pair]
    return a1[pair], p[pair], n[order[start[pair] + within]]


def random_triplets(batch: Batch, per_anchor: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets (a, p, n) of each anchor that has a positive and a negative, both drawn uniformly with replacement.

    This takes O(triplets + M) memory. The draws follow ``torch.manual_seed``; the numbers come from PyTorch's CPU
    generator, so they are the same on any device.

    Args:
        batch: a batch with labels on both sides.
        per_anchor: the number of triplets of each anchor; None: the number of bank entries of its class.
    """
    y, c = batch.y, batch.c
    if y is None or c is None:
        raise ValueError("labels are needed to draw triplets")
    order, start, end, own, positives, _ = ClassRanges.of(y, c, batch.exclude, IGNORE_INDEX)
    # The place of the row's own copy within its class; past the end if the copy is not there.
    at, others = torch.where(own[:, 0] < 0, end, own[:, 0]), (c != IGNORE_INDEX).sum() - (end - start)
    usable = (y != IGNORE_INDEX) & (positives > 0) & (others > 0)
    many = end - start if per_anchor is None else torch.full_like(start, per_anchor)
    a = torch.repeat_interleave(torch.where(usable, many, 0))
    p, n = start[a] + _drawn(positives[a]), _drawn(others[a])
    # Negatives are numbered in the sorted list without ignored labels, where the class itself is left out.
    by_label = c[order]
    used = by_label != IGNORE_INDEX
    before = torch.searchsorted(by_label[used], y[a])
    return a, order[p + (p >= at[a]).long()], order[used][torch.where(n < before, n, n + (end - start)[a])]


def _drawn(below: Tensor) -> Tensor:
    """A uniformly drawn number in [0, below) for each entry."""
    uniform = torch.rand(below.numel(), dtype=torch.float64).to(below.device)
    return (uniform * below).long().minimum(below - 1)


def anchors(tuples: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The anchors of a miner's tuple: a, or a1 and a2."""
    return tuples[:1] if len(tuples) == 3 else tuples[::2]


def without_own(own: Tensor | None, tuples: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tuple without positives that are copies of their anchor; ``own`` (N,) has the copies' places, or is None."""
    if own is None:
        return tuples
    keep = own[tuples[0]] != tuples[1]
    positives = 3 if len(tuples) == 3 else 2
    return (*(t[keep] for t in tuples[:positives]), *tuples[positives:])


def row_weights(tuples: tuple[Tensor, ...] | None, n: int, like: Tensor, anchors_alone: bool = False) -> Tensor | None:
    """(N,) fp64: the number of times that a miner's tuple lists each row, over the largest such number; None without a
    tuple, or for an empty one.

    Args:
        tuples: a miner's pairs or triplets, or None.
        n: the number N of rows.
        like: a tensor on the device of the result.
        anchors_alone: count rows only as anchors, as pytorch-metric-learning 2.9 does for its NCA losses.

    Raises:
        ValueError: an index outside [0, N).
    """
    if tuples is None or sum(t.numel() for t in tuples) == 0:
        return None
    index = torch.cat(tuples)
    if values_can_be_read(index) and not 0 <= int(index.min()) <= int(index.max()) < n:
        raise ValueError(f"indices_tuple must hold rows in [0, {n}); got {int(index.min())} to {int(index.max())}")
    if anchors_alone:
        index = torch.cat(anchors(tuples))
    count = torch.zeros(n, dtype=torch.float64, device=like.device)
    count = count.scatter_add(0, index, torch.ones_like(index, dtype=count.dtype))
    return count / count.max()

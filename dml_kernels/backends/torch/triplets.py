"""triplet_sum in plain PyTorch, forward and backward by hand, on any device: functional has the formula.

With the thresholds t_ip = s_ip - margin of a row's positives, a term is relu(s_in - t_ip). The positives are few and
are sorted. A negative needs only the number k_in of thresholds that it passes, and a threshold the number of negatives
that pass it:

    sum_i = sum_n k_in s_in - sum_p t_ip #{n: s_in > t_ip},    dS_in = k_in,    dS_ip = -#{n: s_in > t_ip}

All triplets therefore cost O(N M log K), from tiles of scores that are used once and not kept; sums are in fp64. With
``smooth`` or ``swap`` a term does not separate, so a tile is walked once for each positive, O(N M K).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...logspace import log1pexp
from ...ops.contract import accumulate_dtype
from ...ops.signatures import Points, TripletSpec
from ...pairs.class_ranges import ClassRanges
from ...pairs.sets import sets_of
from . import by_class, tiles
from .tiles import Gradients, Scores, Side

# Up to this number of positives a walk over them is faster than a binary search.
FEW = 48
# The number of 64-bit words, of 8 flags each, that are added up before their bytes are separated.
LANE = 128


class Thresholds(NamedTuple):
    """The positives of a block: thresholds t (R, P), +inf where not ``used``, and their places ``at`` in the block."""

    t: Tensor
    at: Tensor
    used: Tensor


class _Block:
    """A block of rows: the thresholds of its positives, and the tiles of the bank with its negatives."""

    def __init__(self, block: by_class.Block, points: Points, spec: TripletSpec):
        self.block, self.points, self.spec = block, points, spec
        self.y = points.y[block.rows]
        self.exclude = None if points.exclude is None else points.exclude[block.rows]
        self.a = Side.of(points.x[block.rows], spec.normalize, spec.eps, spec.dtype)
        # With swap the positives are compared with the negatives too.
        self.p = self._side(points.w[block.cols]) if spec.swap else None
        self.thresholds = self._thresholds()

    def _side(self, t: Tensor) -> Side:
        return Side.of(t, self.spec.normalize, self.spec.eps, self.spec.dtype)

    def pieces(self) -> Iterator[tuple[slice, Side, Scores]]:
        """Yields the entries of the block's classes with their scores, in pieces."""
        for k in self.block.pieces(self.points.x.size(1)):
            b = self._side(self.points.w[self.block.cols[k]])
            yield k, b, tiles.scores(self.a, b, self.spec.metric)

    def _thresholds(self) -> Thresholds:
        s = torch.cat([scores.s for _, _, scores in self.pieces()], 1)
        at, used = self.block.slots()
        t = s.gather(1, at).sub_(self.spec.margin).masked_fill_(~used, math.inf)
        if not (self.spec.smooth or self.spec.swap):
            t, order = t.sort(1)
            at, used = at.gather(1, order), used.gather(1, order)
        return Thresholds(t, at, used)

    def tiles(self) -> Iterator[tuple[slice, Side, Scores, Tensor]]:
        """Yields the bank in tiles: the entries, their side, their scores, and which pairs are not negatives."""
        m, d = self.points.w.shape
        rows = self.block.rows.numel() if self.p is None else max(self.block.rows.numel(), self.block.cols.numel())
        step = max(32, by_class.TILE // 2 // max(rows, d))
        step -= step % (8 * LANE) if step > 8 * LANE else 0
        for start in range(0, m, step):
            k = slice(start, min(start + step, m))
            b = self._side(self.points.w[k])
            masked = ~sets_of(self.y, self.points.c, self.exclude, self.spec.ignore_index, k).different
            yield k, b, tiles.scores(self.a, b, self.spec.metric), masked

    def passed(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C) how many thresholds each negative passes, and (R, P) how many negatives pass each threshold."""
        t = self.thresholds.t
        r, p = t.shape
        if p <= FEW:
            k, by_threshold = torch.zeros(s.shape, dtype=torch.uint8, device=s.device), []
            for column in t.unbind(1):
                over = s > column[:, None]
                k += over
                by_threshold.append(_row_counts(over))
            return k, torch.stack(by_threshold, 1)
        k = torch.searchsorted(t, s, out_int32=True)
        bins = k + torch.arange(r, device=s.device, dtype=torch.int32)[:, None] * (p + 1)
        fewer = torch.bincount(bins.view(-1), minlength=r * (p + 1)).view(r, p + 1).cumsum_(1)
        return k, fewer[:, -1:] - fewer[:, :-1]

    def swapped(self, b: Side) -> Scores | None:
        """(Q, C): the scores of the block's positives with the entries of a tile."""
        return None if self.p is None else tiles.scores(self.p, b, self.spec.metric)

    def violation(self, s: Tensor, other: Tensor | None, slot: int) -> tuple[Tensor, Tensor | None]:
        """s_n - t for each row's positive in one slot, -inf for an empty slot; with swap also s_pn."""
        t = self.thresholds.t[:, slot, None]
        if other is None:
            return s - t, None
        pn = other[self.thresholds.at[:, slot]]
        return torch.maximum(s, pn.masked_fill_(s == -math.inf, -math.inf)).sub_(t), pn


def _row_counts(over: Tensor) -> Tensor:
    """(R,) int64: the number of True in each row of a bool tile, read eight bytes at a time where its width allows."""
    r, c = over.shape
    if c % (8 * LANE) or not over.is_contiguous():
        return over.sum(1)
    eights = over.view(torch.int64).view(r, -1, LANE).sum(2)  # no byte of a sum exceeds 255
    return eights.view(torch.uint8).view(r, -1).sum(1)


def _kept(ranges: ClassRanges) -> Tensor:
    return (ranges.positives > 0) & (ranges.negatives > 0)


def triplet_sum_fwd(points: Points, spec: TripletSpec) -> tuple[Tensor, Tensor, Tensor]:
    """For each anchor: the sum, the number of triplets, and the number of terms above 0."""
    ranges = ClassRanges.of(points.y, points.c, points.exclude, spec.ignore_index)
    total, active = points.x.new_zeros(points.x.size(0), dtype=torch.float64), torch.zeros_like(points.y)
    one_by_one = spec.smooth or spec.swap
    for block in by_class.blocks(ranges, _kept(ranges)):
        work = _Block(block, points, spec)
        total[block.rows], active[block.rows] = (_walked if one_by_one else _separated)(work)
    return total.to(accumulate_dtype(spec.dtype)), ranges.positives * ranges.negatives, active


def _separated(work: _Block) -> tuple[Tensor, Tensor]:
    # Scores are taken relative to the lowest threshold, so that k s and t n are not large numbers that cancel.
    t, used = work.thresholds.t, work.thresholds.used
    lowest = t[:, :1]
    over = torch.where(used, t - lowest, 0).double()
    total, count = over.sum(1) * 0, torch.zeros(t.shape, dtype=torch.int64, device=t.device)  # NaN stays
    for _, _, scores, masked in work.tiles():
        s = scores.s.masked_fill_(masked, -math.inf)
        k, by_threshold = work.passed(s)
        count += by_threshold
        total += s.sub_(lowest).clamp_min_(0).mul_(k).sum(1, dtype=torch.float64)
    return total - (over * count).sum(1), count.sum(1)


def _walked(work: _Block) -> tuple[Tensor, Tensor]:
    t = work.thresholds.t
    total = torch.where(work.thresholds.used, t, 0).sum(1).double() * 0
    active = torch.zeros(t.size(0), dtype=torch.int64, device=t.device)
    for _, b, scores, masked in work.tiles():
        s = scores.s.masked_fill_(masked, -math.inf)
        other = work.swapped(b)
        for slot in range(t.size(1)):
            value, _ = work.violation(s, None if other is None else other.s, slot)
            value = log1pexp(value) if work.spec.smooth else value.clamp_min_(0)
            total += value.sum(1, dtype=torch.float64)
            active += (value > 0).sum(1)
    return total, active


def triplet_sum_bwd(grad: Tensor, needs: list[bool], points: Points, spec: TripletSpec) -> tuple[Tensor | None, ...]:
    """The gradients of <grad, total> in x and w."""
    ranges = ClassRanges.of(points.y, points.c, points.exclude, spec.ignore_index)
    acc = accumulate_dtype(spec.dtype)
    g_x, g_w = (
        torch.zeros_like(t, dtype=acc, memory_format=torch.contiguous_format) if need else None
        for t, need in zip((points.x, points.w), needs, strict=True)
    )
    for block in by_class.blocks(ranges, _kept(ranges) & (grad != 0)):
        work = _Block(block, points, spec)
        collect = Gradients(work.a, spec.metric, needs[0], needs[1])
        g = grad[block.rows].to(acc)[:, None]
        backward = _walked_bwd if spec.smooth or spec.swap else _separated_bwd
        dt = backward(work, g, collect, g_w)
        _positives_bwd(work, dt, collect, g_w)
        if g_x is not None:
            g_x[block.rows] = collect.finish()
    return tuple(None if g is None else g.to(t.dtype) for g, t in zip((g_x, g_w), (points.x, points.w)))


def _separated_bwd(work: _Block, g: Tensor, collect: Gradients, g_w: Tensor | None) -> Tensor:
    count = torch.zeros(work.thresholds.t.shape, dtype=torch.int64, device=g.device)
    for k, b, scores, masked in work.tiles():
        passed, by_threshold = work.passed(scores.s.masked_fill(masked, -math.inf))
        count += by_threshold
        part = collect.chunk(b, scores, passed * g)
        if g_w is not None:
            g_w[k] += part
    return count * -g


def _walked_bwd(work: _Block, g: Tensor, collect: Gradients, g_w: Tensor | None) -> Tensor:
    t = work.thresholds.t
    dt = torch.zeros_like(t)
    swap = None if work.p is None else Gradients(work.p, work.spec.metric, g_w is not None, g_w is not None)
    for k, b, scores, masked in work.tiles():
        s = scores.s.masked_fill(masked, -math.inf)
        other = work.swapped(b)
        ds, d_other = torch.zeros_like(s), None if other is None else torch.zeros_like(other.s)
        for slot in range(t.size(1)):
            value, pn = work.violation(s, None if other is None else other.s, slot)
            dv = (torch.sigmoid(value) if work.spec.smooth else (value > 0).to(s.dtype)).mul_(g)
            dt[:, slot] -= dv.sum(1)
            if d_other is not None:
                # The larger of the two scores takes the gradient; equal ones share it.
                theirs = dv * torch.where(pn == s, 0.5, (pn > s).to(s.dtype))
                d_other.index_add_(0, work.thresholds.at[:, slot], theirs)
                dv -= theirs
            ds += dv
        part = collect.chunk(b, scores, ds)
        if g_w is not None:
            g_w[k] += part
            if swap is not None:
                g_w[k] += swap.chunk(b, other, d_other)
    if swap is not None and g_w is not None:
        g_w[work.block.cols] += swap.finish()
    return dt


def _positives_bwd(work: _Block, dt: Tensor, collect: Gradients, g_w: Tensor | None) -> None:
    """Adds the gradient of the thresholds at the places of their scores."""
    r, q = work.block.rows.numel(), work.block.cols.numel()
    dt = torch.where(work.thresholds.used, dt, 0)
    ds = dt.new_zeros((r, q)).scatter_add_(1, work.thresholds.at, dt)
    for k, b, scores in work.pieces():
        part = collect.chunk(b, scores, ds[:, k].contiguous())
        if g_w is not None:
            g_w[work.block.cols[k]] += part

"""Positives by class: the bank is sorted by label once, then blocks of rows meet the few entries of their classes.

Rows of one class share its entries, and rows in the order of their classes share most of the entries of a block. The
positives of a block are therefore a small dense tile and a mask. There is no list of pairs and nothing N x M, even
where one class holds every row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...pairs.class_ranges import ClassRanges
from ...pairs.sets import left_out

# The most entries in the tile of a block; several buffers of that size are alive at once. The tile of the block's
# classes has half as many, because the counts and places of its entries take 8 bytes each.
TILE = 1 << 19
# The rows of a block share the entries of all its classes, so with more rows more of the tile is masked out.
MOST_ROWS = 256


class Block(NamedTuple):
    """Some rows and the bank entries of their classes; row r's class is at places lo[r] to hi[r] of ``cols``.

    Args:
        rows: (R,) row indices.
        cols: (Q,) bank indices, each once.
        lo, hi: (R,) the range of the row's class in ``cols``.
        own: (R, E) the places in ``cols`` that are left out, or -1.
    """

    rows: Tensor
    cols: Tensor
    lo: Tensor
    hi: Tensor
    own: Tensor

    def pieces(self, width: int) -> Iterator[slice]:
        """Yields the entries in parts so small that the tile and a gathered copy of their vectors stay bounded."""
        step = max(32, TILE // max(self.rows.numel(), width))
        for at in range(0, self.cols.numel(), step):
            yield slice(at, min(at + step, self.cols.numel()))

    def mask(self, k: slice) -> Tensor:
        """(R, piece) bool: the pairs that are positives."""
        at = torch.arange(k.start, k.stop, device=self.lo.device)
        return (at >= self.lo[:, None]) & (at < self.hi[:, None]) & ~left_out(self.own, at)

    def slots(self) -> tuple[Tensor, Tensor]:
        """(R, P): each row's positives as places in ``cols``, and which slots hold one; the largest class has P."""
        most = int((self.hi - self.lo).max())
        at = self.lo[:, None] + torch.arange(most, device=self.lo.device)
        used = (at < self.hi[:, None]) & ~left_out(self.own, at)
        return at.clamp_max(self.cols.numel() - 1), used


def blocks(ranges: ClassRanges, keep: Tensor) -> Iterator[Block]:
    """Yields the rows of ``keep`` (N,) bool by class, in blocks of one row, or of at most TILE / 2 pairs with their
    classes.
    """
    rows = keep.nonzero().squeeze(1)
    rows = rows[torch.argsort(ranges.start[rows], stable=True)]
    starts, counts = torch.unique_consecutive(ranges.start[rows], return_counts=True)
    stops = ranges.stop[rows][counts.cumsum(0) - 1]
    groups = zip(starts.tolist(), stops.tolist(), counts.tolist())
    done = 0
    for parts in _share_out(groups):
        n = sum(part[2] for part in parts)
        yield _block(ranges, rows[done : done + n], parts)
        done += n


def _share_out(groups: Iterator[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Groups classes (start, stop, rows) into blocks; a class with many rows is spread over several blocks."""
    parts: list[tuple[int, int, int]] = []
    r, q = 0, 0
    for start, stop, n in groups:
        while n:
            take = min(n, MOST_ROWS - r, TILE // 2 // (q + stop - start) - r)
            if take <= 0 and parts:
                yield parts
                parts, r, q = [], 0, 0
                continue
            take = max(take, 1)
            parts.append((start, stop, take))
            r, q, n = r + take, q + stop - start, n - take
    if parts:
        yield parts


def _block(ranges: ClassRanges, rows: Tensor, parts: list[tuple[int, int, int]]) -> Block:
    shifts, q = [], 0
    spans: list[list[int]] = []
    for start, stop, _ in parts:
        shifts.append(q - start)
        q += stop - start
        if spans and spans[-1][1] == start:
            spans[-1][1] = stop  # the next class of the bank continues the slice
        else:
            spans.append([start, stop])
    cols = torch.cat([ranges.order[a:b] for a, b in spans])
    device = rows.device
    counts = torch.tensor([part[2] for part in parts], device=device)
    shift = torch.tensor(shifts, device=device).repeat_interleave(counts)
    own = ranges.own[rows]
    own = torch.where(own < 0, -1, own + shift[:, None])
    return Block(rows, cols, ranges.start[rows] + shift, ranges.stop[rows] + shift, own)

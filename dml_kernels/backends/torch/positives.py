"""positive_pair_sum in plain PyTorch, forward and backward by hand, on any device: functional has the formulas.

The scores of a block of rows with the entries of their classes are one small product; its terms are masked and summed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.contract import accumulate_dtype
from ...ops.signatures import Pairs, PairSpec
from ...pairs import dense
from ...pairs.class_ranges import ClassRanges
from . import by_class, tiles
from .tiles import Gradients, Scores, Side


class Partials(NamedTuple):
    """The derivatives of the terms of a piece in s, u and v."""

    s: Tensor
    u: Tensor
    v: Tensor | None


def partials(s: Tensor, u: Tensor, v: Tensor | None, spec: PairSpec) -> Partials:
    """The derivatives of the term in s, u and v."""
    if spec.kind == "softplus":
        p = torch.sigmoid(u - spec.params[0] * s)
        return Partials(-spec.params[0] * p, p, None)
    joint = torch.logaddexp(u, v)
    joint.masked_fill_(joint == -math.inf, 0)
    h = torch.relu(joint - spec.params[0] * s - spec.params[1])
    return Partials(-spec.params[0] * h, h * torch.exp(u - joint), h * torch.exp(v - joint))


class Piece(NamedTuple):
    """Some entries of a block: their indices, vectors and scores, which pairs are positives, and their u and v."""

    cols: Tensor
    b: Side
    scores: Scores
    mask: Tensor
    u: Tensor
    v: Tensor | None


def _pieces(block: by_class.Block, a: Side, pairs: Pairs, spec: PairSpec):
    acc = a.full.dtype
    u = pairs.u[block.rows].to(acc)[:, None]
    for k in block.pieces(pairs.x.size(1)):
        cols = block.cols[k]
        b = Side.of(pairs.w[cols], spec.normalize, spec.eps, spec.dtype)
        v = None if pairs.v is None else pairs.v[cols].to(acc)
        yield Piece(cols, b, tiles.scores(a, b, spec.metric), block.mask(k), u, v)


def positive_pair_sum_fwd(pairs: Pairs, spec: PairSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's sum, number of positives, and number of terms over 0."""
    ranges = ClassRanges.of(pairs.y, pairs.c, pairs.exclude, spec.ignore_index)
    n = pairs.x.size(0)
    total, active = pairs.x.new_zeros(n, dtype=torch.float64), torch.zeros_like(pairs.y)
    for block in by_class.blocks(ranges, ranges.positives > 0):
        a = Side.of(pairs.x[block.rows], spec.normalize, spec.eps, spec.dtype)
        for piece in _pieces(block, a, pairs, spec):
            value = dense.term(piece.scores.s, piece.u, piece.v, spec.kind, spec.params).masked_fill_(~piece.mask, 0)
            total[block.rows] += value.sum(1, dtype=torch.float64)
            active[block.rows] += (value > 0).sum(1)
    return total.to(accumulate_dtype(spec.dtype)), ranges.positives, active


def positive_pair_sum_bwd(grad: Tensor, needs: list[bool], pairs: Pairs, spec: PairSpec) -> tuple[Tensor | None, ...]:
    """The gradients of <grad, total> in x, w, u and v."""
    ranges = ClassRanges.of(pairs.y, pairs.c, pairs.exclude, spec.ignore_index)
    acc, need_points = accumulate_dtype(spec.dtype), needs[0] or needs[1]
    g_x, g_w, g_u, g_v = (
        torch.zeros_like(t, dtype=acc, memory_format=torch.contiguous_format) if need and t is not None else None
        for t, need in zip((pairs.x, pairs.w, pairs.u, pairs.v), needs, strict=True)
    )
    for block in by_class.blocks(ranges, (ranges.positives > 0) & (grad != 0)):
        a = Side.of(pairs.x[block.rows], spec.normalize, spec.eps, spec.dtype)
        collect = Gradients(a, spec.metric, g_x is not None, g_w is not None)
        g = grad[block.rows].to(acc)[:, None]
        for piece in _pieces(block, a, pairs, spec):
            found = partials(piece.scores.s, piece.u, piece.v, spec)
            ds, du, dv = (None if t is None else (t * g).masked_fill_(~piece.mask, 0) for t in found)
            if g_u is not None:
                g_u[block.rows] += du.sum(1)
            if g_v is not None:
                g_v[piece.cols] += dv.sum(0)  # an entry occurs once in a piece, so no two terms add to one place
            if need_points:
                part = collect.chunk(piece.b, piece.scores, ds)
                if g_w is not None:
                    g_w[piece.cols] += part
        if g_x is not None:
            g_x[block.rows] = collect.finish()
    return tuple(
        None if g is None else g.to(t.dtype) for g, t in zip((g_x, g_w, g_u, g_v), (pairs.x, pairs.w, pairs.u, pairs.v))
    )

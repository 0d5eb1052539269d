"""masked_hinge_sum on the ``torch`` backend: forward, backward and double backward over bank chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.contract import accumulate_dtype
from ...pairs.sets import Sets, sets_of
from . import tiles
from .double import Tangents


def positive_scores(inputs, spec) -> Tensor:
    """s_{i, y_i} (N,) in the accumulation dtype, from bank rows gathered one block at a time. The scores of ignored
    rows mean nothing.
    """
    n, d = inputs.x.shape
    out = inputs.x.new_empty(n, dtype=accumulate_dtype(spec.dtype))
    positive = inputs.y.clamp(0, inputs.w.size(0) - 1)
    step = max(1, tiles.CHUNK_ELEMENTS // d)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        x, w = (t.to(out.dtype) for t in (inputs.x[rows], inputs.w[positive[rows]]))
        out[rows] = tiles.listed_scores(x, w, spec.metric, spec.normalize, spec.eps)
    return out


def _active(s: Tensor, k: float, offset: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """k s + offset, and where it is positive in the set. NaN counts as positive, so that it shows in the sum."""
    z = torch.add(offset[:, None], s, alpha=k)
    return z, member & ~(z <= 0)


def masked_hinge_sum_fwd(lines, spec) -> tuple[Tensor, ...]:
    rows = tiles.Side.of(lines.x, spec.normalize, spec.eps, spec.dtype)
    n = lines.x.size(0)
    sums = [rows.full.new_zeros(n) for _ in range(2)]
    counts = [rows.full.new_zeros(n, dtype=torch.int64) for _ in range(2)]
    for chunk in tiles.chunks(n, *lines.w.shape):
        s = tiles.scores(rows, tiles.Side.of(lines.w[chunk], spec.normalize, spec.eps, spec.dtype), spec.metric).s
        sets = sets_of(*lines[2:5], spec.ignore_index, chunk, spec.first_class)
        for i in range(2):
            z, active = _active(s, lines.k[i], lines.offset[i], sets[i])
            sums[i] += z.masked_fill_(~active, 0).sum(1)
            counts[i] += active.sum(1)
    return (*sums, *counts)


def _weights(s: Tensor, sets: Sets, slopes, lines) -> tuple[Tensor, list[Tensor]]:
    """The gradient on each score of a chunk, and where each set's terms are positive."""
    active = [_active(s, lines.k[i], lines.offset[i], sets[i])[1] for i in range(2)]
    ds = torch.where(active[0], slopes.same[:, None], torch.where(active[1], slopes.different[:, None], 0))
    if slopes.positive is not None:
        ds = torch.where(sets.labelled, slopes.positive[:, None], ds)
    return ds, active


def masked_hinge_sum_bwd(slopes, needs, lines, spec) -> tuple[Tensor | None, Tensor | None]:
    rows = tiles.Side.of(lines.x, spec.normalize, spec.eps, spec.dtype)
    collect = tiles.Gradients(rows, spec.metric, *needs)
    grad_w = torch.empty_like(lines.w, memory_format=torch.contiguous_format) if needs[1] else None
    for chunk in tiles.chunks(lines.x.size(0), *lines.w.shape):
        b = tiles.Side.of(lines.w[chunk], spec.normalize, spec.eps, spec.dtype)
        scores = tiles.scores(rows, b, spec.metric)
        ds, _ = _weights(scores.s, sets_of(*lines[2:5], spec.ignore_index, chunk, spec.first_class), slopes, lines)
        part = collect.chunk(b, scores, ds)
        if grad_w is not None:
            grad_w[chunk] = part.to(grad_w.dtype)
    grad_x = collect.finish()
    return None if grad_x is None else grad_x.to(lines.x.dtype), grad_w


def masked_hinge_sum_dbl(directions, slopes, lines, counts, spec) -> tuple[list[Tensor], Tensor, Tensor]:
    """The gradients of Phi in the incoming gradients of both sets, in x and in w.

    Phi = sum_ij ds_ij s'_ij, where s' is the derivative of the scores along the directions. Apart from the incoming
    gradient in it, ds is constant.
    """
    v_x, v_w = directions
    tangents = Tangents(lines.x, v_x, spec.metric, spec.normalize, spec.eps, spec.dtype)
    along = [tangents.x.new_zeros(lines.x.size(0)) for _ in range(2)]
    d_w = torch.empty_like(lines.w, memory_format=torch.contiguous_format)
    for chunk in tiles.chunks(lines.x.size(0), *lines.w.shape):
        step = tangents.chunk(lines.w[chunk], v_w[chunk] if v_w.numel() else None)
        sets = sets_of(*lines[2:5], spec.ignore_index, chunk, spec.first_class)
        ds, active = _weights(step.s, sets, slopes, lines)
        for i in range(2):
            along[i] += lines.k[i] * torch.where(active[i], step.ds, 0).sum(1)
        if slopes.positive is not None:
            along[1] -= lines.k[1] * counts[1] * torch.where(sets.labelled, step.ds, 0).sum(1)
        d_w[chunk] = tangents.pull_back(step, None, ds).to(d_w.dtype)
    return along, tangents.finish().to(lines.x.dtype), d_w

"""pair_scores in plain PyTorch: a block of pairs at a time, with a backward that adds in a fixed order.

With unit vectors (where normalised) u of x and p of w, and the pair's slope a, the gradient on u of one pair is::

    dot  a p, a = g        sqeuclidean  a (p - u), a = 2 g        euclidean  a (p - u), a = g / |u - p|, 0 at distance 0

and the same for the bank with u and p exchanged. The pairs are sorted by row, the pairs of a row are added up from
first to last, and the sum goes through the normalisation once. Differences are computed before they are weighted, so
that close pairs keep their direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import segments
from ...ops.signatures import Listed, ScoresSpec
from . import normalize, tiles


def _picked(t: Tensor, index: Tensor, spec: ScoresSpec) -> tuple[Tensor, Tensor | float]:
    """The rows at ``index`` as stored, and the factor that makes them unit vectors if the spec asks for these."""
    t = t.index_select(0, index).to(spec.dtype)
    return t, tiles.norms(t, spec.eps)[0] if spec.normalize else 1.0


def slope(grad: Tensor, s: Tensor, metric: str) -> Tensor:
    """a, the factor of p - u (or p), from the gradient on a score."""
    if metric == "euclidean":
        return torch.where(s == 0, 0, -grad / torch.where(s == 0, 1, s))
    return grad if metric == "dot" else 2 * grad


def pair_scores_fwd(pairs: Listed, spec: ScoresSpec) -> Tensor:
    x, w, rows, cols = pairs
    step = max(1, tiles.CHUNK_ELEMENTS // x.size(1))
    out = x.new_empty(rows.numel(), dtype=spec.dtype)
    for k in (slice(start, start + step) for start in range(0, rows.numel(), step)):
        u, p = (t.index_select(0, i[k]).to(spec.dtype) for t, i in ((x, rows), (w, cols)))
        out[k] = tiles.listed_scores(u, p, spec.metric, spec.normalize, spec.eps)
    return out


def _collect(this: Tensor, other: Tensor, at: Tensor, other_at: Tensor, a: Tensor, spec: ScoresSpec) -> Tensor:
    """The gradient in ``this``, whose rows ``at`` are paired with the rows ``other_at`` of ``other``."""
    order = at.argsort(stable=True)
    at, other_at, a = at[order], other_at[order], a[order]
    n, d = this.shape
    total = this.new_zeros((n, d), dtype=spec.dtype)
    step = max(n, tiles.CHUNK_ELEMENTS // d, 1)  # each block adds n sums, so it should have at least n pairs
    for k in (slice(start, start + step) for start in range(0, at.numel(), step)):
        p, rp = _picked(other, other_at[k], spec)
        if spec.metric == "dot":
            part = p * rp
        else:
            u, ru = _picked(this, at[k], spec)
            part = tiles.difference(p, u, rp, ru)
        part = part * a[k, None]
        places = torch.arange(part.size(0), device=at.device)
        total += torch.nn.functional.embedding_bag(places, part, segments.offsets(at[k], n)[:-1], mode="sum")
    return normalize.backward(total, this, spec.eps) if spec.normalize else total.to(this.dtype)


def pair_scores_bwd(grad, s, needs, pairs: Listed, spec: ScoresSpec) -> list[Tensor | None]:
    x, w, rows, cols = pairs
    a = slope(grad.to(s.dtype), s, spec.metric)
    sides = ((x, w, rows, cols), (w, x, cols, rows))
    return [_collect(*side, a, spec) if need else None for side, need in zip(sides, needs, strict=True)]


def pair_scores_differentiable_bwd(grad: Tensor, pairs: Listed, spec: ScoresSpec) -> tuple[Tensor, Tensor]:
    """The gradients of both sides by differentiable PyTorch functions, for a second derivative; O(P D) memory."""
    x, w, rows, cols = pairs
    metric, normalize, eps, dtype = spec

    def unit(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r, over = tiles.norms(t.to(dtype), eps) if normalize else (t.new_ones((), dtype=dtype), None)
        return t.to(dtype) * r, r, over

    def back(g: Tensor, u: Tensor, r: Tensor, over: Tensor | None) -> Tensor:
        return r * (g if over is None else torch.where(over, g - u * (u * g).sum(1, keepdim=True), g))

    (u, *of_u), (p, *of_p) = unit(x), unit(w)
    a_row, a_col = u.index_select(0, rows), p.index_select(0, cols)
    s = grad  # used only for the slope of a root
    if metric == "euclidean":
        d2 = (a_row - a_col).square().sum(1)
        # The norms of equal rows may differ in the last bits.
        zero = (d2 == 0) | (x.index_select(0, rows) == w.index_select(0, cols)).all(1)
        s = torch.where(zero, 0, -torch.where(zero, 1, d2).sqrt())
    a = slope(grad.to(dtype), s, metric)[:, None]
    on_row, on_col = (a_col, a_row) if metric == "dot" else (a_col - a_row, a_row - a_col)
    g_u, g_p = (torch.zeros_like(t).index_add(0, i, a * on) for t, i, on in ((u, rows, on_row), (p, cols, on_col)))
    return back(g_u, u, *of_u).to(x.dtype), back(g_p, p, *of_p).to(w.dtype)

"""pair_scores: the scores of listed pairs, a block of pairs at a time, with a backward that adds in a fixed order.

With unit vectors (where normalised) u of x and p of w, and the pair's slope a, the gradient on u of one pair is::

    dot  a p, a = g        sqeuclidean  a (p - u), a = 2 g        euclidean  a (p - u), a = g / |u - p|, 0 at distance 0

and the same with u and p exchanged for the bank. The pairs are sorted by their row, each row's are added up from first
to last, and the sum goes once through the normalisation. Differences are taken before they are weighted, so that close
pairs keep their direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..torch_backend import normalize_bwd, tiles
from . import segments
from .contract import accumulate_dtype, check_pair_indices
from .library import filled, gradients_like, known_signature, register, without_autocast

_PAIRS = "Tensor x, Tensor w, Tensor rows, Tensor cols"
_SPEC = "str metric, bool normalize, float eps, ScalarType dtype"


def _picked(t: Tensor, index: Tensor, normalize: bool, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """The rows at ``index`` as they came, and what makes unit vectors of them where that is wanted."""
    t = t.index_select(0, index).to(dtype)
    return t, tiles.norms(t, eps)[0] if normalize else 1.0


def _slope(grad: Tensor, s: Tensor, metric: str) -> Tensor:
    """a: the gradient on a score, to the factor of p - u (or p)."""
    if metric == "euclidean":
        return torch.where(s == 0, 0, -grad / torch.where(s == 0, 1, s))
    return grad if metric == "dot" else 2 * grad


def _fwd(x, w, rows, cols, metric, normalize, eps, dtype) -> Tensor:
    check_pair_indices(rows, cols, x.size(0), w.size(0))
    step = max(1, tiles.CHUNK_ELEMENTS // x.size(1))
    out = x.new_empty(rows.numel(), dtype=dtype)
    with without_autocast(x.device.type):
        for k in (slice(start, start + step) for start in range(0, rows.numel(), step)):
            u, p = (t.index_select(0, i[k]).to(dtype) for t, i in ((x, rows), (w, cols)))
            out[k] = tiles.listed_scores(u, p, metric, normalize, eps)
    return out


def _collect(own: Tensor, other: Tensor, at: Tensor, other_at: Tensor, a: Tensor, spec) -> Tensor:
    """The gradient of one side: rows ``at`` of ``own`` against rows ``other_at`` of ``other``."""
    metric, normalize, eps, dtype = spec
    order = at.argsort(stable=True)
    at, other_at, a = at[order], other_at[order], a[order]
    n, d = own.shape
    total = own.new_zeros((n, d), dtype=dtype)
    step = max(n, tiles.CHUNK_ELEMENTS // d, 1)  # each block adds n sums: as many pairs or more
    for k in (slice(start, start + step) for start in range(0, at.numel(), step)):
        p, rp = _picked(other, other_at[k], normalize, eps, dtype)
        if metric == "dot":
            part = p * rp
        else:
            u, ru = _picked(own, at[k], normalize, eps, dtype)
            part = tiles.difference(p, u, rp, ru)
        part = part * a[k, None]
        places = torch.arange(part.size(0), device=at.device)
        total += torch.nn.functional.embedding_bag(places, part, segments.offsets(at[k], n)[:-1], mode="sum")
    return normalize_bwd(total, own, eps) if normalize else total.to(own.dtype)


def _bwd(grad, s, x, w, rows, cols, needs, *spec) -> tuple[Tensor, ...]:
    with without_autocast(x.device.type):
        a = _slope(grad.to(s.dtype), s, spec[0])
        sides = ((x, w, rows, cols), (w, x, cols, rows))
        found = (_collect(*side, a, spec) if need else None for side, need in zip(sides, needs, strict=True))
        return filled(found, x, 2)


def _bwd_fake(grad, s, x, w, rows, cols, needs, *spec) -> tuple[Tensor, ...]:
    return gradients_like((x, w), needs, x)


fwd = register(
    "pair_scores_fwd", f"({_PAIRS}, {_SPEC}) -> Tensor", _fwd,
    lambda x, w, rows, cols, metric, normalize, eps, dtype: x.new_empty(rows.numel(), dtype=dtype),
)  # fmt: skip
bwd = register(
    "pair_scores_bwd", f"(Tensor grad, Tensor s, {_PAIRS}, bool[] needs, {_SPEC}) -> (Tensor, Tensor)", _bwd, _bwd_fake
)


def _differentiable_bwd(grad, x, w, rows, cols, metric, normalize, eps, dtype) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's own differentiable functions, for whoever differentiates again; O(P D) memory."""

    def unit(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r, over = tiles.norms(t.to(dtype), eps) if normalize else (t.new_ones((), dtype=dtype), None)
        return t.to(dtype) * r, r, over

    def back(g: Tensor, u: Tensor, r: Tensor, over: Tensor | None) -> Tensor:
        return r * (g if over is None else torch.where(over, g - u * (u * g).sum(1, keepdim=True), g))

    (u, *of_u), (p, *of_p) = unit(x), unit(w)
    a_row, a_col = u.index_select(0, rows), p.index_select(0, cols)
    s = grad  # not read but for a root's slope
    if metric == "euclidean":
        d2 = (a_row - a_col).square().sum(1)
        # Equal rows may have norms that differ in the last bits.
        zero = (d2 == 0) | (x.index_select(0, rows) == w.index_select(0, cols)).all(1)
        s = torch.where(zero, 0, -torch.where(zero, 1, d2).sqrt())
    a = _slope(grad.to(dtype), s, metric)[:, None]
    on_row, on_col = (a_col, a_row) if metric == "dot" else (a_col - a_row, a_row - a_col)
    g_u, g_p = (torch.zeros_like(t).index_add(0, i, a * on) for t, i, on in ((u, rows, on_row), (p, cols, on_col)))
    return back(g_u, u, *of_u).to(x.dtype), back(g_p, p, *of_p).to(w.dtype)


@known_signature
class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, rows, cols, metric, normalize, eps, dtype):
        return fwd(x, w, rows, cols, metric, normalize, eps, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4], output)
        ctx.spec = inputs[4:]

    @staticmethod
    def backward(ctx, grad):
        x, w, rows, cols, s = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        if torch.is_grad_enabled():
            g_x, g_w = _differentiable_bwd(grad, x, w, rows, cols, *ctx.spec)
        else:
            g_x, g_w = bwd(grad, s, x, w, rows, cols, needs, *ctx.spec)
        return g_x if needs[0] else None, g_w if needs[1] else None, *(None,) * 6


def pair_scores(
    x: Tensor, w: Tensor, rows: Tensor, cols: Tensor, metric: str, normalize: bool, eps: float, dtype: torch.dtype
) -> Tensor:
    """For checked arguments; see functional.pair_scores."""
    return _Forward.apply(x, w, rows, cols, metric, normalize, eps, accumulate_dtype(dtype))

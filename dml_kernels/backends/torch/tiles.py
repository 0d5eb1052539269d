"""Rows compared with chunks of the bank: the scores of a chunk, and the gradients from a gradient on these scores.

The raw product x.w is the only N x chunk matrix product; norms enter as row and column scales. With r = 1/|x| on each
side and E = dS r_i r_j (the gradient of the raw product), normalisation differentiates to dx_i = P_i (sum_j E_ij w_j),
P_i = I - x^_i x^_i^T, and likewise for w: no normalised copy of either is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.contract import accumulate_dtype

CHUNK_ELEMENTS = 1 << 19
# Below this share of |u|^2 + |p|^2 a squared distance is computed from differences: the expansion has cancelled 4 bits.
NEAR = 1.0 / 16


def norms(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """r = 1 / max(|x|, eps) as (N, 1) in the accumulation dtype, and whether the projection applies (|x| >= eps)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulate_dtype(x.dtype))
    return 1 / norm.clamp_min(eps), norm >= eps


class Side(NamedTuple):
    """Rows (or one bank chunk) ready for products: t in the product dtype, the original vectors, and their norms.

    Products are in fp16 only for vectors that are stored in fp16, and only on a GPU, which accumulates them in fp32.
    All else is in fp32: fp16 rounds an fp32 vector of norm 1e-6 to 0, and fp16 weights of the scores would need one
    lift that suits all of them, where one large row would leave too little for the others.
    """

    t: Tensor  # (n, D) factor of the products that give scores
    full: Tensor  # (n, D) the vectors in the accumulation dtype
    r: Tensor  # (n,) 1 / max(|t|, eps), or 1 where nothing is normalised
    unit: Tensor  # (n,) bool: the row was divided by its norm, not by eps
    sq: Tensor  # (n,) squared norm after scaling by r

    @staticmethod
    def of(t: Tensor, normalize: bool, eps: float, dtype: torch.dtype) -> Side:
        full = t.to(accumulate_dtype(dtype))
        if normalize:
            r, unit = (v.squeeze(-1) for v in norms(full, eps))
        else:
            r = full.new_ones(full.size(0))
            unit = torch.zeros_like(r, dtype=torch.bool)
        if dtype == torch.float16 and not (t.is_cuda and t.dtype == dtype):
            dtype = full.dtype
        return Side(t.to(dtype), full, r, unit, (full * r[:, None]).square().sum(-1))

    @property
    def weighed(self) -> Tensor:
        """(n, D) factor of the products that give gradients; the other factor, E, has the same dtype."""
        return self.full if self.t.dtype == torch.float16 else self.t

    def project(self, grad: Tensor) -> Tensor:
        """P grad for the rows that are unit vectors, grad for the others; in place."""
        u = self.full * self.r[:, None]
        return grad.sub_(u * torch.where(self.unit, (u * grad).sum(-1), 0)[:, None])


def chunks(n: int, m: int, d: int, centres: int = 1) -> Iterator[slice]:
    """The bank rows of each chunk, which holds whole classes of ``centres`` rows."""
    step = max(32 // centres, CHUNK_ELEMENTS // max(n, d) // centres, 1) * centres
    for start in range(0, m, step):
        yield slice(start, min(start + step, m))


def mm(a: Tensor, b: Tensor, acc: torch.dtype) -> Tensor:
    """a @ b in the accumulation dtype, which the tensor cores write directly where PyTorch offers that."""
    if a.dtype != b.dtype:
        a, b = a.to(acc), b.to(acc)
    if a.dtype == acc:
        return a @ b
    return torch.mm(a, b, out_dtype=acc) if a.is_cuda and acc == torch.float32 else (a @ b).to(acc)


class Scores(NamedTuple):
    s: Tensor  # (N, chunk) score
    near: Tensor | None  # flat places, row by row, of the distances that were taken from differences


def scores(a: Side, b: Side, metric: str) -> Scores:
    """s_ij of one chunk; squared distances never cancel: small ones are summed from differences."""
    s = mm(a.t, b.t.T, a.full.dtype).mul_(a.r[:, None]).mul_(b.r)
    if metric == "dot":
        return Scores(s, None)
    span = a.sq[:, None] + b.sq
    d2 = torch.sub(span, s, alpha=2)
    near = (d2 < NEAR * span).view(-1).nonzero().squeeze(1)
    d2 = d2.clamp_min_(0)
    for part in pieces(near, a.full.size(1)):
        d2.view(-1)[part] = differences(a, b, part)[0].square().sum(-1)
    return Scores(d2.neg_() if metric == "sqeuclidean" else d2.sqrt_().neg_(), near)


def pieces(near: Tensor, d: int) -> Iterator[Tensor]:
    """Parts of a list of places, so small that their differences, D values each, fit into the memory of a chunk."""
    return iter(near.split(max(1, CHUNK_ELEMENTS // 4 // d)) if near.numel() else ())


def differences(a: Side, b: Side, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u - p of the pairs at some places, their rows, and their columns."""
    rows, cols = near // b.full.size(0), near % b.full.size(0)
    return difference(a.full[rows], b.full[cols], a.r[rows, None], b.r[cols, None]), rows, cols


def difference(x: Tensor, w: Tensor, rx: Tensor | float, rw: Tensor | float) -> Tensor:
    """x rx - w rw of pairs of rows (P, D), and exactly 0 where x = w.

    The norms of equal rows may differ in the last bits, because the order of a sum depends on strides and, on a GPU, on
    shapes.
    """
    return torch.where((x == w).all(1, keepdim=True), 0, x * rx - w * rw)


def listed_scores(x: Tensor, w: Tensor, metric: str, normalize: bool, eps: float) -> Tensor:
    """The scores (P,) of the pairs of rows x (P, D) and w (P, D), in the accumulation dtype."""
    rx, rw = (norms(t, eps)[0] if normalize else 1.0 for t in (x, w))
    if metric == "dot":
        return (x * rx * (w * rw)).sum(1)
    d2 = difference(x, w, rx, rw).square().sum(1)
    return -d2 if metric == "sqeuclidean" else -d2.sqrt()


def root_slope(s: Tensor) -> Tensor:
    """d(-sqrt(d2)) / d(-d2) = 1 / (2 sqrt(d2)), and 0 at zero distance."""
    return torch.where(s == 0, 0, -0.5 / s)


class Gradients:
    """Adds up grad_x over bank chunks, and returns grad_w of each chunk, from dS on the scores."""

    def __init__(self, rows: Side, metric: str, need_x: bool, need_w: bool):
        self.rows, self.metric, self.need_x, self.need_w = rows, metric, need_x, need_w
        self.grad_x = rows.full.new_zeros(rows.full.shape) if need_x else None

    def chunk(self, b: Side, scores: Scores, ds: Tensor) -> Tensor | None:
        """Adds dS (overwritten) to grad_x; returns grad_w of the chunk in the accumulation dtype, projected."""
        a = self.rows
        factor = 1.0
        near_ds = None
        if self.metric != "dot":
            factor = 2.0
            if self.metric == "euclidean":
                ds.mul_(root_slope(scores.s))
            near_ds = ds.view(-1)[scores.near]
            ds.view(-1).index_fill_(0, scores.near, 0)
        sums = (ds.sum(1), ds.sum(0)) if self.metric != "dot" else None
        e = ds.mul_(a.r[:, None] * factor).mul_(b.r).to(a.weighed.dtype)
        grad_w = None
        if self.grad_x is not None:
            part = mm(e, b.weighed, a.full.dtype)
            if sums:
                part -= self._own(a, sums[0])
            self.grad_x += part
        if self.need_w:
            grad_w = mm(e.T, a.weighed, a.full.dtype)
            if sums:
                grad_w -= self._own(b, sums[1])
        if near_ds is not None:
            self._add_near(b, scores.near, near_ds, grad_w)
        return None if grad_w is None else b.project(grad_w)

    @staticmethod
    def _own(side: Side, total: Tensor) -> Tensor:
        """-2 (sum dS) u r, the own part of a squared distance. The projection removes it from unit vectors."""
        return side.full * torch.where(side.unit, 0, 2 * total * side.r * side.r)[:, None]

    def _add_near(self, b: Side, near: Tensor, near_ds: Tensor, grad_w: Tensor | None) -> None:
        """Adds the gradient of the near pairs, which were taken out of dS: -2 dS (u - p), from the difference."""
        a, done = self.rows, 0
        for part in pieces(near, a.full.size(1)):
            direct, rows, cols = differences(a, b, part)
            direct *= -2 * near_ds[done : done + part.numel(), None]
            done += part.numel()
            if self.grad_x is not None:
                self.grad_x.index_add_(0, rows, direct * a.r[rows, None])
            if grad_w is not None:
                grad_w.index_add_(0, cols, direct * -b.r[cols, None])

    def finish(self) -> Tensor | None:
        return None if self.grad_x is None else self.rows.project(self.grad_x)

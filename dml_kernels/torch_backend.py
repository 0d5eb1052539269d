"""The ``torch`` backend: a loop over bank chunks in plain PyTorch, forward, backward and double backward by hand.

Runs wherever nothing is compiled, on any device and dtype PyTorch multiplies. Memory is bounded: a few temporaries of
N x chunk, where N x chunk stays near CHUNK_ELEMENTS whatever the bank's size.

The raw product x.w is the only N x chunk matrix product; norms enter as row and column scales. With r = 1/|x| on each
side and E = dS r_i r_j (the gradient of the raw product), normalisation differentiates to dx_i = P_i (sum_j E_ij w_j),
P_i = I - x^_i x^_i^T, and likewise for w: no normalised copy of either is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .ops.contract import Bank, Spec, accumulate_dtype
from .torch_policies import Pooled, circle_weight

name = "torch"
CHUNK_ELEMENTS = 1 << 19
# Below this share of |u|^2 + |p|^2 a squared distance is recomputed from differences: expanding has cancelled 4 bits.
NEAR = 1.0 / 16


def can_run(op: str, device: torch.device, dtype: torch.dtype, policy: str) -> str | None:
    if policy != "linear" and op != "masked_logsumexp":
        return f"{op} has no logit policy, such as {policy!r}"
    return None


def describe() -> str:
    return "chunk loop in plain PyTorch, bounded memory"


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation


def _norms(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """r = 1 / max(|x|, eps) as (N, 1) in the accumulation dtype, and whether the projection applies (|x| >= eps)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulate_dtype(x.dtype))
    return 1 / norm.clamp_min(eps), norm >= eps


def normalize_fwd(x: Tensor, eps: float) -> Tensor:
    r, _ = _norms(x, eps)
    return (x * r).to(x.dtype).contiguous()


def normalize_bwd(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    r, unit = _norms(x, eps)
    u, g = x * r, grad.to(r.dtype)
    return (r * torch.where(unit, g - u * (u * g).sum(-1, keepdim=True), g)).to(x.dtype).contiguous()


def normalize_dbl(v: Tensor, grad: Tensor, x: Tensor, eps: float) -> Tensor:
    """Gradient in x of <v, normalize_bwd(grad, x)>: -r^2 [x^ (v.g - 3 (v.x^)(g.x^)) + (g.x^) v + (v.x^) g]."""
    r, unit = _norms(x, eps)
    u, v, g = x * r, v.to(r.dtype), grad.to(r.dtype)
    vg, vu, gu = ((a * b).sum(-1, keepdim=True) for a, b in ((v, g), (v, u), (g, u)))
    return torch.where(unit, -(r * r) * (u * (vg - 3 * vu * gu) + gu * v + vu * g), 0).to(x.dtype).contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Rows and bank chunks


class Side(NamedTuple):
    """Rows (or one bank chunk) ready for products: t in the product dtype, the originals, and their norms."""

    t: Tensor  # (n, D) product dtype
    full: Tensor  # (n, D) accumulation dtype
    r: Tensor  # (n,) 1 / max(|t|, eps), or 1 where nothing is normalised
    unit: Tensor  # (n,) bool: the row was divided by its own norm
    sq: Tensor  # (n,) squared norm after scaling by r

    @staticmethod
    def of(t: Tensor, normalize: bool, eps: float, dtype: torch.dtype) -> Side:
        full = t.to(accumulate_dtype(dtype))
        if normalize:
            r, unit = (v.squeeze(-1) for v in _norms(full, eps))
        else:
            r = full.new_ones(full.size(0))
            unit = torch.zeros_like(r, dtype=torch.bool)
        return Side(t.to(dtype), full, r, unit, (full * r[:, None]).square().sum(-1))

    def project(self, grad: Tensor) -> Tensor:
        """P grad for the rows that are unit vectors, grad for the others; in place."""
        u = self.full * self.r[:, None]
        return grad.sub_(u * torch.where(self.unit, (u * grad).sum(-1), 0)[:, None])


def _chunks(n: int, m: int, d: int, centres: int = 1) -> Iterator[slice]:
    """Bank rows of each chunk: whole classes of ``centres`` rows."""
    step = max(32 // centres, CHUNK_ELEMENTS // max(n, d) // centres, 1) * centres
    for start in range(0, m, step):
        yield slice(start, min(start + step, m))


def _mm(a: Tensor, b: Tensor, acc: torch.dtype) -> Tensor:
    """a @ b with the result in the accumulation dtype; straight from the tensor cores where PyTorch offers that."""
    if a.dtype == acc:
        return a @ b
    return torch.mm(a, b, out_dtype=acc) if a.is_cuda and acc == torch.float32 else (a @ b).to(acc)


class Scores(NamedTuple):
    s: Tensor  # (N, chunk) score
    near: Tensor | None  # places, row after row, of the distances taken from differences


def _scores(a: Side, b: Side, metric: str) -> Scores:
    """s_ij of one chunk; squared distances never cancel: small ones are summed from differences."""
    s = _mm(a.t, b.t.T, a.full.dtype).mul_(a.r[:, None]).mul_(b.r)
    if metric == "dot":
        return Scores(s, None)
    span = a.sq[:, None] + b.sq
    d2 = torch.sub(span, s, alpha=2)
    near = (d2 < NEAR * span).view(-1).nonzero().squeeze(1)
    d2 = d2.clamp_min_(0)
    for part in _pieces(near, a.full.size(1)):
        d2.view(-1)[part] = _differences(a, b, part)[0].square().sum(-1)
    return Scores(d2.neg_() if metric == "sqeuclidean" else d2.sqrt_().neg_(), near)


def _pieces(near: Tensor, d: int) -> Iterator[Tensor]:
    """A list of places in parts whose differences, D values each, stay within a chunk's memory."""
    return iter(near.split(max(1, CHUNK_ELEMENTS // 4 // d)) if near.numel() else ())


def _differences(a: Side, b: Side, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u - p of the pairs at some places, their rows, and their columns."""
    rows, cols = near // b.full.size(0), near % b.full.size(0)
    return a.full[rows] * a.r[rows, None] - b.full[cols] * b.r[cols, None], rows, cols


def _root_slope(s: Tensor) -> Tensor:
    """d(-sqrt(d2)) / d(-d2) = 1 / (2 sqrt(d2)), and 0 at zero distance."""
    return torch.where(s == 0, 0, -0.5 / s)


def _product_scale(e: Tensor) -> Tensor:
    """A power of two that lifts an fp16 chunk clear of underflow: 1e-6/4096*16 is 0 in fp16."""
    peak = e.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.exp2(torch.floor(torch.log2(1024 / peak)).clamp(-100, 100))


class Gradients:
    """Collects grad_x over bank chunks, and hands back each chunk's grad_w, from dS on the scores."""

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
                ds.mul_(_root_slope(scores.s))
            near_ds = ds.view(-1)[scores.near]
            ds.view(-1).index_fill_(0, scores.near, 0)
        sums = (ds.sum(1), ds.sum(0)) if self.metric != "dot" else None
        e = ds.mul_(a.r[:, None] * factor).mul_(b.r)
        lift = _product_scale(e) if a.t.dtype == torch.float16 else None
        e = (e if lift is None else e * lift).to(a.t.dtype)
        grad_w = None
        if self.grad_x is not None:
            part = _mm(e, b.t, a.full.dtype)
            part = part if lift is None else part / lift
            if sums:
                part -= self._own(a, sums[0])
            self.grad_x += part
        if self.need_w:
            grad_w = _mm(e.T, a.t, a.full.dtype)
            grad_w = grad_w if lift is None else grad_w / lift
            if sums:
                grad_w -= self._own(b, sums[1])
        if near_ds is not None:
            self._add_near(b, scores.near, near_ds, grad_w)
        return None if grad_w is None else b.project(grad_w)

    @staticmethod
    def _own(side: Side, total: Tensor) -> Tensor:
        """-2 (sum dS) u r: a point's own part in a squared distance. The projection removes it from unit vectors."""
        return side.full * torch.where(side.unit, 0, 2 * total * side.r * side.r)[:, None]

    def _add_near(self, b: Side, near: Tensor, near_ds: Tensor, grad_w: Tensor | None) -> None:
        """The near pairs, taken out of dS: their gradient -2 dS (u - p) comes from the difference, not from sums."""
        a, done = self.rows, 0
        for part in _pieces(near, a.full.size(1)):
            direct, rows, cols = _differences(a, b, part)
            direct *= -2 * near_ds[done : done + part.numel(), None]
            done += part.numel()
            if self.grad_x is not None:
                self.grad_x.index_add_(0, rows, direct * a.r[rows, None])
            if grad_w is not None:
                grad_w.index_add_(0, cols, direct * -b.r[cols, None])

    def finish(self) -> Tensor | None:
        return None if self.grad_x is None else self.rows.project(self.grad_x)


# ---------------------------------------------------------------------------------------------------------------------
# normalized_distance


def _to_distance(s: Tensor, metric: str) -> Tensor:
    return s if metric == "dot" else s.neg_()


def normalized_distance_fwd(x, w, metric, normalize, eps, dtype) -> Tensor:
    rows = Side.of(x, normalize, eps, dtype)
    out = x.new_empty((x.size(0), w.size(0)), dtype=dtype)
    for k in _chunks(x.size(0), *w.shape):
        out[:, k] = _to_distance(_scores(rows, Side.of(w[k], normalize, eps, dtype), metric).s, metric)
    return out


def normalized_distance_bwd(grad, x, w, needs, metric, normalize, eps, dtype) -> tuple[Tensor | None, ...]:
    rows = Side.of(x, normalize, eps, dtype)
    grads = Gradients(rows, metric, *needs)
    grad_w = torch.empty_like(w, memory_format=torch.contiguous_format) if needs[1] else None
    for k in _chunks(x.size(0), *w.shape):
        b = Side.of(w[k], normalize, eps, dtype)
        # A copy of one chunk of grad, whatever its strides: it is overwritten.
        ds = grad[:, k].to(rows.full.dtype, copy=True, memory_format=torch.contiguous_format)
        part = grads.chunk(b, _scores(rows, b, metric), ds if metric == "dot" else ds.neg_())
        if grad_w is not None:
            grad_w[k] = part.to(w.dtype)
    grad_x = grads.finish()
    return None if grad_x is None else grad_x.to(x.dtype), grad_w


def normalized_distance_dbl(v_x, v_w, grad, x, w, metric, normalize, eps, dtype) -> tuple[Tensor, Tensor, Tensor]:
    from .torch_double import Tangents

    tangents = Tangents(x, v_x, metric, normalize, eps, dtype)
    sign = 1.0 if metric == "dot" else -1.0
    d_grad = torch.empty_like(grad, memory_format=torch.contiguous_format)
    d_w = torch.empty_like(w, memory_format=torch.contiguous_format)
    for k in _chunks(x.size(0), *w.shape):
        step = tangents.chunk(w[k], v_w[k] if v_w.numel() else None)
        d_grad[:, k] = (sign * step.ds).to(grad.dtype)
        d_w[k] = tangents.pull_back(step, None, grad[:, k].to(step.s.dtype) * sign).to(w.dtype)
    return d_grad, tangents.finish().to(x.dtype), d_w


# ---------------------------------------------------------------------------------------------------------------------
# masked_logsumexp


class Logits(NamedTuple):
    """One chunk's logits: z, and everything its derivative reads. Masked-out entries have z = -inf."""

    z: Tensor
    same: Tensor  # (N, chunk) bool: in the row's same set
    used: Tensor  # (N, chunk) bool: in either set
    k: Tensor | float  # set's factor, per entry where the sets differ
    o: Tensor | float
    t: Tensor  # (N, 1) scale
    q: Tensor  # (1, chunk) column scale


def class_chunks(bank: Bank, spec: Spec) -> Iterator[tuple[slice, slice]]:
    """Columns of each chunk, and their bank rows: the same without pooling."""
    for rows in _chunks(bank.x.size(0), *bank.w.shape, spec.centres):
        yield slice(rows.start // spec.centres, rows.stop // spec.centres), rows


def row_scale(bank: Bank, acc: torch.dtype) -> Tensor:
    n = bank.x.size(0)
    return bank.x.new_ones((n, 1), dtype=acc) if bank.scale is None else bank.scale.to(acc).reshape(-1, 1).expand(n, 1)


def logits(s: Tensor, k: slice, t: Tensor, bank: Bank, spec: Spec) -> Logits:
    columns = torch.arange(k.start, k.stop, device=s.device)
    c = columns if bank.c is None else bank.c[k]
    same = bank.y[:, None] == c
    used = (bank.y != spec.ignore_index)[:, None].expand_as(same)
    if bank.c is not None:
        used = used & (c != spec.ignore_index)
    if bank.exclude is not None:
        used = used & (bank.exclude[:, None] != columns)
    k_same, o_same, k_diff, o_diff = spec.logit
    factor = k_same if k_same == k_diff else torch.where(same, *s.new_tensor((k_same, k_diff)))
    offset = o_same if o_same == o_diff else torch.where(same, *s.new_tensor((o_same, o_diff)))
    q = s.new_ones((1, s.size(1))) if bank.col_scale is None else bank.col_scale[k].to(s.dtype)[None]
    if spec.policy == "quadratic":
        factor = factor * circle_weight(q * s, same, spec.policy_params[0])
    z = factor * t * (q * s - offset)
    if bank.col_bias is not None:
        z = z + bank.col_bias[k].to(s.dtype)
        used = used & (z != -math.inf)
    return Logits(z.masked_fill_(~used, -math.inf), same & used, used, factor, offset, t, q)


def masked_logsumexp_fwd(bank: Bank, spec: Spec) -> tuple[Tensor, ...]:
    rows = Side.of(bank.x, spec.normalize, spec.eps, spec.dtype)
    acc, n = rows.full.dtype, bank.x.size(0)
    t = row_scale(bank, acc)
    lse = [bank.x.new_full((n,), -math.inf, dtype=acc) for _ in range(2)]
    sums = [bank.x.new_zeros(n if spec.sums else 0, dtype=acc) for _ in range(2)]
    for k, entries in class_chunks(bank, spec):
        s = _scores(rows, Side.of(bank.w[entries], spec.normalize, spec.eps, spec.dtype), spec.metric).s
        chunk = logits(Pooled(s, spec).s, k, t, bank, spec)
        for i, members in enumerate((chunk.same, chunk.used & ~chunk.same)):
            z = chunk.z.masked_fill(~members, -math.inf)
            lse[i] = torch.logaddexp(lse[i], torch.logsumexp(z, 1))
            if spec.sums:
                sums[i] += z.masked_fill_(~members, 0).sum(1)
    return (*lse, *sums)


def entry(per_row: tuple[Tensor, Tensor], same: Tensor) -> Tensor:
    """Each entry's own set's row value."""
    return torch.where(same, per_row[0][:, None], per_row[1][:, None])


def weights(chunk: Logits, lse: tuple[Tensor, ...]) -> Tensor:
    """p_ij = exp(z_ij - lse_i) of the entry's set; 0 for an empty set and for masked entries."""
    closed = tuple(torch.where(v == -math.inf, math.inf, v) for v in lse)
    return torch.exp(chunk.z - entry(closed, chunk.same))


def row_grads(grads: tuple[Tensor, ...], chunk: Logits, p: Tensor, sums: bool) -> Tensor:
    """dz = g p, plus the gradient of the plain sum where that was asked for."""
    acc = p.dtype
    dz = p * entry((grads[0].to(acc), grads[1].to(acc)), chunk.same)
    if sums:
        dz = dz + torch.where(chunk.used, entry((grads[2].to(acc), grads[3].to(acc)), chunk.same), 0)
    return dz


def masked_logsumexp_bwd(grads, lse, needs, bank: Bank, spec: Spec) -> tuple[Tensor | None, ...]:
    need_x, need_w, need_t, need_q, need_b = needs
    rows = Side.of(bank.x, spec.normalize, spec.eps, spec.dtype)
    acc, n, m = rows.full.dtype, bank.x.size(0), bank.w.size(0) // spec.centres
    t = row_scale(bank, acc)
    collect = Gradients(rows, spec.metric, need_x, need_w)
    g_w = torch.empty_like(bank.w, memory_format=torch.contiguous_format) if need_w else None
    g_t = t.new_zeros(n) if need_t else None
    g_q, g_b = (bank.x.new_empty(m if need else 0, dtype=acc) for need in (need_q, need_b))
    for k, entries in class_chunks(bank, spec):
        b = Side.of(bank.w[entries], spec.normalize, spec.eps, spec.dtype)
        scores = _scores(rows, b, spec.metric)
        pooled = Pooled(scores.s, spec)
        chunk = logits(pooled.s, k, t, bank, spec)
        dz = row_grads(grads, chunk, weights(chunk, lse), spec.sums)
        if need_b:
            g_b[k] = dz.sum(0)
        dz = dz * chunk.k
        if g_t is not None:
            g_t += (dz * (chunk.q * pooled.s - chunk.o)).sum(1)
        if need_q:
            g_q[k] = (dz * chunk.t * pooled.s).sum(0)
        if need_x or need_w:
            part = collect.chunk(b, scores, pooled.spread(dz.mul_(chunk.t).mul_(chunk.q)))
            if g_w is not None:
                g_w[entries] = part.to(bank.w.dtype)
    g_x = collect.finish()
    return (
        None if g_x is None else g_x.to(bank.x.dtype),
        g_w,
        None if g_t is None else scale_grad(g_t, bank),
        g_q.to(bank.col_scale.dtype) if need_q else None,
        g_b.to(bank.col_bias.dtype) if need_b else None,
    )


def scale_grad(per_row: Tensor, bank: Bank) -> Tensor:
    """The gradient of the scale in its own shape, () or (N,), and dtype."""
    assert bank.scale is not None
    return (per_row.sum() if bank.scale.dim() == 0 else per_row).to(bank.scale.dtype)


def masked_logsumexp_dbl(directions, grads, lse, bank: Bank, spec: Spec) -> tuple[Tensor, ...]:
    from .torch_double import masked_logsumexp_dbl as double

    return double(directions, grads, lse, bank, spec)


# The ops of pair losses, which are written on the functions above.
from .torch_argmax import masked_argmax_fwd  # noqa: E402, F401
from .torch_hinge import masked_hinge_sum_bwd, masked_hinge_sum_dbl, masked_hinge_sum_fwd  # noqa: E402, F401
from .torch_hinge import positive_scores as positive_scores  # noqa: E402

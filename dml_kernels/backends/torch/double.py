"""The double backward in closed form, streamed over bank chunks in plain PyTorch. All backends use it.

The first backward returns, for parameters theta, sum_ij dz_ij dz_ij/dtheta with dz_ij = g_i p_ij + h_i. Contracted with
the incoming directions v it is

    Phi = sum_ij dz_ij z'_ij,      z'_ij the derivative of z_ij along v.

So the gradient of Phi reaches theta in two ways: through z' with weight B = dz, and through p with weight
A = g p z'. Through s and its tangent s' both become weights on u.p, u'.p and u.p' of one chunk. The log-sum-exps are
separate inputs here, with gradient -g sum_j p z'.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.contract import accumulate_dtype
from ...ops.signatures import Bank, Spec
from . import logsumexp, normalize, tiles
from .policies import Pooled


class Step(NamedTuple):
    """One bank chunk: its unit (or raw) vectors, the scores, and the tangents of both."""

    w: Tensor
    v: Tensor
    p: Tensor
    dp: Tensor
    s: Tensor
    ds: Tensor
    dq: Tensor  # tangent of the negative squared distance (for the other metrics the same as ds)


class Tangents:
    """Scores and their derivative along (v_x, v_w), and the way back from weights on both."""

    def __init__(self, x: Tensor, v_x: Tensor, metric: str, normalize: bool, eps: float, dtype: torch.dtype):
        self.metric, self.normalize, self.eps, self.acc = metric, normalize, eps, accumulate_dtype(dtype)
        self.x = x.to(self.acc)
        self.v = v_x.to(self.acc) if v_x.numel() else torch.zeros_like(self.x)
        self.u, self.du = self._lift(self.x, self.v)
        self.rows = tiles.Side.of(self.x, normalize, eps, self.acc)
        self.grad_u, self.grad_du = torch.zeros_like(self.u), torch.zeros_like(self.u)

    def _lift(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not self.normalize:
            return x, v
        return normalize.forward(x, self.eps), normalize.backward(v, x, self.eps)

    def _drop(self, x: Tensor, v: Tensor, grad_u: Tensor, grad_du: Tensor) -> Tensor:
        """The gradient in x, from the gradients in u = x^ and in the tangent of u."""
        if not self.normalize:
            return grad_u
        return normalize.backward(grad_u, x, self.eps) + normalize.double(v, grad_du, x, self.eps)

    def chunk(self, w: Tensor, v: Tensor | None) -> Step:
        w = w.to(self.acc)
        v = torch.zeros_like(w) if v is None else v.to(self.acc)
        p, dp = self._lift(w, v)
        if self.metric == "dot":
            s, ds = self.u @ p.T, self.du @ p.T + self.u @ dp.T
            return Step(w, v, p, dp, s, ds, ds)
        # From the stored vectors, so that equal ones are at distance 0 as in the first derivative.
        s = tiles.scores(self.rows, tiles.Side.of(w, self.normalize, self.eps, self.acc), self.metric).s
        # -2 (u - p).(u' - p'), expanded, because differences would take N x chunk x D memory.
        cross = self.u @ dp.T + self.du @ p.T
        dq = 2 * (cross - (self.u * self.du).sum(1)[:, None] - (p * dp).sum(1))
        return Step(w, v, p, dp, s, dq * tiles.root_slope(s) if self.metric == "euclidean" else dq, dq)

    def pull_back(self, step: Step, on_s: Tensor | None, on_ds: Tensor) -> Tensor:
        """Adds the rows' gradients for weights on s and on s'; returns the chunk's gradient in w."""
        a, b = on_s, on_ds
        if self.metric == "euclidean":
            # s = -sqrt(-q), so s' = f1 q', and the derivative of f1 in q is f2 = 2 f1^3.
            f1 = tiles.root_slope(step.s)
            a = b * 2 * f1**3 * step.dq + (0 if a is None else a * f1)
            b = b * f1
        if self.metric == "dot":
            grad_u, grad_du = b @ step.dp, b @ step.p
            grad_p, grad_dp = b.T @ self.du, b.T @ self.u
            if a is not None:
                grad_u, grad_p = grad_u + a @ step.p, grad_p + a.T @ self.u
        else:
            rb, cb = b.sum(1)[:, None], b.sum(0)[:, None]
            grad_u, grad_du = b @ step.dp - rb * self.du, b @ step.p - rb * self.u
            grad_p, grad_dp = b.T @ self.du - cb * step.dp, b.T @ self.u - cb * step.p
            if a is not None:
                grad_u = grad_u + a @ step.p - a.sum(1)[:, None] * self.u
                grad_p = grad_p + a.T @ self.u - a.sum(0)[:, None] * step.p
            grad_u, grad_du, grad_p, grad_dp = (2 * t for t in (grad_u, grad_du, grad_p, grad_dp))
        self.grad_u += grad_u
        self.grad_du += grad_du
        return self._drop(step.w, step.v, grad_p, grad_dp)

    def finish(self) -> Tensor:
        return self._drop(self.x, self.v, self.grad_u, self.grad_du).contiguous()


def masked_logsumexp_dbl(directions, grads, lse, bank: Bank, spec: Spec) -> tuple[Tensor | None, ...]:
    """The gradients of Phi in the four incoming gradients, both log-sum-exps, x, w, scale and col_bias."""
    _, v_w, v_t, v_b = (v if v.numel() else None for v in directions)
    tangents = Tangents(bank.x, directions[0], spec.metric, spec.normalize, spec.eps, spec.dtype)
    acc, n, m = tangents.acc, bank.x.size(0), bank.w.size(0) // spec.centres
    t = logsumexp.row_scale(bank, acc)
    dt = torch.zeros_like(t) if v_t is None else v_t.to(acc).reshape(-1, 1).expand(n, 1)
    d_g = [torch.zeros(n, dtype=acc, device=t.device) for _ in range(4)]
    d_w = torch.empty_like(bank.w, memory_format=torch.contiguous_format)
    d_t = t.new_zeros(n)
    d_b = t.new_empty(m)
    for k, entries in logsumexp.class_chunks(bank, spec):
        step = tangents.chunk(bank.w[entries], None if v_w is None else v_w[entries])
        pooled = Pooled(step.s, spec)
        s, ds = pooled.s, pooled.tangent(step.ds)
        chunk = logsumexp.logits(s, k, t, bank, spec)
        p = logsumexp.weights(chunk, lse)
        kk = chunk.k
        dz = kk * (t * ds + dt * (s - chunk.o))
        if v_b is not None:
            dz = dz + v_b[k].to(acc)
        dz = torch.where(chunk.used, dz, 0)
        b = logsumexp.row_grads(grads, chunk, p, spec.sums)
        a = p * logsumexp.entry((grads[0].to(acc), grads[1].to(acc)), chunk.same) * dz
        for i, members in enumerate((chunk.same, chunk.used & ~chunk.same)):
            d_g[i] += torch.where(members, p * dz, 0).sum(1)
            d_g[2 + i] += torch.where(members, dz, 0).sum(1)
        a, b, d_b[k] = a * kk, b * kk, a.sum(0)
        d_t += (a * (s - chunk.o) + b * ds).sum(1)
        on_s, on_ds = pooled.pull_back(a * t + b * dt, b * t, step.ds)
        d_w[entries] = tangents.pull_back(step, on_s, on_ds).to(bank.w.dtype)
    d_lse = [torch.where(v == -math.inf, 0, -g.to(acc) * d) for v, g, d in zip(lse, grads, d_g, strict=False)]
    out_g = [d.to(g.dtype) if g.numel() else torch.empty_like(g) for d, g in zip(d_g, grads, strict=True)]
    return (
        *out_g,
        *d_lse,
        tangents.finish().to(bank.x.dtype),
        d_w,
        None if bank.scale is None else logsumexp.scale_grad(d_t, bank),
        None if bank.col_bias is None else d_b.to(bank.col_bias.dtype),
    )

"""Other implementations of Proxy-NCA with the positive in the sum: a cross-entropy over 2 scale x^.w^.

A peer is make(problem) -> step() -> (value, grad x, grad w); time and memory include the normalisation.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as TF

from ..problem import Problem

SCALE = 8.0
Step = Callable[[], tuple[Tensor, ...]]
CHUNK = 16384  # bank entries of the hand-written loop


def _autograd(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Problem], Step]:
    def make(problem: Problem) -> Step:
        def step() -> tuple[Tensor, ...]:
            x, w = problem.x.detach().requires_grad_(), problem.w.detach().requires_grad_()
            value = loss(x, w, problem.y)
            return value.detach(), *torch.autograd.grad(value, (x, w))

        return step

    return make


def _dense(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return TF.cross_entropy(2 * SCALE * (TF.normalize(x) @ TF.normalize(w).T).float(), y)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_dense, fullgraph=True, dynamic=False)


def _units(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return (2 * SCALE * TF.normalize(x)).bfloat16(), TF.normalize(w).bfloat16()


def _cce(filtered: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        options = {} if filtered else {"filter_eps": None}
        return linear_cross_entropy(*_units(x, w), y, reduction="none", impl="cce", **options).mean()

    return loss


def _liger(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    a, b = _units(x, w)
    return liger_fused_linear_cross_entropy(a, b, y, reduction="mean", accum_dtype=torch.float32, chunk_mem_const=256)


def _quack(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    a, b = _units(x, w)
    return chunked_linear_cross_entropy(a, b, y, chunk_size=512, reduction="mean")


def _cublas_loop(problem: Problem) -> Step:
    """The fairest peer: a loop of the vendor's products over chunks of the bank, forward and backward by hand."""

    def step() -> tuple[Tensor, ...]:
        x, w, y = problem.x, problem.w, problem.y
        n, (rx, rw) = x.size(0), ((1 / t.float().norm(dim=1)) for t in (x, w))
        xs = (x * rx[:, None]).to(x.dtype)
        lse = torch.full((n,), -torch.inf, device=x.device)
        own = 2 * SCALE * (xs.float() * (w[y] * rw[y, None]).float()).sum(1)
        for k in range(0, w.size(0), CHUNK):
            z = (xs @ w[k : k + CHUNK].T).float().mul_(2 * SCALE * rw[k : k + CHUNK])
            lse = torch.logaddexp(lse, torch.logsumexp(z, 1))
        grad_x, grad_w = torch.zeros_like(x, dtype=torch.float32), torch.empty_like(w)
        rows = torch.arange(n, device=x.device)
        for k in range(0, w.size(0), CHUNK):
            w_k, r_k = w[k : k + CHUNK], rw[k : k + CHUNK]
            p = (xs @ w_k.T).float().mul_(2 * SCALE * r_k).sub_(lse[:, None]).exp_().div_(n)
            inside = (y >= k) & (y < k + w_k.size(0))
            p.index_put_((rows, (y - k).clamp(0, w_k.size(0) - 1)), -inside.float() / n, accumulate=True)
            e = (p * (2 * SCALE * r_k)).to(x.dtype)
            grad_x += (e @ w_k).float()
            part = (e.T @ xs).float()
            unit = w_k.float() * r_k[:, None]
            grad_w[k : k + CHUNK] = (part - unit * (unit * part).sum(1, keepdim=True)).to(w.dtype)
        unit = x.float() * rx[:, None]
        grad_x = (grad_x - unit * (unit * grad_x).sum(1, keepdim=True)) * rx[:, None]
        return (lse - own).mean(), grad_x.to(x.dtype), grad_w

    return step


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def peers(dtype: torch.dtype) -> dict[str, tuple[Callable[[Problem], Step], float]]:
    """name -> (make, how many N x M fp32 matrices it holds at its peak)."""
    found: dict[str, tuple[Callable[[Problem], Step], float]] = {
        "cuBLAS over bank chunks": (_cublas_loop, 0.0),
        "torch.compile": (_autograd(lambda *a: _compiled()(*a)), 3.5),
        "eager": (_autograd(_dense), 5.0),
    }
    if dtype == torch.bfloat16:
        if _installed("cut_cross_entropy"):
            found["cut-cross-entropy, no filter"] = (_autograd(_cce(False)), 0.0)
            found["cut-cross-entropy, default filter (approximate)"] = (_autograd(_cce(True)), 0.0)
        if _installed("liger_kernel"):
            found["liger-kernel"] = (_autograd(_liger), 0.0)
        if _installed("quack"):
            found["quack-kernels"] = (_autograd(_quack), 0.0)
    return found

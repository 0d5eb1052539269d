"""normalize: x / max(|x|, eps) over the last dimension, with hand-written first and second derivatives.

With r = 1 / max(|x|, eps) and x^ = x r, the backward is r (g - x^ (x^.g)), and r g where |x| < eps, because r is
constant there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import choice
from .checks import check_tensor
from .contract import check_eps, check_matrix
from .library import known_signature, register
from .signatures import NormalizeSpec, Rows


def _fwd(rows: Rows, spec: NormalizeSpec) -> Tensor:
    return choice.BACKENDS[spec.backend].normalize_fwd(rows, spec)


def _bwd(grad, rows: Rows, spec: NormalizeSpec) -> Tensor:
    return choice.BACKENDS[spec.backend].normalize_bwd(grad, rows, spec)


def _dbl(v, grad, rows: Rows, spec: NormalizeSpec) -> tuple[Tensor, Tensor]:
    torch_backend = choice.BACKENDS["torch"]
    # The Jacobian is symmetric, so the derivative along `grad` is the backward of v.
    return torch_backend.normalize_bwd(v, rows, spec), torch_backend.normalize_dbl(v, grad, rows, spec)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


fwd = register("normalize_fwd", Rows, NormalizeSpec, 1, _fwd, lambda rows, spec: _like(rows.x))
bwd = register("normalize_bwd", Rows, NormalizeSpec, 1, _bwd, lambda g, rows, spec: _like(rows.x), "Tensor grad")
dbl = register(
    "normalize_dbl", Rows, NormalizeSpec, 2, _dbl, lambda v, g, rows, spec: (_like(rows.x), _like(rows.x)),
    "Tensor v, Tensor grad",
)  # fmt: skip


@known_signature
class _Backward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad, x, spec):
        return bwd(grad, x, *spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, x, ctx.spec = inputs
        ctx.save_for_backward(grad, x)

    @staticmethod
    def backward(ctx, v):
        return *dbl(v, *ctx.saved_tensors, *ctx.spec), None


@known_signature
class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, spec):
        return fwd(x, *spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.spec = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        g_x = _Backward.apply(grad, x, ctx.spec) if torch.is_grad_enabled() else bwd(grad, x, *ctx.spec)
        return g_x, None


def differentiable(rows: Rows, spec: NormalizeSpec) -> Tensor:
    """normalize for checked arguments, on the backend that the spec names."""
    return _Forward.apply(*rows, spec)


def normalize(x: Tensor, eps: float = 1e-12, *, backend: str | None = None) -> Tensor:
    """Unit vectors along the last dimension: x / max(|x|, eps).

    Args:
        x: (..., D), float32, float64, bfloat16 or float16.
        eps: the floor under a norm. A vector whose norm is smaller is divided by ``eps``; its gradient is g / eps.
        backend: overrides the choice of backend for this call.

    Returns:
        (..., D) in the dtype of x. Norms are computed in fp32 (fp64 for fp64). Differentiable twice.

    Raises:
        TypeError: x is not a floating tensor.
        ValueError: x has no last dimension, or eps is not positive.
    """
    check_tensor("x", x)
    if x.dim() == 0 or x.size(-1) == 0:
        raise ValueError(f"x must have shape (..., D) with D at least 1; got {tuple(x.shape)}")
    rows = x.reshape(-1, x.size(-1))
    check_matrix("x", rows)
    eps = check_eps(eps)
    chosen = choice.choose("normalize", x.device, x.dtype, backend)
    if chosen == choice.REFERENCE:
        return choice.reference.normalize(x, eps)
    return differentiable(Rows(rows), NormalizeSpec(eps=eps, backend=chosen)).view(x.shape)

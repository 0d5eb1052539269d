"""normalize: x / max(|x|, eps) over the last dimension, with hand-written first and second derivatives.

With r = 1 / max(|x|, eps) and x^ = x r: backward r (g - x^ (x^.g)), and r g where |x| < eps, for there r is constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend
from .library import known_signature, register


def _fwd(x: Tensor, eps: float, name: str) -> Tensor:
    return backend.BACKENDS[name].normalize_fwd(x, eps)


def _bwd(grad: Tensor, x: Tensor, eps: float, name: str) -> Tensor:
    return backend.BACKENDS[name].normalize_bwd(grad, x, eps)


def _dbl(v: Tensor, grad: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    torch_backend = backend.BACKENDS["torch"]
    # The Jacobian is symmetric: the derivative along `grad` is the backward of v.
    return torch_backend.normalize_bwd(v, x, eps), torch_backend.normalize_dbl(v, grad, x, eps)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


fwd = register("normalize_fwd", "(Tensor x, float eps, str backend) -> Tensor", _fwd, lambda x, eps, name: _like(x))
bwd = register(
    "normalize_bwd", "(Tensor grad, Tensor x, float eps, str backend) -> Tensor", _bwd, lambda g, x, eps, name: _like(x)
)
dbl = register(
    "normalize_dbl", "(Tensor v, Tensor grad, Tensor x, float eps) -> (Tensor, Tensor)", _dbl,
    lambda v, g, x, eps: (_like(x), _like(x)),
)  # fmt: skip


@known_signature
class _Backward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad, x, eps, backend):
        return bwd(grad, x, eps, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, x, ctx.eps, _ = inputs
        ctx.save_for_backward(grad, x)

    @staticmethod
    def backward(ctx, v):
        grad, x = ctx.saved_tensors
        return *dbl(v, grad, x, ctx.eps), None, None


@known_signature
class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, eps, backend):
        return fwd(x, eps, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.eps, ctx.backend = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        first_derivative = _Backward.apply if torch.is_grad_enabled() else bwd
        return first_derivative(grad, x, ctx.eps, ctx.backend), None, None


def normalize(x: Tensor, eps: float, name: str) -> Tensor:
    """For checked arguments; see functional.normalize."""
    return _Forward.apply(x, eps, name)

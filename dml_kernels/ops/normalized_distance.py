"""normalized_distance: the whole N x M matrix, for those who want it; gradients stream over it in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend
from .library import filled, gradients_like, known_signature, register, without_autocast

_SPEC = "str metric, bool normalize, float eps, ScalarType dtype, str backend"


def _fwd(x, w, metric, normalize, eps, dtype, name):
    with without_autocast(x.device.type):
        return backend.BACKENDS[name].normalized_distance_fwd(x, w, metric, normalize, eps, dtype)


def _bwd(grad, x, w, needs, metric, normalize, eps, dtype, name):
    with without_autocast(x.device.type):
        out = backend.BACKENDS[name].normalized_distance_bwd(grad, x, w, needs, metric, normalize, eps, dtype)
    return filled(out, x, 2)


def _bwd_fake(grad, x, w, needs, metric, normalize, eps, dtype, name):
    return gradients_like((x, w), needs, x)


def _dbl(v_x, v_w, grad, x, w, metric, normalize, eps, dtype, name):
    with without_autocast(x.device.type):
        return backend.BACKENDS["torch"].normalized_distance_dbl(v_x, v_w, grad, x, w, metric, normalize, eps, dtype)


fwd = register(
    "normalized_distance_fwd", f"(Tensor x, Tensor w, {_SPEC}) -> Tensor", _fwd,
    lambda x, w, metric, normalize, eps, dtype, name: x.new_empty((x.size(0), w.size(0)), dtype=dtype),
)  # fmt: skip
bwd = register(
    "normalized_distance_bwd", f"(Tensor grad, Tensor x, Tensor w, bool[] needs, {_SPEC}) -> (Tensor, Tensor)",
    _bwd, _bwd_fake,
)  # fmt: skip
dbl = register(
    "normalized_distance_dbl",
    f"(Tensor v_x, Tensor v_w, Tensor grad, Tensor x, Tensor w, {_SPEC}) -> (Tensor, Tensor, Tensor)", _dbl,
    lambda v_x, v_w, grad, x, w, *_: tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (grad, x, w)
    ),
)  # fmt: skip


@known_signature
class _Backward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad, x, w, needs, metric, normalize, eps, dtype, backend):
        return bwd(grad, x, w, needs, metric, normalize, eps, dtype, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.spec = inputs[4:]

    @staticmethod
    def backward(ctx, v_x, v_w):
        return *dbl(v_x, v_w, *ctx.saved_tensors, *ctx.spec), *(None,) * 6


@known_signature
class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, metric, normalize, eps, dtype, backend):
        return fwd(x, w, metric, normalize, eps, dtype, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.spec = inputs[2:]

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        metric, normalize, eps, dtype, backend = ctx.spec
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
        first_derivative = _Backward.apply if torch.is_grad_enabled() else bwd
        g_x, g_w = first_derivative(grad, x, w, needs, metric, normalize, eps, dtype, backend)
        return g_x if needs[0] else None, g_w if needs[1] else None, *(None,) * 5


def normalized_distance(x: Tensor, w: Tensor, metric: str, normalize: bool, eps: float, dtype: torch.dtype, name: str):
    """For checked arguments; see functional.normalized_distance."""
    return _Forward.apply(x, w, metric, normalize, eps, dtype, name)

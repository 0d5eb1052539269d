"""normalized_distance: the whole N x M matrix, for whoever wants it; gradients stream over it in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from . import choice
from .library import filled, gradients_like, known_signature, register, without_autocast
from .signatures import DistanceSpec, Matrices


def _fwd(inputs: Matrices, spec: DistanceSpec) -> Tensor:
    with without_autocast(inputs.x.device.type):
        return choice.BACKENDS[spec.backend].normalized_distance_fwd(inputs, spec)


def _fwd_fake(inputs: Matrices, spec: DistanceSpec) -> Tensor:
    return inputs.x.new_empty((inputs.x.size(0), inputs.w.size(0)), dtype=spec.dtype)


def _bwd(grad, needs, inputs: Matrices, spec: DistanceSpec) -> tuple[Tensor, ...]:
    with without_autocast(inputs.x.device.type):
        out = choice.BACKENDS[spec.backend].normalized_distance_bwd(grad, needs, inputs, spec)
    return filled(out, inputs.x, 2)


def _bwd_fake(grad, needs, inputs: Matrices, spec: DistanceSpec) -> tuple[Tensor, ...]:
    return gradients_like(inputs, needs, inputs.x)


def _dbl(v_x, v_w, grad, inputs: Matrices, spec: DistanceSpec) -> tuple[Tensor, ...]:
    with without_autocast(inputs.x.device.type):
        return choice.BACKENDS["torch"].normalized_distance_dbl((v_x, v_w), grad, inputs, spec)


def _dbl_fake(v_x, v_w, grad, inputs: Matrices, spec: DistanceSpec) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (grad, *inputs))


fwd = register("normalized_distance_fwd", Matrices, DistanceSpec, 1, _fwd, _fwd_fake)
bwd = register("normalized_distance_bwd", Matrices, DistanceSpec, 2, _bwd, _bwd_fake, "Tensor grad, bool[] needs")
dbl = register(
    "normalized_distance_dbl", Matrices, DistanceSpec, 3, _dbl, _dbl_fake, "Tensor v_x, Tensor v_w, Tensor grad"
)


@known_signature
class _Backward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad, needs, x, w, spec):
        return bwd(grad, needs, x, w, *spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, _needs, x, w, ctx.spec = inputs
        ctx.save_for_backward(grad, x, w)

    @staticmethod
    def backward(ctx, v_x, v_w):
        grad, x, w = dbl(v_x, v_w, *ctx.saved_tensors, *ctx.spec)
        return grad, None, x, w, None


@known_signature
class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, spec):
        return fwd(x, w, *spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, ctx.spec = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx, grad):
        needs = list(ctx.needs_input_grad[:2])
        if torch.is_grad_enabled():
            g_x, g_w = _Backward.apply(grad, needs, *ctx.saved_tensors, ctx.spec)
        else:
            g_x, g_w = bwd(grad, needs, *ctx.saved_tensors, *ctx.spec)
        return g_x if needs[0] else None, g_w if needs[1] else None, None


def normalized_distance(inputs: Matrices, spec: DistanceSpec) -> Tensor:
    """For checked arguments; see functional.normalized_distance."""
    return _Forward.apply(*inputs, spec)

"""magnet: the whole Magnet loss as one op; losses/magnet.py has the formula.

``fwd`` returns the reduced loss, each row's log-sum-exp over the clusters of other classes, and the variance before its
floor; ``bwd`` returns the gradients of embeddings, centres and variance. Both run fused where the backend has a fused
kernel, else as the composition in backends/composed/magnet.py. A backward that may be differentiated again always runs
as the composition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.composed import magnet as composed
from . import choice, engines
from .contract import accumulate_dtype, check_clusters
from .library import filled, gradients_like, known_signature, register, without_autocast
from .signatures import Clustered, MagnetSpec

# Positions of the tensors that may need a gradient.
DIFFERENTIABLE = (0, 3, 4)


def _fwd(inputs: Clustered, spec: MagnetSpec) -> tuple[Tensor, ...]:
    check_clusters(inputs.clusters, inputs.classes, inputs.variance, spec.ignore_index)
    with without_autocast(inputs.x.device.type):
        backend = choice.BACKENDS[spec.backend]
        if backend.fuses("magnet", inputs):
            return backend.magnet_fwd(inputs, spec)
        return composed.magnet_fwd(inputs, spec, engines.kernels(spec.backend))


def _fwd_fake(inputs: Clustered, spec: MagnetSpec) -> tuple[Tensor, ...]:
    acc, n = accumulate_dtype(spec.dtype), inputs.x.size(0)
    shapes = ((n,) if spec.reduction == "none" else (), (n,), ())
    return tuple(inputs.x.new_empty(shape, dtype=acc) for shape in shapes)


def _bwd(grad, different, needs, inputs: Clustered, spec: MagnetSpec) -> tuple[Tensor, ...]:
    with without_autocast(inputs.x.device.type):
        backend = choice.BACKENDS[spec.backend]
        if backend.fuses("magnet", inputs):
            found = backend.magnet_bwd(grad, different, needs, inputs, spec)
        else:
            found = composed.magnet_bwd(grad, different, needs, inputs, spec, engines.kernels(spec.backend))
        return filled(found, inputs.x, len(DIFFERENTIABLE))


def _bwd_fake(grad, different, needs, inputs: Clustered, spec: MagnetSpec) -> tuple[Tensor, ...]:
    return gradients_like([inputs[i] for i in DIFFERENTIABLE], needs, inputs.x)


fwd = register("magnet_fwd", Clustered, MagnetSpec, 3, _fwd, _fwd_fake)
bwd = register("magnet_bwd", Clustered, MagnetSpec, 3, _bwd, _bwd_fake, "Tensor grad, Tensor different, bool[] needs")


@known_signature
class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, clusters, classes, centers, variance, spec):
        return fwd(x, clusters, classes, centers, variance, *spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.spec = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1], output[2])

    @staticmethod
    def backward(ctx, grad, _different, _variance):
        *tensors, different = ctx.saved_tensors
        need = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE]
        if torch.is_grad_enabled():
            found = composed.differentiable_bwd(grad, need, Clustered(*tensors), ctx.spec, engines.functions())
        else:
            found = bwd(grad, different, need, *tensors, *ctx.spec)
        g_x, g_centers, g_variance = (g if n else None for g, n in zip(found, need, strict=True))
        return g_x, None, None, g_centers, g_variance, None


def differentiable(inputs: Clustered, spec: MagnetSpec) -> tuple[Tensor, Tensor]:
    """(loss, variance before its floor) for checked arguments; functional.magnet_loss has the formula."""
    value, _, variance = _Forward.apply(*inputs, spec)
    return value, variance

"""proxy_nca: the whole Proxy-NCA loss as one op; losses/proxy_nca.py has the formula.

``fwd`` returns the reduced loss and both log-sum-exps of each row; ``bwd`` returns the gradients of embeddings, proxies
and scale. Both run fused where the backend has a fused kernel. A backward that may be differentiated again runs as the
composition in backends/composed/proxy_nca.py, every piece of which is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.composed import proxy_nca as composed
from . import choice, engines
from .contract import accumulate_dtype, check_values
from .library import filled, gradients_like, known_signature, register, without_autocast
from .signatures import Proxied, ProxySpec

# Positions of the tensors that may need a gradient.
DIFFERENTIABLE = (0, 1, 3)


def _fwd(inputs: Proxied, spec: ProxySpec) -> tuple[Tensor, ...]:
    check_values(composed.bank_of(inputs), spec.ignore_index, first_class=spec.first_class)
    with without_autocast(inputs.x.device.type):
        backend = choice.BACKENDS[spec.backend]
        if backend.fuses("proxy_nca", inputs):
            return backend.proxy_nca_fwd(inputs, spec)
        return composed.proxy_nca_fwd(inputs, spec, engines.kernels(spec.backend))


def _fwd_fake(inputs: Proxied, spec: ProxySpec) -> tuple[Tensor, ...]:
    acc, n = accumulate_dtype(spec.dtype), inputs.x.size(0)
    shapes = ((n,) if spec.reduction == "none" else (), (n,), (n,))
    return tuple(inputs.x.new_empty(shape, dtype=acc) for shape in shapes)


def _bwd(grad, same, different, needs, inputs: Proxied, spec: ProxySpec) -> tuple[Tensor, ...]:
    with without_autocast(inputs.x.device.type):
        backend, lse = choice.BACKENDS[spec.backend], (same, different)
        if backend.fuses("proxy_nca", inputs):
            found = backend.proxy_nca_bwd(grad, lse, needs, inputs, spec)
        else:
            found = composed.proxy_nca_bwd(grad, lse, needs, inputs, spec, engines.kernels(spec.backend))
        return filled(found, inputs.x, len(DIFFERENTIABLE))


def _bwd_fake(grad, same, different, needs, inputs: Proxied, spec: ProxySpec) -> tuple[Tensor, ...]:
    return gradients_like([inputs[i] for i in DIFFERENTIABLE], needs, inputs.x)


fwd = register("proxy_nca_fwd", Proxied, ProxySpec, 3, _fwd, _fwd_fake)
_BEFORE = "Tensor grad, Tensor same, Tensor different, bool[] needs"
bwd = register("proxy_nca_bwd", Proxied, ProxySpec, 3, _bwd, _bwd_fake, _BEFORE)


@known_signature
class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, y, scale, weight, spec):
        return fwd(x, w, y, scale, weight, *spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.spec = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, grad, _same, _different):
        *tensors, same, different = ctx.saved_tensors
        need = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE]
        if torch.is_grad_enabled():
            found = composed.differentiable_bwd(grad, need, Proxied(*tensors), ctx.spec, engines.functions())
        else:
            found = bwd(grad, same, different, need, *tensors, *ctx.spec)
        g_x, g_w, g_scale = (g if n else None for g, n in zip(found, need, strict=True))
        return g_x, g_w, None, g_scale, None, None


def differentiable(inputs: Proxied, spec: ProxySpec) -> Tensor:
    """The loss for checked arguments; functional.proxy_nca_loss has the formula."""
    return _Forward.apply(*inputs, spec)[0]

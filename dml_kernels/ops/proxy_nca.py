"""proxy_nca: the whole Proxy-NCA loss as one op; losses/proxy_nca.py has the formula.

``fwd`` gives the reduced loss and both log-sum-exps of each row; ``bwd`` the gradients of embeddings, proxies and
scale. A backend fuses both as it can. Where somebody may differentiate again, the backward runs as the composition in
composed/proxy_nca.py, every piece of which is differentiable.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract import Bank, Spec, accumulate_dtype, check_values
from .fused import composed, fused_or_composed
from .library import filled, gradients_like, known_signature, register, without_autocast


class Proxied(NamedTuple):
    """x (N, D) rows; w (M, D) proxies; y (N,) int64 rows of w, or ignore_index; scale () or (N,) beside the number in
    the spec, or None; weight (N,) of the rows, or None.
    """

    x: Tensor
    w: Tensor
    y: Tensor
    scale: Tensor | None
    weight: Tensor | None


class ProxySpec(NamedTuple):
    """The numbers of one loss, the product dtype, and who computes it."""

    factor: float
    exclude_positive: bool
    label_smoothing: float
    eps: float
    ignore_index: int
    reduction: str
    dtype: torch.dtype
    backend: str

    @property
    def lse(self) -> Spec:
        """The comparison behind it."""
        logit, sums = [self.factor, 0.0, self.factor, 0.0], self.label_smoothing > 0
        return Spec(
            "sqeuclidean", True, logit, self.eps, self.ignore_index, self.dtype, sums, False, "linear", [], self.backend
        )


_INPUTS = "Tensor x, Tensor w, Tensor y, Tensor? scale, Tensor? weight"
_SPEC = (
    "float factor, bool exclude_positive, float label_smoothing, float eps, int ignore_index, str reduction, "
    "ScalarType dtype, str backend"
)
N_INPUTS, N_SPEC = 5, 8
# Positions of the tensors that may need a gradient.
DIFFERENTIABLE = (0, 1, 3)


def bank_of(inputs: Proxied) -> Bank:
    """The rows against the proxies, each its own label."""
    return Bank(inputs.x, inputs.w, inputs.y, None, None, inputs.scale, None, None)


def _split(args: tuple[Any, ...]) -> tuple[Proxied, ProxySpec]:
    return Proxied(*args[:N_INPUTS]), ProxySpec(*args[N_INPUTS:])


def _fwd(*args: Any) -> tuple[Tensor, ...]:
    inputs, spec = _split(args)
    check_values(bank_of(inputs), spec.ignore_index)
    with without_autocast(inputs.x.device.type):
        return fused_or_composed("proxy_nca", spec.backend).proxy_nca_fwd(inputs, spec)


def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, spec = _split(args)
    acc, n = accumulate_dtype(spec.dtype), inputs.x.size(0)
    shapes = ((n,) if spec.reduction == "none" else (), (n,), (n,))
    return tuple(inputs.x.new_empty(shape, dtype=acc) for shape in shapes)


def _bwd(*args: Any) -> tuple[Tensor, ...]:
    grad, same, different, needs = args[:4]
    inputs, spec = _split(args[4:])
    with without_autocast(inputs.x.device.type):
        found = fused_or_composed("proxy_nca", spec.backend).proxy_nca_bwd(grad, same, different, needs, inputs, spec)
        return filled(found, inputs.x, len(DIFFERENTIABLE))


def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    needs = args[3]
    inputs, _ = _split(args[4:])
    return gradients_like([inputs[i] for i in DIFFERENTIABLE], needs, inputs.x)


fwd = register("proxy_nca_fwd", f"({_INPUTS}, {_SPEC}) -> (Tensor, Tensor, Tensor)", _fwd, _fwd_fake)
bwd = register(
    "proxy_nca_bwd",
    f"(Tensor grad, Tensor same, Tensor different, bool[] needs, {_INPUTS}, {_SPEC}) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


@known_signature
class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x, w, y, scale, weight,
        factor, exclude_positive, label_smoothing, eps, ignore_index, reduction, dtype, backend,
    ):  # fmt: skip
        return fwd(
            x, w, y, scale, weight,
            factor, exclude_positive, label_smoothing, eps, ignore_index, reduction, dtype, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:N_INPUTS], *output[1:])
        ctx.spec = inputs[N_INPUTS:]
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, grad, _same, _different):
        *tensors, same, different = ctx.saved_tensors
        need = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE]
        if torch.is_grad_enabled():
            found = composed("proxy_nca").differentiable_backward(grad, need, Proxied(*tensors), ProxySpec(*ctx.spec))
        else:
            found = bwd(grad, same, different, need, *tensors, *ctx.spec)
        g_x, g_w, g_scale = (g if n else None for g, n in zip(found, need, strict=True))
        return g_x, g_w, None, g_scale, None, *(None,) * N_SPEC


def proxy_nca(inputs: Proxied, spec: ProxySpec) -> Tensor:
    """The loss for checked arguments; see functional.proxy_nca_loss."""
    return _Forward.apply(*inputs, *spec)[0]

"""normalized_distance: the whole N x M matrix of similarities or distances; its backward goes through it in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from . import choice
from .contract import apart, check_eps, check_pair, product_dtype, split_metric
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


def differentiable(inputs: Matrices, spec: DistanceSpec) -> Tensor:
    """normalized_distance for checked arguments, on the backend that the spec names."""
    return _Forward.apply(*inputs, spec)


def normalized_distance(
    x: Tensor,
    w: Tensor,
    metric: str = "euclidean",
    *,
    normalize: bool = True,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """All N x M similarities or distances, with no N x M temporary in the backward.

    ``cosine`` x^.w^ and ``dot`` x.w are similarities (larger is closer); ``sqeuclidean`` |u - p|^2 and ``euclidean``
    |u - p| are distances, of unit vectors u = x^, p = w^ unless ``normalize=False``. Small distances are summed from
    differences, so identical rows give exactly 0; the gradient at distance zero is 0.

    Args:
        x: (N, D) rows.
        w: (M, D) bank. Its dtype may differ from that of x.
        metric: ``cosine``, ``dot``, ``sqeuclidean`` or ``euclidean``.
        normalize: compare unit vectors (``cosine`` always does, ``dot`` never).
        eps: the floor under a norm.
        backend: overrides the choice of backend for this call.

    Returns:
        (N, M) in the product dtype. That is fp64 where either input is fp64; else autocast's dtype where autocast is
        on; else the dtype of the inputs. Where those differ, it is the half-precision dtype with fp32, and fp32 for
        fp16 with bf16. Differentiable twice.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or metric; the message names the fix.
    """
    check_pair(x, w)
    return matrix_in(product_dtype(x, w), x, w, metric, normalize=normalize, eps=eps, backend=backend)


def matrix_in(
    dtype: torch.dtype, x: Tensor, w: Tensor, metric: str, *, normalize: bool, eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """:func:`normalized_distance` of a checked pair, multiplied and returned in ``dtype``."""
    base, unit = split_metric(metric, normalize, plain_dot=True)
    inputs = Matrices(x, apart(w, x))
    spec = DistanceSpec(metric=base, normalize=unit, eps=check_eps(eps), dtype=dtype)
    spec = choice.settle("normalized_distance", inputs, spec, backend)
    if spec.backend == choice.REFERENCE:
        return choice.reference.normalized_distance(inputs, spec)
    return differentiable(inputs, spec)

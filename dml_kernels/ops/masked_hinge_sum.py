"""masked_hinge_sum: each row's sum of relu(k s + o + t) over the bank entries of its label, and of all other labels.

As in masked_logsumexp three registered ops and two autograd Functions. The indicator of a positive term is constant, so
the first derivative weighs scores by g k where a term is positive, and the second derivative is that of the scores
alone. What is relative to the row's own positive is settled here, for every backend alike: the positive's score moves
into the row's offset, and its gradient, minus k g times the count of positive terms, into its own place of the tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend
from .contract import Bank, accumulate_dtype, check_thresholds, check_values
from .library import filled, gradients_like, known_signature, register, without_autocast

TensorTuple = tuple[Tensor, ...]


class Hinged(NamedTuple):
    """The tensors of one call: as in Bank, and the thresholds of both sets, each (), (N,) or None."""

    x: Tensor
    w: Tensor
    y: Tensor
    c: Tensor | None
    exclude: Tensor | None
    t_same: Tensor | None
    t_different: Tensor | None


class HingeSpec(NamedTuple):
    """The numbers of one call; ``hinge`` is (k_same, o_same, k_different, o_different)."""

    metric: str
    normalize: bool
    hinge: list[float]
    relative: bool
    eps: float
    ignore_index: int
    dtype: torch.dtype
    backend: str


class Lines(NamedTuple):
    """What a backend sees: term = relu(k s + offset), with k a number and the offset (N,), for same and different."""

    x: Tensor
    w: Tensor
    y: Tensor
    c: Tensor | None
    exclude: Tensor | None
    k: tuple[float, float]
    offset: tuple[Tensor, Tensor]


class Slopes(NamedTuple):
    """The gradient on a score: (N,) for positive terms of same and of different; ``own`` replaces it at the row's own
    label's entry (also an excluded one), or is None.
    """

    same: Tensor
    different: Tensor
    own: Tensor | None


_INPUTS = "Tensor x, Tensor w, Tensor y, Tensor? c, Tensor? exclude, Tensor? t_same, Tensor? t_different"
_SPEC = (
    "str metric, bool normalize, float[] hinge, bool relative, float eps, int ignore_index, ScalarType dtype, "
    "str backend"
)
_KEPT = "Tensor grad_same, Tensor grad_different, Tensor count_same, Tensor count_different, Tensor positive"
N_INPUTS, N_SPEC, N_KEPT = 7, 8, 5
# Positions of the tensors that may need a gradient: x, w, and both thresholds.
DIFFERENTIABLE = (0, 1, 5, 6)


def _split(args: tuple[Any, ...]) -> tuple[Hinged, HingeSpec]:
    return Hinged(*args[:N_INPUTS]), HingeSpec(*args[N_INPUTS:])


def _lines(inputs: Hinged, spec: HingeSpec, positive: Tensor) -> Lines:
    k_same, o_same, k_different, o_different = spec.hinge
    acc, n = accumulate_dtype(spec.dtype), inputs.x.size(0)

    def offset(o: float, t: Tensor | None) -> Tensor:
        base = inputs.x.new_full((n,), o, dtype=acc)
        return base if t is None else base + t.to(acc)

    same, different = offset(o_same, inputs.t_same), offset(o_different, inputs.t_different)
    if spec.relative:  # k (s_iy - s_iy) is 0, whatever the rounding
        k_same, different = 0.0, different - k_different * positive
    return Lines(*inputs[:5], (k_same, k_different), (same, different))


def _slopes(grads: TensorTuple, counts: TensorTuple, lines: Lines, relative: bool) -> Slopes:
    acc = lines.offset[0].dtype
    same, different = (g.to(acc) * k for g, k in zip(grads, lines.k, strict=True))
    return Slopes(same, different, -different * counts[1] if relative else None)


def _fwd(*args: Any) -> TensorTuple:
    inputs, spec = _split(args)
    check_values(Bank(*inputs[:5], None, None, None), spec.ignore_index)
    check_thresholds(inputs.t_same, inputs.t_different)
    with without_autocast(inputs.x.device.type):
        if spec.relative:
            positive = backend.BACKENDS["torch"].positive_scores(inputs, spec)
        else:
            positive = inputs.x.new_empty(0, dtype=accumulate_dtype(spec.dtype))
        out = backend.BACKENDS[spec.backend].masked_hinge_sum_fwd(_lines(inputs, spec, positive), spec)
    return (*out, positive)


def _fwd_fake(*args: Any) -> TensorTuple:
    inputs, spec = _split(args)
    acc, n = accumulate_dtype(spec.dtype), inputs.x.size(0)
    dtypes = (acc, acc, torch.int64, torch.int64)
    out = tuple(inputs.x.new_empty(n, dtype=dtype) for dtype in dtypes)
    return (*out, inputs.x.new_empty(n if spec.relative else 0, dtype=acc))


def _threshold_grad(grad: Tensor, count: Tensor, t: Tensor | None, need: bool) -> Tensor | None:
    if t is None or not need:
        return None
    per_row = grad.to(accumulate_dtype(grad.dtype)) * count
    return (per_row.sum() if t.dim() == 0 else per_row).to(t.dtype)


def _bwd(*args: Any) -> TensorTuple:
    grads, counts, positive, needs = args[:2], args[2:4], args[4], args[N_KEPT]
    inputs, spec = _split(args[N_KEPT + 1 :])
    g_x = g_w = None
    with without_autocast(inputs.x.device.type):
        if needs[0] or needs[1]:
            lines = _lines(inputs, spec, positive)
            slopes = _slopes(grads, counts, lines, spec.relative)
            g_x, g_w = backend.BACKENDS[spec.backend].masked_hinge_sum_bwd(slopes, needs[:2], lines, spec)
    thresholds = (inputs.t_same, inputs.t_different)
    g_t = [_threshold_grad(*v) for v in zip(grads, counts, thresholds, needs[2:], strict=True)]
    return filled((g_x, g_w, *g_t), inputs.x, 4)


def _bwd_fake(*args: Any) -> TensorTuple:
    needs = args[N_KEPT]
    inputs, _ = _split(args[N_KEPT + 1 :])
    return gradients_like([inputs[i] for i in DIFFERENTIABLE], needs, inputs.x)


def _dbl(*args: Any) -> TensorTuple:
    directions, grads, counts, positive = args[:4], args[4:6], args[6:8], args[8]
    inputs, spec = _split(args[4 + N_KEPT :])
    with without_autocast(inputs.x.device.type):
        lines = _lines(inputs, spec, positive)
        slopes = _slopes(grads, counts, lines, spec.relative)
        # One implementation for all backends: a chunk loop in plain PyTorch, bounded like theirs.
        along, d_x, d_w = backend.BACKENDS["torch"].masked_hinge_sum_dbl(directions[:2], slopes, lines, counts, spec)
    d_grads = []
    for grad, count, d, v in zip(grads, counts, along, directions[2:], strict=True):
        d_grads.append((d if v.numel() == 0 else d + v.to(d.dtype) * count).to(grad.dtype))
    return (*d_grads, d_x, d_w)


def _dbl_fake(*args: Any) -> TensorTuple:
    inputs, _ = _split(args[4 + N_KEPT :])
    like = (args[4], args[5], inputs.x, inputs.w)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in like)


fwd = register(
    "masked_hinge_sum_fwd", f"({_INPUTS}, {_SPEC}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _fwd, _fwd_fake
)
bwd = register(
    "masked_hinge_sum_bwd",
    f"({_KEPT}, bool[] needs, {_INPUTS}, {_SPEC}) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)
dbl = register(
    "masked_hinge_sum_dbl",
    f"(Tensor v_x, Tensor v_w, Tensor v_t_same, Tensor v_t_different, {_KEPT}, {_INPUTS}, {_SPEC}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _dbl,
    _dbl_fake,
)


@known_signature
class _Backward(torch.autograd.Function):
    """The first derivative as a differentiable function of the incoming gradients and the inputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_same, grad_different, count_same, count_different, positive, needs,
        x, w, y, c, exclude, t_same, t_different,
        metric, normalize, hinge, relative, eps, ignore_index, dtype, backend,
    ):  # fmt: skip
        return bwd(
            grad_same, grad_different, count_same, count_different, positive, needs,
            x, w, y, c, exclude, t_same, t_different,
            metric, normalize, hinge, relative, eps, ignore_index, dtype, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:N_KEPT], *inputs[N_KEPT + 1 : N_KEPT + 1 + N_INPUTS])
        ctx.spec = inputs[N_KEPT + 1 + N_INPUTS :]

    @staticmethod
    def backward(ctx, v_x, v_w, v_t_same, v_t_different):
        g_same, g_different, x, w = dbl(v_x, v_w, v_t_same, v_t_different, *ctx.saved_tensors, *ctx.spec)
        return g_same, g_different, None, None, None, None, x, w, *(None,) * (N_INPUTS - 2 + N_SPEC)


@known_signature
class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x, w, y, c, exclude, t_same, t_different,
        metric, normalize, hinge, relative, eps, ignore_index, dtype, backend,
    ):  # fmt: skip
        return fwd(
            x, w, y, c, exclude, t_same, t_different,
            metric, normalize, hinge, relative, eps, ignore_index, dtype, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*output[2:], *inputs[:N_INPUTS])
        ctx.spec = inputs[N_INPUTS:]

    @staticmethod
    def backward(ctx, grad_same, grad_different, _count_same, _count_different, _positive):
        need = ctx.needs_input_grad
        needs = [need[i] for i in DIFFERENTIABLE]
        # The Function costs as much as a small kernel: only where somebody may differentiate again.
        first_derivative = _Backward.apply if torch.is_grad_enabled() else bwd
        count_same, count_different, positive, x, w, y, c, exclude, t_same, t_different = ctx.saved_tensors
        metric, normalize, hinge, relative, eps, ignore_index, dtype, backend = ctx.spec
        found = first_derivative(
            grad_same, grad_different, count_same, count_different, positive, needs,
            x, w, y, c, exclude, t_same, t_different,
            metric, normalize, hinge, relative, eps, ignore_index, dtype, backend,
        )  # fmt: skip
        g_x, g_w, g_t_same, g_t_different = (g if n else None for g, n in zip(found, needs, strict=True))
        return g_x, g_w, None, None, None, g_t_same, g_t_different, *(None,) * N_SPEC


def masked_hinge_sum(inputs: Hinged, spec: HingeSpec) -> TensorTuple:
    """(same, different, count_same, count_different) for checked arguments; see functional.masked_hinge_sum."""
    return _Forward.apply(*inputs, *spec)[:4]

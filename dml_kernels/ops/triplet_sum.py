"""triplet_sum: for each anchor the sum over all its triplets; functional has the formula.

Two registered ops and an autograd Function. Where somebody may differentiate again, the backward is that of a dense
expression, which holds the N x M scores and a term for every triplet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import by_class
from ..torch_backend import triplets
from ..torch_backend.triplets import Points, TripletSpec
from .contract import Bank, check_values
from .library import filled, gradients_like, known_signature, register, without_autocast
from .positive_pair_sum import again, scores, sums_like

_POINTS = "Tensor x, Tensor w, Tensor y, Tensor c, Tensor? exclude"
_SPEC = (
    "float margin, bool smooth, bool swap, str metric, bool normalize, float eps, int ignore_index, ScalarType dtype"
)
N_POINTS, N_SPEC = 5, 8


def _split(args: tuple[Any, ...]) -> tuple[Points, TripletSpec]:
    return Points(*args[:N_POINTS]), TripletSpec(*args[N_POINTS:])


def _fwd(*args: Any) -> tuple[Tensor, ...]:
    points, spec = _split(args)
    check_values(Bank(*points, None, None, None), spec.ignore_index)
    with without_autocast(points.x.device.type):
        return triplets.fwd(points, spec)


def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    points, spec = _split(args)
    return sums_like(points.x, points.x.size(0), spec.dtype)


def _bwd(*args: Any) -> tuple[Tensor, ...]:
    grad, needs = args[:2]
    points, spec = _split(args[2:])
    with without_autocast(points.x.device.type):
        return filled(triplets.bwd(grad, needs, points, spec), points.x, 2)


def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    needs, points = args[1], _split(args[2:])[0]
    return gradients_like(points[:2], needs, points.x)


fwd = register("triplet_sum_fwd", f"({_POINTS}, {_SPEC}) -> (Tensor, Tensor, Tensor)", _fwd, _fwd_fake)
bwd = register(
    "triplet_sum_bwd", f"(Tensor grad, bool[] needs, {_POINTS}, {_SPEC}) -> (Tensor, Tensor)", _bwd, _bwd_fake
)


def _differentiable(grad: Tensor, needs: list[bool], points: Points, spec: TripletSpec) -> list[Tensor | None]:
    same, different = by_class.members(points.y, points.c, points.exclude, spec.ignore_index)
    x, w = (t.view_as(t) for t in points[:2])
    between = scores(w, w, spec) if spec.swap else None
    total, _, _ = by_class.triplet_sum(scores(x, w, spec), same, different, spec.margin, spec.smooth, between)
    return again(total, (x, w), needs, grad)


@known_signature
class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, y, c, exclude, margin, smooth, swap, metric, normalize, eps, ignore_index, dtype):
        return fwd(x, w, y, c, exclude, margin, smooth, swap, metric, normalize, eps, ignore_index, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:N_POINTS])
        ctx.spec = inputs[N_POINTS:]
        ctx.mark_non_differentiable(output[1], output[2])

    @staticmethod
    def backward(ctx, grad, _number, _active):
        x, w, y, c, exclude = ctx.saved_tensors
        margin, smooth, swap, metric, normalize, eps, ignore_index, dtype = ctx.spec
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
        if torch.is_grad_enabled():
            found = _differentiable(grad, needs, Points(x, w, y, c, exclude), TripletSpec(*ctx.spec))
        else:
            found = bwd(
                grad, needs, x, w, y, c, exclude, margin, smooth, swap, metric, normalize, eps, ignore_index, dtype
            )
        g_x, g_w = (g if need else None for g, need in zip(found, needs, strict=True))
        return g_x, g_w, None, None, None, *(None,) * N_SPEC


def triplet_sum(points: Points, spec: TripletSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(total, number, active) for checked arguments; see functional.triplet_sum."""
    return _Forward.apply(*points, *spec)

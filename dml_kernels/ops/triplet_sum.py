"""triplet_sum: for each anchor the sum over all its triplets; functional has the formula.

Two registered ops and an autograd Function. Where somebody may differentiate again, the backward is that of a dense
expression, which holds the N x M scores and a term for every triplet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.torch import triplets
from ..reference import by_class
from .contract import check_values
from .library import filled, gradients_like, known_signature, register, without_autocast
from .positive_pair_sum import again, scores, sums_like
from .signatures import Bank, Points, TripletSpec


def _fwd(points: Points, spec: TripletSpec) -> tuple[Tensor, ...]:
    check_values(Bank(*points), spec.ignore_index)
    with without_autocast(points.x.device.type):
        return triplets.fwd(points, spec)


def _fwd_fake(points: Points, spec: TripletSpec) -> tuple[Tensor, ...]:
    return sums_like(points.x, points.x.size(0), spec.dtype)


def _bwd(grad, needs, points: Points, spec: TripletSpec) -> tuple[Tensor, ...]:
    with without_autocast(points.x.device.type):
        return filled(triplets.bwd(grad, needs, points, spec), points.x, 2)


def _bwd_fake(grad, needs, points: Points, spec: TripletSpec) -> tuple[Tensor, ...]:
    return gradients_like(points[:2], needs, points.x)


fwd = register("triplet_sum_fwd", Points, TripletSpec, 3, _fwd, _fwd_fake)
bwd = register("triplet_sum_bwd", Points, TripletSpec, 2, _bwd, _bwd_fake, "Tensor grad, bool[] needs")


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
    def forward(x, w, y, c, exclude, spec):
        return fwd(x, w, y, c, exclude, *spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.spec = inputs
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(output[1], output[2])

    @staticmethod
    def backward(ctx, grad, _number, _active):
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
        if torch.is_grad_enabled():
            found = _differentiable(grad, needs, Points(*ctx.saved_tensors), ctx.spec)
        else:
            found = bwd(grad, needs, *ctx.saved_tensors, *ctx.spec)
        g_x, g_w = (g if need else None for g, need in zip(found, needs, strict=True))
        return g_x, g_w, None, None, None, None


def triplet_sum(points: Points, spec: TripletSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(total, number, active) for checked arguments; see functional.triplet_sum."""
    return _Forward.apply(*points, spec)

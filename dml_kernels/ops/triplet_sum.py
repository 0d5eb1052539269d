"""triplet_sum: for each anchor the sum over all its triplets; the function's docstring has the formula.

There are two registered ops and an autograd Function. A backward that may be differentiated again is that of a dense
expression, which holds the N x M scores and a term for every triplet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pairs import dense
from ..pairs.sets import sets_of
from . import choice, own_bank
from .checks import check_flag, check_number
from .contract import apart, check_comparison, check_values, with_labels
from .library import filled, gradients_like, known_signature, register, without_autocast
from .positive_pair_sum import TermSums, again, scores, sums_like
from .signatures import Bank, Points, TripletSpec


def _fwd(points: Points, spec: TripletSpec) -> tuple[Tensor, ...]:
    points = own_bank.spelled_out(points, spec.own)
    check_values(Bank(*points), spec.ignore_index)
    with without_autocast(points.x.device.type):
        return choice.BACKENDS[spec.backend].triplet_sum_fwd(points, spec)


def _fwd_fake(points: Points, spec: TripletSpec) -> tuple[Tensor, ...]:
    return sums_like(points.x, points.x.size(0), spec.dtype)


def _bwd(grad, needs, points: Points, spec: TripletSpec) -> tuple[Tensor, ...]:
    with without_autocast(points.x.device.type):
        both, inputs = own_bank.needs_of_both(needs, points), own_bank.spelled_out(points, spec.own)
        out = choice.BACKENDS[spec.backend].triplet_sum_bwd(grad, both, inputs, spec)
    return filled(own_bank.added(out, points), points.x, 2)


def _bwd_fake(grad, needs, points: Points, spec: TripletSpec) -> tuple[Tensor, ...]:
    return gradients_like(points[:2], needs, points.x)


fwd = register("triplet_sum_fwd", Points, TripletSpec, 3, _fwd, _fwd_fake)
bwd = register("triplet_sum_bwd", Points, TripletSpec, 2, _bwd, _bwd_fake, "Tensor grad, bool[] needs")


def _differentiable(grad: Tensor, needs: list[bool], points: Points, spec: TripletSpec) -> list[Tensor | None]:
    whole = own_bank.spelled_out(points, spec.own)
    same, different, _ = sets_of(*whole[2:], spec.ignore_index, slice(0, whole.w.size(0)))
    x = points.x.view_as(points.x)
    w = x if points.w is None else points.w.view_as(points.w)
    between = scores(w, w, spec) if spec.swap else None
    total, _, _ = dense.triplet_sum(scores(x, w, spec), same, different, spec.margin, spec.smooth, between)
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


def triplet_sum(
    x: Tensor,
    w: Tensor | None = None,
    y: Tensor | None = None,
    c: Tensor | None = None,
    *,
    margin: float,
    smooth: bool = False,
    swap: bool = False,
    metric: str = "cosine",
    normalize: bool = False,
    exclude: Tensor | None = None,
    own: bool = False,
    ignore_index: int = -100,
    eps: float = 1e-12,
    backend: str | None = None,
) -> TermSums:
    """For each anchor the sum over all its positives p (c_p = y_i) and negatives n (c_n != y_i), exactly::

        sum_p sum_n relu(s_in - s_ip + margin)          smooth: log(1 + exp(.));  swap: max(s_in, s_pn) for s_in

    with s as in :func:`masked_logsumexp`; s_pn compares two bank entries. Without ``smooth`` and ``swap`` the terms
    separate, and for K positives of a row the time in addition to the products is O(N M log K); with either option it
    is O(N M K). In both cases the memory in addition to the gradients is bounded. A second derivative goes through a
    dense expression with a term for every triplet.

    Args:
        x: (N, D) anchors.
        w: (M, D) bank, whose dtype may differ from that of x; None: x.
        y: (N,) int64 labels of the anchors.
        c: (M,) int64 labels of the bank. None: each entry's index, where y must hold bank rows or ``ignore_index``; or
            y if ``w`` is None.
        margin: how much larger the score of a positive must be than that of a negative.
        smooth, swap: the variants above.
        metric: ``cosine``, ``dot``, ``sqeuclidean`` or ``euclidean``.
        normalize: compare unit vectors. ``cosine`` always does; ``dot`` with it is ``cosine``.
        exclude: (N,) int64 bank index that is in no triplet of the anchor, -1 for none.
        own: where ``w`` is None, keep the row's own copy, which is left out otherwise, in addition to ``exclude``.
        ignore_index: anchors with this label, and bank entries with this label in ``c``, are in no triplet.
        eps: the floor under a norm.
        backend: overrides the choice of backend for this call.

    Returns:
        TermSums. ``total`` is in fp32 (fp64 where either input is fp64), and 0 with a zero gradient for an anchor
        without positives or negatives.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value; the message names the fix.
        RuntimeError: no backend, or not the requested one, runs this combination.
    """
    y, numbers = check_comparison(x, w, y, c, exclude, own, metric, normalize, eps, ignore_index)
    y, c, numbers["ignore_index"] = with_labels(x, w, y, c, exclude, numbers["ignore_index"])
    margin, smooth, swap = check_number("margin", margin), check_flag("smooth", smooth), check_flag("swap", swap)
    points = Points(x, apart(w, x), y, c, exclude)
    spec = TripletSpec(**numbers, margin=margin, smooth=smooth, swap=swap)
    spec = choice.settle("triplet_sum", points, spec, backend)
    if spec.backend == choice.REFERENCE:
        return TermSums(*choice.reference.triplet_sum(own_bank.spelled_out(points, spec.own), spec))
    return TermSums(*_Forward.apply(*points, spec))

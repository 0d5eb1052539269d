"""positive_pair_sum: for each row the sum of a term over its positives; functional has the formulas.

Two registered ops and an autograd Function. Where somebody may differentiate again, the backward is that of a dense
expression, which holds the N x M scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.torch import positives
from ..reference import by_class
from .contract import accumulate_dtype, check_values
from .library import filled, gradients_like, known_signature, register, without_autocast
from .normalized_distance import normalized_distance
from .signatures import Bank, DistanceSpec, Matrices, Pairs, PairSpec

DIFFERENTIABLE = (0, 1, 5, 6)


def _fwd(pairs: Pairs, spec: PairSpec) -> tuple[Tensor, ...]:
    check_values(Bank(*pairs[:5]), spec.ignore_index)
    with without_autocast(pairs.x.device.type):
        return positives.fwd(pairs, spec)


def _fwd_fake(pairs: Pairs, spec: PairSpec) -> tuple[Tensor, ...]:
    n = pairs.x.size(0)
    return sums_like(pairs.x, n, spec.dtype)


def sums_like(x: Tensor, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(n, dtype=accumulate_dtype(dtype)),
        x.new_empty(n, dtype=torch.int64),
        x.new_empty(n, dtype=torch.int64),
    )


def _bwd(grad, needs, pairs: Pairs, spec: PairSpec) -> tuple[Tensor, ...]:
    with without_autocast(pairs.x.device.type):
        return filled(positives.bwd(grad, needs, pairs, spec), pairs.x, len(DIFFERENTIABLE))


def _bwd_fake(grad, needs, pairs: Pairs, spec: PairSpec) -> tuple[Tensor, ...]:
    return gradients_like([pairs[i] for i in DIFFERENTIABLE], needs, pairs.x)


fwd = register("positive_pair_sum_fwd", Pairs, PairSpec, 3, _fwd, _fwd_fake)
bwd = register("positive_pair_sum_bwd", Pairs, PairSpec, 4, _bwd, _bwd_fake, "Tensor grad, bool[] needs")


def scores(x: Tensor, w: Tensor, spec: Any) -> Tensor:
    """The N x M scores as a Function that can be differentiated twice, in the accumulation dtype."""
    acc = accumulate_dtype(spec.dtype)
    of = DistanceSpec(metric=spec.metric, normalize=spec.normalize, eps=spec.eps, dtype=acc, backend="torch")
    out = normalized_distance(Matrices(x, w.view_as(w)), of)
    return out if spec.metric == "dot" else -out


def again(total: Tensor, leaves: tuple[Tensor | None, ...], needs: list[bool], grad: Tensor) -> list[Tensor | None]:
    """The gradients of <grad, total> in the leaves that need one, differentiable in their turn."""
    wanted = [t for t, need in zip(leaves, needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(total, wanted, grad, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needs]


def _differentiable(grad: Tensor, needs: list[bool], pairs: Pairs, spec: PairSpec) -> list[Tensor | None]:
    same, _ = by_class.members(pairs.y, pairs.c, pairs.exclude, spec.ignore_index)
    acc = accumulate_dtype(spec.dtype)
    # Leaves of their own: what the caller's tensors hang from is not this derivative's.
    x, w, u = (t.view_as(t) for t in (pairs.x, pairs.w, pairs.u))
    v = None if pairs.v is None else pairs.v.view_as(pairs.v)
    total, _, _ = by_class.positive_pair_sum(
        scores(x, w, spec), same, u.to(acc), None if v is None else v.to(acc),
        lambda s, u, v: positives.term(s, u, v, spec),
    )  # fmt: skip
    return again(total, (x, w, u, v), needs, grad)


@known_signature
class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, y, c, exclude, u, v, spec):
        return fwd(x, w, y, c, exclude, u, v, *spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.spec = inputs
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(output[1], output[2])

    @staticmethod
    def backward(ctx, grad, _number, _active):
        needs = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE]
        if torch.is_grad_enabled():
            found = _differentiable(grad, needs, Pairs(*ctx.saved_tensors), ctx.spec)
        else:
            found = bwd(grad, needs, *ctx.saved_tensors, *ctx.spec)
        g_x, g_w, g_u, g_v = (g if need else None for g, need in zip(found, needs, strict=True))
        return g_x, g_w, None, None, None, g_u, g_v, None


def positive_pair_sum(pairs: Pairs, spec: PairSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(total, number, active) for checked arguments; see functional.positive_pair_sum."""
    return _Forward.apply(*pairs, spec)

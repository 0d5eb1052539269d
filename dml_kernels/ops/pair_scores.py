"""pair_scores: the scores of listed pairs, a block of pairs at a time, with a backward that adds in a fixed order.

One implementation serves every device: `dml_kernels/backends/torch/listed.py`, which states the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import choice
from .checks import check_tensor
from .contract import (
    accumulate_dtype,
    apart,
    check_eps,
    check_pair,
    check_pair_indices,
    check_vector,
    product_dtype,
    split_metric,
)
from .library import filled, gradients_like, known_signature, register, without_autocast
from .signatures import Listed, ScoresSpec


def _fwd(pairs: Listed, spec: ScoresSpec) -> Tensor:
    check_pair_indices(pairs.rows, pairs.cols, pairs.x.size(0), pairs.w.size(0))
    with without_autocast(pairs.x.device.type):
        return choice.BACKENDS["torch"].pair_scores_fwd(pairs, spec)


def _bwd(grad, s, needs, pairs: Listed, spec: ScoresSpec) -> tuple[Tensor, ...]:
    with without_autocast(pairs.x.device.type):
        return filled(choice.BACKENDS["torch"].pair_scores_bwd(grad, s, needs, pairs, spec), pairs.x, 2)


fwd = register(
    "pair_scores_fwd", Listed, ScoresSpec, 1, _fwd,
    lambda pairs, spec: pairs.x.new_empty(pairs.rows.numel(), dtype=spec.dtype),
)  # fmt: skip
bwd = register(
    "pair_scores_bwd", Listed, ScoresSpec, 2, _bwd,
    lambda grad, s, needs, pairs, spec: gradients_like(pairs[:2], needs, pairs.x),
    "Tensor grad, Tensor s, bool[] needs",
)  # fmt: skip


@known_signature
class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, rows, cols, spec):
        return fwd(x, w, rows, cols, *spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.spec = inputs
        ctx.save_for_backward(output, *tensors)

    @staticmethod
    def backward(ctx, grad):
        s, *tensors = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        if torch.is_grad_enabled():
            g_x, g_w = choice.BACKENDS["torch"].pair_scores_differentiable_bwd(grad, Listed(*tensors), ctx.spec)
        else:
            g_x, g_w = bwd(grad, s, needs, *tensors, *ctx.spec)
        return g_x if needs[0] else None, g_w if needs[1] else None, None, None, None


def pair_scores(
    x: Tensor,
    w: Tensor,
    rows: Tensor,
    cols: Tensor,
    metric: str = "cosine",
    *,
    normalize: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """The scores of listed pairs: s_k compares row rows[k] of x with row cols[k] of w; larger is closer.

    The forward and the backward gather the rows of one block of pairs at a time. The backward adds up the pairs of a
    row in the order of the list, so that the same call gives the same bits. Two equal rows have exactly distance 0 and
    gradient 0.

    Args:
        x: (N, D) rows.
        w: (M, D) bank; x itself for pairs within a batch.
        rows, cols: (P,) int64, in [0, N) and [0, M). A pair may be listed more than once.
        metric: ``cosine``, ``dot``, ``sqeuclidean`` or ``euclidean``: u.p, x.w, -|u - p|^2 or -|u - p|.
        normalize: compare unit vectors. ``cosine`` always does; ``dot`` with it is ``cosine``.
        eps: the floor under a norm.

    Returns:
        (P,) in fp32, or fp64 where either input is fp64. Differentiable twice; the second derivative takes O(P D)
        memory.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device, metric or index; the message names the fix.
    """
    check_pair(x, w)
    for name, index in (("rows", rows), ("cols", cols)):
        check_tensor(name, index)
        check_vector(name, index, rows.numel(), x, integer=True)
    base, unit = split_metric(metric, normalize)
    w = apart(w, x)
    acc = accumulate_dtype(product_dtype(x, w))
    spec = ScoresSpec(metric=base, normalize=unit, eps=check_eps(eps), dtype=acc)
    return _Forward.apply(x, w, rows, cols, spec)

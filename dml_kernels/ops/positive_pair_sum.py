"""positive_pair_sum: for each row the sum of a term over its positives; the function's docstring has the formulas.

There are two registered ops and an autograd Function. A backward that may be differentiated again is that of a dense
expression, which holds the N x M scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pairs import dense
from ..pairs.sets import sets_of
from . import choice, own_bank
from .checks import check_choice, check_number, check_sequence
from .contract import accumulate_dtype, apart, check_comparison, check_values, check_vector, with_labels
from .library import filled, gradients_like, known_signature, register, without_autocast
from .normalized_distance import differentiable
from .signatures import Bank, DistanceSpec, Matrices, Pairs, PairSpec

DIFFERENTIABLE = (0, 1, 5, 6)
KINDS = {"softplus": 1, "lifted": 2}  # the number of parameters of each


def _fwd(pairs: Pairs, spec: PairSpec) -> tuple[Tensor, ...]:
    pairs = own_bank.spelled_out(pairs, spec.own)
    check_values(Bank(*pairs[:5]), spec.ignore_index)
    with without_autocast(pairs.x.device.type):
        return choice.BACKENDS[spec.backend].positive_pair_sum_fwd(pairs, spec)


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
        both, inputs = own_bank.needs_of_both(needs, pairs), own_bank.spelled_out(pairs, spec.own)
        out = choice.BACKENDS[spec.backend].positive_pair_sum_bwd(grad, both, inputs, spec)
    return filled(own_bank.added(out, pairs), pairs.x, len(DIFFERENTIABLE))


def _bwd_fake(grad, needs, pairs: Pairs, spec: PairSpec) -> tuple[Tensor, ...]:
    return gradients_like([pairs[i] for i in DIFFERENTIABLE], needs, pairs.x)


fwd = register("positive_pair_sum_fwd", Pairs, PairSpec, 3, _fwd, _fwd_fake)
bwd = register("positive_pair_sum_bwd", Pairs, PairSpec, 4, _bwd, _bwd_fake, "Tensor grad, bool[] needs")


def scores(x: Tensor, w: Tensor, spec: Any) -> Tensor:
    """The N x M scores, differentiable twice, in the accumulation dtype."""
    acc = accumulate_dtype(spec.dtype)
    of = DistanceSpec(metric=spec.metric, normalize=spec.normalize, eps=spec.eps, dtype=acc, backend="torch")
    out = differentiable(Matrices(x, w.view_as(w)), of)
    return out if spec.metric == "dot" else -out


def again(total: Tensor, leaves: tuple[Tensor | None, ...], needs: list[bool], grad: Tensor) -> list[Tensor | None]:
    """The gradients of <grad, total> in the leaves that need one; these gradients are differentiable."""
    wanted = [t for t, need in zip(leaves, needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(total, wanted, grad, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needs]


def _differentiable(grad: Tensor, needs: list[bool], pairs: Pairs, spec: PairSpec) -> list[Tensor | None]:
    whole = own_bank.spelled_out(pairs, spec.own)
    same = sets_of(*whole[2:5], spec.ignore_index, slice(0, whole.w.size(0))).same
    acc = accumulate_dtype(spec.dtype)
    # New leaves, because this derivative must not continue into the graph of the caller's tensors.
    x, u = (t.view_as(t) for t in (pairs.x, pairs.u))
    w = x if pairs.w is None else pairs.w.view_as(pairs.w)
    v = None if pairs.v is None else pairs.v.view_as(pairs.v)
    total, _, _ = dense.positive_pair_sum(scores(x, w, spec), same, u.to(acc), None if v is None else v.to(acc), spec)
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


class TermSums(NamedTuple):
    """For each row, (N,): the sum of its terms, and as int64 their number and the number of those above 0."""

    total: Tensor
    number: Tensor
    active: Tensor


def positive_pair_sum(
    x: Tensor,
    w: Tensor | None,
    y: Tensor,
    c: Tensor | None,
    u: Tensor,
    v: Tensor | None = None,
    *,
    kind: str,
    params: Sequence[float] = (1.0,),
    metric: str = "cosine",
    normalize: bool = False,
    exclude: Tensor | None = None,
    own: bool = False,
    ignore_index: int = -100,
    eps: float = 1e-12,
    backend: str | None = None,
) -> TermSums:
    """For each row the sum of a term over its positives j (c_j = y_i, j not ``exclude_i``), with s_ij as in
    :func:`masked_logsumexp`::

        kind="softplus", params=(k,)      log(1 + exp(u_i - k s_ij))
        kind="lifted",   params=(k, o)    relu(log(exp(u_i) + exp(v_j)) - k s_ij - o)^2 / 2

    Positives are found by class: a sort of the labels, then small products of rows with the entries of their classes.
    Nothing of size N x M or positives x negatives is built. The memory in addition to the gradients is bounded, even
    where one class holds all rows. A second derivative goes through a dense expression with the N x M scores.

    Args:
        x: (N, D) rows.
        w: (M, D) bank, whose dtype may differ from that of x; None: x.
        y: (N,) int64 labels of the rows.
        c: (M,) int64 labels of the bank. None: each entry's index, where y must hold bank rows or ``ignore_index``; or
            y if ``w`` is None.
        u: (N,) a value of each row's negatives, such as their log-sum-exp; it gets a gradient. -inf stands for no
            negatives: the softplus is then 0, and the logarithm in ``lifted`` is 0 if v_j is -inf too.
        v: (M,) the same value for each bank entry, which ``lifted`` needs; else None. It gets a gradient.
        kind, params: the term and its parameters.
        metric: ``cosine``, ``dot``, ``sqeuclidean`` or ``euclidean``.
        normalize: compare unit vectors. ``cosine`` always does; ``dot`` with it is ``cosine``.
        exclude: (N,) int64 bank index that is not a positive of the row, -1 for none.
        own: where ``w`` is None, keep the row's own copy, which is left out otherwise, in addition to ``exclude``.
        ignore_index: rows with this label have no positives.
        eps: the floor under a norm.
        backend: overrides the choice of backend for this call.

    Returns:
        TermSums. ``total`` is in fp32 (fp64 where either input is fp64), and 0 with a zero gradient for a row without
        positives.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value; the message names the fix.
        RuntimeError: no backend, or not the requested one, runs this combination.
    """
    y, numbers = check_comparison(x, w, y, c, exclude, own, metric, normalize, eps, ignore_index)
    y, c, numbers["ignore_index"] = with_labels(x, w, y, c, exclude, numbers["ignore_index"])
    check_vector("u", u, x.size(0), x, integer=False)
    check_vector("v", v, (x if w is None else w).size(0), x, integer=False)
    check_choice("kind", kind, KINDS)
    if (v is None) != (kind == "softplus"):
        raise ValueError(f"kind {kind!r} {'takes no' if kind == 'softplus' else 'needs'} v")
    given = check_sequence("params", params, "numbers")
    terms = [check_number(f"params[{i}]", value) for i, value in enumerate(given)]
    if len(terms) != KINDS[kind]:
        raise ValueError(f"kind {kind!r} takes {KINDS[kind]} params; got {len(terms)}")
    pairs = Pairs(x, apart(w, x), y, c, exclude, u, apart(v, u))
    spec = choice.settle("positive_pair_sum", pairs, PairSpec(**numbers, kind=kind, params=terms), backend)
    if spec.backend == choice.REFERENCE:
        return TermSums(*choice.reference.positive_pair_sum(own_bank.spelled_out(pairs, spec.own), spec))
    return TermSums(*_Forward.apply(*pairs, spec))

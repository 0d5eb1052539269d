"""Sums over a row's positives, and over its positives and negatives: what losses of pairs and of triplets need.

Part of :mod:`dml_kernels.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..backends.torch.positives import KINDS, term
from ..ops import choice as backends
from ..ops import contract
from ..ops import positive_pair_sum as _pairs
from ..ops import triplet_sum as _triplets
from ..ops.checks import check_choice, check_flag, check_integer, check_number, check_sequence
from ..ops.signatures import Bank, Pairs, PairSpec, Points, TripletSpec
from ..reference import by_class


class TermSums(NamedTuple):
    """Of each row, (N,): the sum of its terms; how many they are, and how many are over 0, as int64."""

    total: Tensor
    number: Tensor
    active: Tensor


def positive_pair_sum(
    x: Tensor,
    w: Tensor,
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
    ignore_index: int = -100,
    eps: float = 1e-12,
    backend: str | None = None,
) -> TermSums:
    """For each row the sum of a term over its positives j (c_j = y_i, j not ``exclude_i``), with s_ij as in
    :func:`masked_logsumexp`::

        kind="softplus", params=(k,)      log(1 + exp(u_i - k s_ij))
        kind="lifted",   params=(k, o)    relu(log(exp(u_i) + exp(v_j)) - k s_ij - o)^2 / 2

    Positives are found by class: a sort of the labels, then small products of rows with the entries of their classes.
    Nothing N x M, nothing of positives x negatives; memory beside the gradients is bounded, also where one class holds
    everything. A second derivative goes through a dense expression with the N x M scores.

    Args:
        x: (N, D) rows. w: (M, D) bank, in a dtype of its own, as :func:`masked_logsumexp` has it.
        y: (N,) int64 labels of the rows. c: (M,) int64 labels of the bank; None: each entry's own index, and labels
            must be bank rows, or ``ignore_index``.
        u: (N,), v: (M,) or None, what the row and the positive know of their negatives (log-sum-exps, say); each gets a
            gradient. -inf stands for no negatives: a softplus of 0, and where neither has any, a logarithm of 0.
        kind, params: the term and its numbers.
        metric, normalize: the score. exclude: (N,) int64 bank index that is not the row's positive, -1 for none.
        ignore_index: rows with this label have no positives. eps: guards the division by the norm.
        backend: overrides the choice of backend for this call.

    Returns:
        TermSums; total in fp32 (fp64 where either input is), 0 with a zero gradient for a row without positives.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value; the message names the fix.
        RuntimeError: no backend, or not the one asked for, runs this combination.
    """
    base, unit, eps, dtype, chosen = _checked("positive_pair_sum", x, w, y, c, exclude, metric, normalize, eps, backend)
    y, c, ignore_index = _labelled(x, w, y, c, exclude, ignore_index)
    contract.check_vector("u", u, x.size(0), x, integer=False)
    contract.check_vector("v", v, w.size(0), x, integer=False)
    check_choice("kind", kind, KINDS)
    if (v is None) != (kind == "softplus"):
        raise ValueError(f"kind {kind!r} {'takes no' if kind == 'softplus' else 'needs'} v")
    given = check_sequence("params", params, "numbers")
    numbers = [check_number(f"params[{i}]", value) for i, value in enumerate(given)]
    if len(numbers) != KINDS[kind]:
        raise ValueError(f"kind {kind!r} takes {KINDS[kind]} params; got {len(numbers)}")
    spec = PairSpec(
        kind=kind, params=numbers, metric=base, normalize=unit, eps=eps, ignore_index=ignore_index, dtype=dtype
    )
    v = contract.apart(v, u)
    if chosen == backends.REFERENCE:
        same, _ = by_class.members(y, c, exclude, ignore_index)
        s = reference.scores(x, w, base, unit, eps)
        return TermSums(*by_class.positive_pair_sum(s, same, u, v, lambda s, u, v: term(s, u, v, spec)))
    return TermSums(*_pairs.positive_pair_sum(Pairs(x, contract.apart(w, x), y, c, exclude, u, v), spec))


def triplet_sum(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    c: Tensor | None = None,
    *,
    margin: float,
    smooth: bool = False,
    swap: bool = False,
    metric: str = "cosine",
    normalize: bool = False,
    exclude: Tensor | None = None,
    ignore_index: int = -100,
    eps: float = 1e-12,
    backend: str | None = None,
) -> TermSums:
    """For each anchor the sum over all its positives p (c_p = y_i) and negatives n (c_n != y_i), exactly::

        sum_p sum_n relu(s_in - s_ip + margin)          smooth: log(1 + exp(.));  swap: max(s_in, s_pn) for s_in

    with s as in :func:`masked_logsumexp`; s_pn is between two bank entries. Without ``smooth`` and ``swap`` the terms
    separate: O(N M log K) time beside the products for K positives a row; with either O(N M K). Memory beside the
    gradients is bounded in both. A second derivative goes through a dense expression with a term for every triplet.

    Args:
        x: (N, D) anchors. w: (M, D) bank, in a dtype of its own, as :func:`masked_logsumexp` has it.
        y: (N,) int64 labels of the anchors. c: (M,) int64 labels of the bank; None: each entry's own index, and labels
            must be bank rows, or ``ignore_index``.
        margin: how much closer, as a score, a positive must be. smooth, swap: the variants above.
        metric, normalize: the score. exclude: (N,) int64 bank index that is in no triplet of the anchor, -1 for none.
        ignore_index: anchors with this label, and bank entries whose ``c`` is it, are in no triplet.
        eps: guards the division by the norm.
        backend: overrides the choice of backend for this call.

    Returns:
        TermSums; total in fp32 (fp64 where either input is), 0 with a zero gradient for an anchor without positives or
        negatives.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value; the message names the fix.
        RuntimeError: no backend, or not the one asked for, runs this combination.
    """
    base, unit, eps, dtype, chosen = _checked("triplet_sum", x, w, y, c, exclude, metric, normalize, eps, backend)
    y, c, ignore_index = _labelled(x, w, y, c, exclude, ignore_index)
    margin = check_number("margin", margin)
    smooth, swap = check_flag("smooth", smooth), check_flag("swap", swap)
    if chosen == backends.REFERENCE:
        same, different = by_class.members(y, c, exclude, ignore_index)
        s, between = (reference.scores(t, w, base, unit, eps) for t in (x, w))
        return TermSums(*by_class.triplet_sum(s, same, different, margin, smooth, between if swap else None))
    spec = TripletSpec(
        margin=margin, smooth=smooth, swap=swap, metric=base, normalize=unit, eps=eps,
        ignore_index=ignore_index, dtype=dtype,
    )  # fmt: skip
    return TermSums(*_triplets.triplet_sum(Points(x, contract.apart(w, x), y, c, exclude), spec))


def _checked(
    op: str, x: Tensor, w: Tensor, y: Tensor, c: Tensor | None, exclude: Tensor | None, metric: str, normalize: bool,
    eps: float, backend: str | None,
) -> tuple[str, bool, float, torch.dtype, str]:  # fmt: skip
    contract.check_pair(x, w)
    n, m = x.size(0), w.size(0)
    contract.check_members(x, m, y, c, exclude)
    base, unit = contract.split_metric(metric, normalize)
    eps = contract.check_eps(eps)
    dtype = contract.product_dtype(x, w)
    chosen = backends.choose(op, x.device, dtype, argument=backend, size=(n, m, x.size(1)))
    return base, unit, eps, dtype, chosen


def _labelled(
    x: Tensor, w: Tensor, y: Tensor, c: Tensor | None, exclude: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, int]:
    """Labels of rows and bank, and what marks the ignored ones; without ``c`` that is no bank entry's own index."""
    ignore_index = check_integer("ignore_index", ignore_index)
    if c is not None:
        return y, contract.apart(c, y), ignore_index
    if contract.values_can_be_read(y):
        contract.check_values(Bank(x, w, y, exclude=exclude), ignore_index)
    return torch.where(y == ignore_index, -1, y), torch.arange(w.size(0), device=x.device), -1

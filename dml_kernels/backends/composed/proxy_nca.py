"""The Proxy-NCA loss, composed of masked_logsumexp and operations on its N-sized results.

With u_i = L-_i - L+_i (a row has one positive, so L+ is its logit), h_i the incoming gradient of a row, which includes
its weight and the mean's divisor, e the label smoothing and Z_i the sum of all M logits::

    row = log(1 + exp u) + e (L+ - Z / M)     dL/dL- = h sigmoid(u)   dL/dL+ = h (e - sigmoid(u))   dL/dZ = -h e / M
    positive left out: row = u                dL/dL- = h              dL/dL+ = -h
    no positive here:  row = L- - e Z / M     dL/dL- = h                                            dL/dZ = -h e / M
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import logspace
from ...ops.signatures import Bank, Proxied, ProxySpec
from .engine import Engine


def bank_of(inputs: Proxied) -> Bank:
    """The comparison of the rows with the proxies, where the label of a proxy is its index."""
    return Bank(inputs.x, inputs.w, inputs.y, scale=inputs.scale)


def _contributes(different: Tensor, counted: Tensor, exclude_positive: bool) -> Tensor:
    """Which rows have a loss that is not 0 by definition."""
    # Where the positive is left out, a row without negatives contributes nothing; a NaN contributes.
    return counted & (different != -math.inf) if exclude_positive else counted


def elsewhere_of(y: Tensor, m: int, first_class: int) -> Tensor | None:
    """The rows (N,) of classes that are not among the m from ``first_class`` on; None where the bank holds all."""
    return None if first_class < 0 else (y < first_class) | (y >= first_class + m)


def rows_of(
    lse: Sequence[Tensor | None], counted: Tensor, exclude_positive: bool, label_smoothing: float, columns: int,
    elsewhere: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss of each row (N,) from what masked_logsumexp returns, 0 where not counted; autograd differentiates it.

    Rows ``elsewhere`` (N,) have no positive: L+ is left out.
    """
    same, different, sum_same, sum_different = lse
    assert same is not None
    assert different is not None
    if elsewhere is not None:
        same = same.masked_fill(elsewhere, 0)
    contributes = _contributes(different, counted, exclude_positive)
    u = (different - same).masked_fill(~contributes, 0 if exclude_positive else -math.inf)
    rows = u if exclude_positive else logspace.log1pexp(u)
    if elsewhere is not None:
        rows = torch.where(elsewhere & counted, u, rows)
    if label_smoothing:
        assert sum_same is not None
        assert sum_different is not None
        mean = (sum_same + sum_different) / columns
        rows = rows + label_smoothing * (same - mean).masked_fill(~counted, 0)
    return rows


def _row_factor(inputs: Proxied, counted: Tensor, like: Tensor, reduction: str) -> Tensor:
    """Each row's weight over the divisor, which for the mean is the total weight of the counted rows, else 1."""
    weight = counted.to(like.dtype) if inputs.weight is None else torch.where(counted, inputs.weight.to(like.dtype), 0)
    if reduction != "mean":
        return weight
    mass = weight.sum()
    return weight / torch.where(mass == 0, 1, mass)


def proxy_nca_fwd(inputs: Proxied, spec: ProxySpec, engine: Engine) -> tuple[Tensor, Tensor, Tensor]:
    """(the loss, L+ of each row, L- of each row)."""
    lse = engine.lse(bank_of(inputs), spec.lse)
    counted = inputs.y != spec.ignore_index
    elsewhere = elsewhere_of(inputs.y, inputs.w.size(0), spec.first_class)
    rows = rows_of(lse, counted, spec.exclude_positive, spec.label_smoothing, inputs.w.size(0), elsewhere)
    # By a mask and not by a factor of 0, because the loss of an ignored row may be NaN.
    value = torch.where(counted, rows * _row_factor(inputs, counted, rows, spec.reduction), 0)
    return value if spec.reduction == "none" else value.sum(), lse[0], lse[1]


def proxy_nca_bwd(grad, lse, needs, inputs: Proxied, spec: ProxySpec, engine: Engine) -> list[Tensor | None]:
    """The gradients of x, w and scale, None where not needed."""
    return _backward(grad, *lse, needs, inputs, spec, engine)


def differentiable_bwd(grad, needs, inputs: Proxied, spec: ProxySpec, engine: Engine) -> list[Tensor | None]:
    """As proxy_nca_bwd. With an engine of Functions the result is differentiable in grad and in all inputs."""
    same, different, *_ = engine.lse(bank_of(inputs), spec.lse)
    return _backward(grad, same, different, needs, inputs, spec, engine)


def _backward(
    grad: Tensor, same: Tensor, different: Tensor, needs: Sequence[bool], inputs: Proxied, spec: ProxySpec,
    engine: Engine,
) -> list[Tensor | None]:  # fmt: skip
    counted = inputs.y != spec.ignore_index
    contributes = _contributes(different, counted, spec.exclude_positive)
    h = torch.where(counted, grad * _row_factor(inputs, counted, same, spec.reduction), 0)
    if spec.exclude_positive:
        slope = contributes.to(same.dtype)
    else:
        slope = torch.sigmoid((different - same).masked_fill(~contributes, -math.inf))
    pulls, e = h * slope, spec.label_smoothing
    of_sums = h * (-e / inputs.w.size(0)) if e else h.new_zeros(0)
    grads = (h * e - pulls, pulls, of_sums, of_sums)
    wanted = [needs[0], needs[1], needs[2], False]
    found = engine.lse_bwd(grads, (same, different), wanted, bank_of(inputs), spec.lse)
    return [g if need else None for g, need in zip(found, needs, strict=False)]

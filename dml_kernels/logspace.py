"""Helpers for losses that live in log space, where an empty set is -inf and must give a zero gradient, never NaN."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)) with a gradient that is 0, not NaN, where an operand is -inf.

    ``torch.logaddexp(-inf, -inf)`` has a NaN gradient even behind ``torch.where``. Written as
    max + softplus(-|a - b|), with the difference taken only between finite operands.
    """
    both = (a > -math.inf) & (b > -math.inf)
    fa, fb = torch.where(both, a, 0), torch.where(both, b, 0)
    joint = torch.maximum(fa, fb) + torch.nn.functional.softplus(-(fa - fb).abs(), threshold=1e4)
    return torch.where(both, joint, torch.where(a > b, a, b))


def log1pexp(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact to the last bits of x's dtype; 0 with a zero gradient at -inf.

    ``log1pexp(b - a)`` is ``logaddexp(a, b) - a``: the cross-entropy of a positive a against the rest b.
    """
    return torch.nn.functional.softplus(x, threshold=40 if x.dtype == torch.float64 else 20)

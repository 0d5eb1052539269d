"""Functions in log space for the losses: an empty set is -inf and must give a zero gradient, never NaN."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def log1pexp(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact to the last bits of x's dtype; 0 with a zero gradient at -inf.

    ``log1pexp(b - a)`` is ``logaddexp(a, b) - a``, the cross-entropy of a positive a against the rest b. Mask x, not
    the result: ``torch.logaddexp(-inf, -inf)`` and -inf - -inf have NaN gradients even behind a ``torch.where``.
    """
    return softplus(x, threshold=40 if x.element_size() == 8 else 20)


def logaddexp(u: Tensor, v: Tensor, empty: float) -> Tensor:
    """log(exp(u) + exp(v)), broadcast, and ``empty`` where both are -inf. First and second derivatives are exact.

    ``torch.logaddexp`` has NaN second derivatives where one operand is -inf. The maximum that is factored out is a
    constant here, because autograd through it would give 0 where u and v are equal.
    """
    peak = torch.maximum(u, v).detach()
    none = peak == -torch.inf
    peak = torch.where(none, 0, peak)
    total = torch.exp(u - peak) + torch.exp(v - peak)
    return torch.where(none, empty, peak + torch.log(torch.where(none, 1, total)))

"""Log space, where the losses live: an empty set is -inf and must give a zero gradient, never NaN."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def log1pexp(x: Tensor) -> Tensor:
    """log(1 + exp(x)), to the last bits of x's dtype; 0 with a zero gradient at -inf.

    ``log1pexp(b - a)`` is ``logaddexp(a, b) - a``, the cross-entropy of a positive a against the rest b. Mask x, not
    the result: ``torch.logaddexp(-inf, -inf)`` and -inf - -inf have NaN gradients even behind a ``torch.where``.
    """
    return softplus(x, threshold=40 if x.element_size() == 8 else 20)

"""The batch as its own bank: replaces w=None by the tensors that it means, so that no backend need know it.

A backend gets x in the place of w, so it returns two gradients, that of the rows and that of the bank. Their sum is the
gradient of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .contract import check_no_bank_labels


def spelled_out(inputs: Any, own: bool) -> Any:
    """An op's tensors as a backend takes them: where w is None it is x, c is y, and the row's own copy is excluded.

    With ``own`` it is not. Where ``exclude`` is given in addition, each row leaves out two: (N, 2).
    """
    if inputs.w is not None:
        return inputs
    check_no_bank_labels(inputs.c)
    exclude, n = inputs.exclude, inputs.x.size(0)
    if not own:
        row = torch.arange(n, device=inputs.x.device)
        exclude = row if exclude is None else torch.stack((row, torch.where(exclude == row, -1, exclude)), 1)
    return inputs._replace(w=inputs.x, c=inputs.y, exclude=exclude)


def needs_of_both(needs: Sequence[bool], inputs: Any) -> list[bool]:
    """Which gradients (x, w, ...) a backend must return; where w is None, the gradient of x is the sum of two."""
    return list(needs) if inputs.w is not None else [needs[0], needs[0], *needs[2:]]


def added(grads: Sequence[Tensor | None], inputs: Any) -> list[Tensor | None]:
    """The gradients (x, w, ...) of an op from those of a backend; where w is None, the first two are added up for x."""
    if inputs.w is not None:
        return list(grads)
    x, w, *rest = grads
    if x is not None and w is not None:
        x = x.add_(w)
    return [x, None, *rest]


def directions_of_both(directions: Sequence[Tensor], inputs: Any) -> list[Tensor]:
    """The directions (x, w, ...) of a second derivative; where w is None, the bank's direction is that of the rows."""
    return list(directions) if inputs.w is not None else [directions[0], directions[0], *directions[2:]]

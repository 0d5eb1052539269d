"""The batch as its own bank: replaces w=None by the tensors that it means, so that no backend need know it.

A backend gets the tensors spelled out, with x in the place of w, and so returns two gradients of x, as the rows and as
the bank. Their sum is the gradient of x.
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
    """Which gradients (x, w, ...) a backend is asked for: that of x is the sum of two where w is None."""
    return list(needs) if inputs.w is not None else [needs[0], needs[0], *needs[2:]]


def added(grads: Sequence[Tensor | None], inputs: Any) -> list[Tensor | None]:
    """The gradients (x, w, ...) that a backend returns; where w is None both are of x, and are added up there."""
    if inputs.w is not None:
        return list(grads)
    x, w, *rest = grads
    if x is not None and w is not None:
        x = x.add_(w)
    return [x, None, *rest]


def directions_of_both(directions: Sequence[Tensor], inputs: Any) -> list[Tensor]:
    """Directions (x, w, ...) of a second derivative: where w is None the bank moves as the rows do."""
    return list(directions) if inputs.w is not None else [directions[0], directions[0], *directions[2:]]

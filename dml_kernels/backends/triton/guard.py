"""What a kernel reads by address, checked at the door: the registered ops can be called with anything.

The public functions have checked all of it. A launch takes some hundred times as long as this.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ...ops.contract import FLOATS, check_members, check_pair


def same_shape(grad: Tensor, *shape: int) -> None:
    """A gradient is as large as what it belongs to, and floating."""
    if tuple(grad.shape) != shape or grad.dtype not in FLOATS:
        raise ValueError(f"grad must be floating of shape {shape}; got {grad.dtype} {tuple(grad.shape)}")


def vectors(size: int, values: Iterable[Tensor | None]) -> None:
    """Floating vectors (size,), or one value for all; absent ones are None or empty."""
    for t in values:
        if t is None or t.numel() == 0:
            continue
        if t.dtype not in FLOATS or (t.dim() and t.shape != (size,)):
            raise ValueError(f"a vector must be floating of shape ({size},) or (); got {t.dtype} {tuple(t.shape)}")


def comparison(x: Tensor, w: Tensor, y: Tensor, c: Tensor | None, exclude: Tensor | None, centres: int = 1) -> None:
    """Rows, bank and labels that belong together."""
    check_pair(x, w)
    if w.size(0) % centres:
        raise ValueError(f"w must have whole classes of {centres} centres; got {w.size(0)} rows")
    check_members(x, w.size(0) // centres, y, c, exclude)

"""Checks of everything that a kernel reads by address, because the registered ops can be called with any arguments.

The public functions have already checked all of it. A launch takes about a hundred times as long as these checks.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ...ops.contract import FLOATS, check_members, check_pair


def same_shape(grad: Tensor, *shape: int) -> None:
    """Checks that a gradient is floating and has the shape of its tensor."""
    if tuple(grad.shape) != shape or grad.dtype not in FLOATS:
        raise ValueError(f"grad must be floating of shape {shape}; got {grad.dtype} {tuple(grad.shape)}")


def vectors(size: int, values: Iterable[Tensor | None]) -> None:
    """Checks for floating vectors (size,) or single values; one that is absent is None or empty."""
    for t in values:
        if t is None or t.numel() == 0:
            continue
        if t.dtype not in FLOATS or (t.dim() and t.shape != (size,)):
            raise ValueError(f"a vector must be floating of shape ({size},) or (); got {t.dtype} {tuple(t.shape)}")


def comparison(x: Tensor, w: Tensor, y: Tensor, c: Tensor | None, exclude: Tensor | None, centres: int = 1) -> None:
    """Checks that rows, bank and labels fit together."""
    check_pair(x, w)
    if w.size(0) % centres:
        raise ValueError(f"w must have whole classes of {centres} centres; got {w.size(0)} rows")
    check_members(x, w.size(0) // centres, y, c, exclude)

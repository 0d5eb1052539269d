"""Kernel launches on the device and current stream of the tensors, and a recorder for ahead-of-time compilation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

ACCUMULATE = {torch.float32: tl.float32, torch.float64: tl.float64}
PRODUCTS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

_recorders: list[Callable[..., None]] = []


@contextlib.contextmanager
def recorded(recorder: Callable[..., None]) -> Iterator[None]:
    """Passes every launch to ``recorder(kernel, grid, arguments, options)`` instead of running it."""
    _recorders.append(recorder)
    try:
        yield
    finally:
        _recorders.pop()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int,
) -> None:
    """Runs ``kernel`` over ``grid``."""
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if _recorders:
        _recorders[-1](kernel, grid, arguments, options)
        return
    if 0 in grid:
        return
    kernel[grid](**arguments, **options)


def on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device the current one, because launches go to the current device."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)

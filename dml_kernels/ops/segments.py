"""Sums over the segments of a sorted list, and the spreading of a value over each segment.

Each of the two is the derivative of the other. On a GPU, ``torch.index_add`` adds in the order in which its atomics
arrive. Here each segment is added up from its first entry to its last, so that the same call gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import known_signature


def offsets(rows: Tensor, n: int) -> Tensor:
    """(n + 1,): where each of n segments starts in the sorted ``rows``, and where the last one ends."""
    return torch.searchsorted(rows, torch.arange(n + 1, device=rows.device))


def _reduce(values: Tensor, bounds: Tensor, how: str) -> Tensor:
    initial = {"sum": 0.0, "max": -torch.inf}[how]
    return torch.segment_reduce(values, how, offsets=bounds, axis=0, unsafe=True, initial=initial)


def maximum(values: Tensor, bounds: Tensor) -> Tensor:
    """The largest value of each segment, -inf for an empty one; it has no gradient."""
    return _reduce(values.detach(), bounds, "max")


@known_signature
class _Sum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values, rows, bounds):
        return _reduce(values, bounds, "sum")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        rows, bounds = ctx.saved_tensors
        return spread(grad, rows, bounds), None, None


@known_signature
class _Spread(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(per_row, rows, bounds):
        return per_row.index_select(0, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        rows, bounds = ctx.saved_tensors
        return total(grad, rows, bounds), None, None


def total(values: Tensor, rows: Tensor, bounds: Tensor) -> Tensor:
    """The sum of each segment: values (P,), their sorted rows (P,), ``offsets(rows, n)``; returns (n,)."""
    return _Sum.apply(values, rows, bounds) if torch.is_grad_enabled() else _reduce(values, bounds, "sum")


def spread(per_row: Tensor, rows: Tensor, bounds: Tensor) -> Tensor:
    """(P,): for each entry of the list, the value of its row."""
    return _Spread.apply(per_row, rows, bounds) if torch.is_grad_enabled() else per_row.index_select(0, rows)

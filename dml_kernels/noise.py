"""Counter-based noise: a number for (seed, row, column), the same for any tiling, thread count and backend.

The hash is splitmix64: the stream of a row starts at mix(mix(seed) + row gamma), and its element in a column is
mix(start + (column + 1) gamma), all modulo 2^64. csrc/core/noise.h computes the same in C++, and a test compares the
bits of both.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def _shifted(h: Tensor, by: int) -> Tensor:
    """Logical shift right; PyTorch's own shift repeats the sign bit."""
    return (h >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mix(h: Tensor) -> Tensor:
    for by, factor in _MIX:
        h = (h ^ _shifted(h, by)).mul_(factor)
    return h ^ _shifted(h, 31)


def bits(seed: int, rows: Tensor, columns: Tensor) -> Tensor:
    """64 random bits for each (row, column).

    Args:
        seed: any integer; only its value modulo 2^64 counts.
        rows: (N,) int64.
        columns: (C,) int64.

    Returns:
        (N, C) int64.
    """
    start = _mix(_mix(rows.new_tensor(_signed(seed % (1 << 64)))) + rows * GAMMA)
    return _mix(start[:, None] + (columns + 1) * GAMMA)


def gumbel(seed: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log(1 - t)), (N, C) fp64; t is the upper 53 of the ``bits`` as a number in (0, 1)."""
    t = _shifted(bits(seed, rows, columns), 11).double().add_(0.5).mul_(2.0**-53)
    return t.neg_().log1p_().neg_().log_().neg_()


def distance_log_weight(d2: Tensor, d: int, cutoff: float, nonzero_loss_cutoff: float) -> Tensor:
    """The logarithm of the weight 1/q of a distance between unit vectors (Wu et al. 2017, "Sampling Matters")::

        q(t) = t^(d - 2) (1 - t^2 / 4)^((d - 3) / 2),  t = max(distance, cutoff)

    It is -inf, so that the entry is never drawn, where t is ``nonzero_loss_cutoff`` or more, or the weight not finite.

    Args:
        d2: squared distances, of any shape.
        d: the number of dimensions of the vectors.
        cutoff: the floor under the distance.
        nonzero_loss_cutoff: the distance from which entries are not drawn.
    """
    d2 = d2.clamp_min(cutoff * cutoff)
    weight = torch.log(d2) * (0.5 * (2 - d)) - torch.log1p(-0.25 * d2) * (0.5 * (d - 3))
    usable = (d2 < nonzero_loss_cutoff * nonzero_loss_cutoff) & weight.isfinite()
    return torch.where(usable, weight, -torch.inf)

"""Counter-based noise: a number for (seed, row, column), the same on any tiling, thread count and backend.

The hash is splitmix64: a row's stream starts at mix(mix(seed) + row gamma) and its element is mix(start + (column + 1)
gamma), all modulo 2^64. csrc/core/noise.h is the same in C++, and a test compares the bits of both.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def _shifted(h: Tensor, by: int) -> Tensor:
    """Logical shift right; that of PyTorch repeats the sign."""
    return (h >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mix(h: Tensor) -> Tensor:
    for by, factor in _MIX:
        h = (h ^ _shifted(h, by)).mul_(factor)
    return h ^ _shifted(h, 31)


def bits(seed: int, rows: Tensor, columns: Tensor) -> Tensor:
    """64 bits as int64 for each (row, column) of the int64 tensors ``rows`` (N,) and ``columns`` (C,): (N, C)."""
    start = _mix(_mix(rows.new_tensor(_signed(seed % (1 << 64)))) + rows * GAMMA)
    return _mix(start[:, None] + (columns + 1) * GAMMA)


def gumbel(seed: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Standard Gumbel noise in fp64, (N, C): -log(-log(1 - t)), t the upper 53 bits as a number within (0, 1)."""
    t = _shifted(bits(seed, rows, columns), 11).double().add_(0.5).mul_(2.0**-53)
    return t.neg_().log1p_().neg_().log_().neg_()


def distance_log_weight(d2: Tensor, d: int, cutoff: float, nonzero_loss_cutoff: float) -> Tensor:
    """log 1/q of "Sampling Matters" (Wu et al. 2017) from squared distances of unit vectors in ``d`` dimensions.

    q(t) = t^(d - 2) (1 - t^2 / 4)^((d - 3) / 2) with t = max(distance, cutoff); -inf, so never drawn, from
    ``nonzero_loss_cutoff`` on and where that is not finite.
    """
    d2 = d2.clamp_min(cutoff * cutoff)
    weight = torch.log(d2) * (0.5 * (2 - d)) - torch.log1p(-0.25 * d2) * (0.5 * (d - 3))
    usable = (d2 < nonzero_loss_cutoff * nonzero_loss_cutoff) & weight.isfinite()
    return torch.where(usable, weight, -torch.inf)

"""Dense masked_hinge_sum and masked_argmax, written from their definitions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import noise
from . import matrix
from .sets import sets


def masked_hinge_sum(
    x, w, y, c=None, *, metric="euclidean", normalized=True, same=(0.0, 0.0), different=(0.0, 0.0),
    t_same=None, t_different=None, relative=False, exclude=None, ignore_index=-100, eps=1e-12, first_class=0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(same, different, count_same, count_different); functional.masked_hinge_sum has the formulas."""
    s = matrix.scores(x, w, metric, normalized, eps)
    if relative:
        s = s - s.gather(1, y.clamp(0, w.size(0) - 1)[:, None])
    sums, counts = [], []
    both = sets(y, c, w.size(0), exclude, ignore_index, first_class)
    for (k, o), t, members in zip((same, different), (t_same, t_different), both, strict=True):
        z = k * s + o
        if t is not None:
            z = z + (t[:, None] if t.dim() else t)
        sums.append(torch.where(members, torch.relu(z), 0).sum(1))
        counts.append((members & (z > 0)).sum(1))
    return sums[0], sums[1], counts[0], counts[1]


def distance_log_weight(distance: Tensor, d: int, cutoff: float, nonzero_loss_cutoff: float) -> Tensor:
    """The logarithm of the inverse of the first equation in section 4 of "Sampling Matters" (Wu et al. 2017)."""
    t = distance.clamp_min(cutoff)
    log_q = (d - 2) * t.log() + (d - 3) / 2 * (1 - t * t / 4).log()
    return torch.where((t < nonzero_loss_cutoff) & log_q.isfinite(), -log_q, -math.inf)


def masked_argmax(
    x, w, y, c=None, *, metric="euclidean", normalized=True, largest=(False, True), low=None, high=None, seed=None,
    cutoffs=(0.5, 1.4), exclude=None, ignore_index=-100, eps=1e-12, first_class=0,
) -> list[Tensor]:  # fmt: skip
    """(index, score, count) of same, then of different, as functional.masked_argmax describes them."""
    s = matrix.scores(x, w, metric, normalized, eps)
    n, m = s.shape
    usable = ~s.isnan()
    usable = usable if low is None else usable & (s > low[:, None])
    usable = usable if high is None else usable & (s < high[:, None])
    if seed is not None:
        key = noise.gumbel(seed, torch.arange(n, device=s.device), torch.arange(m, device=s.device))
        of_cosine = (2 - 2 * s).clamp_min(0).sqrt()
        distance = {"sqeuclidean": (-s).clamp_min(0).sqrt(), "euclidean": -s}.get(metric, of_cosine)
        key = key + distance_log_weight(distance.double(), x.size(1), *cutoffs)
    found = []
    for wants_largest, members in zip(largest, sets(y, c, m, exclude, ignore_index, first_class), strict=True):
        rank = key if seed is not None else s if wants_largest else -s
        rank = torch.where(members & usable, rank, -math.inf)
        best, at = rank.max(1)
        empty = -math.inf if wants_largest or seed is not None else math.inf
        none = best == -math.inf
        score = torch.where(none, empty, s.gather(1, at[:, None]).squeeze(1))
        found += [torch.where(none, -1, at), score, (rank > -math.inf).sum(1)]
    return found

"""Triplets with a negative drawn at random: uniformly, or by the inverse density of its distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import distances, functional
from ..batch import IGNORE_INDEX, Batch
from .base import Miner


def by_class(labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of each wanted label: (order, first, count), entries ``order[first : first + count]``."""
    order = labels.argsort(stable=True)
    inside = labels[order]
    first = torch.searchsorted(inside, wanted)
    return order, first, torch.searchsorted(inside, wanted, right=True) - first


class UniformMiner(Miner):
    """Random triplets: ``triplets_per_anchor`` for each anchor, positive and negative drawn uniformly.

    Args:
        triplets_per_anchor: how many; None: as many as the anchor's class has examples.

    The draws follow ``torch.manual_seed``: one number from PyTorch's CPU generator seeds a counter-based generator, so
    the same seed gives the same triplets on any device.
    """

    log_weight = "uniform"
    cutoff, nonzero_loss_cutoff = 0.5, 1.4  # of the weighted draws below

    def __init__(self, triplets_per_anchor: int | None = None, **options: Any):
        super().__init__(**options)
        if triplets_per_anchor is not None and triplets_per_anchor < 1:
            raise ValueError(f"triplets_per_anchor must be positive, or None; got {triplets_per_anchor}")
        self.triplets_per_anchor = triplets_per_anchor

    def mine(self, batch: Batch) -> tuple[Tensor, ...]:
        """Anchors repeated, a positive by position in the class, a negative by Gumbel-max over the streamed bank."""
        assert batch.y is not None
        assert batch.c is not None
        generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, ())))
        order, first, count = by_class(batch.c, batch.y)
        own = torch.zeros_like(count)
        if batch.exclude is not None:
            # A row's own copy stands somewhere in its class: the positives are those before and after it.
            own = (batch.exclude >= 0).to(count)
        usable = (count - own > 0) & (batch.y != IGNORE_INDEX)
        times = count if self.triplets_per_anchor is None else torch.full_like(count, self.triplets_per_anchor)
        a = torch.repeat_interleave(torch.arange(count.numel(), device=count.device), torch.where(usable, times, 0))
        p = self._positives(batch, a, order, first, count - own, generator)
        n = self._negatives(batch, a, int(torch.randint(1 << 62, (), generator=generator)))
        found = n >= 0
        return a[found], p[found], n[found]

    def _positives(
        self, batch: Batch, a: Tensor, order: Tensor, first: Tensor, count: Tensor, generator: torch.Generator
    ) -> Tensor:
        uniform = torch.rand(a.numel(), generator=generator, dtype=torch.float64).to(a.device)
        place = (uniform * count[a]).long().clamp_max(count[a] - 1)
        if batch.exclude is not None:
            rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
            own = rank[batch.exclude[a].clamp_min(0)] - first[a]
            place += ((batch.exclude[a] >= 0) & (place >= own)).to(place)
        return order[first[a] + place]

    def _negatives(self, batch: Batch, a: Tensor, seed: int) -> Tensor:
        assert batch.y is not None
        exclude = None if batch.exclude is None else batch.exclude[a]
        found = functional.masked_argmax(
            batch.x[a], batch.w, batch.y[a], batch.c, metric=self.distance.metric,
            normalize=self.distance.normalize_embeddings, which="different", exclude=exclude, noise_seed=seed,
            log_weight=self.log_weight, cutoff=self.cutoff,
            nonzero_loss_cutoff=self.nonzero_loss_cutoff,
        )  # fmt: skip
        assert found.different is not None
        return found.different.index


class DistanceWeightedMiner(UniformMiner):
    """Triplets whose negative is drawn in inverse proportion to how common its distance is.

    On the unit sphere in D dimensions distances crowd around sqrt(2): uniform draws see little else. The weight is
    1 / q(d), q(d) = d^(D-2) (1 - d^2/4)^((D-3)/2) (Wu et al. 2017, "Sampling Matters in Deep Embedding Learning", arXiv
    1706.07567, section 4), with d at least ``cutoff``, and 0 from ``nonzero_loss_cutoff`` on: an anchor all of whose
    negatives lie beyond gives no triplet.
    """

    log_weight = "distance"

    def __init__(self, cutoff: float = 0.5, nonzero_loss_cutoff: float = 1.4, **options: Any):
        super().__init__(**options)
        if self.distance.metric != "euclidean" or not self.distance.normalize_embeddings:
            raise ValueError("DistanceWeightedMiner weighs Euclidean distances of unit vectors: use LpDistance()")
        self.cutoff, self.nonzero_loss_cutoff = float(cutoff), float(nonzero_loss_cutoff)

    def default_distance(self) -> distances.Distance:
        """Euclidean, of unit vectors."""
        return distances.LpDistance()

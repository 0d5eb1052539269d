"""Miners of random triplets: negatives are drawn uniformly, or by the inverse density of their distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import distances
from ..ops.checks import check_integer, check_positive
from ..ops.masked_argmax import masked_argmax
from ..pairs.batch import Batch
from ..pairs.tuples import random_triplets
from .base import Miner


class UniformMiner(Miner):
    """Draws the positive and the negative of each anchor uniformly, with replacement: (a, p, n).

    ``torch.manual_seed`` determines the draws, which are the same on any device.

    Args:
        triplets_per_anchor: how many triplets each anchor has; None: as many as its class has entries.
        options: of :class:`Miner`.

    Raises:
        ValueError: ``triplets_per_anchor`` is not a positive integer.
    """

    def __init__(self, triplets_per_anchor: int | None = None, **options: Any):
        super().__init__(**options)
        if triplets_per_anchor is not None:
            triplets_per_anchor = check_integer("triplets_per_anchor", triplets_per_anchor, 1)
        self.triplets_per_anchor = triplets_per_anchor

    def mine(self, batch: Batch) -> tuple[Tensor, ...]:
        """Draw places in the list that is sorted by label."""
        return random_triplets(batch, self.triplets_per_anchor)


class DistanceWeightedMiner(UniformMiner):
    """Draws the negative of a triplet in inverse proportion to how common its distance is: (a, p, n).

    On the unit sphere in D dimensions most distances lie near sqrt(2), so uniform draws rarely give others. The weight
    of a negative at distance d is::

        1 / q(d),  q(d) = d^(D-2) (1 - d^2/4)^((D-3)/2)

    (Wu et al. 2017, "Sampling Matters in Deep Embedding Learning", arXiv 1706.07567, section 4), where d is raised to
    ``cutoff`` at least; from ``nonzero_loss_cutoff`` on the weight is 0. An anchor whose negatives all have weight 0
    gives no triplet.

    Args:
        cutoff: the floor under d.
        nonzero_loss_cutoff: the distance from which negatives are not drawn.
        options: of :class:`UniformMiner`.

    Raises:
        ValueError: a distance other than the Euclidean distance of unit vectors, or a cutoff that is not positive.
    """

    def __init__(self, cutoff: float = 0.5, nonzero_loss_cutoff: float = 1.4, **options: Any):
        super().__init__(**options)
        self._check_distance()
        self.cutoff = check_positive("cutoff", cutoff)
        self.nonzero_loss_cutoff = check_positive("nonzero_loss_cutoff", nonzero_loss_cutoff)

    def _check_distance(self) -> None:
        if self.distance.metric != "euclidean" or not self.distance.normalize_embeddings:
            raise ValueError("DistanceWeightedMiner weighs Euclidean distances of unit vectors: use LpDistance()")

    def default_distance(self) -> distances.Distance:
        """The Euclidean distance of unit vectors."""
        return distances.LpDistance()

    def mine(self, batch: Batch) -> tuple[Tensor, ...]:
        """Draw anchors and positives uniformly, and their negatives by Gumbel-max over the streamed bank."""
        self._check_distance()
        a, p, _ = random_triplets(batch, self.triplets_per_anchor)
        assert batch.y is not None
        found = masked_argmax(
            batch.x[a], batch.w, batch.y[a], batch.c, metric=self.distance.metric, which="different",
            exclude=None if batch.exclude is None else batch.exclude[a], noise_seed=int(torch.randint(1 << 62, ())),
            cutoff=self.cutoff, nonzero_loss_cutoff=self.nonzero_loss_cutoff,
        ).different  # fmt: skip
        assert found is not None
        drawn = found.index >= 0
        return a[drawn], p[drawn], found.index[drawn]

"""Miners of pairs that violate a margin, or that are hard compared with the hardest pair of the other kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import distances
from ..ops.checks import check_number
from ..pairs.batch import Batch, Tile
from .base import Miner


class PairMarginMiner(Miner):
    """Chooses positive pairs further apart than ``pos_margin`` and negative pairs closer than ``neg_margin``.

    With a similarity it chooses positives below ``pos_margin`` and negatives above ``neg_margin``. Returns
    (a1, p, a2, n).

    Args:
        pos_margin: the margin of positive pairs, in the units of the distance.
        neg_margin: the margin of negative pairs, in the units of the distance.
        options: of :class:`Miner`.
    """

    def __init__(self, pos_margin: float = 0.2, neg_margin: float = 0.8, **options: Any):
        super().__init__(**options)
        self.pos_margin = check_number("pos_margin", pos_margin)
        self.neg_margin = check_number("neg_margin", neg_margin)

    def mine(self, batch: Batch) -> tuple[Tensor, ...]:
        """List the pairs beyond the margins."""
        low, high = self.distance.threshold(self.pos_margin), self.distance.threshold(self.neg_margin)
        return self.listed(batch, lambda t: t.same & (t.scores < low), lambda t: t.different & (t.scores > high))


class MultiSimilarityMiner(Miner):
    """Chooses pairs that are hard compared with the hardest of the other kind (Wang et al. 2019, arXiv 1904.06627).

    A positive is kept if its score minus ``epsilon`` is below the score of the anchor's closest negative; a negative is
    kept if its score plus ``epsilon`` is above the score of the anchor's furthest positive. An anchor without positives
    keeps no negatives, and one without negatives keeps no positives. Returns (a1, p, a2, n).

    Args:
        epsilon: the margin, in the units of the score.
        options: of :class:`Miner`.
    """

    def __init__(self, epsilon: float = 0.1, **options: Any):
        super().__init__(**options)
        self.epsilon = check_number("epsilon", epsilon)

    def default_distance(self) -> distances.Distance:
        """Cosine similarity."""
        return distances.CosineSimilarity()

    def mine(self, batch: Batch) -> tuple[Tensor, ...]:
        """List the pairs by the two rules, in one pass over the scores."""

        def positives(t: Tile) -> Tensor:
            closest = torch.where(t.different, t.scores, -torch.inf).amax(1, keepdim=True)
            return t.same & (t.scores - self.epsilon < closest)

        def negatives(t: Tile) -> Tensor:
            furthest = torch.where(t.same, t.scores, torch.inf).amin(1, keepdim=True)
            return t.different & (t.scores + self.epsilon > furthest)

        return self.listed(batch, positives, negatives)

"""Miners of triplets: by how far they violate a margin, or by their position in the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.checks import check_choice, check_number
from ..pairs.batch import TILE_ELEMENTS, Batch, tiles
from .base import Miner, pieces

TYPES = ("all", "hard", "semihard", "easy")


class TripletMarginMiner(Miner):
    """Lists every triplet (a, p, n) of one kind, by its slack d_an - d_ap (for a similarity, s_ap - s_an).

    - ``all``: the slack is at most ``margin``.
    - ``hard``: it is at most ``margin`` and at most 0.
    - ``semihard``: it is at most ``margin`` and over 0.
    - ``easy``: it is over ``margin``.

    It takes O(N M K) time for K positives per anchor, and memory for the whole list. TripletMarginLoss without a miner
    sums the triplets of ``all`` exactly in O(N M log M) and lists nothing.

    Args:
        margin: in the units of the distance.
        type_of_triplets: one of the four kinds.
        options: of :class:`Miner`.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, margin: float = 0.2, type_of_triplets: str = "all", **options: Any):
        super().__init__(**options)
        self.margin = check_number("margin", margin)
        self.type_of_triplets = check_choice("type_of_triplets", type_of_triplets, TYPES)

    def _wanted(self, slack: Tensor) -> Tensor:
        if self.type_of_triplets == "easy":
            return slack > self.margin
        wanted = slack <= self.margin
        if self.type_of_triplets == "hard":
            return wanted & (slack <= 0)
        return wanted & (slack > 0) if self.type_of_triplets == "semihard" else wanted

    def mine(self, batch: Batch) -> tuple[Tensor, ...]:
        """Compare the positives of a tile, a piece at a time, with all entries of their rows."""
        found = [batch.x.new_empty((0, 3), dtype=torch.int64)]
        for tile in tiles(batch, self.distance):
            for pairs in pieces(tile.same.nonzero(), batch.w.size(0), TILE_ELEMENTS // 4):
                row, p = pairs.unbind(1)
                slack = tile.scores[row].neg_().add_(tile.scores[row, p, None])
                place, n = self._wanted(slack).logical_and_(tile.different[row]).nonzero().unbind(1)
                if n.numel():
                    found.append(torch.stack([row[place] + tile.rows.start, p[place], n], 1))
        return torch.cat(found).unbind(1)


class EmbeddingsAlreadyPackagedAsTriplets(Miner):
    """Takes rows 3k, 3k + 1 and 3k + 2 as the triplet (a, p, n), whatever the labels say.

    Raises:
        ValueError: at a call, the number of rows is not a multiple of 3.
    """

    def mine(self, batch: Batch) -> tuple[Tensor, ...]:
        """List all rows, in order."""
        n = batch.x.size(0)
        if n % 3:
            raise ValueError(f"embeddings must be triplets, row by row: a multiple of 3; got {n} rows")
        return torch.arange(n, device=batch.x.device).view(-1, 3).unbind(1)

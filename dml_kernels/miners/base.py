"""What every miner shares: the call, and the listing of pairs tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import distances
from ..pairs.batch import Batch, Tile, make_batch, tiles
from ..pairs.sets import IGNORE_INDEX
from ..records import Recorded


class Miner(Recorded):
    """Chooses pairs or triplets of a batch; a subclass defines ``mine``.

    Args:
        distance: one of :mod:`dml_kernels.distances`, or the class of the same name in pytorch-metric-learning; None:
            the default of the miner.
        collect_stats: whether the record keepers of pytorch-metric-learning see the attributes below, which exist in
            any case. The miners of pytorch-metric-learning also record distances; these miners do not, because that
            would take a pass over the matrix.

    Attributes:
        num_pos_pairs: the number of positive pairs that the last call returned; 0 if it returned triplets.
        num_neg_pairs: the number of negative pairs that the last call returned; 0 if it returned triplets.
        num_triplets: the number of triplets that the last call returned; 0 if it returned pairs.
    """

    statistics = ("num_pos_pairs", "num_neg_pairs", "num_triplets")
    distance_kinds: tuple[type[distances.Distance], ...] = (distances.Distance,)

    def __init__(self, *, distance: Any = None, collect_stats: bool | None = None):
        super().__init__(collect_stats)
        self.distance = distance

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "distance":
            value = distances.accept(value, self.default_distance(), self.distance_kinds, type(self).__name__)
        super().__setattr__(name, value)

    def default_distance(self) -> distances.Distance:
        """The distance that is used if none is given."""
        return distances.LpDistance()

    def mine(self, batch: Batch) -> tuple[Tensor, ...]:
        """Choose the index tuple of a checked batch."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Choose pairs or triplets of a batch, compared with itself or with references.

        Where ``ref_emb`` and ``embeddings`` are the same tensor, the references are the batch itself, and no row is
        compared with its own copy.

        Args:
            embeddings: (N, D) floating point.
            labels: (N,) integers.
            ref_emb: (M, D) floating point: what the embeddings are compared with; None: the batch itself.
            ref_labels: (M,) integers: the labels of ``ref_emb``.

        Returns:
            Triplets (a, p, n) or pairs (a1, p, a2, n) of int64 indices.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination; the message names the fix.
        """
        if labels is None:
            raise ValueError(f"{type(self).__name__} needs labels: they say which pairs are positive")
        batch = make_batch(embeddings, labels, None, ref_emb, ref_labels)
        if batch.w.size(0) == 0:  # a batch without rows is compared with one reference that is in no pair
            ignored = torch.full((1,), IGNORE_INDEX, device=batch.x.device)
            batch = batch._replace(w=batch.x.new_zeros(1, batch.x.size(1)), c=ignored, exclude=None)
        found = self.mine(batch)
        pairs = len(found) == 4
        self.num_triplets = 0 if pairs else len(found[0])
        self.num_pos_pairs, self.num_neg_pairs = (len(found[0]), len(found[2])) if pairs else (0, 0)
        return found

    def listed(self, batch: Batch, *choices: Callable[[Tile], Tensor]) -> tuple[Tensor, ...]:
        """List the entries that each choice selects by a mask over a tile: (rows, columns, ...), rows ascending."""
        found: list[list[Tensor]] = [[] for _ in choices]
        for tile in tiles(batch, self.distance):
            for places, choice in zip(found, choices, strict=True):
                place = choice(tile).nonzero()
                place[:, 0] += tile.rows.start
                if place.numel():
                    places.append(place)
        empty = batch.x.new_empty((0, 2), dtype=torch.int64)
        return tuple(column for places in found for column in torch.cat([empty, *places]).unbind(1))


def pieces(places: Tensor, width: int, elements: int) -> Iterator[Tensor]:
    """Split a list of places so that a part times ``width`` has at most ``elements`` entries, or is a single place."""
    return iter(places.split(max(1, elements // max(width, 1)))) if places.numel() else iter(())

"""Miners by the names people use: which pairs or triplets of a batch a loss should see, as index tuples.

``miner(embeddings, labels, ref_emb=None, ref_labels=None)`` gives triplets (a, p, n) or pairs (a1, p, a2, n): int64
indices, p and n into the references where those are given. They serve our losses and pytorch-metric-learning's alike.
Scores are looked at tile by tile: beside the tuples themselves, memory stays within some tiles of 16 MB.
"""

from ..elsewhere import explain
from .base import Miner
from .batch_hard import BatchEasyHardMiner, BatchHardMiner
from .pairs import MultiSimilarityMiner, PairMarginMiner
from .sampling import DistanceWeightedMiner, UniformMiner
from .triplets import EmbeddingsAlreadyPackagedAsTriplets, TripletMarginMiner

__all__ = [
    "BatchEasyHardMiner", "BatchHardMiner", "DistanceWeightedMiner", "EmbeddingsAlreadyPackagedAsTriplets", "Miner",
    "MultiSimilarityMiner", "PairMarginMiner", "TripletMarginMiner", "UniformMiner",
]  # fmt: skip

explain(__name__)

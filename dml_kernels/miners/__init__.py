"""Miners, under pytorch-metric-learning's names: they choose the pairs or triplets of a batch that a loss sees.

``miner(embeddings, labels, ref_emb=None, ref_labels=None)`` returns an index tuple: triplets (a, p, n) or pairs
(a1, p, a2, n) of int64 indices, where p and n are rows of the references if those are given. The losses of this package
and of pytorch-metric-learning accept the tuples. Miners compute the scores tile by tile: the memory in addition to the
tuples stays within a few tiles of 16 MB.
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

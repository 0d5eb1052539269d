"""Miners, under pytorch-metric-learning's names: which pairs or triplets of a batch a loss should see.

``miner(embeddings, labels, ref_emb=None, ref_labels=None)`` returns an index tuple: triplets (a, p, n) or pairs
(a1, p, a2, n) of int64 indices, p and n into the references where those are given. The losses of this package and of
pytorch-metric-learning accept the tuples. Miners compute the scores tile by tile: in addition to the tuples, memory
stays within a few tiles of 16 MB.
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

"""Judging embeddings, streamed: retrieval (Recall@K, R-precision, MAP@R) and classification (kNC, kNN).

Nothing of size N x M is built; the result does not depend on the sizes of the tiles. CPU and CUDA tensors.
"""

from .classification import Classification, k_nearest_clusters, k_nearest_neighbours
from .retrieval import RetrievalResult, evaluate, map_at_r, nearest, recall_at_k

__all__ = [
    "Classification",
    "RetrievalResult",
    "evaluate",
    "k_nearest_clusters",
    "k_nearest_neighbours",
    "map_at_r",
    "nearest",
    "recall_at_k",
]

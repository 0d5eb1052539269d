"""Evaluation of embeddings, streamed.

- ``retrieval``: Recall@K, precision@1, R-precision, MAP@R, MRR.
- ``clustering``: NMI and AMI of a k-means partition (faiss, scikit-learn).
- ``classification``: soft k nearest clusters, k nearest neighbours.
- ``verification``, 1:1: ROC-AUC, TAR at a FAR, EER, best threshold, accuracy by folds. ``pairs`` draws pairs and scores
  them.
- ``identification``, 1:K: CMC; for the open set DIR at a false alarm rate, and rejection.
- ``few_shot``: N-way K-shot classification by the nearest class mean.

Nothing of size N x M is built, and the results do not depend on the sizes of the tiles. Embeddings may be on the CPU
or on CUDA. Labels may be a tensor, an array, a list or a pandas column, and are read by position. Every value is a
class, including -100 (except in the cluster classes of ``k_nearest_clusters``), so leave out rows without a label.
"""

from .classification import Classification, k_nearest_clusters, k_nearest_neighbours
from .clustering import ClusteringResult, cluster_agreement
from .few_shot import FewShotResult, few_shot_accuracy
from .identification import Identification, IdentificationResult, evaluate_identification, identify
from .pairs import pair_scores, sample_pairs
from .retrieval import RetrievalResult, evaluate, evaluate_retrieval, map_at_r, nearest, recall_at_k
from .verification import FoldAccuracy, VerificationResult, fold_accuracy, verify, verify_pairs, verify_scores

__all__ = [
    "Classification",
    "ClusteringResult",
    "FewShotResult",
    "FoldAccuracy",
    "Identification",
    "IdentificationResult",
    "RetrievalResult",
    "VerificationResult",
    "cluster_agreement",
    "evaluate",
    "evaluate_identification",
    "evaluate_retrieval",
    "few_shot_accuracy",
    "fold_accuracy",
    "identify",
    "k_nearest_clusters",
    "k_nearest_neighbours",
    "map_at_r",
    "nearest",
    "pair_scores",
    "recall_at_k",
    "sample_pairs",
    "verify",
    "verify_pairs",
    "verify_scores",
]

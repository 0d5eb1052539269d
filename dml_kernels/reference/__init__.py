"""Dense, literal versions of the ops, differentiated by autograd, which the tests compare the ops with.

A call runs here only if it asks for the backend ``reference`` by name. Memory grows as N x M x D.
"""

from __future__ import annotations

from .logsumexp import circle_logits, masked_logsumexp, pool
from .matrix import normalize, normalized_distance, scores
from .pairs import distance_log_weight, masked_argmax, masked_hinge_sum
from .sets import sets

__all__ = [
    "circle_logits", "distance_log_weight", "masked_argmax", "masked_hinge_sum", "masked_logsumexp", "normalize",
    "normalized_distance", "pool", "scores", "sets",
]  # fmt: skip

"""The ops and losses as plain functions, which check their arguments and return tensors.

First come the comparisons of rows with a bank, of which the losses are made, then the losses over proxies and clusters.
Every function is defined in the module of its op or loss.
"""

from __future__ import annotations

from .losses.arcface import arcface_loss
from .losses.cosface import cosface_loss
from .losses.large_margin_softmax import large_margin_softmax_loss
from .losses.magnet import magnet_loss
from .losses.normalized_softmax import normalized_softmax_loss
from .losses.proxy_anchor import proxy_anchor_loss
from .losses.proxy_nca import proxy_nca_loss
from .losses.proxy_ranking import proxy_ranking_loss
from .losses.soft_triple import soft_triple_loss
from .losses.sphereface import sphereface_loss
from .losses.subcenter_arcface import subcenter_arcface_loss
from .ops.masked_argmax import Choice, MaskedArgmax, masked_argmax
from .ops.masked_hinge_sum import MaskedHingeSum, masked_hinge_sum
from .ops.masked_logsumexp import MaskedLogSumExp, masked_logsumexp
from .ops.normalize import normalize
from .ops.normalized_distance import normalized_distance
from .ops.pair_scores import pair_scores
from .ops.positive_pair_sum import TermSums, positive_pair_sum
from .ops.triplet_sum import triplet_sum

__all__ = [
    "Choice", "MaskedArgmax", "MaskedHingeSum", "MaskedLogSumExp", "TermSums", "arcface_loss", "cosface_loss",
    "large_margin_softmax_loss", "magnet_loss", "masked_argmax", "masked_hinge_sum", "masked_logsumexp", "normalize",
    "normalized_distance", "normalized_softmax_loss", "pair_scores", "positive_pair_sum", "proxy_anchor_loss",
    "proxy_nca_loss", "proxy_ranking_loss", "soft_triple_loss", "sphereface_loss", "subcenter_arcface_loss",
    "triplet_sum",
]  # fmt: skip

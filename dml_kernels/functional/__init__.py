"""Plain functions: checked arguments in, tensors out. The losses are written on these."""

from __future__ import annotations

from .by_class import TermSums, positive_pair_sum, triplet_sum
from .distance import normalize, normalized_distance
from .logsumexp import MaskedLogSumExp, masked_logsumexp
from .pairs import Choice, MaskedArgmax, MaskedHingeSum, masked_argmax, masked_hinge_sum, pair_scores

__all__ = [
    "Choice", "MaskedArgmax", "MaskedHingeSum", "MaskedLogSumExp", "TermSums", "arcface_loss", "cosface_loss",
    "large_margin_softmax_loss", "magnet_loss", "masked_argmax", "masked_hinge_sum", "masked_logsumexp", "normalize",
    "normalized_distance", "normalized_softmax_loss", "pair_scores", "positive_pair_sum", "proxy_anchor_loss",
    "proxy_nca_loss", "proxy_ranking_loss", "soft_triple_loss", "sphereface_loss", "subcenter_arcface_loss",
    "triplet_sum",
]  # fmt: skip

# The losses are written on the functions above.
from ..losses.arcface import arcface_loss
from ..losses.cosface import cosface_loss
from ..losses.large_margin_softmax import large_margin_softmax_loss
from ..losses.magnet import magnet_loss
from ..losses.normalized_softmax import normalized_softmax_loss
from ..losses.proxy_anchor import proxy_anchor_loss
from ..losses.proxy_nca import proxy_nca_loss
from ..losses.proxy_ranking import proxy_ranking_loss
from ..losses.soft_triple import soft_triple_loss
from ..losses.sphereface import sphereface_loss
from ..losses.subcenter_arcface import subcenter_arcface_loss

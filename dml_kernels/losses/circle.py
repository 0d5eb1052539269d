"""Circle loss: each similarity weighted by how far it is from its optimum.

With the cosines s of an anchor's pairs, and the weights in brackets taken as constants::

    loss = mean over anchors with both kinds of pairs, and a loss above 0, of
           log(1 + sum_p exp(-gamma [1 + m - s_ap]+ (s_ap - (1 - m)))  sum_n exp(gamma [s_an + m]+ (s_an - m)))

Sun, Cheng, Zhang, Zhang, Zheng, Wang and Wei 2020, "Circle Loss: A Unified Perspective of Pair Similarity
Optimization", arXiv 2002.10857, equation 6, with the paper's O_p = 1 + m, O_n = -m, margins 1 - m and m. An anchor
without positives or without negatives contributes 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances, reducers
from ..logspace import log1pexp
from ..ops.checks import check_number
from ..pairs.batch import Batch
from ..pairs.comparisons import compared
from ..reducers import Terms
from ..reference.labelled import LabelledPairs, mean_of_positive
from .base import LossEntry
from .metric_loss import MetricLoss, as_function


class CircleLoss(MetricLoss):
    """Circle loss; a drop-in for pytorch-metric-learning 2.9's class of this name.

    See the module for the formula. A pair that a miner lists several times counts once, as in pytorch-metric-learning.

    Args:
        m: the relaxation.
        gamma: the scale. In the paper (m, gamma) is (0.25, 256) for faces, (0.25, 128) for persons, and (0.4, 80) for
            fine-grained retrieval.
        options: those of :class:`MetricLoss`; the distance is CosineSimilarity, the reducer AvgNonZeroReducer.

    Attributes:
        op, on: the optima of positives and of negatives.
        delta_p, delta_n: their margins. All four follow from m; neither they nor m can be assigned.

    Raises:
        ValueError: a distance other than the cosine.
    """

    distance_kinds = (distances.CosineSimilarity,)
    fixed = ("m", "op", "on", "delta_p", "delta_n")
    unused = ("soft_plus",)

    def __init__(self, m: float = 0.4, gamma: float = 80, **options: Any):
        super().__init__(**options)
        m, self.gamma = check_number("m", m), check_number("gamma", gamma)
        self.m = m
        self.op, self.on, self.delta_p, self.delta_n = 1 + m, -m, 1 - m, m

    def default_distance(self) -> distances.Distance:
        """The cosine."""
        return distances.CosineSimilarity()

    def default_reducer(self) -> reducers.Reducer:
        """The mean over anchors above 0."""
        return reducers.AvgNonZeroReducer()

    def terms(self, batch: Batch) -> Mapping[str, Terms]:
        """One term for each anchor."""
        pairs = compared(batch, self.distance, unique=True)
        lse = pairs.logsumexp(scale=self.gamma, policy="quadratic", policy_params=(self.m,))
        both = (lse.same != -torch.inf) & (lse.different != -torch.inf)
        values = log1pexp(torch.where(both, lse.same, 0) + torch.where(both, lse.different, -torch.inf))
        return {"loss": Terms.elements(values, batch.y, pairs.kept)}

    def extra_repr(self) -> str:
        """What ``print(loss)`` shows."""
        return f"m={self.m}, gamma={self.gamma}"


def circle_reference(
    embeddings: Tensor, labels: Tensor, *, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None,
    m: float = 0.4, gamma: float = 80,
) -> Tensor:  # fmt: skip
    """The formula, anchor by anchor. For tests only."""
    pairs = LabelledPairs.of(embeddings, labels, ref_emb, ref_labels, distances.CosineSimilarity())
    rows = [embeddings.sum() * 0]
    for i in range(len(labels)):
        p, n = pairs.s[i][pairs.same[i]], pairs.s[i][pairs.different[i]]
        if len(p) and len(n):
            z_p = -gamma * (1 + m - p).clamp_min(0).detach() * (p - (1 - m))
            z_n = gamma * (n + m).clamp_min(0).detach() * (n - m)
            zero = z_p.new_zeros(1)
            rows.append(torch.logsumexp(torch.cat((zero, (z_p[:, None] + z_n).flatten())), 0))
    return mean_of_positive(torch.stack(rows))


ENTRY = LossEntry(
    loss=CircleLoss,
    function=as_function(CircleLoss),
    reference=circle_reference,
    paper="Sun et al. 2020, arXiv 2002.10857",
    options=({}, {"m": 0.25, "gamma": 8.0}),
    family="pairs",
    policy="quadratic",
)

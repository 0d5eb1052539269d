"""Contrastive loss: positives nearer than one margin, negatives farther than another.

With the distance d of a pair::

    loss = mean over active positive pairs of (d - pos_margin)+  +  mean over active negative pairs of (neg_margin - d)+

(v)+ = max(v, 0), a pair being active where its term is above 0; for a similarity the signs of both terms are reversed.
By default d is the distance of unit vectors. Hadsell, Chopra and LeCun 2006, "Dimensionality Reduction by Learning an
Invariant Mapping", with the first power of each hinge, as pytorch-metric-learning has it. An anchor without positives
or without negatives adds nothing to that part; a part without active pairs is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances, reducers
from ..ops.checks import check_number
from ..pairs.batch import Batch
from ..pairs.comparisons import compared
from ..reducers import Terms
from ..reference.labelled import LabelledPairs, mean_of_positive
from .base import LossEntry
from .metric_loss import MetricLoss, as_function


class ContrastiveLoss(MetricLoss):
    """Contrastive loss; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Its parts, for ``MultipleReducers``, are ``pos_loss`` and ``neg_loss``. A single listed pair counts; in
    pytorch-metric-learning it gives 0. See the module for the formula.

    Args:
        pos_margin: distance up to which (similarity from which) a positive pair costs nothing.
        neg_margin: distance from which (similarity up to which) a negative pair costs nothing.
        options: those of :class:`MetricLoss`; the distance is LpDistance, the reducer AvgNonZeroReducer.
    """

    def __init__(self, pos_margin: float = 0, neg_margin: float = 1, **options: Any):
        super().__init__(**options)
        self.pos_margin = check_number("pos_margin", pos_margin)
        self.neg_margin = check_number("neg_margin", neg_margin)

    def default_reducer(self) -> reducers.Reducer:
        """The mean over active pairs."""
        return reducers.AvgNonZeroReducer()

    def terms(self, batch: Batch) -> Mapping[str, Terms]:
        """Both sums of hinges."""
        pairs = compared(batch, self.distance)
        near, far = self.distance.threshold(self.pos_margin), self.distance.threshold(self.neg_margin)
        hinge, number = pairs.hinge_sum((-1.0, near), (1.0, -far)), pairs.counts()
        return {
            "pos_loss": pairs.pair_terms(hinge.same, number.same, hinge.count_same),
            "neg_loss": pairs.pair_terms(hinge.different, number.different, hinge.count_different),
        }

    def extra_repr(self) -> str:
        """What ``print(loss)`` shows."""
        return f"pos_margin={self.pos_margin}, neg_margin={self.neg_margin}"


def contrastive_reference(
    embeddings: Tensor, labels: Tensor, *, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None,
    pos_margin: float = 0, neg_margin: float = 1, distance: Any = None,
) -> Tensor:  # fmt: skip
    """The formula on all pairs at once. For tests only."""
    distance = distance or distances.LpDistance()
    pairs = LabelledPairs.of(embeddings, labels, ref_emb, ref_labels, distance)
    d, sign = (pairs.s, -1) if distance.is_inverted else (-pairs.s, 1)
    positive = torch.relu(sign * (d[pairs.same] - pos_margin))
    negative = torch.relu(sign * (neg_margin - d[pairs.different]))
    return mean_of_positive(positive) + mean_of_positive(negative) + embeddings.sum() * 0


ENTRY = LossEntry(
    loss=ContrastiveLoss,
    function=as_function(ContrastiveLoss),
    reference=contrastive_reference,
    paper="Hadsell et al. 2006",
    options=(
        {},
        {"pos_margin": 0.2, "neg_margin": 1.3, "distance": distances.LpDistance(power=2)},
        {"pos_margin": 0.9, "neg_margin": 0.1, "distance": distances.CosineSimilarity()},
        {"pos_margin": 1.0, "neg_margin": 2.5, "distance": distances.LpDistance(normalize_embeddings=False)},
    ),
    family="pairs",
    op="masked_hinge_sum",
)

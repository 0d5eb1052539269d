"""Generalized lifted structure loss: a soft maximum over an anchor's positives, another over its negatives.

With the distances d of an anchor's pairs::

    loss = mean over anchors of (log sum_p exp(d_ap - pos_margin) + log sum_n exp(neg_margin - d_an))+

(v)+ = max(v, 0); for a similarity the signs in the exponents are reversed. By default d is the distance of unit
vectors. Hermans, Beyer and Leibe 2017, "In Defense of the Triplet Loss for Person Re-Identification", arXiv 1703.07737,
equation 4. As in pytorch-metric-learning an anchor without positives, or without negatives, has 0 in place of that
log-sum-exp, and counts in the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances
from ..ops.checks import check_number
from ..pairs.batch import Batch
from ..pairs.comparisons import compared
from ..pairs.sets import IGNORE_INDEX
from ..reducers import Terms
from ..reference.labelled import LabelledPairs, mean
from .base import LossEntry
from .metric_loss import MetricLoss, as_function


class GeneralizedLiftedStructureLoss(MetricLoss):
    """Generalized lifted structure loss; a drop-in for pytorch-metric-learning 2.9's class of this name.

    See the module for the formula. A pair that a miner lists several times counts once, as in pytorch-metric-learning.

    Args:
        neg_margin: added to the negatives' logits, in units of the distance.
        pos_margin: subtracted from the positives' logits, in units of the distance.
        options: those of :class:`MetricLoss`; the distance is LpDistance, the reducer MeanReducer.
    """

    def __init__(self, neg_margin: float = 1, pos_margin: float = 0, **options: Any):
        super().__init__(**options)
        self.neg_margin = check_number("neg_margin", neg_margin)
        self.pos_margin = check_number("pos_margin", pos_margin)

    def terms(self, batch: Batch) -> Mapping[str, Terms]:
        """One term for each anchor."""
        pairs = compared(batch, self.distance, unique=True)
        near, far = self.distance.threshold(self.pos_margin), self.distance.threshold(self.neg_margin)
        lse = pairs.logsumexp(same=(-1.0, near), different=(1.0, far))
        both = sum(torch.where(v == -torch.inf, 0, v) for v in (lse.same, lse.different))
        assert isinstance(both, Tensor)
        return {"loss": Terms.elements(torch.relu(both), batch.y, pairs.kept)}

    def extra_repr(self) -> str:
        """What ``print(loss)`` shows."""
        return f"neg_margin={self.neg_margin}, pos_margin={self.pos_margin}"


def generalized_lifted_structure_reference(
    embeddings: Tensor, labels: Tensor, *, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None,
    neg_margin: float = 1, pos_margin: float = 0, distance: Any = None,
) -> Tensor:  # fmt: skip
    """The formula, anchor by anchor. For tests only."""
    distance = distance or distances.LpDistance()
    pairs = LabelledPairs.of(embeddings, labels, ref_emb, ref_labels, distance)
    d, sign = (pairs.s, -1) if distance.is_inverted else (-pairs.s, 1)
    rows = []
    for i in (labels != IGNORE_INDEX).nonzero().flatten().tolist():
        row = d[i].sum() * 0
        if pairs.same[i].any():
            row = row + torch.logsumexp(sign * (d[i][pairs.same[i]] - pos_margin), 0)
        if pairs.different[i].any():
            row = row + torch.logsumexp(sign * (neg_margin - d[i][pairs.different[i]]), 0)
        rows.append(torch.relu(row))
    return mean(torch.stack(rows) if rows else d.new_empty(0), embeddings)


ENTRY = LossEntry(
    loss=GeneralizedLiftedStructureLoss,
    function=as_function(GeneralizedLiftedStructureLoss),
    reference=generalized_lifted_structure_reference,
    paper="Hermans et al. 2017, arXiv 1703.07737",
    options=(
        {},
        {"neg_margin": 0.5, "pos_margin": 1.2, "distance": distances.LpDistance(power=2)},
        {"neg_margin": 0.1, "pos_margin": 0.8, "distance": distances.CosineSimilarity()},
    ),
    family="pairs",
)

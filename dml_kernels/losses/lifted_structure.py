"""Lifted structure loss: each positive pair against the negatives of both of its points.

With the distances d and, for a point, L = log sum_n exp(neg_margin - d_n) over its negatives::

    l_ip = (log(exp L_i + exp L_p) + d_ip - pos_margin)+^2 / 2         mean over positive pairs (i, p) and (p, i)

(v)+ = max(v, 0); for a similarity the signs in the exponents are reversed. By default d is the distance of unit
vectors. Oh Song et al. 2016, "Deep Metric Learning via Lifted Structured Feature Embedding", arXiv 1511.06452, equation
4. As in pytorch-metric-learning, log(exp L_i + exp L_p) is 0 where neither point has a negative, and the loss is 0
where nothing in the batch has one.

With references the pair is (row, reference), and the negatives of a reference are the rows of other labels (listed: the
rows listed with it as a negative). There pytorch-metric-learning compares the index of the reference with
indices of rows, and so uses the negatives of some other row; in the batch itself both agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances
from ..ops.checks import check_number
from ..pairs.batch import Batch
from ..pairs.comparisons import Compared, compared
from ..reducers import Terms
from ..reference.labelled import LabelledPairs, mean
from .base import LossEntry
from .metric_loss import MetricLoss, as_function


class LiftedStructureLoss(MetricLoss):
    """Lifted structure loss; a drop-in for pytorch-metric-learning 2.9's class of this name.

    See the module for the formula; the mean is over positive pairs.

    Args:
        neg_margin: added to the negatives' logits, in units of the distance.
        pos_margin: subtracted from the positive's logit, in units of the distance.
        options: those of :class:`MetricLoss`; the distance is LpDistance, the reducer MeanReducer.
    """

    def __init__(self, neg_margin: float = 1, pos_margin: float = 0, **options: Any):
        super().__init__(**options)
        self.neg_margin = check_number("neg_margin", neg_margin)
        self.pos_margin = check_number("pos_margin", pos_margin)

    def terms(self, batch: Batch) -> Mapping[str, Terms]:
        """One term for each positive pair."""
        pairs = compared(batch, self.distance)
        own = self._negatives(pairs)
        of_positive = own if batch.is_own_bank else self._negatives(compared(_turned(batch), self.distance))
        near = self.distance.threshold(self.pos_margin)
        found = pairs.positive_sum("lifted", own, of_positive, params=(1.0, -near))
        some = (own != -torch.inf).any()
        return {"loss": found._replace(total=torch.where(some, found.total, 0))}

    def _negatives(self, pairs: Compared) -> Tensor:
        return pairs.logsumexp(different=(1.0, self.distance.threshold(self.neg_margin))).different

    def extra_repr(self) -> str:
        """What ``print(loss)`` shows."""
        return f"neg_margin={self.neg_margin}, pos_margin={self.pos_margin}"


def _turned(batch: Batch) -> Batch:
    """The batch with the two sides exchanged: references compared with rows."""
    tuples = batch.tuples
    if tuples is not None:
        a1, p, a2, n = (tuples[0], tuples[1], tuples[0], tuples[2]) if len(tuples) == 3 else tuples
        tuples = (p, a1, n, a2)
    return Batch(batch.w, batch.c, batch.x, batch.y, batch.exclude if batch.w is batch.x else None, tuples)


def lifted_structure_reference(
    embeddings: Tensor, labels: Tensor, *, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None,
    neg_margin: float = 1, pos_margin: float = 0, distance: Any = None,
) -> Tensor:  # fmt: skip
    """The formula, pair by pair. For tests only."""
    distance = distance or distances.LpDistance()
    pairs = LabelledPairs.of(embeddings, labels, ref_emb, ref_labels, distance)
    d, sign = (pairs.s, -1) if distance.is_inverted else (-pairs.s, 1)
    z, different = sign * (neg_margin - d), pairs.different
    values = []
    for i, p in pairs.same.nonzero().tolist():
        logits = [z[i][different[i]], z[p][different[p]] if ref_emb is None else z[:, p][different[:, p]]]
        joint = torch.cat(logits)
        lse = torch.logsumexp(joint, 0) if joint.numel() else 0
        values.append(torch.relu(lse + sign * (d[i, p] - pos_margin)).square() / 2)
    if not different.any() or not values:
        return embeddings.sum() * 0
    return mean(torch.stack(values), embeddings)


ENTRY = LossEntry(
    loss=LiftedStructureLoss,
    function=as_function(LiftedStructureLoss),
    reference=lifted_structure_reference,
    paper="Oh Song et al. 2016, arXiv 1511.06452",
    options=(
        {},
        {"neg_margin": 0.5, "pos_margin": 1.2, "distance": distances.LpDistance(power=2)},
        {"neg_margin": 0.1, "pos_margin": 0.8, "distance": distances.CosineSimilarity()},
    ),
    family="pairs",
)

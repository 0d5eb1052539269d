"""NCA: the probability that an anchor picks a neighbour of its own class.

With z = -scale d^2 of an anchor's pairs (d the distance of unit vectors by default)::

    loss = mean over anchors with positives of  -log( sum_p exp z_ap / (sum_p exp z_ap + sum_n exp z_an) )

Goldberger, Hinton, Roweis and Salakhutdinov 2004, "Neighbourhood Components Analysis", with the logarithm that its
section 2 names as the alternative. An anchor without positives drops out of the mean. The loss is computed in log
space, so an anchor whose probability underflows keeps its loss and gradient; pytorch-metric-learning drops it as if it
had no positives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances
from ..logspace import log1pexp
from ..ops.checks import check_number
from ..pairs.batch import Batch
from ..pairs.comparisons import Streamed
from ..pairs.tuples import anchors, row_weights
from ..reducers import Terms
from ..reference.labelled import LabelledPairs, mean
from .base import LossEntry
from .metric_loss import MetricLoss, as_function


class NCALoss(MetricLoss):
    """NCA; a drop-in for pytorch-metric-learning 2.9's class of this name.

    See the module for the formula. A miner's tuple chooses no pairs but weighs the anchors, as in
    pytorch-metric-learning: by how often each is listed (as anchor, positive or negative; only as anchor with
    ``ref_emb``), over the largest such number. Labels are always needed. A single embedding with ``ref_emb`` counts; in
    pytorch-metric-learning it gives 0.

    Args:
        softmax_scale: multiplies the (squared) distance, or the similarity.
        options: those of :class:`MetricLoss`; the distance is LpDistance(power=2), the reducer MeanReducer.
    """

    def __init__(self, softmax_scale: float = 1, **options: Any):
        super().__init__(**options)
        self.softmax_scale = check_number("softmax_scale", softmax_scale)

    def default_distance(self) -> distances.Distance:
        """The squared distance of unit vectors."""
        return distances.LpDistance(power=2)

    def terms(self, batch: Batch) -> Mapping[str, Terms]:
        """One term for each anchor with positives."""
        if batch.y is None:
            raise ValueError("NCALoss needs labels: a miner's tuple weighs rows, and names no pairs")
        pairs = Streamed(batch._replace(tuples=None), self.distance)
        lse = pairs.logsumexp(scale=self.softmax_scale)
        some = lse.same != -torch.inf
        gap = torch.where(some, lse.different, -torch.inf) - torch.where(some, lse.same, 0)
        values = log1pexp(gap)
        if batch.tuples is not None:
            named = batch.tuples if batch.w is batch.x else anchors(batch.tuples)  # the others are references
            weights = row_weights(named, len(values), values)
            values = values if weights is None else values * weights.to(values.dtype)
        return {"loss": Terms.elements(values, batch.y, some)}

    def extra_repr(self) -> str:
        """What ``print(loss)`` shows."""
        return f"softmax_scale={self.softmax_scale}"


def nca_reference(
    embeddings: Tensor, labels: Tensor, *, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None,
    softmax_scale: float = 1, distance: Any = None,
) -> Tensor:  # fmt: skip
    """The formula, anchor by anchor. For tests only."""
    pairs = LabelledPairs.of(embeddings, labels, ref_emb, ref_labels, distance or distances.LpDistance(power=2))
    rows = []
    for z, same, different in zip(softmax_scale * pairs.s, pairs.same, pairs.different):
        if same.any():
            rows.append(torch.logsumexp(z[same | different], 0) - torch.logsumexp(z[same], 0))
    return mean(torch.stack(rows) if rows else pairs.s[:0, 0], embeddings)


ENTRY = LossEntry(
    loss=NCALoss,
    function=as_function(NCALoss),
    reference=nca_reference,
    paper="Goldberger et al. 2004",
    options=(
        {},
        {"softmax_scale": 6.0},
        {"softmax_scale": 0.5, "distance": distances.DotProductSimilarity(normalize_embeddings=False)},
    ),
    family="pairs",
)

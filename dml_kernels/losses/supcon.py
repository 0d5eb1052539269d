"""Supervised contrastive loss: each positive against all positives and negatives of its anchor.

With z = s / temperature, s the cosines of an anchor's pairs::

    loss = mean over anchors of  log(sum_p exp z_ap + sum_n exp z_an) - (mean over positives of z_ap)

Khosla et al. 2020, "Supervised Contrastive Learning", arXiv 2004.11362, equation 2 (L_out). For a distance, s is minus
the distance. An anchor without positives contributes 0, and the default mean is over anchors above 0. As in
pytorch-metric-learning, a batch without any positive or without any negative pair gives 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances, reducers
from ..logspace import log1pexp
from ..pairs.batch import Batch
from ..pairs.comparisons import compared
from ..reducers import Terms
from ..reference.labelled import LabelledPairs, mean_of_positive
from .base import LossEntry
from .metric_loss import as_function
from .temperature import TemperatureLoss


class SupConLoss(TemperatureLoss):
    """Supervised contrastive loss; a drop-in for pytorch-metric-learning 2.9's class of this name.

    See the module for the formula. A pair that a miner lists several times counts once, as in pytorch-metric-learning.

    Args:
        temperature: divides the similarity; not 0.
        options: those of :class:`~dml_kernels.losses.metric_loss.MetricLoss`; the distance
            is CosineSimilarity, the reducer AvgNonZeroReducer.
    """

    def __init__(self, temperature: float = 0.1, **options: Any):
        super().__init__(temperature, **options)

    def default_reducer(self) -> reducers.Reducer:
        """The mean over anchors above 0."""
        return reducers.AvgNonZeroReducer()

    def terms(self, batch: Batch) -> Mapping[str, Terms]:
        """One term for each anchor."""
        pairs = compared(batch, self.distance, unique=True)
        lse, number = pairs.logsumexp(scale=1 / self.temperature, sums=True), pairs.counts()
        assert lse.sum_same is not None
        some = number.same > 0
        positives = torch.where(some, lse.same, 0)
        whole = positives + log1pexp(torch.where(some, lse.different, -torch.inf) - positives)
        values = whole - lse.sum_same / number.same.clamp_min(1)
        both = (number.same.sum() > 0) & (number.different.sum() > 0)
        return {"loss": Terms.elements(torch.where(some & both, values, 0), batch.y, pairs.kept)}


def supcon_reference(
    embeddings: Tensor, labels: Tensor, *, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None,
    temperature: float = 0.1, distance: Any = None,
) -> Tensor:  # fmt: skip
    """The formula, anchor by anchor. For tests only."""
    pairs = LabelledPairs.of(embeddings, labels, ref_emb, ref_labels, distance or distances.CosineSimilarity())
    rows = [embeddings.sum() * 0]
    if pairs.same.any() and pairs.different.any():
        for z, same, different in zip(pairs.s / temperature, pairs.same, pairs.different):
            if same.any():
                rows.append(-(z[same] - torch.logsumexp(z[same | different], 0)).mean())
    return mean_of_positive(torch.stack(rows))


ENTRY = LossEntry(
    loss=SupConLoss,
    function=as_function(SupConLoss),
    reference=supcon_reference,
    paper="Khosla et al. 2020, arXiv 2004.11362",
    options=({}, {"temperature": 0.5}, {"temperature": 0.3, "distance": distances.LpDistance()}),
    family="pairs",
)

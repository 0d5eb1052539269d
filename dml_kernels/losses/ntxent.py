"""NT-Xent: the normalised, temperature-scaled cross-entropy of SimCLR, with labels.

For each positive pair (i, p), with z = s / temperature and the row's negatives n, other positives left out::

    l_ip = -log exp(z_ip) / (exp(z_ip) + sum_n exp(z_in))  =  log(1 + exp(L_i - z_ip)),   L_i = log sum_n exp(z_in)

s is the cosine, or minus a distance. Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
Representations", arXiv 2002.05709. Where pytorch-metric-learning takes the logarithm of a quotient, which loses a pair
whose probability underflows, here everything stays in log space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances
from ..pairs.batch import Batch
from ..pairs.comparisons import compared
from ..reducers import Terms
from ..reference.labelled import LabelledPairs, mean
from .base import LossEntry
from .metric_loss import as_function
from .temperature import TemperatureLoss


class NTXentLoss(TemperatureLoss):
    """NT-Xent loss; a drop-in for pytorch-metric-learning 2.9's class of this name.

    See the module for the formula; the mean is over positive pairs. A positive pair whose row has no negative counts
    with 0; a row without positives does not count.

    Args:
        temperature: divides the similarity; not 0.
        options: those of :class:`~dml_kernels.losses.metric_loss.MetricLoss`; the distance
            is CosineSimilarity, the reducer MeanReducer.
    """

    def __init__(self, temperature: float = 0.07, **options: Any):
        super().__init__(temperature, **options)

    def terms(self, batch: Batch) -> Mapping[str, Terms]:
        """One term for each positive pair."""
        pairs, k = compared(batch, self.distance), 1 / self.temperature
        return {"loss": pairs.positive_sum("softplus", pairs.logsumexp(scale=k).different, params=(k,))}


def ntxent_reference(
    embeddings: Tensor, labels: Tensor, *, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None,
    temperature: float = 0.07, distance: Any = None,
) -> Tensor:  # fmt: skip
    """The formula, pair by pair. For tests only."""
    pairs = LabelledPairs.of(embeddings, labels, ref_emb, ref_labels, distance or distances.CosineSimilarity())
    values = [embeddings.new_empty(0)]
    for z, same, different in zip(pairs.s / temperature, pairs.same, pairs.different):
        negatives = z[different].expand(int(same.sum()), -1)
        values.append(torch.logsumexp(torch.cat((z[same][:, None], negatives), 1), 1) - z[same])
    return mean(torch.cat(values), embeddings)


ENTRY = LossEntry(
    loss=NTXentLoss,
    function=as_function(NTXentLoss),
    reference=ntxent_reference,
    paper="Chen et al. 2020, arXiv 2002.05709",
    options=({}, {"temperature": 0.5}, {"temperature": 0.3, "distance": distances.LpDistance()}),
    family="pairs",
)

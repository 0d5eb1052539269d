"""Multi-similarity loss: soft maxima over an anchor's far positives and near negatives, each against a common base.

With the similarities s of an anchor's pairs::

    loss = mean over anchors of  log(1 + sum_p exp(-alpha (s_ap - base))) / alpha
                               + log(1 + sum_n exp( beta  (s_an - base))) / beta

By default s is the cosine; for a distance the signs in the exponents are reversed. Wang, Han, Huang, Dong and Scott
2019, "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", arXiv 1904.06627, equation 15. An
anchor without positives, or without negatives, has 0 in that place, and counts in the mean.
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
from ..pairs.comparisons import compared
from ..pairs.sets import IGNORE_INDEX
from ..reducers import Terms
from ..reference.labelled import LabelledPairs, mean
from .base import LossEntry
from .metric_loss import MetricLoss, as_function


class MultiSimilarityLoss(MetricLoss):
    """Multi-similarity loss; a drop-in for pytorch-metric-learning 2.9's class of this name.

    See the module for the formula. The paper mines its pairs first: MultiSimilarityMiner. A pair that a miner lists
    several times counts once, as in pytorch-metric-learning.

    Args:
        alpha, beta: the factors in the exponents of positives and of negatives.
        base: the similarity that both are compared with.
        options: those of :class:`MetricLoss`; the distance is CosineSimilarity, the reducer MeanReducer.
    """

    def __init__(self, alpha: float = 2, beta: float = 50, base: float = 0.5, **options: Any):
        super().__init__(**options)
        self.alpha, self.beta = check_number("alpha", alpha), check_number("beta", beta)
        self.base = check_number("base", base)

    def default_distance(self) -> distances.Distance:
        """The cosine."""
        return distances.CosineSimilarity()

    def terms(self, batch: Batch) -> Mapping[str, Terms]:
        """One term for each anchor."""
        pairs = compared(batch, self.distance, unique=True)
        base = self.distance.threshold(self.base)
        lse = pairs.logsumexp(same=(-self.alpha, base), different=(self.beta, base))
        values = log1pexp(lse.same) / self.alpha + log1pexp(lse.different) / self.beta
        return {"loss": Terms.elements(values, batch.y, pairs.kept)}

    def extra_repr(self) -> str:
        """What ``print(loss)`` shows."""
        return f"alpha={self.alpha}, beta={self.beta}, base={self.base}"


def multi_similarity_reference(
    embeddings: Tensor, labels: Tensor, *, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None,
    alpha: float = 2, beta: float = 50, base: float = 0.5, distance: Any = None,
) -> Tensor:  # fmt: skip
    """The formula, anchor by anchor. For tests only."""
    distance = distance or distances.CosineSimilarity()
    pairs = LabelledPairs.of(embeddings, labels, ref_emb, ref_labels, distance)
    at, zero = base if distance.is_inverted else -base, pairs.s.new_zeros(1)
    rows = [
        torch.logsumexp(torch.cat((zero, -alpha * (pairs.s[i][pairs.same[i]] - at))), 0) / alpha
        + torch.logsumexp(torch.cat((zero, beta * (pairs.s[i][pairs.different[i]] - at))), 0) / beta
        for i in (labels != IGNORE_INDEX).nonzero().flatten().tolist()
    ]
    return mean(torch.stack(rows) if rows else zero[:0], embeddings)


ENTRY = LossEntry(
    loss=MultiSimilarityLoss,
    function=as_function(MultiSimilarityLoss),
    reference=multi_similarity_reference,
    paper="Wang et al. 2019, arXiv 1904.06627",
    options=(
        {},
        {"alpha": 1, "beta": 4, "base": 0.1},
        {"alpha": 2, "beta": 10, "base": 1.2, "distance": distances.LpDistance()},
    ),
    family="pairs",
)

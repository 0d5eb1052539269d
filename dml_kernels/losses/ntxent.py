"""NT-Xent: the normalised, temperature-scaled cross-entropy of SimCLR, with labels.

    l_ip = -log exp(s_ip / t) / (exp(s_ip / t) + sum_n exp(s_in / t))        for each positive pair (i, p)
         = log(1 + exp(L-_i - s_ip / t)),      L-_i the log-sum-exp of s_in / t over the row's negatives

Other positives are not in the denominator. One ``masked_logsumexp`` over the bank, one sum over the positives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances, functional
from ..ops.contract import check_number
from ..reducers import PAIR, Terms
from .base import LossEntry, check_labels
from .metric_loss import Batch, MetricLoss


class NTXentLoss(MetricLoss):
    """The cross-entropy of each positive pair against the row's negatives, averaged over the pairs.

    A positive pair whose row has no negative counts with 0; a row without positives does not count.

    Args:
        temperature: divides the score (cosine; minus the distance, with a distance). options: of :class:`MetricLoss`.

    Paper: Chen et al. 2020, arXiv 2002.05709.
    """

    def __init__(self, temperature: float = 0.07, **options: Any):
        super().__init__(**options)
        self.temperature = check_number("temperature", temperature)
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive; got {temperature}")

    def default_distance(self) -> distances.Distance:
        """Cosine."""
        return distances.CosineSimilarity()

    def terms(self, batch: Batch) -> Mapping[str, Terms]:
        """The positive pairs, of all that the labels make or of the tuples."""
        return {"loss": self._of_labels(batch)}

    def _of_labels(self, batch: Batch) -> Terms:
        assert batch.y is not None
        assert batch.c is not None
        k = 1 / self.temperature
        options = {"metric": self.distance.metric, "normalize": self.distance.normalize_embeddings}
        lse = functional.masked_logsumexp(
            batch.x, batch.w, batch.y, batch.c, scale=k, exclude=batch.exclude, **options
        )  # fmt: skip
        found = functional.positive_pair_sum(
            batch.x, batch.w, batch.y, batch.c, lse.different, kind="softplus", params=(k,), exclude=batch.exclude,
            **options,
        )  # fmt: skip
        total = found.total
        return Terms(total, found.number.to(total), found.active.to(total), PAIR, batch.y)

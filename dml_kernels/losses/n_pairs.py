"""N-pairs loss: one pair of each class; the positives of all other classes are its negatives.

In each class with two members or more the first is the anchor a and the second its positive p. With s the products of
unit vectors::

    loss = mean over classes i of  -s(a_i, p_i) + log sum_j exp s(a_i, p_j)

Sohn 2016, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", equation 10; its regulariser of
lengths is available as ``embedding_regularizer``. A class with one member takes no part. A single class gives 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances
from ..logspace import log1pexp
from ..ops.contract import accumulate_dtype, check_pair_indices, values_can_be_read
from ..ops.masked_logsumexp import masked_logsumexp
from ..pairs.batch import Batch
from ..pairs.sets import IGNORE_INDEX
from ..reducers import ELEMENT, Terms, nonzero
from .base import LossEntry
from .metric_loss import MetricLoss, as_function


class NPairsLoss(MetricLoss):
    """N-pairs loss; a drop-in for pytorch-metric-learning 2.9's class of this name.

    See the module for the formula. With a miner's tuple, the first positive pair that it lists for a class is the pair
    of that class. Labels are always needed. Shapes do not depend on the labels: half the batch is gathered, whatever
    the number of classes.

    Args:
        options: those of :class:`MetricLoss`; the reducer is MeanReducer. The distance is that of
            pytorch-metric-learning, products of unit vectors; that of the paper is
            ``DotProductSimilarity(normalize_embeddings=False)``.

    Attributes:
        num_pairs: of the last call, where ``collect_stats=True``.

    Raises:
        ValueError: at the call, ``ref_emb`` (both sides of a pair come out of the batch) or no labels.
    """

    takes_references = False
    statistics = ("num_pairs",)
    unused = ("cross_entropy",)

    def default_distance(self) -> distances.Distance:
        """The product of unit vectors."""
        return distances.DotProductSimilarity(normalize_embeddings=True)

    def terms(self, batch: Batch) -> Mapping[str, Terms]:
        """One term for each class with a pair."""
        if not batch.is_own_bank:
            raise ValueError("NPairsLoss takes both sides of its pairs out of the batch; it takes no ref_emb")
        if batch.y is None:
            raise ValueError("NPairsLoss needs labels: it takes one pair of each class")
        anchors, positives, used = _pairs(batch, batch.y)
        if self.collect_stats:
            self.num_pairs = int(used.sum())  # waits for a GPU
        if not anchors.numel():
            nothing = batch.x.sum(1, dtype=accumulate_dtype(batch.x.dtype)) * 0
            return {"loss": Terms.elements(nothing, batch.y, torch.zeros_like(nothing, dtype=torch.bool))}
        classes = torch.where(used, torch.arange(used.numel(), device=used.device), -1)
        lse = masked_logsumexp(
            batch.x.index_select(0, anchors), batch.x.index_select(0, positives), classes, classes, ignore_index=-1,
            metric=self.distance.metric, normalize=self.distance.normalize_embeddings,
        )  # fmt: skip
        gap = torch.where(used, lse.different, -torch.inf) - torch.where(used, lse.same, 0)
        values, labels = log1pexp(gap), batch.y.index_select(0, anchors)
        return {"loss": Terms(values, used.to(values), nonzero(values), ELEMENT, labels)}


def _pairs(batch: Batch, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors, positives, and which of them are the pair of a class; as many as the batch can hold at most."""
    if batch.tuples is not None:
        if values_can_be_read(y):
            check_pair_indices(batch.tuples[0], batch.tuples[1], y.numel(), y.numel())
        order = y[batch.tuples[0]].argsort(stable=True)
        a, p = batch.tuples[0][order], batch.tuples[1][order]
        two, slots = torch.ones_like(a, dtype=torch.bool), min(a.numel(), y.numel())
    else:
        order = y.argsort(stable=True)
        a, p = order[:-1], order[1:]
        two, slots = (y[a] == y[p]) & (y[a] != IGNORE_INDEX), y.numel() // 2
    label = y[a]
    first = torch.cat((torch.ones_like(label[:1], dtype=torch.bool), label[1:] != label[:-1]))
    used = two & first
    front = (~used).long().argsort(stable=True)[:slots]
    return a[front], p[front], used[front]


def n_pairs_reference(
    embeddings: Tensor, labels: Tensor, *, ref_emb: None = None, ref_labels: None = None, distance: Any = None
) -> Tensor:
    """The formula as a cross-entropy. For tests only."""
    from .. import reference

    distance = distance or distances.CosineSimilarity()
    members = [(labels == label).nonzero().flatten() for label in labels.unique() if label != IGNORE_INDEX]
    pairs = [(rows[0], rows[1]) for rows in members if len(rows) > 1]
    if not pairs:
        return embeddings.sum() * 0
    a, p = (torch.stack(side) for side in zip(*pairs))
    s = reference.scores(embeddings[a], embeddings[p], distance.metric, distance.normalize_embeddings)
    return torch.nn.functional.cross_entropy(s, torch.arange(len(pairs)))


ENTRY = LossEntry(
    loss=NPairsLoss,
    function=as_function(NPairsLoss),
    reference=n_pairs_reference,
    paper="Sohn 2016",
    options=(
        {},
        {"distance": distances.DotProductSimilarity(normalize_embeddings=False)},
        {"distance": distances.LpDistance(power=2)},
    ),
    family="pairs",
)

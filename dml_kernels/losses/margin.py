"""Margin loss: distances of positives below a boundary, of negatives above it; the boundary may be learned.

Over all triplets (a, p, n), with the distances d and the boundary beta (one, or one for each class, of the anchor)::

    loss = sum over triplets of (d_ap - beta + margin)+ + (beta - d_an + margin)+
           / number of positive terms  +  nu beta

(v)+ = max(v, 0); for a similarity the signs are reversed. By default d is the distance of unit vectors. Wu, Manmatha,
Smola and Krähenbühl 2017, "Sampling Matters in Deep Embedding Learning", arXiv 1706.07567, equation 4; the paper
samples its pairs, as DistanceWeightedMiner does. Summed over all triplets, a pair counts once for every pair in the
other set of its anchor, so no triplet is built. An anchor without positives or without negatives contributes 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances, reducers
from ..ops.checks import check_flag, check_integer, check_number
from ..pairs.batch import Batch
from ..pairs.comparisons import compared
from ..pairs.sets import IGNORE_INDEX
from ..pairs.tuples import check_per_anchor, random_triplets
from ..reducers import TRIPLET, Terms, nonzero
from ..reference.labelled import LabelledPairs
from .base import LossEntry, values_can_be_read
from .metric_loss import MetricLoss, as_function


class MarginLoss(MetricLoss):
    """Margin loss; a drop-in for pytorch-metric-learning 2.9's class of this name.

    See the module for the formula. Its parts, for ``MultipleReducers``, are ``margin_loss`` and ``beta_reg_loss``.

    Args:
        margin: half the width between positives and negatives.
        nu: the weight of the regulariser of beta, which is used if ``learn_beta``. With a beta for each class it is
            summed over triplets and divided as they are.
        beta: the boundary, or its initial value if it is learned.
        triplets_per_anchor: ``all``, or how many triplets to draw for each anchor if no miner chooses them.
        learn_beta: whether beta is a parameter.
        num_classes: None: one beta; a number: a beta for each of that many classes, and labels must be below it.
        options: those of :class:`MetricLoss`; the distance is LpDistance, the reducer DivisorReducer.

    Attributes:
        beta: (1,) or (num_classes,), a parameter if ``learn_beta``; never cast to another dtype.

    Raises:
        ValueError, TypeError: ``triplets_per_anchor`` that is neither ``all`` nor a positive integer; at the call,
            labels outside ``num_classes``, or none where each class has its beta.
    """

    beta: Tensor

    def __init__(
        self, margin: float = 0.2, nu: float = 0, beta: float = 1.2, triplets_per_anchor: str | int = "all",
        learn_beta: bool = False, num_classes: int | None = None, **options: Any,
    ):  # fmt: skip
        super().__init__(**options)
        self.margin, self.nu = check_number("margin", margin), check_number("nu", nu)
        self.learn_beta = check_flag("learn_beta", learn_beta)
        self.triplets_per_anchor = check_per_anchor(triplets_per_anchor)
        betas = 1 if num_classes is None else check_integer("num_classes", num_classes, 1)
        start = torch.full((betas,), check_number("beta", beta))
        if learn_beta:
            self.beta = torch.nn.Parameter(start)
        else:
            self.register_buffer("beta", start, persistent=False)

    def default_reducer(self) -> reducers.Reducer:
        """The sum over the number of positive terms."""
        return reducers.DivisorReducer()

    def terms(self, batch: Batch) -> Mapping[str, Terms]:
        """Sums over each anchor's triplets."""
        if batch.tuples is None and self.triplets_per_anchor != "all":
            batch = batch._replace(tuples=random_triplets(batch, int(self.triplets_per_anchor)))
        pairs = compared(batch, self.distance)
        beta = self._row_beta(batch).to(pairs.dtype)
        boundary = beta if self.distance.is_inverted else -beta
        triplets = pairs.hinge_triplets((-1.0, self.margin), (1.0, self.margin), (boundary, -boundary))
        parts = {"margin_loss": triplets}
        if self.learn_beta:
            number = triplets.number
            if self.beta.numel() == 1:
                parts["beta_reg_loss"] = Terms.final(torch.where(number.sum() > 0, beta * self.nu, 0))
            else:
                total = beta * self.nu * number
                positive = nonzero(total) * number
                parts["beta_reg_loss"] = Terms(total, number, positive, TRIPLET, batch.y, triplets.divisor)
        return parts

    def _row_beta(self, batch: Batch) -> Tensor:
        """The beta of each row: () where there is one beta, else (N,)."""
        if self.beta.numel() == 1:
            return self.beta[0]
        if batch.y is None:
            raise ValueError("labels are needed: each class has its own beta")
        y, classes = torch.where(batch.y == IGNORE_INDEX, 0, batch.y), self.beta.numel()
        if values_can_be_read(y) and y.numel() and not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise ValueError(
                f"labels must be in [0, {classes}), as num_classes says; got {int(y.min())} to {int(y.max())}"
            )
        return self.beta.index_select(0, y)

    def extra_repr(self) -> str:
        """What ``print(loss)`` shows."""
        return f"margin={self.margin}, nu={self.nu}, learn_beta={self.learn_beta}, betas={self.beta.numel()}"


def margin_reference(
    embeddings: Tensor, labels: Tensor, *, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None,
    margin: float = 0.2, nu: float = 0, beta: float = 1.2, learn_beta: bool = False, num_classes: int | None = None,
    distance: Any = None,
) -> Tensor:  # fmt: skip
    """The formula, every triplet in turn. For tests only."""
    distance = distance or distances.LpDistance()
    pairs = LabelledPairs.of(embeddings, labels, ref_emb, ref_labels, distance)
    d, sign = (pairs.s, -1) if distance.is_inverted else (-pairs.s, 1)
    beta = float(torch.tensor(beta))  # as the parameter holds it
    total, active, triplets = embeddings.sum() * 0, 0, 0
    for row, same, different in zip(d, pairs.same, pairs.different):
        near = torch.relu(sign * (row[same] - beta) + margin)[:, None].expand(-1, int(different.sum()))
        far = torch.relu(sign * (beta - row[different]) + margin).expand_as(near)
        total = total + (near + far).sum()
        active += int((near > 0).sum() + (far > 0).sum())
        triplets += near.numel()
    if learn_beta and num_classes:
        total = total + nu * beta * triplets
    loss = total / active if active else total * 0
    return loss + nu * beta if learn_beta and not num_classes and triplets else loss


ENTRY = LossEntry(
    loss=MarginLoss,
    function=as_function(MarginLoss),
    reference=margin_reference,
    paper="Wu et al. 2017, arXiv 1706.07567",
    options=(
        {},
        {"margin": 0.1, "nu": 0.5, "beta": 1.0, "learn_beta": True},
        {"nu": 0.1, "learn_beta": True, "num_classes": 50},
        {"beta": 0.3, "distance": distances.CosineSimilarity()},
    ),
    family="pairs",
    op="masked_hinge_sum",
)

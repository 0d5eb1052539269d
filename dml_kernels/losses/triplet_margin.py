"""Triplet margin loss: every positive of an anchor must be closer than every negative, by a margin.

With the distances d of a triplet of an anchor a, a positive p and a negative n::

    l_apn = (d_ap - d_an + margin)+               mean over the triplets with l > 0

(v)+ = max(v, 0). ``smooth_loss``: log(1 + exp v). ``swap``: the smaller of d_an and d_pn in place of d_an (Balntas et
al. 2016, "Learning local feature descriptors with triplets and shallow convolutional neural networks"). For a
similarity the signs are reversed. By default d is the distance of unit vectors. Schroff, Kalenichenko and Philbin 2015,
"FaceNet: A Unified Embedding for Face Recognition and Clustering", arXiv 1503.03832; Weinberger and Saul 2009.

All triplets of the batch are counted, exactly, in O(N M log K) time for K positives an anchor and without a list of
them (pytorch-metric-learning lists N M K); with ``smooth_loss`` or ``swap`` in O(N M K), still without a list. A
miner's pairs form every triplet of a common anchor; with ``smooth_loss`` or ``swap`` those are listed, which breaks a
compiled graph, as random triplets do.

With references, d_pn is the distance of two references. There pytorch-metric-learning takes the distance between the
reference and the row of the batch with that index; in the batch itself both agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances, reducers, reference
from ..ops import segments
from ..ops.checks import check_flag, check_number
from ..ops.pair_scores import pair_scores
from ..ops.triplet_sum import triplet_sum
from ..pairs.batch import Batch
from ..pairs.comparisons import Listed, Streamed
from ..pairs.tuples import as_triplets, check_per_anchor, random_triplets
from ..reducers import TRIPLET, Terms, nonzero
from ..reference.labelled import LabelledPairs, mean_of_positive
from .base import LossEntry
from .metric_loss import MetricLoss, as_function


class TripletMarginLoss(MetricLoss):
    """Triplet margin loss; a drop-in for pytorch-metric-learning 2.9's class of this name.

    See the module for the formula.

    Args:
        margin: the margin, in units of the distance.
        swap: whether d_pn may replace d_an; see the module.
        smooth_loss: whether log(1 + exp v) replaces the hinge; see the module.
        triplets_per_anchor: ``all``, or how many random triplets of each anchor, by PyTorch's default generator.
        options: those of :class:`MetricLoss`; the distance is LpDistance, the reducer AvgNonZeroReducer.

    Raises:
        ValueError: triplets_per_anchor is neither ``all`` nor a positive integer.
    """

    def __init__(
        self, margin: float = 0.05, swap: bool = False, smooth_loss: bool = False,
        triplets_per_anchor: int | str = "all", **options: Any,
    ):  # fmt: skip
        super().__init__(**options)
        self.margin = check_number("margin", margin)
        self.swap, self.smooth_loss = check_flag("swap", swap), check_flag("smooth_loss", smooth_loss)
        self.triplets_per_anchor = check_per_anchor(triplets_per_anchor)

    def default_reducer(self) -> reducers.Reducer:
        """The mean over triplets above 0."""
        return reducers.AvgNonZeroReducer()

    def terms(self, batch: Batch) -> Mapping[str, Terms]:
        """One term for each triplet."""
        if batch.w.size(0) and (batch.tuples is not None or self.triplets_per_anchor != "all"):
            return {"loss": self._listed(batch)}
        pairs = Streamed(batch, self.distance)
        if pairs.c.numel() == 0:
            empty = pairs.pair_terms(*[pairs._empty()] * 3)
            return {"loss": empty._replace(kind=TRIPLET)}
        found = triplet_sum(
            batch.x, margin=self.margin, smooth=self.smooth_loss, swap=self.swap, **pairs.call
        )  # fmt: skip
        number, active = (count.to(pairs.dtype) for count in found[1:])
        return {"loss": Terms(found.total, number, active, TRIPLET, batch.y)}

    def _listed(self, batch: Batch) -> Terms:
        tuples = batch.tuples
        if tuples is not None and len(tuples) == 4 and not (self.smooth_loss or self.swap):
            return _all_of_lists(Listed(batch, self.distance, tuples), self.margin)
        a, p, n = random_triplets(batch, int(self.triplets_per_anchor)) if tuples is None else as_triplets(tuples)
        s_ap, s_an = self._scores(batch.x, batch.w, a, p), self._scores(batch.x, batch.w, a, n)
        if self.swap:
            s_an = torch.maximum(s_an, self._scores(batch.w, batch.w, p, n))
        value = s_an - s_ap + self.margin
        value = torch.nn.functional.softplus(value) if self.smooth_loss else torch.relu(value)
        order = a.argsort(stable=True)
        value, a = value[order], a[order]
        bounds = segments.offsets(a, batch.x.size(0))
        total = segments.total(value, a, bounds)
        active = segments.total(nonzero(value), a, bounds)
        return Terms(total, bounds.diff().to(total), active, TRIPLET, batch.y)

    def _scores(self, x: Tensor, w: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return pair_scores(
            x, w, i, j, self.distance.metric, normalize=self.distance.normalize_embeddings
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What ``print(loss)`` shows."""
        return (
            f"margin={self.margin}, swap={self.swap}, smooth_loss={self.smooth_loss}, "
            f"triplets_per_anchor={self.triplets_per_anchor!r}"
        )


def _all_of_lists(pairs: Listed, margin: float) -> Terms:
    """Sum every triplet that listed pairs of an anchor make, in O(pairs) memory.

    Negatives are sorted by anchor and score; a binary search for each positive gives a difference of prefix sums, fp64.
    """
    near, far = pairs.same, pairs.different
    t, s = near.s.double() - margin, far.s.double()
    every = t.numel() + s.numel()
    # Among equals a negative comes first: it does not pass the threshold.
    order = torch.cat((s, t)).detach().argsort(stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(every, device=order.device))
    key, order = (far.rows * every + rank[: s.numel()]).sort()
    prefix = torch.cat((s.new_zeros(1), s[order].cumsum(0)))
    at, end = torch.searchsorted(key, near.rows * every + rank[s.numel() :]), far.bounds[near.rows + 1]
    total = near.total(prefix[end] - prefix[at] - (end - at) * t).to(pairs.dtype)
    number = pairs.counts()
    active = near.total((end - at).to(pairs.dtype))
    return Terms(total, number.same * number.different, active, TRIPLET, pairs.batch.y)


def triplet_margin_reference(
    embeddings: Tensor, labels: Tensor, *, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None,
    margin: float = 0.05, swap: bool = False, smooth_loss: bool = False, distance: Any = None,
) -> Tensor:  # fmt: skip
    """The formula, one anchor and positive at a time. For tests only."""
    distance = distance or distances.LpDistance()
    pairs = LabelledPairs.of(embeddings, labels, ref_emb, ref_labels, distance)
    bank = embeddings if ref_emb is None else ref_emb
    between = reference.scores(bank, bank, distance.metric, distance.normalize_embeddings)
    values = [embeddings.sum()[None] * 0]
    for a, p in pairs.same.nonzero().tolist():
        n = pairs.different[a]
        closest = torch.maximum(pairs.s[a][n], between[p][n]) if swap else pairs.s[a][n]
        violation = closest - pairs.s[a, p] + margin
        values.append(torch.log1p(violation.exp()) if smooth_loss else torch.relu(violation))
    return mean_of_positive(torch.cat(values))


ENTRY = LossEntry(
    loss=TripletMarginLoss,
    function=as_function(TripletMarginLoss),
    reference=triplet_margin_reference,
    paper="Schroff et al. 2015, arXiv 1503.03832",
    options=(
        {},
        {"margin": 0.3, "distance": distances.CosineSimilarity()},
        {"margin": 0.2, "swap": True},
        {"margin": 0.1, "smooth_loss": True, "distance": distances.LpDistance(power=2)},
        {"margin": 0.1, "smooth_loss": True, "swap": True},
    ),
    family="pairs",
    op="triplet_sum",
)

"""The pairs that a loss compares, behind one interface: all that the labels define, or those of a miner.

A pair loss is written once, on a few reductions over each anchor's same-class and different-class pairs.
:class:`Streamed` computes these through the ops, tile by tile, without an N x M buffer; :class:`Listed` gathers the
listed pairs, in O(pairs) memory, and reduces the part of the list that belongs to each anchor. In both, scores s are
larger for closer pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distances import Distance
from ..ops import segments
from ..ops.contract import accumulate_dtype, product_dtype
from ..ops.masked_hinge_sum import MaskedHingeSum, masked_hinge_sum
from ..ops.masked_logsumexp import MaskedLogSumExp, masked_logsumexp
from ..ops.pair_scores import pair_scores
from ..ops.positive_pair_sum import positive_pair_sum
from ..reducers import PAIR, TRIPLET, Terms, nonzero
from . import dense
from .batch import Batch
from .class_ranges import count_pairs
from .sets import IGNORE_INDEX

Line = tuple[float, float]


class Counts(NamedTuple):
    """The number of same and of different pairs of each anchor, (N,), in the dtype of the sums."""

    same: Tensor
    different: Tensor


class Compared:
    """The interface of both kinds of comparison.

    Attributes:
        batch, distance: what is compared, and how.
        kept: (N,) bool, the anchors that count: those not labelled -100.
        dtype: the dtype of the sums: fp32, or fp64 where either side is fp64.
    """

    batch: Batch
    distance: Distance
    kept: Tensor
    dtype: torch.dtype

    def counts(self) -> Counts:
        """The number of pairs of each anchor."""
        raise NotImplementedError

    def logsumexp(
        self, same: Line = (1.0, 0.0), different: Line = (1.0, 0.0), scale: float = 1.0, *, sums: bool = False,
        policy: str = "linear", policy_params: Sequence[float] = (),
    ) -> MaskedLogSumExp:  # fmt: skip
        """Log-sum-exp (N,) of z = k scale (s - o) over either set; see :func:`functional.masked_logsumexp`.

        ``policy`` is ``linear`` or ``quadratic``. An empty set is -inf with a zero gradient.
        """
        raise NotImplementedError

    def hinge_sum(
        self, same: Line, different: Line, threshold: tuple[Tensor | None, Tensor | None] = (None, None)
    ) -> MaskedHingeSum:
        """Sum (N,) of relu(k s + o + t) over either set and the number of its positive terms.

        t is a () or (N,) tensor for each set; see :func:`functional.masked_hinge_sum`.
        """
        raise NotImplementedError

    def hinge_triplets(
        self, same: Line, different: Line, threshold: tuple[Tensor | None, Tensor | None] = (None, None)
    ) -> Terms:
        """Sum over triplets (a, p, n) of hinge(a, p) + hinge(a, n): each pair counts once for every pair of the other
        set.

        ``divisor`` counts how often, over all triplets, a hinge is positive.
        """
        hinge, pairs = self.hinge_sum(same, different, threshold), self.counts()
        active = Counts(hinge.count_same.to(self.dtype), hinge.count_different.to(self.dtype))
        number = pairs.same * pairs.different
        # This is not a difference of large numbers, because few terms may be active.
        either = active.same * pairs.different + (pairs.same - active.same) * active.different
        total = hinge.same * pairs.different + hinge.different * pairs.same
        divisor = active.same * pairs.different + active.different * pairs.same
        return Terms(total, number, either, TRIPLET, self.batch.y, divisor.sum())

    def positive_sum(self, kind: str, u: Tensor, v: Tensor | None = None, params: Sequence[float] = ()) -> Terms:
        """One term for each positive pair (a, p): see :func:`dense.term`.

        Args:
            kind, params: the term and its parameters.
            u: (N,) a value of each anchor.
            v: (M,) a value of each positive, or None.
        """
        raise NotImplementedError

    def pair_terms(self, total: Tensor, number: Tensor, active: Tensor) -> Terms:
        """The terms of pairs, for the reducer."""
        return Terms(total, number, active.to(self.dtype), PAIR, self.batch.y)


def compared(batch: Batch, distance: Distance, *, unique: bool = False) -> Compared:
    """The comparison of a batch. With ``unique``, a pair that a miner lists several times counts once.

    A triplet counts as its two pairs, (a, p) and (a, n).
    """
    if batch.tuples is None or batch.w.size(0) == 0:
        return Streamed(batch, distance)
    return Listed(batch, distance, batch.tuples, unique)


class Streamed(Compared):
    """All pairs that the labels define, without each row's own copy."""

    def __init__(self, batch: Batch, distance: Distance):
        assert batch.y is not None
        if batch.c is None:
            raise ValueError("ref_labels are needed where no indices_tuple says which pairs to compare")
        self.batch, self.distance, self.y, self.c = batch, distance, batch.y, batch.c
        self.kept = batch.y != IGNORE_INDEX
        self.dtype = accumulate_dtype(product_dtype(batch.x, batch.w))
        self.call: dict[str, Any] = {
            **batch.bank._asdict(), "y": batch.y, "metric": distance.metric, "normalize": distance.normalize_embeddings,
            "ignore_index": IGNORE_INDEX,
        }  # fmt: skip

    def counts(self) -> Counts:
        """Counts by binary search in the sorted labels, so that shapes do not depend on the values."""
        positives, negatives = count_pairs(self.y, self.c, self.batch.exclude, IGNORE_INDEX)
        return Counts(positives.to(self.dtype), negatives.to(self.dtype))

    def _empty(self) -> Tensor:
        return self.batch.x.sum(1, dtype=self.dtype)

    def logsumexp(
        self, same: Line = (1.0, 0.0), different: Line = (1.0, 0.0), scale: float = 1.0, *, sums: bool = False,
        policy: str = "linear", policy_params: Sequence[float] = (),
    ) -> MaskedLogSumExp:  # fmt: skip
        """Calls :func:`functional.masked_logsumexp`."""
        if self.c.numel() == 0:
            return MaskedLogSumExp(*[self._empty()] * 4)
        return masked_logsumexp(
            self.batch.x, scale=scale, same=same, different=different, sums=sums, policy=policy,
            policy_params=policy_params, **self.call,
        )  # fmt: skip

    def hinge_sum(
        self, same: Line, different: Line, threshold: tuple[Tensor | None, Tensor | None] = (None, None)
    ) -> MaskedHingeSum:
        """Calls :func:`functional.masked_hinge_sum`."""
        if self.c.numel() == 0:
            return MaskedHingeSum(*[self._empty()] * 4)
        return masked_hinge_sum(self.batch.x, same=same, different=different, threshold=threshold, **self.call)

    def positive_sum(self, kind: str, u: Tensor, v: Tensor | None = None, params: Sequence[float] = ()) -> Terms:
        """Calls :func:`functional.positive_pair_sum`."""
        if self.c.numel() == 0:
            return self.pair_terms(*[self._empty()] * 3)
        found = positive_pair_sum(self.batch.x, u=u, v=v, kind=kind, params=params, **self.call)
        return self.pair_terms(found.total, found.number.to(self.dtype), found.active)


class PairSet:
    """Listed pairs, stably sorted by anchor: their scores, and reductions over the pairs of each anchor.

    Attributes:
        rows, cols: (P,) the anchors, ascending, and the bank entries that they are compared with.
        s: (P,) scores.
        keep: (P,) bool, False for repeats; None where repeats count.
    """

    def __init__(self, batch: Batch, distance: Distance, rows: Tensor, cols: Tensor, unique: bool):
        order = rows.argsort(stable=True)
        self.rows, self.cols = rows[order], cols[order]
        self.bounds = segments.offsets(self.rows, batch.x.size(0))
        self.keep = _first_of_equal(self.rows, self.cols, batch.w.size(0)) if unique else None
        self.s = pair_scores(
            batch.x, batch.w, self.rows, self.cols, distance.metric, normalize=distance.normalize_embeddings
        )

    def total(self, values: Tensor) -> Tensor:
        """(N,): the sum of the (P,) values of each anchor."""
        values = values if self.keep is None else torch.where(self.keep, values, 0)
        return segments.total(values, self.rows, self.bounds)

    def spread(self, per_row: Tensor) -> Tensor:
        """(P,): for each pair, the value of its anchor."""
        return segments.spread(per_row, self.rows, self.bounds)

    def count(self) -> Tensor:
        """(N,): the number of pairs of each anchor."""
        if self.keep is None:
            return self.bounds.diff().to(self.s.dtype)
        return self.total(torch.ones_like(self.s.detach()))

    def logsumexp(self, z: Tensor) -> Tensor:
        """(N,): the log-sum-exp of the (P,) logits of each anchor, -inf for an anchor without pairs."""
        z = z if self.keep is None else torch.where(self.keep, z, -torch.inf)
        peak = segments.maximum(z, self.bounds)
        peak = torch.where(peak == -torch.inf, 0, peak)
        total = self.total(torch.exp(z - self.spread(peak)))
        none = total == 0
        return torch.where(none, -torch.inf, torch.log(torch.where(none, 1, total)) + peak)

    def hinge(self, line: Line, threshold: Tensor | None) -> Tensor:
        """relu(k s + o + t), (P,)."""
        z = line[0] * self.s + line[1]
        if threshold is not None:
            z = z + (self.spread(threshold.to(z.dtype)) if threshold.dim() else threshold)
        return torch.relu(z)


class Listed(Compared):
    """The pairs (a1, p, a2, n) or triplets (a, p, n) of a miner, exactly as listed, for any labels."""

    def __init__(self, batch: Batch, distance: Distance, tuples: tuple[Tensor, ...], unique: bool = False):
        self.batch, self.distance = batch, distance
        self.kept = torch.ones(batch.x.size(0), dtype=torch.bool, device=batch.x.device)
        a1, p, a2, n = (tuples[0], tuples[1], tuples[0], tuples[2]) if len(tuples) == 3 else tuples
        self.same = PairSet(batch, distance, a1, p, unique)
        self.different = PairSet(batch, distance, a2, n, unique)
        self.dtype = self.same.s.dtype
        self.triplets = len(tuples) == 3  # entry k of both sets is then one triplet, because both have the same order

    def counts(self) -> Counts:
        """The number of listed pairs of each anchor."""
        return Counts(self.same.count(), self.different.count())

    def logsumexp(
        self, same: Line = (1.0, 0.0), different: Line = (1.0, 0.0), scale: float = 1.0, *, sums: bool = False,
        policy: str = "linear", policy_params: Sequence[float] = (),
    ) -> MaskedLogSumExp:  # fmt: skip
        """Over the listed pairs."""
        logit = [same[0] * scale, same[1], different[0] * scale, different[1]]
        if policy == "quadratic":
            (m,) = policy_params
            logit = dense.circle_logit(logit, m)
        z = []
        for pairs, (k, o) in ((self.same, logit[:2]), (self.different, logit[2:])):
            factor: float | Tensor = k
            if policy == "quadratic":
                s = pairs.s.detach()
                factor = k * dense.circle_weight(s, torch.full_like(s, pairs is self.same, dtype=torch.bool), m)
            z.append(factor * (pairs.s - o))
        lse = self.same.logsumexp(z[0]), self.different.logsumexp(z[1])
        return MaskedLogSumExp(*lse, *((self.same.total(z[0]), self.different.total(z[1])) if sums else (None, None)))

    def hinge_sum(
        self, same: Line, different: Line, threshold: tuple[Tensor | None, Tensor | None] = (None, None)
    ) -> MaskedHingeSum:
        """Over the listed pairs."""
        sets = (self.same, self.different)
        terms = [pairs.hinge(line, t) for pairs, line, t in zip(sets, (same, different), threshold)]
        counts = [pairs.total(nonzero(h)) for pairs, h in zip(sets, terms)]
        return MaskedHingeSum(self.same.total(terms[0]), self.different.total(terms[1]), *counts)

    def hinge_triplets(
        self, same: Line, different: Line, threshold: tuple[Tensor | None, Tensor | None] = (None, None)
    ) -> Terms:
        """Takes listed triplets as they are; listed pairs form every triplet with a common anchor."""
        if not self.triplets:
            return super().hinge_triplets(same, different, threshold)
        h_same, h_different = self.same.hinge(same, threshold[0]), self.different.hinge(different, threshold[1])
        on = nonzero(h_same), nonzero(h_different)
        active = self.same.total(torch.maximum(*on))
        total, number = self.same.total(h_same + h_different), self.same.count()
        divisor = (on[0] + on[1]).sum()
        return Terms(total, number, active, TRIPLET, self.batch.y, divisor)

    def positive_sum(self, kind: str, u: Tensor, v: Tensor | None = None, params: Sequence[float] = ()) -> Terms:
        """Over the listed pairs."""
        pairs = self.same
        by_positive = None if v is None else v.index_select(0, pairs.cols)
        values = dense.term(pairs.s, pairs.spread(u), by_positive, kind, params)
        return self.pair_terms(pairs.total(values), pairs.count(), pairs.total(nonzero(values)))


def _first_of_equal(rows: Tensor, cols: Tensor, m: int) -> Tensor:
    """(P,) bool: the first of the pairs that are listed more than once."""
    key, order = (rows * m + cols).sort(stable=True)
    new = torch.cat((torch.ones_like(key[:1], dtype=torch.bool), key[1:] != key[:-1]))
    return torch.zeros_like(new).scatter(0, order, new)

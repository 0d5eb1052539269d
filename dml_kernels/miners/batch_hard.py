"""Miners of one positive and one negative an anchor: the hardest, the easiest, or the hardest beyond the other."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import check_choice, check_number, shown
from ..ops.contract import accumulate_dtype, product_dtype
from ..ops.masked_argmax import masked_argmax
from ..pairs.batch import Batch
from .base import Miner


class BatchEasyHardMiner(Miner):
    """Chooses a positive and a negative for each anchor by a strategy: (a1, p, a2, n).

    Xuan et al., "Improved Embeddings with Easy Positive Triplet Mining", 2020, arXiv 1904.04370. The strategies:

    - ``hard``: the furthest positive, the closest negative.
    - ``easy``: the closest positive, the furthest negative.
    - ``semihard``: the closest negative that is further than the chosen positive; the furthest positive that is closer
      than the chosen negative.
    - ``all``: all positives, all negatives.

    Anchors for which the positive or the negative is missing are left out.

    Args:
        pos_strategy: the strategy for positives.
        neg_strategy: the strategy for negatives. The two must not both be ``semihard``, nor ``semihard`` and ``all``.
        allowed_pos_range: (low, high): only positive pairs with a distance (or similarity) from low to high, both
            included, are considered; None: all.
        allowed_neg_range: the same for negative pairs.
        options: of :class:`Miner`.

    Raises:
        ValueError: an unknown strategy, two strategies that do not fit together, or a range with low over high.
        TypeError: a range that is not a pair of numbers.
    """

    HARD, SEMIHARD, EASY, ALL = "hard", "semihard", "easy", "all"
    all_batch_mining_strategies = (HARD, SEMIHARD, EASY, ALL)

    def __init__(
        self,
        pos_strategy: str = EASY,
        neg_strategy: str = SEMIHARD,
        allowed_pos_range: tuple[float, float] | None = None,
        allowed_neg_range: tuple[float, float] | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        for name, strategy in (("pos_strategy", pos_strategy), ("neg_strategy", neg_strategy)):
            check_choice(name, strategy, self.all_batch_mining_strategies)
        both = {pos_strategy, neg_strategy}
        if both == {self.SEMIHARD} or both == {self.SEMIHARD, self.ALL}:
            raise ValueError(f"pos_strategy={pos_strategy!r} with neg_strategy={neg_strategy!r} names no pair: one of "
                             "the two must be chosen before the other can lie beyond it")  # fmt: skip
        self.pos_strategy, self.neg_strategy = pos_strategy, neg_strategy
        self.allowed_pos_range = _check_range("allowed_pos_range", allowed_pos_range)
        self.allowed_neg_range = _check_range("allowed_neg_range", allowed_neg_range)

    def mine(self, batch: Batch) -> tuple[Tensor, ...]:
        """Search each set once; a semi-hard search comes after the search of the other set."""
        chosen: dict[str, tuple[Tensor, Tensor]] = {}
        for kind in ("same", "different") if self.pos_strategy != self.SEMIHARD else ("different", "same"):
            if self._strategy(kind) != self.ALL:
                other = next(iter(chosen.values()), None)
                chosen[kind] = self._search(batch, kind, None if other is None else other[1])
        pairs = []
        keep = torch.stack([index >= 0 for index, _ in chosen.values()]).all(0) if len(chosen) == 2 else None
        for kind in ("same", "different"):
            if kind in chosen:
                index = chosen[kind][0]
                rows = (index >= 0 if keep is None else keep).nonzero().squeeze(1)
                pairs += [rows, index[rows]]
            else:
                pairs += self.listed(batch, operator.attrgetter(kind))
        return tuple(pairs)

    def _strategy(self, kind: str) -> str:
        return self.pos_strategy if kind == "same" else self.neg_strategy

    def _search(self, batch: Batch, kind: str, other: Tensor | None) -> tuple[Tensor, Tensor]:
        """The (index, score) of the choice from one set; ``other`` is the score of the choice from the other set."""
        strategy = self._strategy(kind)
        # A hard negative is the closest, a hard positive the furthest; semi-hard is the hardest within the bounds.
        largest = (strategy != self.EASY) == (kind == "different")
        low, high = self._range(batch, kind)
        if strategy == self.SEMIHARD:
            assert other is not None
            # An anchor without the other choice finds nothing, because no number lies beyond NaN.
            other = torch.where(other.isfinite(), other, torch.nan)
            if kind == "different":
                high = other if high is None else torch.minimum(high, other)
            else:
                low = other if low is None else torch.maximum(low, other)
        assert batch.y is not None
        bank = batch.bank
        found = masked_argmax(
            batch.x, bank.w, batch.y, bank.c, metric=self.distance.metric,
            normalize=self.distance.normalize_embeddings, which=kind, largest_same=largest, largest_different=largest,
            bounds=(low, high), exclude=bank.exclude,
        )  # fmt: skip
        choice = found.same if kind == "same" else found.different
        assert choice is not None
        return choice.index, choice.score

    def _range(self, batch: Batch, kind: str) -> tuple[Tensor | None, Tensor | None]:
        """The allowed range as an open interval of scores, (N,) each."""
        allowed = self.allowed_pos_range if kind == "same" else self.allowed_neg_range
        if allowed is None:
            return None, None
        dtype = accumulate_dtype(product_dtype(batch.x, batch.w))
        ends = torch.tensor(sorted(self.distance.threshold(value) for value in allowed), dtype=dtype)
        ends = torch.nextafter(ends, torch.tensor([-torch.inf, torch.inf], dtype=dtype)).to(batch.x.device)
        return ends[0].expand(batch.x.size(0)), ends[1].expand(batch.x.size(0))


def _check_range(name: str, ends: tuple[float, float] | None) -> tuple[float, float] | None:
    """Check a range (low, high), or None."""
    if ends is None:
        return None
    if not isinstance(ends, Sequence) or len(ends) != 2:
        raise TypeError(f"{name} must be a pair (low, high) or None; got {shown(ends)}")
    low, high = (check_number(f"{name}[{i}]", end) for i, end in enumerate(ends))
    if low > high:
        raise ValueError(f"{name} must be (low, high) with low at most high; got {shown(ends)}")
    return low, high


class BatchHardMiner(BatchEasyHardMiner):
    """Chooses the furthest positive and the closest negative of each anchor: (a, p, n).

    Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017, arXiv 1703.07737.
    """

    def __init__(self, **options: Any):
        super().__init__(pos_strategy=self.HARD, neg_strategy=self.HARD, **options)

    def mine(self, batch: Batch) -> tuple[Tensor, ...]:
        """Choose one triplet for each anchor that has both a positive and a negative."""
        a, p, _, n = super().mine(batch)
        return a, p, n

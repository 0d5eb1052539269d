"""Reducers, under pytorch-metric-learning's names: from the sums that a loss streams for each anchor to one number.

A loss passes on sums, never its terms: the N x M pairs or N x M x K triplets of a batch are not listed. So a reducer
can be anything that follows from the sum, the number and the number of non-zero terms of each anchor. A reducer that
needs the terms themselves is refused, with an error that names the nearest one.

The losses of pytorch-metric-learning list their terms, and call ``reducer(loss_dict, embeddings, labels)``: these
reducers accept that call too, and then see every term.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .elsewhere import explain
from .foreign import of_pml, pml_name
from .ops.checks import check_number, check_tensor
from .ops.contract import accumulate_dtype, values_can_be_read
from .records import Recorded

ELEMENT, PAIR, TRIPLET, REDUCED = "element", "pair", "triplet", "reduced"


def nonzero(values: Tensor) -> Tensor:
    """1 for a term over 0, else 0, in the dtype of the values. NaN counts as over 0, so that a mean over it is NaN."""
    values = values.detach()
    return (~(values <= 0)).to(values)


class Terms(NamedTuple):
    """One part of a loss (for example its positive pairs), summed for each anchor.

    Args:
        total: (N,) sum of the anchor's terms; () for ``kind="reduced"``, a final value.
        number, active: (N,) how many terms there are, and how many are over 0 or NaN; in the dtype of total, without
            gradient.
        kind: ``element`` (one term for each anchor), ``pair``, ``triplet`` or ``reduced``.
        labels: (N,) labels of the anchors, for class weights. divisor: () what DivisorReducer divides by.
    """

    total: Tensor
    number: Tensor
    active: Tensor
    kind: str = PAIR
    labels: Tensor | None = None
    divisor: Tensor | None = None

    @staticmethod
    def elements(
        values: Tensor, labels: Tensor | None, keep: Tensor | None = None, divisor: Tensor | None = None
    ) -> Terms:
        """One term for each anchor; those outside ``keep`` (N,) bool do not count."""
        keep = torch.ones_like(values, dtype=torch.bool) if keep is None else keep
        values = torch.where(keep, values, 0)
        return Terms(values, keep.to(values), nonzero(values), ELEMENT, labels, divisor)

    @staticmethod
    def final(value: Tensor) -> Terms:
        """A value that no reducer changes."""
        one = torch.ones_like(value)
        return Terms(value, one, one, REDUCED)


class Reducer(Recorded):
    """Adds up the parts of a loss: each Terms as a number, final values as they are.

    Args:
        collect_stats: accepted as in pytorch-metric-learning; nothing of a step is recorded, because the terms are not
            kept.
    """

    needs_labels = False

    def __init__(self, *, collect_stats: bool | None = None):
        super().__init__(collect_stats)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("reducer", "default_reducer"):
            value = accept(value, MeanReducer())
        super().__setattr__(name, value)

    def forward(
        self, parts: Mapping[str, Any], embeddings: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar connected to the graph.

        Args:
            parts: :class:`Terms` by name, from a loss of this package; or from a loss of pytorch-metric-learning a dict
                of ``losses``, ``indices``, ``reduction_type`` and, for some, ``divisor``.
            embeddings, labels: needed with such a dict.
        """
        values = []
        for name, part in parts.items():
            if not isinstance(part, Terms):
                values.append(self.reduce_listed(name, part, embeddings, labels))
            else:
                values.append(part.total if part.kind == REDUCED else self.reduce(name, part))
        return torch.stack(values).sum() if len(values) > 1 else values[0]

    def reduce(self, name: str, part: Terms) -> Tensor:
        """The number for one part; ``name`` is for messages."""
        raise NotImplementedError

    def reduce_listed(self, name: str, part: Any, embeddings: Tensor | None, labels: Tensor | None) -> Tensor:
        """The number for one part of a loss of pytorch-metric-learning: each term that it lists is an element."""
        if not isinstance(part, Mapping) or embeddings is None:
            raise TypeError(f"{name} must be Terms, or come from the loss_dict of pytorch-metric-learning, given with "
                            f"embeddings; got {type(part).__name__}")  # fmt: skip
        values, indices = part["losses"], part["indices"]
        if not isinstance(values, Tensor):  # 0, as there was nothing to compare
            return (embeddings * 0).sum() + values
        values = values.to(accumulate_dtype(values.dtype))
        if part["reduction_type"] == "already_reduced":
            return values.sum()
        anchors = indices if isinstance(indices, Tensor) else indices[0]
        own = labels[anchors.to(labels.device)].to(values.device) if self.needs_labels and labels is not None else None
        divisor = torch.as_tensor(part["divisor"]) if "divisor" in part else None
        return self.reduce(name, Terms.elements(values, own, divisor=divisor))


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    """total / count, and 0 (connected to the graph) where the count is 0."""
    return total / count.masked_fill(count == 0, torch.inf)


class MeanReducer(Reducer):
    """The mean over all terms, zeros included."""

    def reduce(self, name: str, part: Terms) -> Tensor:
        """Sum over number."""
        return _ratio(part.total.sum(), part.number.sum())


class SumReducer(Reducer):
    """The sum over all terms."""

    def reduce(self, name: str, part: Terms) -> Tensor:
        """Sum."""
        return part.total.sum()


class ThresholdReducer(Reducer):
    """The mean over the terms above ``low`` and below ``high``. A term that is NaN passes.

    Raises:
        ValueError: when called by a loss of pairs or triplets, thresholds other than ``low=0`` (AvgNonZeroReducer).
    """

    def __init__(self, low: float | None = None, high: float | None = None, **options: Any):
        super().__init__(**options)
        if low is None and high is None:
            raise ValueError("ThresholdReducer needs low or high")
        self.low = None if low is None else check_number("low", low)
        self.high = None if high is None else check_number("high", high)

    def reduce(self, name: str, part: Terms) -> Tensor:
        """Sum over number, of the terms that pass."""
        if part.kind != ELEMENT:
            if (self.low, self.high) != (0, None):
                raise ValueError(
                    f"{name} is a sum over {part.kind}s that are not kept: only low=0, high=None can be told from it "
                    f"(AvgNonZeroReducer); got low={self.low}, high={self.high}. Give the miner the threshold instead"
                )
            return _ratio(part.total.sum(), part.active.sum())
        keep: Tensor = part.number > 0
        if self.low is not None:
            keep = keep & ~(part.total <= self.low)
        if self.high is not None:
            keep = keep & ~(part.total >= self.high)
        return _ratio(torch.where(keep, part.total, 0).sum(), keep.to(part.total).sum())


class AvgNonZeroReducer(ThresholdReducer):
    """The mean over the terms above 0."""

    def __init__(self, **options: Any) -> None:
        super().__init__(low=0, **options)


class DivisorReducer(Reducer):
    """The sum over the divisor that the loss states: for ProxyAnchorLoss and MarginLoss, whose default it is."""

    def reduce(self, name: str, part: Terms) -> Tensor:
        """Sum over divisor, 0 where that is 0."""
        if part.divisor is None:
            raise ValueError(f"{name} states no divisor; use MeanReducer, SumReducer or AvgNonZeroReducer")
        return _ratio(part.total.sum(), part.divisor.to(part.total))


class PerAnchorReducer(Reducer):
    """First the mean over the pairs of each anchor (0 without any), then ``reducer`` over anchors (default: mean)."""

    unused = ("aggregation_func",)
    reducer: Any

    def __init__(self, reducer: Any = None, **options: Any):
        super().__init__(**options)
        self.reducer = reducer

    def reduce_listed(self, name: str, part: Any, embeddings: Tensor | None, labels: Tensor | None) -> Tensor:
        """Add up listed pairs by anchor first."""
        kind = part["reduction_type"] if isinstance(part, Mapping) and isinstance(part["losses"], Tensor) else ""
        if not kind.endswith(PAIR) and kind != TRIPLET:
            return self.reducer.reduce_listed(name, part, embeddings, labels)
        assert embeddings is not None
        values, anchors = part["losses"], part["indices"][0]
        values = values.to(accumulate_dtype(values.dtype))
        total, number, active = (
            values.new_zeros(embeddings.size(0)).index_add(0, anchors, terms)
            for terms in (values, torch.ones_like(values), nonzero(values))
        )
        own = None if labels is None else labels.to(values.device)
        return self.reduce(name, Terms(total, number, active, TRIPLET if kind == TRIPLET else PAIR, own))

    def reduce(self, name: str, part: Terms) -> Tensor:
        """The mean for each anchor, then over the anchors."""
        if part.kind == TRIPLET:
            raise ValueError(f"{name} is a sum over triplets, which have no mean per anchor; use MeanReducer")
        if part.kind == PAIR:
            part = Terms.elements(_ratio(part.total, part.number), part.labels, divisor=part.divisor)
        return self.reducer.reduce(name, part)


class ClassWeightedReducer(Reducer):
    """The mean of the terms, each multiplied by the weight of its anchor's class.

    Args:
        weights: (number of classes,), a weight for each label.

    Raises:
        ValueError: at the call, a label that has no weight (on the CPU; elsewhere the loss is NaN).
    """

    weights: Tensor
    needs_labels = True

    def __init__(self, weights: Tensor, **options: Any):
        super().__init__(**options)
        values = torch.as_tensor(weights)
        check_tensor("weights", values)
        if values.dim() != 1 or values.is_complex() or values.numel() == 0:
            raise ValueError(f"weights must be real of shape (number of classes,); got {values.dtype} "
                             f"{tuple(values.shape)}")  # fmt: skip
        self.register_buffer("weights", values, persistent=False)

    def reduce(self, name: str, part: Terms) -> Tensor:
        """Weighted sum over number."""
        if part.labels is None:
            raise ValueError(f"{name} has no labels to weight by; call the loss with labels")
        labels, classes = part.labels, self.weights.numel()
        beyond = ((labels < 0) | (labels >= classes)) & (part.number > 0)
        if values_can_be_read(labels) and beyond.any():
            raise ValueError(f"labels must be in [0, {classes}): ClassWeightedReducer has {classes} weights; got "
                             f"{labels[beyond][0].item()}")  # fmt: skip
        weight = self.weights.to(part.total)[labels.clamp(0, classes - 1)]
        # Where the values are not read, a label without a weight gives NaN, not the weight of the last class.
        weight = torch.where(beyond, torch.nan, weight)
        return _ratio((part.total * weight).sum(), part.number.sum())


class DoNothingReducer(Reducer):
    """Returns the parts as they are; for a loss of this package a dict of :class:`Terms`."""

    def forward(self, parts: Mapping[str, Any], *_: Any) -> Mapping[str, Any]:  # type: ignore[override]
        """The parts."""
        return parts


class MultipleReducers(Reducer):
    """A reducer for each part of a loss, by its name; ``default_reducer`` (default: the mean) for the others."""

    def __init__(self, reducers: Mapping[str, Any], default_reducer: Any = None, **options: Any):
        super().__init__(**options)
        self.reducers = torch.nn.ModuleDict({name: accept(r, MeanReducer()) for name, r in reducers.items()})
        self.default_reducer = default_reducer

    def reduce(self, name: str, part: Terms) -> Tensor:
        """Delegate to the reducer of the part."""
        return self._of(name).reduce(name, part)

    def reduce_listed(self, name: str, part: Any, embeddings: Tensor | None, labels: Tensor | None) -> Tensor:
        """Delegate to the reducer of the part."""
        return self._of(name).reduce_listed(name, part, embeddings, labels)

    def _of(self, name: str) -> Reducer:
        chosen = self.reducers[name] if name in self.reducers else self.default_reducer  # noqa: SIM401 (no get)
        assert isinstance(chosen, Reducer)
        return chosen


_PLAIN = {kind.__name__: kind for kind in (MeanReducer, SumReducer, DivisorReducer, DoNothingReducer)}


def accept(reducer: Any, default: Reducer) -> Reducer:
    """A reducer for a loss: one of ours, or one of pytorch-metric-learning converted to ours; None: ``default``.

    Raises:
        TypeError, ValueError: a reducer that needs every term, or any other class; the message names the possible ones.
    """
    if reducer is None:
        return default
    if isinstance(reducer, Reducer):
        return reducer
    name = pml_name(reducer, "reducers")
    if name in _PLAIN:
        return _PLAIN[name]()
    if name in ("ThresholdReducer", "AvgNonZeroReducer"):
        non_zero = name == "AvgNonZeroReducer" and (reducer.low, reducer.high) == (0, None)
        return AvgNonZeroReducer() if non_zero else ThresholdReducer(reducer.low, reducer.high)
    if name == "PerAnchorReducer":
        if not of_pml(reducer.aggregation_func, "reducers.per_anchor_reducer", "aggregation_func"):
            raise ValueError("PerAnchorReducer takes the mean of each anchor's pairs; another aggregation_func needs "
                             "every pair, and pairs are not kept")  # fmt: skip
        return PerAnchorReducer(reducer.reducer)
    if name == "ClassWeightedReducer":
        return ClassWeightedReducer(reducer.weights)
    if name == "MultipleReducers":
        return MultipleReducers(dict(reducer.reducers.items()), reducer.default_reducer)
    kind = type(reducer)
    raise TypeError(
        f"reducer must be one of dml_kernels.reducers ({', '.join(_PLAIN)}, AvgNonZeroReducer, ...) or of "
        f"pytorch_metric_learning.reducers; got {kind.__module__}.{kind.__qualname__}. A class of your own derives "
        "from dml_kernels.reducers.Reducer and defines reduce(name, part)"
    )


explain(__name__)

"""Reducers, under pytorch-metric-learning's names: they turn a loss's sums for each anchor into one number.

A loss passes on sums, never its terms: it does not list the N x M pairs or N x M x K triplets of a batch. So a reducer
can compute whatever follows from three numbers of each anchor: the sum of its terms, how many there are, and how many
are not zero. A reducer that needs the terms themselves is refused, with an error that names the nearest one.

The losses of pytorch-metric-learning list their terms, and call ``reducer(loss_dict, embeddings, labels)``. These
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
    """1 for a term over 0, else 0, in the dtype of the values. NaN counts as over 0, so that a mean with it is NaN."""
    values = values.detach()
    return (~(values <= 0)).to(values)


class Terms(NamedTuple):
    """One part of a loss (for example its positive pairs), summed for each anchor.

    Args:
        total: (N,) sum of the anchor's terms; () for ``kind="reduced"``, a final value.
        number: (N,) how many terms there are, in the dtype of total, without gradient.
        active: (N,) how many of them are over 0 or NaN, in the dtype of total, without gradient.
        kind: ``element`` (one term for each anchor), ``pair``, ``triplet`` or ``reduced``.
        labels: (N,) labels of the anchors, for class weights.
        divisor: () what DivisorReducer divides by.
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
        """One term for each anchor.

        Args:
            values: (N,) the terms.
            labels: (N,) or None, as in :class:`Terms`.
            keep: (N,) bool: which anchors count; None: all.
            divisor: () or None, as in :class:`Terms`.
        """
        keep = torch.ones_like(values, dtype=torch.bool) if keep is None else keep
        values = torch.where(keep, values, 0)
        return Terms(values, keep.to(values), nonzero(values), ELEMENT, labels, divisor)

    @staticmethod
    def final(value: Tensor) -> Terms:
        """A value that no reducer changes."""
        one = torch.ones_like(value)
        return Terms(value, one, one, REDUCED)


class Reducer(Recorded):
    """Reduces each part of a loss to a number and adds them up; final values stay as they are.

    A subclass defines ``reduce``.

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
        """Reduce the parts of a loss to the loss.

        Args:
            parts: :class:`Terms` by name, from a loss of this package; or by name, from a loss of
                pytorch-metric-learning, a dict of ``losses``, ``indices``, ``reduction_type`` and, for some losses,
                ``divisor``.
            embeddings: (N, D), needed with such a dict.
            labels: (N,), needed with such a dict by reducers that weight classes.

        Returns:
            The loss, a scalar connected to the graph.
        """
        values = []
        for name, part in parts.items():
            if not isinstance(part, Terms):
                values.append(self.reduce_listed(name, part, embeddings, labels))
            else:
                values.append(part.total if part.kind == REDUCED else self.reduce(name, part))
        return torch.stack(values).sum() if len(values) > 1 else values[0]

    def reduce(self, name: str, part: Terms) -> Tensor:
        """The number for one part.

        Args:
            name: of the part, for messages.
            part: its sums.
        """
        raise NotImplementedError

    def reduce_listed(self, name: str, part: Any, embeddings: Tensor | None, labels: Tensor | None) -> Tensor:
        """The number for one part of a loss of pytorch-metric-learning, with each listed term as an element."""
        if not isinstance(part, Mapping) or embeddings is None:
            raise TypeError(f"{name} must be Terms, or come from the loss_dict of pytorch-metric-learning, given with "
                            f"embeddings; got {type(part).__name__}")  # fmt: skip
        values, indices = part["losses"], part["indices"]
        if not isinstance(values, Tensor):  # the number 0: there was nothing to compare
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
        """The sum divided by the number of terms."""
        return _ratio(part.total.sum(), part.number.sum())


class SumReducer(Reducer):
    """The sum over all terms."""

    def reduce(self, name: str, part: Terms) -> Tensor:
        """The sum."""
        return part.total.sum()


class ThresholdReducer(Reducer):
    """The mean over the terms above ``low`` and below ``high``. A term that is NaN counts.

    Args:
        low: the lower bound, or None.
        high: the upper bound, or None; at least one of the two is needed.
        options: of :class:`Reducer`.

    Raises:
        ValueError: neither bound; or, at a call by a loss of pairs or triplets, bounds other than ``low=0`` alone
            (AvgNonZeroReducer).
    """

    def __init__(self, low: float | None = None, high: float | None = None, **options: Any):
        super().__init__(**options)
        if low is None and high is None:
            raise ValueError("ThresholdReducer needs low or high")
        self.low = None if low is None else check_number("low", low)
        self.high = None if high is None else check_number("high", high)

    def reduce(self, name: str, part: Terms) -> Tensor:
        """The sum of the terms within the bounds, divided by their number."""
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
    """The sum divided by the divisor that the loss states. It is the default of ProxyAnchorLoss and MarginLoss."""

    def reduce(self, name: str, part: Terms) -> Tensor:
        """The sum divided by the divisor, 0 where that is 0."""
        if part.divisor is None:
            raise ValueError(f"{name} states no divisor; use MeanReducer, SumReducer or AvgNonZeroReducer")
        return _ratio(part.total.sum(), part.divisor.to(part.total))


class PerAnchorReducer(Reducer):
    """Takes the mean over the pairs of each anchor (0 without any), then applies a reducer over the anchors.

    Args:
        reducer: the reducer over the anchors; None: the mean.
        options: of :class:`Reducer`.
    """

    unused = ("aggregation_func",)
    reducer: Any

    def __init__(self, reducer: Any = None, **options: Any):
        super().__init__(**options)
        self.reducer = reducer

    def reduce_listed(self, name: str, part: Any, embeddings: Tensor | None, labels: Tensor | None) -> Tensor:
        """As in :class:`Reducer`, with the listed pairs added up by anchor first."""
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
        options: of :class:`Reducer`.

    Raises:
        ValueError: weights that are complex, empty or not a vector; at a call on the CPU, a label that has no weight
            (on a GPU the loss is then NaN).
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
        """The weighted sum divided by the number of terms."""
        if part.labels is None:
            raise ValueError(f"{name} has no labels to weight by; call the loss with labels")
        labels, classes = part.labels, self.weights.numel()
        beyond = ((labels < 0) | (labels >= classes)) & (part.number > 0)
        if values_can_be_read(labels) and beyond.any():
            raise ValueError(f"labels must be in [0, {classes}): ClassWeightedReducer has {classes} weights; got "
                             f"{labels[beyond][0].item()}")  # fmt: skip
        weight = self.weights.to(part.total)[labels.clamp(0, classes - 1)]
        # Where the labels cannot be read, one without a weight gives NaN, not the weight of the last class.
        weight = torch.where(beyond, torch.nan, weight)
        return _ratio((part.total * weight).sum(), part.number.sum())


class DoNothingReducer(Reducer):
    """Returns the parts as they are: for a loss of this package a dict of :class:`Terms`."""

    def forward(self, parts: Mapping[str, Any], *_: Any) -> Mapping[str, Any]:  # type: ignore[override]
        """The parts, unchanged."""
        return parts


class MultipleReducers(Reducer):
    """Applies a reducer of its own to each part of a loss.

    Args:
        reducers: name of a part -> its reducer.
        default_reducer: the reducer of the other parts; None: the mean.
        options: of :class:`Reducer`.
    """

    def __init__(self, reducers: Mapping[str, Any], default_reducer: Any = None, **options: Any):
        super().__init__(**options)
        self.reducers = torch.nn.ModuleDict({name: accept(r, MeanReducer()) for name, r in reducers.items()})
        self.default_reducer = default_reducer

    def reduce(self, name: str, part: Terms) -> Tensor:
        """The result of the reducer of the part."""
        return self._of(name).reduce(name, part)

    def reduce_listed(self, name: str, part: Any, embeddings: Tensor | None, labels: Tensor | None) -> Tensor:
        """The result of the reducer of the part."""
        return self._of(name).reduce_listed(name, part, embeddings, labels)

    def _of(self, name: str) -> Reducer:
        chosen = self.reducers[name] if name in self.reducers else self.default_reducer  # noqa: SIM401 (no get)
        assert isinstance(chosen, Reducer)
        return chosen


_PLAIN = {kind.__name__: kind for kind in (MeanReducer, SumReducer, DivisorReducer, DoNothingReducer)}


def accept(reducer: Any, default: Reducer) -> Reducer:
    """A reducer for a loss: one of this module, or one of pytorch-metric-learning converted to it.

    Args:
        reducer: what the loss was given; None: ``default``.
        default: the reducer of the loss where none is given.

    Raises:
        ValueError: a reducer that needs every term.
        TypeError: an object of any other class; the message names the classes that are accepted.
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

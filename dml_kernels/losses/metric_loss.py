"""The Module under every drop-in loss: the arguments of pytorch-metric-learning, checked once, and the reduction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .. import distances, reducers
from ..ops.checks import check_number, shown
from ..pairs.batch import Batch, make_batch
from ..records import Recorded
from ..reducers import Terms


class MetricLoss(Recorded):
    """A loss that is called as in pytorch-metric-learning 2.9; a subclass defines its ``terms``.

    Args:
        distance: one of :mod:`dml_kernels.distances`, or the class of the same name in pytorch-metric-learning; None:
            the default of the loss.
        reducer: one of :mod:`dml_kernels.reducers`, or of pytorch-metric-learning; None: the default of the loss.
        embedding_regularizer: called on the embeddings; its value is added to the loss.
        embedding_reg_weight: multiplies that value.
        collect_stats: accepted as in pytorch-metric-learning, whose record keepers find the settings in any case. Only
            NPairsLoss records a number of a step, its ``num_pairs``.
    """

    # Whether ``ref_emb`` makes sense, and so a memory.
    takes_references = True
    # Whether the reducer is the default of the loss.
    plain: bool
    # What the distance may be; a loss whose formula fixes it narrows this.
    distance_kinds: tuple[type[distances.Distance], ...] = (distances.Distance,)

    def __init__(
        self,
        *,
        distance: Any = None,
        reducer: Any = None,
        embedding_regularizer: Any = None,
        embedding_reg_weight: float = 1,
        collect_stats: bool | None = None,
    ):
        super().__init__(collect_stats)
        self.distance, self.reducer = distance, reducer
        if embedding_regularizer is not None and not callable(embedding_regularizer):
            raise TypeError(f"embedding_regularizer must be callable on embeddings; got {shown(embedding_regularizer)}")
        self.embedding_regularizer = embedding_regularizer
        self.embedding_reg_weight = check_number("embedding_reg_weight", embedding_reg_weight)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "distance":
            value = distances.accept(value, self.default_distance(), self.distance_kinds, type(self).__name__)
        elif name == "reducer":
            self.plain = value is None
            value = reducers.accept(value, self.default_reducer())
        super().__setattr__(name, value)

    def default_distance(self) -> distances.Distance:
        """The distance that is used if none is given."""
        return distances.LpDistance()

    def default_reducer(self) -> reducers.Reducer:
        """The reducer that is used if none is given."""
        return reducers.MeanReducer()

    def terms(self, batch: Batch) -> Mapping[str, Terms]:
        """The parts of the loss, summed for each anchor."""
        raise NotImplementedError

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of a batch.

        Args:
            embeddings: (N, D) floating point.
            labels: (N,) integers, on any device; needed unless ``indices_tuple`` is given.
            indices_tuple: a miner's triplets (a, p, n) or pairs (a1, p, a2, n): indices of rows; p and n index
                ``ref_emb`` where that is given.
            ref_emb: (M, D) what the embeddings are compared with instead of the batch. The same tensor as
                ``embeddings`` means the batch: each row's own copy is left out. Any other tensor, even a detached or
                cloned one, is compared in full, including row i with reference i, the second view of example i.
            ref_labels: (M,) integers, the labels of ``ref_emb``.

        Returns:
            The loss in fp32, or fp64 where ``embeddings`` or ``ref_emb`` is.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination; the message names the fix.
        """
        return self.reduced(self.batch(embeddings, labels, indices_tuple, ref_emb, ref_labels))

    def batch(
        self, embeddings: Tensor, labels: Tensor | None, indices_tuple: Any, ref_emb: Tensor | None,
        ref_labels: Tensor | None, exclude: Tensor | None = None,
    ) -> Batch:  # fmt: skip
        """The checked arguments of a call. ``exclude`` marks own copies among the references."""
        return make_batch(embeddings, labels, indices_tuple, ref_emb, ref_labels, exclude)

    def reduced(self, batch: Batch) -> Tensor:
        """One number from the parts and the regulariser of the embeddings."""
        parts = dict(self.terms(batch))
        if self.embedding_regularizer is not None:
            value = self.embedding_regularizer(batch.x) * self.embedding_reg_weight
            parts["embedding_reg_loss"] = Terms.final(value)
        return self.reducer(parts)


def check_takes_references(loss: Any) -> None:
    """Refuse anything but a loss of this package that takes ``ref_emb``, such as a memory or a second view."""
    if not isinstance(loss, MetricLoss) or not loss.takes_references:
        raise TypeError(
            "loss must be a pair loss of dml_kernels.losses that takes ref_emb, such as ContrastiveLoss(); got "
            f"{type(loss).__name__}"
        )


def as_function(loss: type[MetricLoss]) -> Callable[..., Tensor]:
    """The loss as a function of (embeddings, labels, ref_emb=, ref_labels=, **constructor arguments), for the
    registry."""

    def function(
        embeddings: Tensor, labels: Tensor, *, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        module = loss(**options).to(embeddings.device)
        return module(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)

    function.__name__, function.__doc__ = loss.__name__, loss.__doc__
    return function

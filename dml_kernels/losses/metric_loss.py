"""The Module under every drop-in loss: the arguments people already pass, checked once, and the reduction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import distances, reducers
from ..ops.contract import check_matrix, check_pair
from ..reducers import Terms
from .base import check_labels


class Batch(NamedTuple):
    """What a loss compares: checked, labels as int64 on the embeddings' device.

    Args:
        x: (N, D) embeddings. y: (N,) their labels, None where the tuples say all.
        w: (M, D) what they are compared with: the batch itself, or the references. c: (M,) their labels.
        exclude: (N,) bank index of each row's own copy, -1 for none; None where the references hold no copies.
        tuples: a miner's pairs (a1, p, a2, n) or triplets (a, p, n); None for all that the labels make.
    """

    x: Tensor
    y: Tensor | None
    w: Tensor
    c: Tensor | None
    exclude: Tensor | None
    tuples: tuple[Tensor, ...] | None


def check_tuples(tuples: Any, like: Tensor) -> tuple[Tensor, ...] | None:
    """A miner's tuple as int64 index tensors on the embeddings' device: 3 of one length, or 4 of two lengths."""
    if tuples is None:
        return None
    if not isinstance(tuples, Sequence) or len(tuples) not in (3, 4):
        got = f"{len(tuples)} of them" if isinstance(tuples, Sequence) else type(tuples).__name__
        raise ValueError(f"indices_tuple must be triplets (a, p, n) or pairs (a1, p, a2, n); got {got}")
    out = tuple(torch.as_tensor(t, device=like.device).long() for t in tuples)
    lengths = [t.numel() for t in out]
    groups = [lengths] if len(out) == 3 else [lengths[:2], lengths[2:]]
    if any(t.dim() != 1 for t in out) or any(len(set(group)) > 1 for group in groups):
        raise ValueError(
            "indices_tuple needs one-dimensional index tensors, of one length for (a, p, n) and of equal lengths "
            f"within (a1, p) and (a2, n); got {[tuple(t.shape) for t in out]}"
        )
    return out


class MetricLoss(torch.nn.Module):
    """A loss with the call of pytorch-metric-learning 2.9; a subclass states its ``terms``.

    Args:
        distance: of :mod:`dml_kernels.distances`, or pytorch-metric-learning's of the same name; None: the loss's own.
        reducer: of :mod:`dml_kernels.reducers`, or theirs; None: the loss's own.
        embedding_regularizer: called on the embeddings; its value times ``embedding_reg_weight`` is added.
        collect_stats: must be False: nothing is recorded during a step.
    """

    # What the distance may be; a loss whose formula fixes it narrows this.
    distance_kinds: tuple[type[distances.Distance], ...] = (distances.Distance,)

    def __init__(
        self,
        *,
        distance: Any = None,
        reducer: Any = None,
        embedding_regularizer: Any = None,
        embedding_reg_weight: float = 1,
        collect_stats: bool = False,
    ):
        super().__init__()
        if collect_stats:
            raise ValueError(f"{type(self).__name__} records nothing during a step; use collect_stats=False")
        name = type(self).__name__
        self.distance = distances.accept(distance, self.default_distance(), self.distance_kinds, name)
        self.reducer = reducers.accept(reducer, self.default_reducer())
        self.embedding_regularizer, self.embedding_reg_weight = embedding_regularizer, embedding_reg_weight

    def default_distance(self) -> distances.Distance:
        """The distance where none is given."""
        return distances.LpDistance()

    def default_reducer(self) -> reducers.Reducer:
        """The reducer where none is given."""
        return reducers.MeanReducer()

    def terms(self, batch: Batch) -> Mapping[str, Terms]:
        """The loss's parts, summed for each anchor."""
        raise NotImplementedError

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of embeddings (N, D), in fp32 (fp64 for fp64).

        Args:
            labels: (N,) integers, on any device; needed unless ``indices_tuple`` is given.
            indices_tuple: a miner's triplets (a, p, n) or pairs (a1, p, a2, n): indices of rows; p and n index
                ``ref_emb`` where that is given.
            ref_emb: (M, D) to compare with in place of the batch; ref_labels: (M,) its labels.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination; the message names the fix.
        """
        return self.reduced(self.batch(embeddings, labels, indices_tuple, ref_emb, ref_labels))

    def batch(
        self, embeddings: Tensor, labels: Tensor | None, indices_tuple: Any, ref_emb: Tensor | None,
        ref_labels: Tensor | None, exclude: Tensor | None = None,
    ) -> Batch:  # fmt: skip
        """The call's arguments, checked. ``exclude`` marks own copies among the references."""
        w = embeddings if ref_emb is None else ref_emb
        if ref_emb is None:
            check_matrix("embeddings", embeddings)  # of no rows, too: the loss is then 0
        else:
            check_pair(embeddings, w, ("embeddings", "ref_emb"))
        tuples = check_tuples(indices_tuple, embeddings)
        if labels is None and tuples is None:
            raise ValueError("labels are needed where no indices_tuple says which pairs to compare")
        y = None if labels is None else check_labels(labels, embeddings)
        if (ref_emb is None) != (ref_labels is None) and not (ref_labels is None and tuples is not None):
            missing = "ref_labels" if ref_labels is None else "ref_emb"
            raise ValueError(f"ref_emb and ref_labels come together; {missing} is missing")
        if ref_emb is None:
            own = torch.arange(embeddings.size(0), device=embeddings.device)
            return Batch(embeddings, y, w, y, own, tuples)
        c = None if ref_labels is None else check_labels(ref_labels, w, "ref_labels")
        return Batch(embeddings, y, w, c, exclude, tuples)

    def reduced(self, batch: Batch) -> Tensor:
        """The parts to one number, with the embeddings' regulariser."""
        parts = dict(self.terms(batch))
        if self.embedding_regularizer is not None:
            value = self.embedding_regularizer(batch.x) * self.embedding_reg_weight
            parts["embedding_reg_loss"] = Terms.final(value)
        return self.reducer(parts)


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

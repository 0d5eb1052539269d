"""Wrappers of a loss and a miner for the batches of all ranks, under the names of pytorch-metric-learning."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..foreign import of_pml
from ..losses.cross_batch_memory import CrossBatchMemory
from ..losses.magnet import MagnetLoss
from ..losses.metric_loss import MetricLoss
from ..miners.base import Miner
from ..ops.checks import check_choice
from ..pairs.batch import make_batch
from ..pairs.tuples import without_own
from .collectives import Group, world_size
from .gathering import GRADIENTS, Gathered, GlobalTuple, Parts, divide_gradient


class DistributedLossWrapper(torch.nn.Module):
    """The loss of the batches of all ranks; value and gradients are those of one process that has all batches.

    The value is the same on every rank. :mod:`dml_kernels.distributed` explains the gradients. On one rank, or without
    a process group, the loss is called unchanged.

    Args:
        loss: a loss of this package or of pytorch-metric-learning. With a CrossBatchMemory the memory of each rank
            holds the same rows, those of all ranks. For MagnetLoss use ``loss(*gather(embeddings, clusters)[:2],
            classes)``.
        efficient: compare the rank's own rows with those of all ranks, instead of all with all: 1/R of the work and of
            the memory. The value is the loss of the rank's rows, and the gradient is that of the mean over the ranks.
            It equals the gradient of one process if the loss is a mean over anchors and all batches have the same
            length, and is close to it otherwise. Only losses that take ``ref_emb`` support it. (In
            pytorch-metric-learning the rows of other ranks then get no gradient; here they do.)
        group: a process group; None: all ranks.
        gradient: how gradients of the network and of the loss are combined over the ranks afterwards: ``mean``, as in
            DistributedDataParallel, or ``sum``.

    Raises:
        TypeError: an object that is not called like a loss, DistributedDataParallel, or a loss that does not work with
            ``efficient``.
        ValueError: ``efficient`` with a CrossBatchMemory; an unknown ``gradient``.
    """

    def __init__(self, loss: torch.nn.Module, efficient: bool = False, *, group: Group = None, gradient: str = "mean"):
        super().__init__()
        _check_module("loss", loss)
        check_choice("gradient", gradient, GRADIENTS)
        if isinstance(loss, MagnetLoss):
            raise TypeError(
                "MagnetLoss takes clusters, not labels; use loss(*dml_kernels.distributed.gather(embeddings, "
                "clusters)[:2], classes)"
            )
        self.has_memory = any(
            kind is CrossBatchMemory or of_pml(kind, "losses", "CrossBatchMemory") for kind in type(loss).__mro__
        )
        if self.has_memory and efficient:
            raise ValueError("CrossBatchMemory compares with its memory already; use efficient=False")
        if efficient and isinstance(loss, MetricLoss) and not loss.takes_references:
            raise TypeError(f"efficient=True compares with references, and {type(loss).__name__} takes none; use "
                            "efficient=False")  # fmt: skip
        self.loss, self.efficient, self.group, self.gradient = loss, efficient, group, gradient

    def forward(
        self, embeddings: Tensor, labels: Tensor | None = None, indices_tuple: Any = None,
        ref_emb: Tensor | None = None, ref_labels: Tensor | None = None, enqueue_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute the loss of the batches of all ranks.

        Args:
            embeddings: (N_r, D) floating point: this rank's batch.
            labels: (N_r,) integers, or None.
            indices_tuple: what a DistributedMinerWrapper returned, or another miner's tuple of the rank's own rows.
            ref_emb: (M_r, D) floating point: this rank's references, or None.
            ref_labels: (M_r,) integers, or None.
            enqueue_mask: (N_r,) bool, for a CrossBatchMemory: which of this rank's rows it stores.

        Returns:
            The loss, as the wrapped loss returns it.

        Raises:
            ValueError: arguments that do not fit together, or differ in more than length between the ranks.
        """
        if not self.has_memory and enqueue_mask is not None:
            raise ValueError("enqueue_mask is for a CrossBatchMemory")
        if self.has_memory and not (ref_emb is None and ref_labels is None):
            raise ValueError("a CrossBatchMemory is its own references; it takes no ref_emb and no ref_labels")
        rest = (enqueue_mask,) if self.has_memory else (ref_emb, ref_labels)
        ranks = world_size(self.group)
        if ranks == 1:
            return self.loss(embeddings, labels, indices_tuple, *rest)
        places = int(cast(Any, self.loss).memory_size) if self.has_memory else None
        if isinstance(indices_tuple, GlobalTuple) and indices_tuple.efficient != self.efficient:
            got = indices_tuple.efficient
            raise ValueError(f"indices_tuple is of a miner with efficient={got}; use the same for both")
        parts = Parts(embeddings, labels, ref_emb, ref_labels, self.group, indices_tuple, enqueue_mask, places)
        found = parts.gathered()
        if self.efficient:
            value = self._of_own_rows(parts, found)
        else:
            rest = (parts.whole_mask(),) if self.has_memory else (found.ref_emb, found.ref_labels)
            value = self.loss(found.embeddings, found.labels, parts.whole_tuples(), *rest)
        for t in (found.embeddings, found.ref_emb):  # the backward must reach every collective on every rank
            if t is not None:
                value = value + t[:0].sum().to(value.dtype)
        return divide_gradient(value, ranks) if self.gradient == "sum" else value

    def _of_own_rows(self, parts: Parts, found: Gathered) -> Tensor:
        x, y, tuples = parts.embeddings, parts.labels, parts.own_tuples()
        w, c, own = parts.references(found)
        if isinstance(self.loss, MetricLoss):
            return self.loss.reduced(self.loss.batch(x, y, tuples, w, c, exclude=own))
        if tuples is None:
            if y is None or c is None:
                raise ValueError("labels are needed where no indices_tuple says which pairs to compare")
            same = torch.eq(y[:, None], c)
            a2, n = (~same).nonzero(as_tuple=True)
            tuples = without_own(own, (*same.nonzero(as_tuple=True), a2, n))
        return self.loss(x, y, tuples, w, c)


class DistributedMinerWrapper(torch.nn.Module):
    """A miner for the batches of all ranks, for a DistributedLossWrapper with the same ``efficient``.

    A miner that draws at random draws separately on each rank; the gradient is then that of the mean over the ranks.

    Args:
        miner: a miner of this package or of pytorch-metric-learning.
        efficient: mine only for the rank's own rows, among the rows of all ranks.
        group: a process group; None: all ranks.

    Raises:
        TypeError: an object that is not called like a miner, or DistributedDataParallel.
    """

    def __init__(self, miner: torch.nn.Module, efficient: bool = False, *, group: Group = None):
        super().__init__()
        _check_module("miner", miner)
        self.miner, self.efficient, self.group = miner, efficient, group

    @torch.no_grad()
    def forward(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Mine the batches of all ranks.

        Args:
            embeddings: (N_r, D) floating point: this rank's batch.
            labels: (N_r,) integers.
            ref_emb: (M_r, D) floating point: this rank's references, or None.
            ref_labels: (M_r,) integers, or None.

        Returns:
            A GlobalTuple; on one rank the tuple of the miner.
        """
        if world_size(self.group) == 1:
            return self.miner(embeddings, labels, ref_emb, ref_labels)
        parts = Parts(embeddings, labels, ref_emb, ref_labels, self.group)
        found = parts.gathered()
        if not self.efficient:
            return GlobalTuple(self.miner(found.embeddings, found.labels, found.ref_emb, found.ref_labels), False)
        x, y = parts.embeddings, parts.labels
        w, c, own = parts.references(found)
        if isinstance(self.miner, Miner):
            return GlobalTuple(self.miner.mine(make_batch(x, y, None, w, c, exclude=own)), True)
        return GlobalTuple(without_own(own, self.miner(x, y, w, c)), True)


def _check_module(name: str, module: Any) -> None:
    if isinstance(module, DistributedDataParallel):
        raise TypeError(f"wrap the other way round: DistributedDataParallel(Distributed{name.title()}Wrapper({name}))")
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"{name} must be a {name} of dml_kernels or pytorch-metric-learning; got {type(module).__name__}"
        )

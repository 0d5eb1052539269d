"""Cross-batch memory: any pair loss between a batch and the embeddings of the last batches.

Each call first stores the batch, without gradient, in a ring of ``memory_size`` embeddings, then compares the batch
with all stored embeddings except each row's own copy. Only the batch gets a gradient. Wang, Zhang, Huang and Scott
2020, "Cross-Batch Memory for Embedding Learning", arXiv 1912.06798: embeddings drift slowly enough for old ones to
serve as references.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import check_integer, check_tensor, check_values_there, shown
from ..ops.contract import check_matrix, check_pair_indices
from ..pairs.batch import check_tuples
from ..pairs.sets import IGNORE_INDEX, sets_of
from ..pairs.tuples import as_triplets, without_own
from ..records import Recorded
from .base import check_labels, family
from .metric_loss import MetricLoss, check_takes_references


class CrossBatchMemory(Recorded):
    """A pair loss over a memory; a drop-in for pytorch-metric-learning 2.9's class of this name.

    The memory is streamed like any reference set: nothing of size batch x memory is built, unless ``indices_tuple``
    requires a list of all pairs. Places that are not filled yet have the label -100 and are in no pair.

    Differences from pytorch-metric-learning: the memory keeps its dtype, whatever that of the batch (a float64 batch is
    compared in float64 with the contents of a float32 memory); and a row's own copy is left out of NCALoss too. The
    memory changes in place, unless the graph of an earlier call still waits for its ``backward``: that graph then keeps
    the memory as it was, (M, D) for each waiting call. (Compiled by inductor, the ``backward`` of a call before the
    last is an error.)

    The state dict has the same two keys as in pytorch-metric-learning, and each library loads the state of the other.
    It holds the memory oldest row first, so that the position in the ring, which pytorch-metric-learning does not save,
    follows from it: rows after the last that is neither zero nor labelled -100 were never written. In
    pytorch-metric-learning a loaded memory counts as empty until ``queue_idx`` or ``has_been_filled`` is set; here it
    continues.

    Over several processes, put :class:`dml_kernels.distributed.DistributedLossWrapper` around the memory. Without it
    every process has a memory of its own batches, which must not be given to DistributedDataParallel, because that
    copies the buffers of rank 0 over those of the other ranks before each step.

    Args:
        loss: a loss of this package that takes ``ref_emb``.
        embedding_size: D.
        memory_size: M.
        miner: called with (embeddings, labels, memory embeddings, memory labels), for the filled part of the memory;
            returns the pairs or triplets to compare.
        collect_stats: accepted as in pytorch-metric-learning; nothing of a step is recorded.

    Attributes:
        embedding_memory: (M, D), the stored embeddings.
        label_memory: (M,) int64, their labels; -100 in places that are not filled yet.
        queue_idx: int, the next place.
        has_been_filled: bool; while it is False, only the places before ``queue_idx`` are compared with. Both may be
            assigned; on a GPU, reading them waits for the device.
        curr_batch_idx: (N,) int64, the places of the rows stored last.

    Raises:
        TypeError: a loss that is not one of this package's pair losses.
        ValueError: sizes that are not positive.
    """

    embedding_memory: Tensor
    label_memory: Tensor
    curr_batch_idx: Tensor
    _queue_idx: Tensor
    _has_been_filled: Tensor

    def __init__(self, loss: MetricLoss, embedding_size: int, memory_size: int = 1024, miner: Any = None,
                 collect_stats: bool | None = None):  # fmt: skip
        super().__init__(collect_stats)
        check_takes_references(loss)
        embedding_size = check_integer("embedding_size", embedding_size, 1)
        memory_size = check_integer("memory_size", memory_size, 1)
        if miner is not None and not callable(miner):
            raise TypeError(f"miner must be callable; got {shown(miner)}")
        self.loss, self.miner = loss, miner
        self.embedding_size, self.memory_size = embedding_size, memory_size
        self.register_buffer("embedding_memory", torch.zeros(memory_size, embedding_size))
        self.register_buffer("label_memory", torch.full((memory_size,), IGNORE_INDEX))
        # As tensors, so that a compiled step need not be compiled anew for each position.
        self.register_buffer("_queue_idx", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("_has_been_filled", torch.zeros((), dtype=torch.bool), persistent=False)
        self.curr_batch_idx = torch.empty(0, dtype=torch.int64)
        self._shown: weakref.ref[Tensor] | None = None

    @staticmethod
    def supported_losses() -> list[str]:
        """The names of the losses that take a memory."""
        known = {name: entry.loss for name, entry in family("pairs").items()}
        return sorted(name for name, loss in known.items() if getattr(loss, "takes_references", False))

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        """Raises ValueError for a name that is not among :meth:`supported_losses`."""
        if loss_name not in cls.supported_losses():
            raise ValueError(f"CrossBatchMemory takes {', '.join(cls.supported_losses())}; got {loss_name}")

    @property
    def queue_idx(self) -> int:
        """The next place to be written."""
        return int(self._queue_idx)

    @queue_idx.setter
    def queue_idx(self, value: int) -> None:
        if not 0 <= int(value) < self.memory_size:
            raise ValueError(f"queue_idx must be in [0, {self.memory_size}); got {value}")
        self._queue_idx.fill_(int(value))

    @property
    def has_been_filled(self) -> bool:
        """Whether every place has been written."""
        return bool(self._has_been_filled)

    @has_been_filled.setter
    def has_been_filled(self, value: bool) -> None:
        self._has_been_filled.fill_(bool(value))

    @torch.no_grad()
    def reset_queue(self) -> None:
        """Empty the memory."""
        self._unshare()
        self.embedding_memory.zero_()
        self.label_memory.fill_(IGNORE_INDEX)
        self.queue_idx, self.has_been_filled = 0, False

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Any = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """Store the batch, and compute the loss of the batch compared with the memory.

        Args:
            embeddings: (N, D) floating point.
            labels: (N,) integers. Rows labelled -100 are stored, but are in no pair.
            indices_tuple: pairs or triplets to compare in addition to all others (or to the miner's), with positives
                and negatives as places of the memory. They join a list of all pairs, which takes O(N M) memory.
            enqueue_mask: (N,) bool: only these rows are stored, and only the others are compared (for example the keys
                of a momentum encoder, and the queries). Not together with ``indices_tuple``.

        Raises:
            ValueError: more rows to store than the memory holds, or arguments that do not fit together.
        """
        labels = self._checked(embeddings, labels)
        places: Tensor | None = None
        if enqueue_mask is None:
            self.add_to_memory(embeddings, labels)
            places = self.curr_batch_idx
        else:
            if indices_tuple is not None:
                raise ValueError("indices_tuple and enqueue_mask exclude each other; give one of them")
            check_tensor("enqueue_mask", enqueue_mask)
            check_values_there("enqueue_mask", enqueue_mask, embeddings)
            if enqueue_mask.shape != labels.shape or enqueue_mask.dtype != torch.bool:
                got = f"{enqueue_mask.dtype} {tuple(enqueue_mask.shape)}"
                raise ValueError(f"enqueue_mask must be bool of shape {tuple(labels.shape)}; got {got}")
            mask = enqueue_mask.to(embeddings.device)
            self.add_to_memory(embeddings[mask], labels[mask])
            embeddings, labels = embeddings[~mask], labels[~mask]
        tuples: tuple[Tensor, ...] | None = None
        if self.miner is not None or indices_tuple is not None:
            filled = self.memory_size if self.has_been_filled else self.queue_idx
            used = self.embedding_memory[:filled], self.label_memory[:filled]
            tuples = self.create_indices_tuple(embeddings, labels, *used, indices_tuple, places is not None)
        # A tensor object of its own: it lives as long as a graph that reads the memory.
        memory = self.embedding_memory.detach()
        if not torch.compiler.is_compiling():
            self._shown = weakref.ref(memory)
        written = self._has_been_filled | (torch.arange(self.memory_size, device=memory.device) < self._queue_idx)
        memory_labels = torch.where(written, self.label_memory, IGNORE_INDEX)
        return self.loss.reduced(self.loss.batch(embeddings, labels, tuples, memory, memory_labels, exclude=places))

    def _checked(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The labels as int64, of embeddings that the memory can hold."""
        check_matrix("embeddings", embeddings)
        if embeddings.size(1) != self.embedding_size:
            raise ValueError(f"embeddings must have shape (N, {self.embedding_size}); got {tuple(embeddings.shape)}")
        return check_labels(labels, embeddings)

    @torch.no_grad()
    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int | None = None) -> None:
        """Store rows (N, D) and their labels (N,) in the next N places, which become ``curr_batch_idx``.

        ``batch_size`` is N, as pytorch-metric-learning passes it.

        Raises:
            ValueError: more rows than the memory holds, or another number than ``batch_size``.
        """
        labels, n = self._checked(embeddings, labels), embeddings.size(0)
        if n > self.memory_size:
            raise ValueError(f"{n} rows do not fit a memory of {self.memory_size}; use memory_size={n} or more")
        if batch_size is not None and batch_size != n:
            raise ValueError(f"batch_size must be the number of embeddings, {n}; got {batch_size}")
        self._unshare()
        places = (self._queue_idx + torch.arange(n, device=self._queue_idx.device)) % self.memory_size
        self.embedding_memory.index_copy_(0, places, embeddings.detach().to(self.embedding_memory))
        self.label_memory.index_copy_(0, places, labels.to(self.label_memory))
        end = self._queue_idx + n
        self._has_been_filled.logical_or_(end >= self.memory_size)
        self._queue_idx.copy_(end % self.memory_size)
        self.curr_batch_idx = places

    def _unshare(self) -> None:
        """Leave the memory unchanged for a graph that still reads it; later writes go into a copy."""
        if not torch.compiler.is_compiling() and self._shown is not None and self._shown() is not None:
            self.embedding_memory = self.embedding_memory.clone()

    def create_indices_tuple(
        self, embeddings: Tensor, labels: Tensor, E_mem: Tensor, L_mem: Tensor, input_indices_tuple: Any,
        do_remove_self_comparisons: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The pairs or triplets to compare: the miner's, or all pairs, joined by the given ones.

        Args:
            embeddings: (N, D).
            labels: (N,) int64.
            E_mem: the embeddings of the filled part of the memory.
            L_mem: their labels.
            input_indices_tuple: pairs or triplets to add, or None.
            do_remove_self_comparisons: leave out the copies at ``curr_batch_idx``.
        """
        given = check_tuples(input_indices_tuple, embeddings)
        if self.miner is not None:
            found = check_tuples(self.miner(embeddings, labels, E_mem, L_mem), embeddings)
            if found is None:
                raise TypeError("miner must return pairs or triplets; got None")
            check_pair_indices(found[0], found[1], embeddings.size(0), E_mem.size(0))
        else:
            same, different, _ = sets_of(labels, L_mem, None, IGNORE_INDEX, slice(0, len(L_mem)))
            found = (*same.nonzero(as_tuple=True), *different.nonzero(as_tuple=True))
        if do_remove_self_comparisons:
            found = without_own(self.curr_batch_idx, found)
        if given is None:
            return found
        if len(found) == 4 and len(given) == 3:
            given = (given[0], given[1], given[0], given[2])
        elif len(found) == 3:
            given = as_triplets(given)
        return tuple(torch.cat(both) for both in zip(found, given))

    # --- checkpoints

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shown": None}  # a weak reference is no state

    def _in_order(self, start: Tensor) -> Tensor:
        """The places of the ring from ``start`` on, (M,)."""
        return (start + torch.arange(self.memory_size, device=start.device)) % self.memory_size

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Oldest row first. The ring's position is metadata: it makes a resumed run the same in every bit."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        order = self._in_order(torch.where(self._has_been_filled, self._queue_idx, 0))
        for name in ("embedding_memory", "label_memory"):
            destination[prefix + name] = destination[prefix + name][order]
        position = self._queue_idx.clone(), self._has_been_filled.clone(), _mark(destination[prefix + "label_memory"])
        getattr(destination, "_metadata", {}).get(prefix[:-1], {})["position"] = position

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        """Also loads states of pytorch-metric-learning, and of 0.1, which saved the ring as it was and its position."""
        old = [state_dict.pop(prefix + name, None) for name in ("queue_idx", "has_been_filled")]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        loaded = [(t, state_dict.get(prefix + name)) for name, t in self.named_buffers(recurse=False) if name[0] != "_"]
        if any(there is None or there.shape != t.shape or t.is_meta for t, there in loaded):
            return  # nothing was loaded, or an error will follow
        device = self.label_memory.device
        written = (self.embedding_memory != 0).any(1) & (self.label_memory != IGNORE_INDEX)
        count = torch.where(written, torch.arange(1, self.memory_size + 1, device=device), 0).max()
        position = count % self.memory_size, count == self.memory_size
        known = local_metadata.get("position")
        if None not in old:
            position = old[0], old[1]
        elif known is not None and int(known[2]) == int(_mark(self.label_memory)):
            position = known[:2]
            order = self._in_order(-torch.where(position[1], position[0], 0).to(device))
            self.embedding_memory, self.label_memory = self.embedding_memory[order], self.label_memory[order]
        self._queue_idx, self._has_been_filled = (t.to(device, copy=True) for t in position)

    def extra_repr(self) -> str:
        """What ``print(memory)`` shows."""
        return f"embedding_size={self.embedding_size}, memory_size={self.memory_size}"


def _mark(labels: Tensor) -> Tensor:
    """() int64, a checksum of the labels in this order: metadata may belong to another state than the values."""
    return (labels * torch.arange(1, 2 * labels.numel(), 2, device=labels.device)).sum()

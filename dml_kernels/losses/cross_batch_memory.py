"""Cross-batch memory: any pair loss between a batch and the embeddings of the last batches.

Each call first stores the batch, without gradient, in a ring of ``memory_size`` embeddings, then compares the batch
with all that is stored but each row's own copy. Gradients reach the batch alone. Wang, Zhang, Huang and Scott 2020,
"Cross-Batch Memory for Embedding Learning", arXiv 1912.06798: embeddings drift slowly enough for old ones to serve as
references.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batch import check_tuples
from ..ops.contract import check_integer, check_matrix
from ..tuples import as_triplets
from .base import check_labels
from .comparisons import IGNORED
from .metric_loss import MetricLoss


class CrossBatchMemory(torch.nn.Module):
    """A pair loss over a memory; a drop-in for pytorch-metric-learning 2.9's class of this name.

    The memory is streamed like any reference set: nothing of size batch x memory is built, unless ``indices_tuple``
    asks for a list of all pairs. What is not filled yet has the label -100 and is in no pair.

    Differences from theirs: the ring's position is part of the state dict; the memory keeps its dtype, whatever the
    batch's (half-precision batches beside a float32 memory are fine, a float64 batch needs ``memory.double()``); a
    row's own copy is left out of NCALoss, too. The memory changes in place with each call: call ``backward`` before the
    next forward. Under DistributedDataParallel every rank has a memory of its own batches: wrap the network, not this
    module, or rank 0's buffers are copied over the others' before each step.

    Args:
        loss: of this package: one that takes ``ref_emb``. embedding_size: D. memory_size: M.
        miner: called with (embeddings, labels, memory embeddings, memory labels), for the filled part of the memory;
            returns the pairs or triplets to compare.

    Attributes:
        embedding_memory: (M, D). label_memory: (M,) int64. queue_idx: () int64, the next place. has_been_filled: ()
        bool.

    Raises:
        TypeError: a loss that is not one of this package's pair losses. ValueError: sizes that are not positive.
    """

    embedding_memory: Tensor
    label_memory: Tensor
    queue_idx: Tensor
    has_been_filled: Tensor

    def __init__(self, loss: MetricLoss, embedding_size: int, memory_size: int = 1024, miner: Any = None):
        super().__init__()
        if not isinstance(loss, MetricLoss) or not loss.takes_references:
            raise TypeError(
                f"loss must be a pair loss of dml_kernels.losses that takes ref_emb, such as ContrastiveLoss(); "
                f"got {type(loss).__name__}"
            )
        if check_integer("embedding_size", embedding_size) < 1 or check_integer("memory_size", memory_size) < 1:
            raise ValueError(f"embedding_size and memory_size must be positive; got {embedding_size} and {memory_size}")
        self.loss, self.miner = loss, miner
        self.embedding_size, self.memory_size = embedding_size, memory_size
        self.register_buffer("embedding_memory", torch.zeros(memory_size, embedding_size))
        self.register_buffer("label_memory", torch.full((memory_size,), IGNORED))
        self.register_buffer("queue_idx", torch.zeros((), dtype=torch.int64))
        self.register_buffer("has_been_filled", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def reset_queue(self) -> None:
        """Empty the memory."""
        self.embedding_memory.zero_()
        self.label_memory.fill_(IGNORED)
        self.queue_idx.zero_()
        self.has_been_filled.zero_()

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Any = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """Stores the batch and returns the loss of embeddings (N, D) against the memory.

        Args:
            labels: (N,) integers. Rows labelled -100 are stored, and take part in nothing.
            indices_tuple: pairs or triplets to compare in addition to all others (or the miner's), positives and
                negatives as places of the memory. They join a list of all pairs: O(N M) memory.
            enqueue_mask: (N,) bool: store these rows alone, compare the others alone (a momentum encoder's keys beside
                the queries, say). Not together with ``indices_tuple``.

        Raises:
            ValueError: more rows to store than the memory holds, or arguments that do not fit together.
        """
        check_matrix("embeddings", embeddings)
        if embeddings.size(1) != self.embedding_size:
            raise ValueError(f"embeddings must have shape (N, {self.embedding_size}); got {tuple(embeddings.shape)}")
        labels = check_labels(labels, embeddings)
        places: Tensor | None = None
        if enqueue_mask is None:
            places = self._enqueue(embeddings, labels)
        else:
            if indices_tuple is not None:
                raise ValueError("indices_tuple and enqueue_mask exclude each other; give one of them")
            if enqueue_mask.shape != labels.shape or enqueue_mask.dtype != torch.bool:
                got = f"{enqueue_mask.dtype} {tuple(enqueue_mask.shape)}"
                raise ValueError(f"enqueue_mask must be bool of shape {tuple(labels.shape)}; got {got}")
            mask = enqueue_mask.to(embeddings.device)
            self._enqueue(embeddings[mask], labels[mask])
            embeddings, labels = embeddings[~mask], labels[~mask]
        tuples = self._tuples(embeddings, labels, indices_tuple, places)
        batch = self.loss.batch(embeddings, labels, tuples, self.embedding_memory, self.label_memory, exclude=places)
        return self.loss.reduced(batch)

    @torch.no_grad()
    def _enqueue(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Where the rows went, (N,)."""
        n = embeddings.size(0)
        if n > self.memory_size:
            raise ValueError(f"{n} rows do not fit a memory of {self.memory_size}; use memory_size={n} or more")
        places = (self.queue_idx + torch.arange(n, device=self.queue_idx.device)) % self.memory_size
        self.embedding_memory.index_copy_(0, places, embeddings.detach().to(self.embedding_memory))
        self.label_memory.index_copy_(0, places, labels.to(self.label_memory.device))
        end = self.queue_idx + n
        self.has_been_filled.logical_or_(end >= self.memory_size)
        self.queue_idx.copy_(end % self.memory_size)
        return places

    def _tuples(
        self, embeddings: Tensor, labels: Tensor, given: Any, places: Tensor | None
    ) -> tuple[Tensor, ...] | None:
        """The miner's tuple less own copies, joined by the given one; None for all pairs."""
        given = check_tuples(given, embeddings)
        if self.miner is None and given is None:
            return None
        filled = self.memory_size if self.has_been_filled else int(self.queue_idx)
        memory, memory_labels = self.embedding_memory[:filled], self.label_memory[:filled]
        if self.miner is not None:
            found = check_tuples(self.miner(embeddings, labels, memory, memory_labels), embeddings)
            assert found is not None
        else:
            match = labels[:, None] == memory_labels
            used = (labels != IGNORED)[:, None] & (memory_labels != IGNORED)
            found = (*(match & used).nonzero(as_tuple=True), *(~match & used).nonzero(as_tuple=True))
        if places is not None:
            keep = found[1] != places[found[0]]
            own = 3 if len(found) == 3 else 2
            found = (*(t[keep] for t in found[:own]), *found[own:])
        if given is None:
            return found
        if len(found) == 4 and len(given) == 3:
            given = (given[0], given[1], given[0], given[2])
        elif len(found) == 3:
            given = as_triplets(given)
        return tuple(torch.cat(both) for both in zip(found, given))

    def extra_repr(self) -> str:
        """What ``print(memory)`` shows."""
        return f"embedding_size={self.embedding_size}, memory_size={self.memory_size}"

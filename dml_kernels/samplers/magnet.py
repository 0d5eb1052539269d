"""The sampler for Magnet: a cluster with a high loss, the clusters of other classes around it, some examples of each.

Rippel, Paluri, Dollar, Bourdev, "Metric Learning with Adaptive Density Discrimination", ICLR 2016, arXiv 1511.05939,
section 3: draw a seed cluster with probability proportional to its loss, take its M-1 nearest impostor clusters, and D
examples from each, uniformly.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..clustering import ClusterIndex
from ..ops.checks import check_integer, check_momentum
from ..saved_state import check_count, check_like

__all__ = ["MagnetBatchSampler"]

STATE_FORMAT = 1


class MagnetBatchSampler(Sampler[list[int]]):
    """Draws batches of M clusters x D examples, for ``DataLoader(dataset, batch_sampler=...)`` with any workers.

    **A batch** is a seed cluster, drawn with probability proportional to its tracked loss; its M-1 nearest clusters of
    other classes (``ClusterIndex.nearest_impostors``); and D examples of each without replacement, those of the seed
    cluster first. A cluster of fewer than D examples gives all of them, and then repeats some, drawn with replacement:
    every batch has M D indices. It has fewer only where there are fewer than M-1 clusters of other classes; with a
    single class it is the seed cluster alone. Empty clusters and ignored examples are never drawn.

    **Tracked losses** come from :meth:`update`, called after each step. A cluster that has no loss yet is drawn as if
    it had the mean loss of the clusters that have one. While no cluster has a loss, or where all losses are 0, draws
    are uniform. A cluster of loss 0 is no seed while others have a loss; it can still be drawn as an impostor, which
    updates its loss. Cluster ids keep their meaning when the index is refreshed, and so do the losses.

    Each iteration is a new epoch, with new draws; the first one after ``load_state_dict`` continues where the state was
    saved. ``update`` affects later draws only: a DataLoader with workers draws num_workers x prefetch_factor batches
    ahead. Use one iterator at a time.

    Args:
        index: a ClusterIndex, refreshed at least once before the first batch. It may be refreshed at any time; the next
            batch uses the new clusters.
        clusters_per_batch: M (12 in the paper).
        examples_per_cluster: D (4 in the paper).
        batches: the number of batches of an epoch, len(sampler); None: clustered examples / (M D), rounded up.
        momentum: the weight of the newest loss in the running mean of a cluster, in (0, 1]; the first loss counts
            fully. None: the plain mean of the losses of all its examples so far.
        seed: of the draws.

    Attributes:
        losses: (K,) fp64, the tracked mean loss of each cluster, NaN for a cluster that has no loss yet.

    Raises:
        ValueError, TypeError: wrong arguments.
        RuntimeError: the iteration begins before the first refresh of the index.
    """

    # How many batches are kept, so that a state can begin before them: more than a DataLoader ever draws ahead.
    HISTORY = 1024

    def __init__(
        self,
        index: ClusterIndex,
        clusters_per_batch: int = 12,
        examples_per_cluster: int = 4,
        *,
        batches: int | None = None,
        momentum: float | None = 0.5,
        seed: int = 0,
    ) -> None:
        if not isinstance(index, ClusterIndex):
            raise TypeError(f"index must be a ClusterIndex; got {type(index).__name__}")
        self.clusters_per_batch = check_integer("clusters_per_batch", clusters_per_batch, 1)
        self.examples_per_cluster = check_integer("examples_per_cluster", examples_per_cluster, 1)
        if batches is None:
            batches = -(-index.count // (self.clusters_per_batch * self.examples_per_cluster))
        self._batches = check_integer("batches", batches, 1)
        self.index, self.momentum = index, None if momentum is None else check_momentum(momentum)
        self._losses = torch.zeros(len(index), dtype=torch.float64)
        self._counts = torch.zeros(len(index), dtype=torch.int64)  # how many losses each cluster has had
        self._generator = np.random.default_rng(check_integer("seed", seed, 0))
        self._position = 0  # how many batches were handed out in this epoch
        self._history: deque[list[int]] = deque(maxlen=self.HISTORY)  # the last batches that were handed out
        self._replay: deque[list[int]] = deque()  # batches handed out before the state was saved, but not trained on
        self._resumed = False

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        # Nothing happens before the first batch is requested: a DataLoader with workers makes two iterators and uses
        # the second, which would otherwise begin a new epoch instead of the resumed one.
        if not (self._resumed and self._position < self._batches):
            self._position = 0
            self._replay.clear()
        self._resumed = False
        self._history.clear()
        while self._position < self._batches:
            batch = self._replay.popleft() if self._replay else self._draw()
            self._position += 1
            self._history.append(batch)
            yield list(batch)

    @property
    def losses(self) -> Tensor:
        """(K,) fp64, the tracked mean loss of each cluster, NaN for a cluster that has no loss yet."""
        return torch.where(self._counts > 0, self._losses, torch.nan)

    def update(self, clusters: Tensor, losses: Tensor) -> None:
        """Track the losses of a step. After an error nothing has changed.

        Args:
            clusters: (N,) integers: the cluster of each example, on any device; examples with -1 are left out.
            losses: (N,) floating point: the loss of each example.

        Raises:
            TypeError: wrong dtypes.
            ValueError: wrong shapes, ids outside the index, or losses that are NaN, infinite or negative.
        """
        if not isinstance(clusters, Tensor) or clusters.is_floating_point() or clusters.dtype == torch.bool:
            raise TypeError(f"clusters must be an integer tensor; got {getattr(clusters, 'dtype', type(clusters))}")
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            raise TypeError(f"losses must be a floating point tensor; got {getattr(losses, 'dtype', type(losses))}")
        if clusters.dim() != 1 or clusters.shape != losses.shape:
            raise ValueError(
                "clusters and losses must both have shape (N,), one for each example: take the loss with "
                f"reduction='none'; got {tuple(clusters.shape)} and {tuple(losses.shape)}"
            )
        ids, values = clusters.detach().to("cpu", torch.int64), losses.detach().to("cpu", torch.float64)
        ids, values = ids[ids != -1], values[ids != -1]
        if bool(((ids < 0) | (ids >= len(self.index))).any()):
            raise ValueError(
                f"clusters must be -1 or ids under {len(self.index)}; got {int(ids.min())} to {int(ids.max())}"
            )
        if not bool(((values >= 0) & values.isfinite()).all()):
            raise ValueError("losses hold NaN, infinity or negative values: Magnet's are finite and at least 0")
        ids, place, counts = torch.unique(ids, return_inverse=True, return_counts=True)
        newest = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, place, values) / counts
        seen = self._counts[ids]
        if self.momentum is None:
            weight = counts.double() / (seen + counts)
        else:
            weight = torch.ones_like(newest).masked_fill(seen > 0, self.momentum)
        self._losses[ids] += weight * (newest - self._losses[ids])
        self._counts[ids] += counts

    def probabilities(self) -> Tensor:
        """(K,) fp64, the probability that each cluster is the next seed."""
        present = self.index.sizes > 0
        seen = present & (self._counts > 0)
        largest = self._losses[seen].max() if bool(seen.any()) else torch.tensor(0.0)
        if largest == 0:
            weights = present.double()
        else:
            # The division comes first, because sums of huge losses would overflow.
            weights = self._losses / largest
            weights = torch.where(seen, weights, weights[seen].mean()).masked_fill(~present, 0.0)
        return weights / weights.sum()

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """The generator, the tracked losses and the position, as tensors, numbers and strings.

        Save the state of the index too.

        Args:
            consumed: how many batches of the current epoch were trained on. None: all that were handed out, which is
                right without workers. With workers a DataLoader is ahead of the training loop: the state keeps the
                batches in between, and they are handed out again first. A DataLoader with the same number of workers
                then draws every later batch after the same updates as in an uninterrupted run, so the run continues
                with the same batches.

        Raises:
            ValueError: ``consumed`` is out of range.
        """
        known = [*self._history, *self._replay]
        oldest = self._position - len(self._history)
        consumed = self._position if consumed is None else consumed
        if not oldest <= consumed <= self._position:
            raise ValueError(
                f"consumed must be from {oldest} to {self._position}, batches handed out in this epoch; got {consumed}"
            )
        return {
            "format": STATE_FORMAT,
            "shape": [self.clusters_per_batch, self.examples_per_cluster, self._batches, len(self.index)],
            "losses": self._losses.clone(),
            "counts": self._counts.clone(),
            "generator": json.dumps(self._generator.bit_generator.state),
            "position": consumed,
            "outstanding": known[consumed - oldest :],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state: the next iteration continues its epoch, or begins a new one where it was complete.

        After an error nothing has changed.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ValueError: the state has a different M, D, epoch length or number of clusters, or no sampler can have saved
                it.
        """
        own = self.state_dict()
        if state.get("format") != STATE_FORMAT:
            raise ValueError(f"not a state of this version's MagnetBatchSampler: format {state.get('format')!r}")
        if not isinstance(state.get("shape"), (list, tuple)) or list(state["shape"]) != own["shape"]:
            raise ValueError(
                "the state has [clusters per batch, examples per cluster, batches, clusters of the index] "
                f"{state.get('shape')}, the sampler {own['shape']}: make it as it was when the state was saved"
            )
        state = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
        check_like("the sampler's state", {**state, "shape": own["shape"]}, own)
        self._check_batches(state["outstanding"], check_count("position", state["position"], 0, self._batches))
        if bool((state["losses"] < 0).any()) or bool((state["counts"] < 0).any()):
            raise ValueError("the state's losses and counts must be at least 0")
        generator = np.random.default_rng()
        try:
            generator.bit_generator.state = json.loads(state["generator"])
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"the state's generator is not one of NumPy's PCG64 ({error!r})") from error
        self._losses, self._counts = state["losses"].clone(), state["counts"].clone()
        self._generator, self._position = generator, state["position"]
        self._replay = deque(list(batch) for batch in state["outstanding"])
        self._history.clear()
        self._resumed = True

    def _check_batches(self, batches: list[Any], position: int) -> None:
        """Raise ValueError unless these can be the batches that follow the first ``position``."""
        if len(batches) > self._batches - position:
            raise ValueError(f"the state holds {len(batches)} batches after {position} of an epoch of {self._batches}")
        for batch in batches:
            if not isinstance(batch, list) or not batch:
                raise ValueError(f"a batch of the state must be a list of indices; got {batch!r}")
            for row in batch:
                check_count("an index in a batch of the state", row, 0, len(self.index.clusters) - 1)

    def _draw(self) -> list[int]:
        """Draw one batch from the current clusters and losses."""
        if self.index.refreshes == 0:
            raise RuntimeError("the index has no clusters yet: call index.refresh(embeddings) before the first batch")
        cumulative = self.probabilities().cumsum(0).numpy()
        # The first place whose sum exceeds the draw never has weight 0; the bound keeps rounding from passing the end.
        drawn = self._generator.random() * cumulative[-1]
        seed = int(np.searchsorted(cumulative, min(drawn, np.nextafter(cumulative[-1], 0)), side="right"))
        impostors = self.index.nearest_impostors(seed, self.clusters_per_batch - 1)
        rows, starts = self.index.grouped()
        chosen = torch.cat((torch.tensor([seed]), impostors))
        places = _places(self._generator, self.index.sizes[chosen].numpy(), self.examples_per_cluster)
        batch: list[int] = rows[starts[chosen][:, None] + torch.from_numpy(places)].flatten().tolist()
        return batch


def _places(generator: np.random.Generator, sizes: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """Draw ``count`` different places in [0, size) for each of the sizes (M,): (M, count), all sets equally likely.

    Where size < count, all places come first, and then repeats drawn at random. The algorithm is R. W. Floyd's, for all
    sizes at once: step i draws from the first size - count + i + 1 places, and replaces a place that is taken by the
    last of these.
    """
    places = np.empty((len(sizes), count), dtype=np.int64)
    small = sizes < count
    for i in range(count):
        last = sizes - count + i
        drawn = generator.integers(0, np.where(small, sizes, last + 1))
        taken = (places[:, :i] == drawn[:, None]).any(axis=1)
        places[:, i] = np.where(small, np.where(i < sizes, i, drawn), np.where(taken, last, drawn))
    return places

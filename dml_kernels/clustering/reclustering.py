"""One refresh of a ``ClusterIndex``, block by block of the embeddings, into new tensors. No n x D copy is made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kmeans import KMeans, segment_sums

if TYPE_CHECKING:
    from .index import ClusterIndex

__all__ = ["Embeddings", "Reclustering", "Source"]

Embeddings = Tensor | Callable[[Tensor], Tensor]
# The largest coordinate of an embedding: squared distances stay well inside the range of fp32.
LARGEST = 1e15


class Reclustering:
    """One refresh: fills new tensors, which the index takes over at the end."""

    def __init__(self, index: ClusterIndex, source: Source, centers: Tensor | None) -> None:
        self.index, self.source = index, source
        self.clusters, self.sizes, self.scatter = index.clusters.clone(), index.sizes.clone(), index._scatter.clone()
        # In a partial refresh the centres of the other slices stay, and determine D.
        self._known = None if centers is None else centers.clone()
        if self._known is not None:
            source.dimensions = self._known.shape[1]
        self._kmeans: KMeans | None = None
        self.kmeans_seconds, self.filled = 0.0, 0

    @property
    def centers(self) -> Tensor:
        """(K, D) fp32, the new centres as far as they are known."""
        if self._known is None:
            assert self.source.dimensions is not None, "no block was read yet"
            self._known = torch.zeros(len(self.index), self.source.dimensions)
        return self._known

    def cluster(self, first: int, last: int, advance: Callable[[int], object]) -> None:
        """Cluster the classes [first, last), which fit a block together, or one class of any size."""
        index = self.index
        start, end = int(index._first_example[first]), int(index._first_example[last])
        rows, block = index._order[start:end], index.block_examples
        whole = len(rows) <= block
        sample = rows if whole else self._sample(rows, first)
        x = self.source(sample)
        sizes = index._class_sizes[first:last] if whole else torch.tensor([len(sample)])
        counts = index._class_counts[first:last]
        shift = center(x, sizes)
        centroids, nearest = self._train(x, sample, sizes, counts, first, shift)
        moments = Moments(centroids)
        offset = int(index._first_cluster[first])
        if whole:
            moments.add(x, nearest)
            self.clusters[rows] = nearest + offset
            advance(len(rows))
        else:
            del x
            assert self._kmeans is not None
            for part in rows.split(block):
                x = self.source(part).sub_(shift)
                with self._timed():
                    nearest = self._kmeans.assign(x, centroids)
                moments.add(x, nearest)
                self.clusters[part] = nearest + offset
                advance(len(part))
        places = slice(offset, offset + len(centroids))
        self.sizes[places], self.scatter[places], means = moments.result(counts)
        self.centers[places] = (shift.repeat_interleave(counts, dim=0).double() + means).float()

    def _sample(self, rows: Tensor, place: int) -> Tensor:
        """block_examples of the examples of a large class, in order; the same ones at every refresh."""
        generator = torch.Generator().manual_seed(self._seed(place))
        chosen = torch.randperm(len(rows), generator=generator)[: self.index.block_examples]
        return rows[chosen.sort().values]

    def _seed(self, place: int) -> int:
        """The seed of a class, from its place: it does not depend on what else is in the block or the slice."""
        return int((self.index.seed * 1_000_003 + place) % (1 << 31))

    def _train(
        self, x: Tensor, rows: Tensor, sizes: Tensor, counts: Tensor, first: int, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """k-means of a block: centroids relative to the means of the classes, and the nearest of each row."""
        index, total = self.index, int(counts.sum())
        initial = None
        if index.refreshes:
            # The previous clusters, where their examples are now. An empty one starts at the mean of its class, 0.
            before = index.clusters[rows] - index._first_cluster[first]
            members = torch.bincount(before, minlength=total).clamp(min=1)
            initial = (segment_sums(x, before, total) / members[:, None]).float()
        reach = shift.abs().amax(dim=1)
        seeds = [self._seed(first + i) for i in range(len(sizes))]
        if self._kmeans is None:
            self._kmeans = KMeans(x.shape[1], index.iterations)
        with self._timed():
            centroids, nearest, filled = self._kmeans.train(x, sizes.tolist(), counts.tolist(), seeds, initial, reach)
        self.filled += filled
        return centroids, nearest

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        assert self._kmeans is not None
        started = time.perf_counter()
        with self._kmeans.on_one_thread():
            yield
        self.kmeans_seconds += time.perf_counter() - started


class Source:
    """Blocks of embeddings: checked fp32 copies on the CPU, of unit length on request; counts the seconds."""

    def __init__(self, embeddings: Embeddings, count: int, normalize: bool) -> None:
        if isinstance(embeddings, Tensor):
            _check_kind("embeddings", embeddings)
            if len(embeddings) != count:
                raise ValueError(
                    f"embeddings must have one row for each of the {count} labels; got shape {tuple(embeddings.shape)}"
                )
        elif not callable(embeddings):
            raise TypeError(f"embeddings must be a tensor or a function of indices; got {type(embeddings).__name__}")
        self._embeddings, self._normalize = embeddings, normalize
        self.dimensions: int | None = None
        self.seconds = 0.0

    def __call__(self, rows: Tensor) -> Tensor:
        """(len(rows), D) fp32, contiguous, a copy that the caller may change."""
        started = time.perf_counter()
        if isinstance(self._embeddings, Tensor):
            given = self._embeddings.detach()[rows.to(self._embeddings.device)]
        else:
            given = self._embeddings(rows.clone())  # rows is a view of a tensor of the index
            _check_kind("embed(indices)", given)
            if len(given) != len(rows):
                raise ValueError(
                    f"embed(indices) must return a row for each of {len(rows)} indices; got shape {tuple(given.shape)}"
                )
        if self.dimensions not in (None, given.shape[1]):
            raise ValueError(
                f"embeddings have {given.shape[1]} dimensions, the other clusters {self.dimensions}: all must have as "
                "many; refresh(..., whole=True) takes a new width"
            )
        self.dimensions = given.shape[1]
        wide = given.detach().to("cpu", torch.float64 if self._normalize else torch.float32)
        _check_values(wide, rows)
        if self._normalize:
            wide = wide / torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp(min=1e-12)
        x = wide.to(torch.float32, memory_format=torch.contiguous_format)
        if not isinstance(self._embeddings, Tensor) and x.data_ptr() == given.data_ptr():
            x = x.clone()  # the function may keep what it returned
        self.seconds += time.perf_counter() - started
        return x


class Moments:
    """Count, sum and sum of squares of the rows of each centroid, relative to the centroid, so that nothing cancels."""

    def __init__(self, centroids: Tensor) -> None:
        self._centroids = centroids
        self._count = torch.zeros(len(centroids), dtype=torch.int64)
        self._sum = torch.zeros(centroids.shape, dtype=torch.float64)
        self._squares = torch.zeros(len(centroids), dtype=torch.float64)

    def add(self, x: Tensor, nearest: Tensor) -> None:
        """Add rows x (n, D), which are overwritten; nearest (n,) is the centroid of each row."""
        apart, total = x.sub_(self._centroids[nearest]), len(self._centroids)
        self._count += torch.bincount(nearest, minlength=total)
        self._sum += segment_sums(apart, nearest, total)
        self._squares += segment_sums(torch.linalg.vecdot(apart, apart)[:, None], nearest, total)[:, 0]

    def result(self, clusters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sizes (K,), sums of squared distances to the means (K,) fp64, means (K, D) fp64.

        ``clusters`` (classes,): how many of the K each class has. The mean of an empty cluster is that of all rows of
        its class.
        """
        members = self._count.clamp(min=1)
        scatter = self._squares - self._sum.square().sum(1) / members
        means = self._centroids + self._sum / members[:, None]
        owner = torch.arange(len(clusters)).repeat_interleave(clusters)
        rows = torch.zeros(len(clusters), dtype=torch.int64).index_add_(0, owner, self._count)
        of_class = segment_sums(means * self._count[:, None], owner, len(clusters)) / rows[:, None]
        return self._count, scatter.clamp(min=0), torch.where(self._count[:, None] > 0, means, of_class[owner])


def center(x: Tensor, sizes: Tensor) -> Tensor:
    """Subtract from each run of rows its mean, in place; returns the means (runs, D) fp32.

    Far from the origin, small distances would be lost to rounding in the products of faiss.
    """
    owner = torch.arange(len(sizes)).repeat_interleave(sizes)
    means = (segment_sums(x, owner, len(sizes)) / sizes[:, None]).float()
    x.sub_(means[owner])
    return means


def _check_kind(name: str, given: Any) -> None:
    if not isinstance(given, Tensor) or not given.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor; got {getattr(given, 'dtype', type(given))}")
    if given.dim() != 2 or given.shape[1] == 0:
        raise ValueError(f"{name} must have shape (count, dimensions); got {tuple(given.shape)}")


def _check_values(x: Tensor, rows: Tensor) -> None:
    lowest, highest = torch.aminmax(x)
    if not bool((lowest >= -LARGEST) & (highest <= LARGEST)):  # NaN compares false
        row = int((~(x.abs() <= LARGEST)).any(dim=1).nonzero()[0])
        raise ValueError(
            f"the embedding of example {int(rows[row])} holds NaN, infinity or a value over {LARGEST:g}: look for a "
            "diverged training step, lower the learning rate or scale the embeddings"
        )

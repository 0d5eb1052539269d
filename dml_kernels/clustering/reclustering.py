"""One refresh of a ``ClusterIndex``, block by block of the embeddings, into new tensors. No n x D copy is made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kmeans import KMeans, segment_sums

if TYPE_CHECKING:
    from .index import ClusterIndex

__all__ = ["Embeddings", "Reclustering", "RefreshReport", "Source"]

Embeddings = Tensor | Callable[[Tensor], Tensor]
# The largest coordinate of an embedding: squared distances stay well inside the range of fp32.
LARGEST = 1e15


@dataclass(frozen=True)
class RefreshReport:
    """What a refresh did.

    Attributes:
        seconds: how long the refresh took.
        embed_seconds: how long of that it took to get the embeddings.
        kmeans_seconds: how long of that k-means took.
        examples: how many examples were clustered.
        classes: how many classes were clustered.
        moved: the share of these examples whose cluster changed; 1 the first time.
        filled: how many clusters became empty and were given the example farthest from its centre.
        empty: how many clusters of the whole index have no example.
        variance: ``ClusterIndex.variance`` after the refresh.
    """

    seconds: float
    embed_seconds: float
    kmeans_seconds: float
    examples: int
    classes: int
    moved: float
    filled: int
    empty: int
    variance: float


class Reclustering:
    """One refresh: it fills new tensors, which the index takes over at the end.

    Args:
        index: the index to refresh.
        source: the embeddings.
        centers: (K, D) the centres before a partial refresh; None where all classes are clustered.

    Attributes:
        clusters: (n,) int64, as in ``ClusterIndex``.
        sizes: (K,) int64.
        scatter: (K,) fp64, the sum of squared distances to the mean of each cluster.
        kmeans_seconds: the seconds spent in faiss.
        filled: how many empty clusters were given an example.
    """

    def __init__(self, index: ClusterIndex, source: Source, centers: Tensor | None) -> None:
        self.index, self.source = index, source
        self.clusters, self.sizes, self.scatter = index.clusters.clone(), index.sizes.clone(), index._scatter.clone()
        # In a partial refresh the centres of the other slices stay and determine D.
        self._known = None if centers is None else centers.clone()
        if self._known is not None:
            source.dimensions = self._known.shape[1]
        self._kmeans: KMeans | None = None
        self.kmeans_seconds, self.filled = 0.0, 0

    @property
    def centers(self) -> Tensor:
        """(K, D) fp32, the new centres as far as they are computed."""
        if self._known is None:
            assert self.source.dimensions is not None, "no block was read yet"
            self._known = torch.zeros(len(self.index), self.source.dimensions)
        return self._known

    def cluster(self, first: int, last: int, advance: Callable[[int], object]) -> None:
        """Cluster the classes [first, last): several that fit a block together, or one class of any size.

        Args:
            first: the first class, by its place.
            last: the place after the last class.
            advance: called with the number of examples just finished.
        """
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
        """Choose ``block_examples`` examples of a large class, in order; the same ones at every refresh."""
        generator = torch.Generator().manual_seed(self._seed(place))
        chosen = torch.randperm(len(rows), generator=generator)[: self.index.block_examples]
        return rows[chosen.sort().values]

    def _seed(self, place: int) -> int:
        """The seed of a class, from its place: it does not depend on the other classes of the block or slice."""
        return int((self.index.seed * 1_000_003 + place) % (1 << 31))

    def _train(
        self, x: Tensor, rows: Tensor, sizes: Tensor, counts: Tensor, first: int, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run k-means on a block: centroids relative to the means of the classes, and the nearest one of each row."""
        index, total = self.index, int(counts.sum())
        initial = None
        if index.refreshes:
            # Start from the means of the previous clusters' examples. An empty one starts at the mean of its class, 0.
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
    """Gives blocks of embeddings as checked fp32 copies on the CPU.

    Args:
        embeddings: (n, D), or a function that returns the embeddings of given indices.
        count: n.
        normalize: whether vectors are divided by their norm.

    Attributes:
        dimensions: D; None before the first block.
        seconds: the seconds spent on getting the embeddings.

    Raises:
        TypeError: neither a floating point tensor nor a function.
        ValueError: wrong shapes; at a call, NaN, infinite or too large values.
    """

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
        """The embeddings of some rows, (len(rows), D) fp32, contiguous: a copy that the caller may change."""
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
    """Count, sum and sum of squares of the rows of each centroid, relative to the centroid so that nothing cancels.

    Args:
        centroids: (K, D) fp32.
    """

    def __init__(self, centroids: Tensor) -> None:
        self._centroids = centroids
        self._count = torch.zeros(len(centroids), dtype=torch.int64)
        self._sum = torch.zeros(centroids.shape, dtype=torch.float64)
        self._squares = torch.zeros(len(centroids), dtype=torch.float64)

    def add(self, x: Tensor, nearest: Tensor) -> None:
        """Add rows.

        Args:
            x: (n, D) fp32, overwritten.
            nearest: (n,) int64, the centroid of each row.
        """
        apart, total = x.sub_(self._centroids[nearest]), len(self._centroids)
        self._count += torch.bincount(nearest, minlength=total)
        self._sum += segment_sums(apart, nearest, total)
        self._squares += segment_sums(torch.linalg.vecdot(apart, apart)[:, None], nearest, total)[:, 0]

    def result(self, clusters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The moments of each cluster. The mean of an empty cluster is the mean of all rows of its class.

        Args:
            clusters: (classes,) int64, how many of the K clusters each class has.

        Returns:
            Sizes (K,) int64, sums of squared distances to the means (K,) fp64, means (K, D) fp64.
        """
        members = self._count.clamp(min=1)
        scatter = self._squares - self._sum.square().sum(1) / members
        means = self._centroids + self._sum / members[:, None]
        owner = torch.arange(len(clusters)).repeat_interleave(clusters)
        rows = torch.zeros(len(clusters), dtype=torch.int64).index_add_(0, owner, self._count)
        of_class = segment_sums(means * self._count[:, None], owner, len(clusters)) / rows[:, None]
        return self._count, scatter.clamp(min=0), torch.where(self._count[:, None] > 0, means, of_class[owner])


def center(x: Tensor, sizes: Tensor) -> Tensor:
    """Subtract from each run of rows its mean, in place.

    Far from the origin, small distances would be lost to rounding in the products of faiss.

    Args:
        x: (n, D) fp32.
        sizes: (runs,) int64, the number of rows of each run.

    Returns:
        The means, (runs, D) fp32.
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

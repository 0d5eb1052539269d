"""k-means within many small sets: faiss clusters one set after another, on one thread.

faiss does the clustering (k-means++ and Lloyd's iterations). This file adds what faiss leaves to its caller:
coordinates for which single precision is enough, a start from an earlier partition, a treatment of empty clusters, and
no warnings.

Sets of a few dozen vectors are far too small for the threads of faiss, which cost more than they save (and spin on a
busy machine). Each set uses one thread, so the result has the same bits at any number of threads.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..optional import import_optional

__all__ = ["KMeans", "far_apart", "load_faiss", "segment_sums"]

# Distances under this fraction of the size of the coordinates are rounding errors; such vectors count as equal.
ROUNDING = 1e-6
# How many rows are copied in double precision at a time.
ROWS = 2048
# The number of distances up to which k-means++ is greedy; that many take some minutes.
GREEDY = 1 << 27


def load_faiss() -> Any:
    """Import faiss when it is first needed; the ImportError says how to install it."""
    return import_optional("faiss", "clustering")


def segment_sums(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Add up the rows of values (n, D) by owner (n,) int64 in [0, count): (count, D) fp64."""
    sums = torch.zeros(count, values.shape[1], dtype=torch.float64)
    for start in range(0, len(values), ROWS):
        part = slice(start, start + ROWS)
        sums.index_add_(0, owner[part], values[part].double())
    return sums


def far_apart(x: Tensor, count: int, seed: int) -> Tensor:
    """Choose rows to start k-means from, by greedy k-means++ (Arthur and Vassilvitskii 2007).

    Each row is drawn with probability proportional to its squared distance from the rows chosen so far. Of several
    draws the one that leaves the smallest sum of distances counts: a single draw misses some of many groups even where
    they are far apart, because the examples near the groups already found outnumber the others. Where several draws
    would take many minutes, there is one. O(n D count log count) time, O(n log count) memory.

    Args:
        x: (n, D) fp32.
        count: how many rows, at most n.
        seed: of the draws.

    Returns:
        (count,) int64 indices of rows.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = 4 + int(math.log(count)) if len(x) * count <= GREEDY else 1
    lengths = torch.linalg.vecdot(x, x)

    def squared_distances(rows: Tensor) -> Tensor:
        return torch.addmm(lengths, x[rows], x.T, alpha=-2).add_(lengths[rows, None]).clamp_(min=0)

    chosen = torch.randint(len(x), (count,), generator=generator)
    left = squared_distances(chosen[:1])[0]
    for place in range(1, count):
        mass = left.cumsum(0, dtype=torch.float64)
        aims = mass[-1] * torch.rand(draws, dtype=torch.float64, generator=generator)
        drawn = torch.searchsorted(mass, aims, right=True).clamp_(max=len(x) - 1)
        after = torch.minimum(squared_distances(drawn), left)
        best = int(after.sum(1, dtype=torch.float64).argmin())
        chosen[place], left = drawn[best], after[best]
    return chosen


class KMeans:
    """k-means of sets of D-dimensional vectors: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's iterations.

    Args:
        dimensions: D.
        iterations: the most iterations of Lloyd's algorithm.
    """

    def __init__(self, dimensions: int, iterations: int) -> None:
        self._faiss = faiss = load_faiss()
        self._dimensions = dimensions
        self._index = faiss.IndexFlatL2(dimensions)
        self._settings = settings = faiss.ClusteringParameters()
        settings.niter = iterations
        settings.init_method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
        # The sets are small: no warning about few examples per cluster, and no subsampling.
        settings.min_points_per_centroid = 1
        settings.max_points_per_centroid = 1 << 30
        settings.check_input_data_for_NaNs = False  # embeddings are checked where they come in

    @contextlib.contextmanager
    def on_one_thread(self) -> Iterator[None]:
        """Make calls of faiss from this thread use only this thread; restore the setting afterwards."""
        threads = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(1)
        try:
            yield
        finally:
            self._faiss.omp_set_num_threads(threads)

    def train(
        self, x: Tensor, sizes: list[int], counts: list[int], seeds: list[int], initial: Tensor | None, reach: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """Cluster consecutive sets of rows, each set on its own.

        Args:
            x: (n, D) fp32, contiguous, with the mean of each set subtracted.
            sizes: the number of rows of each set.
            counts: the number of clusters of each set, from 1 to its number of rows.
            seeds: of k-means++, one for each set.
            initial: (sum of counts, D) fp32 centroids to start from; None: k-means++.
            reach: (sets,) the largest coordinate of the mean of each set.

        Returns:
            Centroids (sum of counts, D) fp32; the centroid nearest to each row of x, (n,) int64; and how many clusters
            had to be filled (``_fill``).
        """
        centroids = np.zeros((sum(counts), self._dimensions), dtype=np.float32)
        nearest = np.zeros(len(x), dtype=np.int64)
        distance = np.empty(len(x), dtype=np.float32)
        vectors = x.numpy()
        starts = None if initial is None else initial.numpy()
        spans = list(zip(_spans(sizes), _spans(counts)))
        for place, (rows, clusters) in enumerate(spans):
            if counts[place] > 1:  # one cluster: its centre is the mean, which is 0 here
                start = None if starts is None else starts[clusters]
                self._train_one(vectors[rows], seeds[place], start, centroids[clusters], nearest[rows], distance[rows])
            nearest[rows] += clusters.start
        filled = 0
        owner = np.repeat(np.arange(len(counts)), counts)
        for place in np.unique(owner[np.bincount(nearest, minlength=len(centroids)) == 0]):
            rows, clusters = spans[place]
            local = nearest[rows] - clusters.start
            filled += _fill(
                vectors[rows],
                centroids[clusters],
                local,
                ROUNDING * (float(reach[place]) + np.abs(vectors[rows]).max()),
            )
            nearest[rows] = local + clusters.start
        return torch.from_numpy(centroids), torch.from_numpy(nearest), filled

    def assign(self, x: Tensor, centroids: Tensor) -> Tensor:
        """The nearest centroid of each row, (n,) int64; the lowest index among equals."""
        vectors, nearest = x.numpy(), np.empty(len(x), dtype=np.int64)
        self._index.reset()
        self._index.add(centroids.numpy())
        self._search(vectors, np.empty(len(x), dtype=np.float32), nearest)
        return torch.from_numpy(nearest)

    def _train_one(
        self,
        x: np.ndarray[Any, Any],
        seed: int,
        start: np.ndarray[Any, Any] | None,
        centroids: np.ndarray[Any, Any],
        nearest: np.ndarray[Any, Any],
        distance: np.ndarray[Any, Any],
    ) -> None:
        """Cluster one set; write into centroids, nearest (counted from 0) and distance."""
        faiss = self._faiss
        self._settings.seed = seed
        clustering = faiss.Clustering(self._dimensions, len(centroids), self._settings)
        if start is not None:
            faiss.copy_array_to_vector(start.ravel(), clustering.centroids)
        # The calls behind Clustering.train and Index.search, without their checks and copies: microseconds count here.
        clustering.train_c(len(x), faiss.swig_ptr(x), self._index)
        self._search(x, distance, nearest)
        faiss.memcpy(faiss.swig_ptr(centroids), clustering.centroids.data(), centroids.nbytes)

    def _search(self, x: np.ndarray[Any, Any], distance: np.ndarray[Any, Any], nearest: np.ndarray[Any, Any]) -> None:
        pointer = self._faiss.swig_ptr
        self._index.search_c(len(x), pointer(x), 1, pointer(distance), pointer(nearest))


def _spans(lengths: list[int]) -> list[slice]:
    """Slices of consecutive runs with these lengths."""
    ends = list(itertools.accumulate(lengths))
    return [slice(first, end) for first, end in zip([0, *ends], ends)]


def _fill(x: np.ndarray[Any, Any], centroids: np.ndarray[Any, Any], nearest: np.ndarray[Any, Any], noise: float) -> int:
    """Give each empty cluster the example farthest from the mean of its cluster, in place.

    The only example of a cluster is its mean, so it is never taken, and no cluster is emptied in turn. A cluster stays
    empty where the examples within every other cluster are equal up to ``noise``: the set then has fewer different
    vectors than clusters.

    The means are computed here, because faiss may have moved its centroids off equal vectors to split them.

    Returns:
        How many clusters were filled.
    """
    members, filled = np.bincount(nearest, minlength=len(centroids)), 0
    sums = segment_sums(torch.from_numpy(x), torch.from_numpy(nearest), len(centroids)).numpy()
    apart = np.linalg.norm(x - (sums / np.maximum(members, 1)[:, None])[nearest], axis=1)
    for empty in np.flatnonzero(members == 0):
        farthest = int(apart.argmax())
        if apart[farthest] <= noise:
            break
        donor = nearest[farthest]
        nearest[farthest], centroids[empty], apart[farthest] = empty, x[farthest], 0.0
        left = nearest == donor
        apart[left] = np.linalg.norm(x[left] - x[left].mean(axis=0, dtype=np.float64), axis=1)
        filled += 1
    return filled

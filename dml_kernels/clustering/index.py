"""Clusters within each class, kept up to date while the embedding trains.

Magnet (Rippel, Paluri, Dollar, Bourdev, "Metric Learning with Adaptive Density Discrimination", ICLR 2016,
arXiv 1511.05939) models each class as several clusters: k-means of the current embeddings of its examples, refreshed
from time to time. ``ClusterIndex`` holds them:

    index = ClusterIndex(labels, clusters_per_class=3, every=500)
    for step, batch in enumerate(batches):
        if index.due(step):
            index.refresh(embed)        # embed(indices) -> (len(indices), D), called on bounded blocks
        ...
    share = (index.seconds - seconds_before) / seconds_of_the_epoch

Cluster ids are fixed at construction: class by class in ascending order of the labels, id = first id of the class +
number within the class. A refresh starts from the means of the previous clusters' examples in the new embeddings, so it
does not matter how far the space has moved or turned in between, and an id keeps its meaning.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..labels import integers_by_position
from ..ops.checks import check_flag, check_integer, check_positive
from ..progress import Progress, reporter
from ..saved_state import check_count, check_like
from .kmeans import load_faiss
from .reclustering import Embeddings, Reclustering, RefreshReport, Source

__all__ = ["ClusterIndex"]

STATE_FORMAT = 1


class ClusterIndex:
    """The clusters of each class, by k-means of the embeddings of its examples.

    faiss computes them, from k-means++ (Arthur and Vassilvitskii 2007) the first time. An empty cluster is given the
    example of its class that is farthest from its own centre. A cluster stays empty only where the class has fewer
    different vectors than clusters (or more than ``block_examples`` examples), and is left out wherever clusters are
    drawn.

    Memory in addition to the attributes: about 50 bytes an example, and three fp32 blocks of block_examples x D.

    Args:
        labels: (n,) integers, any values in any order, in a tensor, array, list or pandas column (read by position).
            Names (strings) are numbered from 0 in sorted order.
        clusters_per_class: the number of clusters of a class; a class with fewer examples has as many as examples.
        examples_per_cluster: replaces ``clusters_per_class``: a class of c examples has ceil(c / examples_per_cluster)
            clusters.
        normalize: cluster unit vectors r / |r|. The centres are means of unit vectors, not unit vectors themselves; a
            zero vector stays 0.
        iterations: the most Lloyd iterations of a refresh; k-means++ runs only where there are no clusters yet.
        every: steps (or epochs: the caller chooses the unit) between refreshes, see :meth:`due`; None: only the first.
        slices: a refresh covers 1/slices of the examples (whole classes), and the next one the next share, so that it
            interrupts training for 1/slices of the time. The first refresh covers all.
        block_examples: how many embeddings are held at a time. A larger class is clustered on a sample of that many of
            its examples (seeded, the same each time). Then all its examples are assigned, block by block, and the
            centres, sizes and variance are those of all.
        ignore_index: examples with this label are in no cluster.
        seed: of k-means++ and of the samples. The same seed and embeddings give the same bits, at any number of
            threads.

    Attributes:
        clusters: (n,) int64, the cluster of each example; -1 before the first refresh and for ignored examples.
        cluster_classes: (K,) int64, the label of the class of each cluster; fixed.
        centers: (K, D) fp32, the mean of the examples of each cluster, the mean of the class for an empty cluster.
        sizes: (K,) int64, the number of examples of each cluster.
        variance: a float, sum |r - mu_own|^2 / max(n - 1, 1) over the n clustered examples.
        seconds: how long all refreshes took so far.
        refreshes: how many refreshes are finished; code that caches what it derives from the clusters compares it.

    The tensors are on the CPU; a refresh replaces them, and never changes them in place.

    Raises:
        ValueError: labels that are not a vector, no labels to cluster, settings that are not positive integers, or a
            class with more clusters than block_examples.
        TypeError: labels that are neither integers nor names.
        ImportError: faiss is missing.
    """

    def __init__(
        self,
        labels: Any,
        *,
        clusters_per_class: int = 3,
        examples_per_cluster: int | None = None,
        normalize: bool = False,
        iterations: int = 10,
        every: float | None = None,
        slices: int = 1,
        block_examples: int = 8192,
        ignore_index: int = -100,
        seed: int = 0,
    ) -> None:
        clusters_per_class = check_integer("clusters_per_class", clusters_per_class, 1)
        iterations, slices = check_integer("iterations", iterations, 1), check_integer("slices", slices, 1)
        block_examples = check_integer("block_examples", block_examples, 1)
        if examples_per_cluster is not None:
            examples_per_cluster = check_integer("examples_per_cluster", examples_per_cluster, 1)
        every = None if every is None else check_positive("every", every, "a number of steps or None")
        seed, ignore_index = check_integer("seed", seed, 0), check_integer("ignore_index", ignore_index)
        load_faiss()  # if it is missing, the error comes now, not an epoch later
        labels = _check_labels(labels)
        kept = (labels != ignore_index).nonzero().squeeze(1)
        if not len(kept):
            raise ValueError(
                f"no example to cluster: of {len(labels)} labels none differs from ignore_index {ignore_index}"
            )
        self._order = kept[torch.argsort(labels[kept], stable=True)]  # clustered examples, class by class
        classes, class_sizes = torch.unique_consecutive(labels[self._order], return_counts=True)
        if examples_per_cluster is None:
            counts = class_sizes.clamp(max=clusters_per_class)
        else:
            counts = (class_sizes + examples_per_cluster - 1) // examples_per_cluster
        if int(counts.max()) > block_examples:
            raise ValueError(
                f"a class has {int(counts.max())} clusters, more than block_examples={block_examples} examples that "
                "are held to find them: give fewer clusters or a larger block"
            )
        self._class_sizes, self._class_counts = class_sizes, counts
        self._first_example, self._first_cluster = _offsets(class_sizes), _offsets(counts)
        self.cluster_classes = classes.repeat_interleave(counts)
        self.clusters = torch.full((len(labels),), -1)
        self.sizes = torch.zeros(len(self.cluster_classes), dtype=torch.int64)
        self.normalize, self.iterations = check_flag("normalize", normalize), iterations
        self.every, self.seed = every, seed
        self.block_examples = block_examples
        self.seconds = 0.0
        self.refreshes = 0
        self._slices = self._cut(slices)
        self._next_slice = 0
        self._centers: Tensor | None = None
        self._scatter = torch.zeros(len(self.cluster_classes), dtype=torch.float64)
        self._grouped: tuple[Tensor, Tensor, Tensor] | None = None
        self._asked_at: float | None = None
        self._refreshed_at: float | None = None
        self._labels_digest = hashlib.sha256(labels.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        """The number of clusters K, empty ones included."""
        return len(self.cluster_classes)

    @property
    def count(self) -> int:
        """The number of clustered examples: all but the ignored ones."""
        return len(self._order)

    @property
    def centers(self) -> Tensor:
        """(K, D) fp32 means of the clusters; RuntimeError before the first refresh."""
        if self._centers is None:
            raise RuntimeError("the index has no clusters yet: call refresh(embeddings) first")
        return self._centers

    @property
    def variance(self) -> float:
        """sum |r - mu_own|^2 / max(n - 1, 1), squared units of the embedding; RuntimeError before the first refresh."""
        _ = self.centers
        return float(self._scatter.sum()) / max(self.count - 1, 1)

    def due(self, step: float) -> bool:
        """Whether a refresh is due at this step: there was none yet, or the last was ``every`` steps ago or more.

        A refresh is dated by the last call of this method, so call it before each refresh.

        Args:
            step: the current step or epoch, in the unit of ``every``.
        """
        self._asked_at = step
        if self._centers is None:
            return True
        return self.every is not None and (self._refreshed_at is None or step - self._refreshed_at >= self.every)

    def refresh(self, embeddings: Embeddings, *, whole: bool = False, progress: Progress = None) -> RefreshReport:
        """Cluster the next slice of the classes again, or all of them (the first time, or with ``whole``).

        After an error the index is as it was.

        Args:
            embeddings: (n, D) of a floating dtype, on the CPU (may be memory-mapped) or CUDA, read in blocks and
                clustered as fp32 (subtract the mean first where fp64 vectors lie far from the origin); or a function
                that takes (b,) int64 indices, b <= block_examples, and returns their (b, D) embeddings. It is called
                without gradients, on whole classes in the order of their labels. The caller decides whether the model
                is in eval mode.
            whole: cluster all classes.
            progress: called with the number of examples just finished; True: a tqdm bar.

        Returns:
            What the refresh did.

        Raises:
            TypeError: not a floating point tensor.
            ValueError: a wrong shape, a different D than the other slices have, or NaN, infinite or too large (1e15)
                values.
        """
        started = time.perf_counter()
        source = Source(embeddings, len(self.clusters), self.normalize)
        whole = check_flag("whole", whole) or self._centers is None
        first, last = (0, len(self._class_sizes)) if whole else self._slices[self._next_slice]
        work = Reclustering(self, source, None if whole else self._centers)
        mine = self._order[self._first_example[first] : self._first_example[last]]
        with torch.no_grad(), reporter(progress, len(mine), "clusters", "examples") as advance:
            for group in self._groups(first, last):
                work.cluster(*group, advance)
        # The index has not changed so far; from here on nothing can fail.
        moved = float((work.clusters[mine] != self.clusters[mine]).double().mean())
        self.clusters, self._centers, self.sizes, self._scatter = work.clusters, work.centers, work.sizes, work.scatter
        self._next_slice = 0 if whole else (self._next_slice + 1) % len(self._slices)
        self._refreshed_at = self._asked_at
        self.refreshes += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        empty = int((self.sizes == 0).sum())
        return RefreshReport(
            seconds=seconds,
            embed_seconds=source.seconds,
            kmeans_seconds=work.kmeans_seconds,
            examples=len(mine),
            classes=last - first,
            moved=moved,
            filled=work.filled,
            empty=empty,
            variance=self.variance,
        )

    def members(self, cluster: int) -> Tensor:
        """The indices of the examples of a cluster, ascending, (sizes[cluster],) int64."""
        rows, starts = self.grouped()
        cluster = self._check_id(cluster)
        return rows[starts[cluster] : starts[cluster + 1]]

    def grouped(self) -> tuple[Tensor, Tensor]:
        """All clustered examples by cluster, (n,) int64, and where those of each cluster begin, (K + 1,) int64.

        They are sorted at the first call after a refresh, and kept.
        """
        if self._grouped is None or self._grouped[0] is not self.clusters:
            _ = self.centers  # refreshed?
            rows = self._order[torch.argsort(self.clusters[self._order], stable=True)]
            self._grouped = (self.clusters, rows, _offsets(self.sizes))
        return self._grouped[1:]

    def nearest_impostors(self, cluster: int, count: int) -> Tensor:
        """Find the non-empty clusters of other classes with the nearest centres.

        Distances come from differences, not from products, so that equal centres are equally far. One pass over the
        centres takes O(K D) time and O(K) memory.

        Args:
            cluster: the id of a cluster.
            count: how many clusters to find.

        Returns:
            (<= count,) int64, nearest first, equal distances in the order of the ids; fewer than ``count`` where there
            are not as many.
        """
        cluster, count = self._check_id(cluster), check_integer("count", count, 0)
        here = self.centers[cluster : cluster + 1]
        distance = torch.cdist(here, self.centers, compute_mode="donot_use_mm_for_euclid_dist")[0]
        distance[(self.sizes == 0) | (self.cluster_classes == self.cluster_classes[cluster])] = math.inf
        count = min(count, int(distance.isfinite().sum()))
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        bound = distance.kthvalue(count).values
        near = (distance <= bound).nonzero().squeeze(1)
        return near[torch.argsort(distance[near], stable=True)[:count]]

    def state_dict(self) -> dict[str, Any]:
        """All that a refresh changes, and what identifies the index, as tensors, numbers and strings."""
        return {
            "format": STATE_FORMAT,
            "labels": self._labels_digest,
            "normalize": self.normalize,
            "clusters": self.clusters,
            "cluster_classes": self.cluster_classes,
            "centers": self._centers,
            "sizes": self.sizes,
            "scatter": self._scatter,
            "next_slice": self._next_slice,
            "slices": len(self._slices),
            "asked_at": self._asked_at,
            "refreshed_at": self._refreshed_at,
            "refreshes": self.refreshes,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of an index with the same labels and settings. After an error the index is as it was.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ValueError: the state does not fit, or is damaged.
        """
        own = self.state_dict()
        missing = own.keys() - state.keys()
        if missing or state["format"] != STATE_FORMAT:
            raise ValueError(
                f"not a state of this version's ClusterIndex: format {state.get('format')}, missing {missing}"
            )
        if state["labels"] != self._labels_digest:
            raise ValueError("the state is of other labels: make the index with the labels it was saved with, in order")
        state = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
        classes = state["cluster_classes"]
        integers = isinstance(classes, Tensor) and classes.dtype == torch.int64
        if not integers or not torch.equal(classes, self.cluster_classes) or state["normalize"] != self.normalize:
            raise ValueError(
                f"the state has {len(classes) if integers else 'no'} clusters and normalize={state['normalize']}, the "
                f"index {len(self)} and {self.normalize}: make it with the settings it was saved with"
            )
        self._check_state(state, own)
        self.clusters, self.sizes, self._scatter = (state[name].clone() for name in ("clusters", "sizes", "scatter"))
        self._centers = None if state["centers"] is None else state["centers"].clone()
        # If the slices are cut differently, begin with the first.
        self._next_slice = state["next_slice"] if state["slices"] == len(self._slices) else 0
        self._asked_at, self._refreshed_at = state["asked_at"], state["refreshed_at"]
        self.refreshes, self.seconds = state["refreshes"], state["seconds"]

    def _check_state(self, state: dict[str, Any], own: dict[str, Any]) -> None:
        """Raise ValueError unless the parts of a state fit together.

        Either each example is in a cluster of its class, or none is in a cluster.
        """
        count, clusters, centers = len(self), state["clusters"], state["centers"]
        times = {name: state[name] for name in ("asked_at", "refreshed_at")}
        if isinstance(centers, Tensor) and centers.dim() == 2:
            own = {**own, "centers": torch.empty(count, centers.shape[1])}  # of any D
        try:
            check_like("state", state, {**own, **times})
            if centers is None:
                bad = bool((clusters != -1).any())
            else:
                mine = clusters[self._order]
                places = torch.arange(len(self._class_sizes)).repeat_interleave(self._class_sizes)
                bad = bool(((mine < self._first_cluster[places]) | (mine >= self._first_cluster[places + 1])).any())
                bad = bad or not torch.equal(torch.bincount(mine, minlength=count), state["sizes"])
            if bad or bool((state["scatter"] < 0).any()):
                raise ValueError("an example is in a cluster of another class, or a size or scatter is wrong")
            check_count("slices", state["slices"], 1, 1 << 62)
            check_count("next_slice", state["next_slice"], 0, state["slices"] - 1)
            check_count("refreshes", state["refreshes"], 0 if centers is None else 1, 1 << 62)
            for name, step in times.items():
                if step is not None and not (isinstance(step, (int, float)) and math.isfinite(step)):
                    raise ValueError(f"{name} must be a finite number or None; got {step!r}")
        except ValueError as error:
            parts = "its clusters, sizes and centers do not belong together"
            raise ValueError(f"the state is damaged, or {parts}: {error}") from error

    def _check_id(self, cluster: int) -> int:
        cluster = check_integer("cluster", cluster)
        if not 0 <= cluster < len(self):
            raise ValueError(f"cluster {cluster} is out of range: there are {len(self)}")
        return cluster

    def _cut(self, slices: int) -> list[tuple[int, int]]:
        """The classes in at most ``slices`` runs [first, last) of about equally many examples."""
        middle = (self._first_example[:-1] + self._first_example[1:]) // 2
        owner = middle * slices // len(self._order)
        _, runs = torch.unique_consecutive(owner, return_counts=True)
        ends = runs.cumsum(0).tolist()
        return list(zip([0, *ends], ends))

    def _groups(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Runs [first, last) of whole classes of at most ``block_examples`` examples together; a larger class alone."""
        while first < last:
            limit = self._first_example[first] + self.block_examples
            end = int(torch.searchsorted(self._first_example, limit, right=True)) - 1
            end = min(max(end, first + 1), last)
            yield first, end
            first = end


def _offsets(counts: Tensor) -> Tensor:
    """Where each run begins, and where the last one ends: (len + 1,)."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _check_labels(labels: Any) -> Tensor:
    values = integers_by_position("labels", labels, names=True)
    if values.dim() != 1:
        raise ValueError(f"labels must have shape (n,), one for each example; got {tuple(values.shape)}")
    return values.cpu()

"""Classification by the nearest vectors, streamed: soft k nearest clusters (kNC) and k nearest neighbours (kNN).

kNC is Magnet's own rule (Rippel et al. 2016, arXiv 1511.05939, eq. 8). With mu_1 ... mu_k the k cluster centres nearest
to an embedding r and sigma^2 the variance of the embeddings about their centres,

    p(c | r) = sum_{l: class(mu_l) = c} exp(-|r - mu_l|^2 / 2 sigma^2) / sum_l exp(-|r - mu_l|^2 / 2 sigma^2)

kNN is the majority vote: p(c | r) is the share of the k references nearest to r that are of class c.

Both find the k nearest as retrieval does (``streaming``). kNC keeps its weights in log space and computes their
distances again in fp64 from differences, so that an embedding far from every centre, where each exponential is 0, still
has a class and finite log-probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.checks import check_flag, check_integer, check_positive, check_tensor
from ..progress import Progress, reporter
from . import streaming
from .streaming import GallerySearch

__all__ = ["Classification", "k_nearest_clusters", "k_nearest_neighbours"]

NO_CLASS = -100  # fills `classes` where fewer classes than requested are among the k nearest
LARGEST = 1e35  # far beyond it distances overflow fp32, in which they are ranked


@dataclass(frozen=True)
class Classification:
    """The most probable classes of N embeddings, best first.

    An embedding with fewer than ``top`` classes among its k nearest has -100 and -inf in the remaining places.

    Attributes:
        classes: (N, top) int64.
        log_probabilities: (N, top) fp32.
    """

    classes: Tensor
    log_probabilities: Tensor

    @property
    def predictions(self) -> Tensor:
        """The most probable class of each embedding, (N,) int64."""
        return self.classes[:, 0]

    def error(self, labels: Tensor, top: int = 1) -> float:
        """The fraction of the embeddings whose label is not among their ``top`` most probable classes.

        Args:
            labels: (N,) integers.
            top: from 1 to the number of classes kept.

        Raises:
            ValueError: labels of another shape, or ``top`` out of range.
            TypeError: labels that are not integers.
        """
        count, kept = self.classes.shape
        labels = streaming.check_integers("labels", labels, count, self.classes.device)
        top = check_integer("top", top)
        if not 1 <= top <= kept:
            raise ValueError(f"top={top} is out of range: {kept} classes are kept for each embedding")
        answers = self.log_probabilities[:, :top] > -math.inf
        right = ((self.classes[:, :top] == labels[:, None]) & answers).any(dim=1)
        return 1.0 - right.double().mean().item()


def k_nearest_clusters(
    embeddings: Tensor,
    centers: Tensor,
    center_classes: Tensor,
    *,
    variance: float | Tensor,
    k: int = 128,
    top: int = 1,
    normalize: bool = False,
    empty: Tensor | None = None,
    ignore_index: int = -100,
    tile: tuple[int, int] | None = None,
    progress: Progress = None,
) -> Classification:
    """Classify by the soft vote of the k nearest clusters (kNC; formula at the top of the module).

    Extra memory: O(N + K D), and about 28 bytes per entry of a tile (100 where k exceeds the width of the tile).

    Args:
        embeddings: (N, D) floating point, CPU or CUDA.
        centers: (K, D) cluster centres, on the same device; the centre of an empty cluster may hold anything, including
            NaN.
        center_classes: (K,) integers: the class of each cluster.
        variance: sigma^2 > 0, a number or a tensor of one element: sum |r - mu_own|^2 / (n - 1) over the training set,
            summed over all dimensions.
        k: how many clusters vote; all of them where there are fewer. At the k-th place, equal distances (in fp32) go to
            the cluster of lowest index.
        top: how many classes to keep for each embedding.
        normalize: divide the embeddings by their norm first, for centres that are means of unit vectors; the centres
            are used as they are.
        empty: (K,) bool, True for clusters to leave out.
        ignore_index: clusters of this class are left out too.
        tile: as in :func:`evaluate`.
        progress: called with the number of embeddings just finished; True: a tqdm bar.

    Returns:
        The ``top`` classes of each embedding; classes of equal probability (in fp32) rank lowest first.

    Raises:
        ValueError: wrong shapes, an empty set, k or top under 1, NaN, infinity or values over 1e35, a variance that is
            not a positive number, or every cluster left out.
        TypeError: wrong dtypes.
    """
    normalize, ignore_index = check_flag("normalize", normalize), check_integer("ignore_index", ignore_index)
    centers, center_classes = _without_empty(centers, center_classes, empty, ignore_index)
    sigma2 = _check_variance(variance)
    names = ("centers", "center_classes")
    problem = streaming.check(
        embeddings, None, centers, center_classes, None, "euclidean", tile, names=names, unit_queries=normalize
    )
    for name, vectors in (("embeddings", embeddings), ("centers", centers)):
        if max(abs(end.item()) for end in torch.aminmax(vectors)) > LARGEST:
            raise ValueError(f"{name} holds values beyond {LARGEST:g}: distances overflow")
    k = min(check_integer("k", k, 1), len(centers))
    out = _new_result(problem, check_integer("top", top, 1))
    with reporter(progress, len(embeddings), "classification", "embeddings") as report:
        for rows, _, found in streaming.stream_all(problem, k):
            squared = _squared_distances(problem, rows, found)
            # The smallest is subtracted before the division: the nearest then has weight 1, however small sigma^2 is.
            logits = (squared.amin(dim=1, keepdim=True) - squared) / (2 * sigma2)
            groups = _Groups(problem.gallery_labels[found])
            scores = groups.logsumexp(logits) - torch.logsumexp(logits, dim=1, keepdim=True)
            groups.keep_best(out, rows, scores.float(), scores.float())
            report(len(rows))
    return out


def k_nearest_neighbours(
    embeddings: Tensor,
    ref_embeddings: Tensor,
    ref_labels: Tensor,
    *,
    k: int = 1,
    top: int = 1,
    exclude: Tensor | None = None,
    metric: str = "cosine",
    tile: tuple[int, int] | None = None,
    progress: Progress = None,
) -> Classification:
    """Classify by majority vote of the k nearest neighbours; a tied vote goes to the class with the nearest member.

    The memory is that of :func:`k_nearest_clusters`.

    Args:
        embeddings: (N, D) floating point, CPU or CUDA.
        ref_embeddings: (M, D) references, on the same device.
        ref_labels: (M,) integers: the classes of the references.
        k: how many neighbours vote; all of them where there are fewer.
        top: how many classes to keep for each embedding.
        exclude: (N,) int64: the index of a reference that is left out for each embedding, -1 for none. Where the
            references are the embeddings, ``arange(N)`` leaves out each embedding's own copy.
        metric: ``cosine``, ``dot`` or ``euclidean``; references at equal distance (in fp32) rank by lowest index.
        tile: as in :func:`evaluate`.
        progress: called with the number of embeddings just finished; True: a tqdm bar.

    Returns:
        The ``top`` classes of each embedding; log_probabilities are the logarithms of the shares of the vote.

    Raises:
        ValueError: wrong shapes, an empty set, k or top under 1, NaN or infinity, an unknown metric, or no reference
            left for an embedding.
        TypeError: wrong dtypes.
    """
    names = ("ref_embeddings", "ref_labels")
    streaming.check_vectors(names[0], ref_embeddings)
    problem = streaming.check(embeddings, None, ref_embeddings, ref_labels, exclude, metric, tile, names=names)
    if problem.reachable < 1:
        raise ValueError("exclude leaves an embedding without any reference")
    k = min(check_integer("k", k, 1), problem.reachable)
    out = _new_result(problem, check_integer("top", top, 1))
    with reporter(progress, len(embeddings), "classification", "embeddings") as report:
        for rows, _, found in streaming.stream_all(problem, k):
            groups = _Groups(problem.gallery_labels[found])
            votes, first = groups.counts(), groups.first_places()
            groups.keep_best(out, rows, votes * (k + 1) - first, (votes / k).log())
            report(len(rows))
    return out


class _Groups:
    """The neighbours (n, k) of each row, grouped by class; group g of a row is its g-th class in ascending order."""

    def __init__(self, classes: Tensor) -> None:
        self.order = classes.argsort(dim=1, stable=True)  # by class, and nearest first within one
        ordered = classes.gather(1, self.order)
        new = torch.ones_like(ordered)
        new[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).long()
        self.group = new.cumsum(dim=1) - 1
        self.classes = torch.full_like(ordered, NO_CLASS).scatter_(1, self.group, ordered)

    def logsumexp(self, logits: Tensor) -> Tensor:
        """The log-sum-exp of (n, k) finite or -inf logits over each group, -inf where there is no group."""
        ordered = logits.gather(1, self.order)
        peak = torch.full_like(ordered, -math.inf).scatter_reduce(1, self.group, ordered, "amax")
        own_peak = peak.gather(1, self.group)
        weight = torch.where(own_peak > -math.inf, (ordered - own_peak).exp(), 0.0)
        return torch.zeros_like(ordered).scatter_add_(1, self.group, weight).log() + peak

    def counts(self) -> Tensor:
        """How many neighbours each group has."""
        return torch.zeros_like(self.group).scatter_add_(1, self.group, torch.ones_like(self.group))

    def first_places(self) -> Tensor:
        """The place of the nearest member of each group, k where there is no group."""
        depth = self.group.shape[1]
        return torch.full_like(self.group, depth).scatter_reduce(1, self.group, self.order, "amin")

    def keep_best(self, out: Classification, rows: Tensor, rank: Tensor, log_probabilities: Tensor) -> None:
        """Store the groups of largest rank, the lowest class among equals."""
        # The sort is stable: places without a class rank last, even after a class whose score underflowed to -inf.
        best = rank.argsort(dim=1, descending=True, stable=True)[:, : out.classes.shape[1]]
        width = best.shape[1]
        out.classes[rows, :width] = self.classes.gather(1, best)
        out.log_probabilities[rows, :width] = log_probabilities.gather(1, best).float()


def _squared_distances(problem: GallerySearch, rows: Tensor, found: Tensor) -> Tensor:
    """|r - mu|^2 for the centres found for each row, (n, k) fp64, from differences, a tile of entries at a time."""
    queries = problem.queries_of(rows)
    squared = torch.empty(found.shape, dtype=torch.float64, device=found.device)
    width = max(1, problem.tile[0] * problem.tile[1] // queries.numel())
    for start in range(0, found.shape[1], width):
        part = found[:, start : start + width]
        centers = problem.gallery[part].double()
        squared[:, start : start + width] = (centers - queries[:, None]).square_().sum(dim=2)
    return squared


def _new_result(problem: GallerySearch, top: int) -> Classification:
    shape, device = (len(problem.queries), top), problem.queries.device
    return Classification(
        torch.full(shape, NO_CLASS, dtype=torch.int64, device=device), torch.full(shape, -math.inf, device=device)
    )


def _without_empty(
    centers: Tensor, center_classes: Tensor, empty: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The centres (which the caller checks for NaN) and classes of the clusters that are not left out."""
    check_tensor("centers", centers)
    if centers.dim() != 2:
        raise ValueError(f"centers must be a (clusters, dimensions) tensor; got {_shape_of(centers)}")
    center_classes = streaming.check_integers("center_classes", center_classes, len(centers), centers.device)
    keep = center_classes != ignore_index
    if empty is not None:
        if not isinstance(empty, Tensor) or empty.dtype != torch.bool:
            raise TypeError(f"empty must be a bool tensor; got {getattr(empty, 'dtype', type(empty))}")
        if empty.shape != center_classes.shape:
            raise ValueError(f"empty must have shape ({len(centers)},), one for each cluster; got {_shape_of(empty)}")
        keep &= ~empty.to(keep.device)
    if not bool(keep.any()):
        raise ValueError("no cluster is left: all are empty or ignored")
    return (centers, center_classes) if bool(keep.all()) else (centers[keep], center_classes[keep])


def _shape_of(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"


def _check_variance(variance: float | Tensor) -> float:
    if isinstance(variance, Tensor):
        if variance.numel() != 1:
            raise ValueError(f"variance must be one number; got {_shape_of(variance)}")
        return check_positive("variance", variance.detach().reshape(()))
    return check_positive("variance", variance)

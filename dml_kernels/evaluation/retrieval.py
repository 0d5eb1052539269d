"""Retrieval metrics, streamed: Recall@K, R-precision, MAP@R and MRR without an N x M matrix.

For a query i, let R_i be the number of gallery entries of its class (without the query itself), and let rel_i(j) be 1
if its j-th nearest gallery entry is of its class, else 0. Every metric is a mean over the queries with R_i > 0:

    Recall@k_i      1 if any of rel_i(1) ... rel_i(k) is 1, else 0      (Jegou et al., 2011; as used on CUB, SOP)
    R-precision_i   (1 / R_i) sum_{j <= R_i} rel_i(j)
    MAP@R_i         (1 / R_i) sum_{j <= R_i} rel_i(j) P_i(j),   P_i(j) = (1 / j) sum_{l <= j} rel_i(l)
    MRR_i           1 / min {j : rel_i(j) = 1}, over the whole ranking

Precision@1 is Recall@1. Musgrave, Belongie and Lim, "A Metric Learning Reality Check", ECCV 2020, arXiv 2003.08505,
motivate R-precision and MAP@R. All are fractions in [0, 1].

The method is that of ``streaming``, where K is the larger of max(k) and the largest R_i of a chunk of queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import check_flag, check_integer, check_sequence
from ..progress import Progress, reporter
from . import streaming
from .clustering import cluster_agreement
from .streaming import GallerySearch

__all__ = ["RetrievalResult", "evaluate", "evaluate_retrieval", "map_at_r", "nearest", "recall_at_k"]

AT_R = ("r_precision", "mean_average_precision_at_r")
CLUSTERED = ("nmi", "ami")
MEASURES = ("precision_at_1", "recall", *AT_R, "mean_reciprocal_rank", *CLUSTERED)


@dataclass(frozen=True)
class RetrievalResult:
    """Metrics of one pass: fractions in [0, 1], means over the queries that counted.

    Attributes:
        recall: k -> Recall@k.
        map_at_r: mean average precision at R.
        r_precision: R-precision.
        queries: how many queries counted.
        skipped: how many queries were left out because the gallery holds no other member of their class.
        precision_at_1: precision@1.
        mean_reciprocal_rank: MRR; None unless it was requested.
    """

    recall: dict[int, float]
    map_at_r: float
    r_precision: float
    queries: int
    skipped: int
    precision_at_1: float
    mean_reciprocal_rank: float | None = None


def evaluate(
    embeddings: Tensor,
    labels: Tensor,
    k: Sequence[int] = (1, 10),
    *,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    exclude: Tensor | None = None,
    metric: str = "cosine",
    reciprocal_rank: bool = False,
    tile: tuple[int, int] | None = None,
    progress: Progress = None,
) -> RetrievalResult:
    """Compute Recall@k for every k, MAP@R and R-precision in one streamed pass (formulas at the top of the module).

    Extra memory: O(N + M), and about 28 bytes per entry of a tile.

    Args:
        embeddings: (N, D) floating point, CPU or CUDA: the queries.
        labels: (N,) integers: their classes.
        k: depths of Recall@k.
        ref_embeddings: (M, D) floating point, on the same device: the gallery. None: the queries are the gallery, and
            each query leaves itself out, by index: an equal vector elsewhere counts.
        ref_labels: (M,) integers: the classes of the gallery; given together with ``ref_embeddings``.
        exclude: (N,) int64: the gallery index that is left out for each query, -1 for none, for a gallery that contains
            the queries. None: no index where a gallery is given, else ``arange(N)``.
        metric: ``cosine``, ``dot``, or ``euclidean``, which is computed from differences, so it is exact but slow; on
            unit vectors it ranks as ``cosine`` does.
        reciprocal_rank: also compute the mean reciprocal rank, exactly at any depth: for queries without a hit among
            the neighbours of the pass, the gallery is read twice more.
        tile: (queries, gallery entries) that are scored at a time; it bounds the memory and does not change the result.
        progress: called with the number of queries just finished; True: a tqdm bar.

    Returns:
        The metrics. A query whose class has no other member in the gallery is left out of every mean and counted in
        ``skipped``.

    Raises:
        ValueError: wrong shapes, an empty set, k out of [1, reachable gallery], NaN or infinite embeddings, an unknown
            metric, or no query with a positive.
        TypeError: wrong dtypes.
    """
    reciprocal_rank = check_flag("reciprocal_rank", reciprocal_rank)
    problem = _check(embeddings, labels, ref_embeddings, ref_labels, exclude, metric, tile)
    ks = _check_k(k, problem.reachable)
    with reporter(progress, len(labels), "retrieval", "queries") as report:
        return _measure(problem, ks, True, reciprocal_rank, report)


def evaluate_retrieval(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    metrics: Sequence[str] = ("precision_at_1", "recall", *AT_R),
    k: Sequence[int] = (1, 2, 4, 8),
    exclude: Tensor | None = None,
    metric: str = "cosine",
    clusters: int | None = None,
    seed: int = 0,
    tile: tuple[int, int] | None = None,
    progress: Progress = None,
) -> dict[str, float]:
    """Compute the requested metrics in a flat dictionary: {"precision_at_1": ..., "recall_at_8": ..., "queries": ...}.

    The memory is that of :func:`evaluate`.

    Args:
        embeddings, labels, k, exclude, metric, tile, progress: as in :func:`evaluate`.
        gallery, gallery_labels: what :func:`evaluate` calls ref_embeddings and ref_labels.
        metrics: names out of ``precision_at_1``, ``recall`` (gives ``recall_at_k`` for every k), ``r_precision``,
            ``mean_average_precision_at_r``, ``mean_reciprocal_rank``, ``nmi``, ``ami``. Without the two metrics at R,
            only max(k) neighbours are searched, however large the classes are.
        clusters: the number of clusters of the k-means behind nmi and ami (:func:`cluster_agreement`), which use only
            the queries, as unit vectors where ``metric`` is ``cosine``.
        seed: of that k-means.

    Returns:
        The metrics by name; "queries" and "skipped" count the queries in the means, and those whose class the gallery
        lacks.

    Raises:
        ValueError, TypeError: as :func:`evaluate`; ValueError also for an unknown name.
        ImportError: nmi or ami is requested, and faiss or scikit-learn is missing.
    """
    unknown = [str(name) for name in check_sequence("metrics", metrics, "names") if name not in MEASURES]
    if unknown or not metrics:
        raise ValueError(f"metrics must be some of {', '.join(MEASURES)}; got {', '.join(unknown) or 'none'}")
    seed = check_integer("seed", seed, 0)
    clusters = None if clusters is None else check_integer("clusters", clusters, 1)
    problem = _check(embeddings, labels, gallery, gallery_labels, exclude, metric, tile)
    found: dict[str, float] = {}
    if set(metrics) - set(CLUSTERED):
        ks = _check_k(k, problem.reachable) if "recall" in metrics else _check_k((1,), problem.reachable)
        with reporter(progress, len(labels), "retrieval", "queries") as report:
            at_r, reciprocal = bool(set(AT_R) & set(metrics)), "mean_reciprocal_rank" in metrics
            result = _measure(problem, ks, at_r, reciprocal, report)
        values = {
            "precision_at_1": result.precision_at_1,
            "r_precision": result.r_precision,
            "mean_average_precision_at_r": result.map_at_r,
            "mean_reciprocal_rank": result.mean_reciprocal_rank,
        }
        for name in metrics:
            if name == "recall":
                found.update({f"recall_at_{depth}": value for depth, value in result.recall.items()})
            elif (value := values.get(name)) is not None:
                found[name] = value
        found.update(queries=result.queries, skipped=result.skipped)
    if set(metrics) & set(CLUSTERED):
        normalize, adjusted = metric == "cosine", "ami" in metrics
        agreement = cluster_agreement(
            embeddings, labels, clusters=clusters, seed=seed, normalize=normalize, adjusted=adjusted
        )
        found.update({name: getattr(agreement, name) for name in CLUSTERED if name in metrics})
    return found


def _measure(
    problem: GallerySearch, ks: tuple[int, ...], at_r: bool, reciprocal: bool, report: Callable[[int], object]
) -> RetrievalResult:
    """Pass over the queries once. Without at_r, max(ks) neighbours are enough, and the two metrics at R are NaN."""
    positives = _count_positives(problem)
    counted = positives > 0
    if not bool(counted.any()):
        raise ValueError("no query has another member of its class in the gallery: nothing to evaluate")

    device, unseen = problem.queries.device, torch.iinfo(torch.int64).max
    first_hit = torch.full((len(positives),), unseen, device=device)
    average_precision = torch.full((len(positives),), math.nan, dtype=torch.float64, device=device)
    r_precision = average_precision.clone()
    # Queries with similar R share a chunk, so that one large class does not widen the top-K of all chunks.
    order = torch.argsort(positives, stable=True)
    order = order[counted[order]]
    skipped = len(positives) - len(order)
    if skipped:
        report(skipped)
    wanted = positives.clamp(min=max(ks)) if at_r else torch.full_like(positives, max(ks))
    for rows, _, found in streaming.stream(problem, order, wanted):
        relevant = problem.gallery_labels[found] == problem.labels[rows, None]
        depth = torch.arange(1, found.shape[1] + 1, device=device)
        first_hit[rows] = torch.where(relevant, depth, unseen).amin(dim=1)
        if at_r:
            within_r = relevant & (depth <= positives[rows, None])
            hits = within_r.cumsum(dim=1, dtype=torch.float64)
            average_precision[rows] = (within_r * hits / depth).sum(dim=1) / positives[rows]
            r_precision[rows] = hits[:, -1] / positives[rows]
        if reciprocal:
            missed = rows[first_hit[rows] == unseen]
            if len(missed):
                first_hit[missed] = streaming.first_ranks(problem, missed)
        report(len(rows))

    first_hit = first_hit[counted]
    return RetrievalResult(
        recall={depth: (first_hit <= depth).double().mean().item() for depth in ks},
        map_at_r=average_precision[counted].mean().item(),
        r_precision=r_precision[counted].mean().item(),
        queries=len(order),
        skipped=skipped,
        precision_at_1=(first_hit <= 1).double().mean().item(),
        mean_reciprocal_rank=first_hit.double().reciprocal().mean().item() if reciprocal else None,
    )


def recall_at_k(
    embeddings: Tensor,
    labels: Tensor,
    k: Sequence[int] = (1, 10),
    *,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    **options: Any,
) -> dict[int, float]:
    """Compute Recall@k: the fraction of queries with a member of their class among their k nearest.

    :func:`evaluate` computes MAP@R in the same pass; here only max(k) neighbours are searched, not R.

    Args:
        embeddings, labels, k, ref_embeddings, ref_labels: as in :func:`evaluate`.
        options: ``exclude``, ``metric``, ``tile`` and ``progress`` of :func:`evaluate`.

    Returns:
        k -> Recall@k.

    Raises:
        ValueError, TypeError: as :func:`evaluate`.
    """
    found = evaluate_retrieval(embeddings, labels, ref_embeddings, ref_labels, metrics=("recall",), k=k, **options)
    return {int(depth): found[f"recall_at_{int(depth)}"] for depth in k}


def map_at_r(embeddings: Tensor, labels: Tensor, **options: Any) -> float:
    """Compute MAP@R, the mean average precision at R (Musgrave et al. 2020, arXiv 2003.08505; formula at the top).

    :func:`evaluate` computes Recall@k in the same pass.

    Args:
        embeddings, labels: as in :func:`evaluate`.
        options: further arguments of :func:`evaluate`, apart from ``k``.

    Raises:
        ValueError, TypeError: as :func:`evaluate`.
    """
    return evaluate(embeddings, labels, (1,), **options).map_at_r


def nearest(
    embeddings: Tensor,
    k: int,
    *,
    ref_embeddings: Tensor | None = None,
    exclude: Tensor | None = None,
    metric: str = "cosine",
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k nearest gallery entries of each query; equal scores rank by lowest index.

    Args:
        embeddings, ref_embeddings, exclude, metric, tile: as in :func:`evaluate`.
        k: how many entries to find.

    Returns:
        (scores, indices): (N, k) fp32 and (N, k) int64, nearest first. The score is the cosine, the dot product, or
        minus the Euclidean distance.

    Raises:
        ValueError, TypeError: as :func:`evaluate`.
    """
    problem = streaming.check(embeddings, None, ref_embeddings, None, exclude, metric, tile)
    (k,) = _check_k((check_integer("k", k),), problem.reachable)
    count, device = len(problem.queries), problem.queries.device
    scores = torch.empty(count, k, device=device)
    indices = torch.empty(count, k, dtype=torch.int64, device=device)
    for rows, score, found in streaming.stream_all(problem, k):
        scores[rows], indices[rows] = score, found
    return scores, indices


def _check(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    exclude: Tensor | None,
    metric: str,
    tile: tuple[int, int] | None,
) -> GallerySearch:
    if (ref_embeddings is None) != (ref_labels is None):
        raise ValueError("ref_embeddings and ref_labels belong together: give both or neither")
    return streaming.check(embeddings, labels, ref_embeddings, ref_labels, exclude, metric, tile)


def _count_positives(problem: GallerySearch) -> Tensor:
    """R of each query, (N,) int64: the gallery entries of its class, without an excluded one of the class."""
    classes, counts = torch.unique(problem.gallery_labels, return_counts=True)
    place = torch.searchsorted(classes, problem.labels).clamp(max=len(classes) - 1)
    positives = torch.where(classes[place] == problem.labels, counts[place], 0)
    own_class = problem.gallery_labels[problem.exclude.clamp(min=0)] == problem.labels
    return positives - ((problem.exclude >= 0) & own_class).long()


def _check_k(k: Sequence[int], reachable: int) -> tuple[int, ...]:
    ks = streaming.check_depths("k", k)
    for depth in ks:
        if not 1 <= depth <= reachable:
            raise ValueError(f"k={depth} is out of range: each query has {reachable} gallery entries to be ranked")
    return ks

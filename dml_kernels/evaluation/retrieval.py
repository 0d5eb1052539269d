"""Retrieval metrics, streamed: Recall@K, R-precision and MAP@R without an N x M matrix.

For a query i let R_i be the number of gallery entries of its class (itself left out) and rel_i(j) be 1 when its j-th
nearest gallery entry is of its class, else 0. Every metric is a mean over the queries with R_i > 0:

    Recall@k_i      1 if any of rel_i(1) ... rel_i(k) is 1, else 0      (Jegou et al., 2011; as used on CUB, SOP)
    R-precision_i   (1 / R_i) sum_{j <= R_i} rel_i(j)
    MAP@R_i         (1 / R_i) sum_{j <= R_i} rel_i(j) P_i(j),   P_i(j) = (1 / j) sum_{l <= j} rel_i(l)

MAP@R and its motive are in Musgrave, Belongie and Lim, "A Metric Learning Reality Check", ECCV 2020, arXiv 2003.08505.
All are fractions in [0, 1].

Method: `streaming`, with K the larger of max(k) and the largest R_i of a chunk of queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import streaming
from .streaming import Problem

__all__ = ["RetrievalResult", "evaluate", "map_at_r", "nearest", "recall_at_k"]


@dataclass(frozen=True)
class RetrievalResult:
    """Metrics of one pass: fractions in [0, 1], means over `queries`.

    recall: k -> Recall@k. queries: how many counted. skipped: how many were left out because the gallery
    holds no other member of their class.
    """

    recall: dict[int, float]
    map_at_r: float
    r_precision: float
    queries: int
    skipped: int


def evaluate(
    embeddings: Tensor,
    labels: Tensor,
    k: Sequence[int] = (1, 10),
    *,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    exclude: Tensor | None = None,
    metric: str = "cosine",
    tile: tuple[int, int] | None = None,
    progress: Callable[[int], object] | None = None,
) -> RetrievalResult:
    """Recall@k for every k, MAP@R and R-precision in one streamed pass (formulas at the top of the module).

    embeddings      (N, D) floating point, CPU or CUDA: the queries
    labels          (N,) integers: their classes
    ref_embeddings  (M, D) gallery with `ref_labels` (M,), on the same device; both or neither. Without them the
                    queries are the gallery and each leaves itself out, by index: an equal vector elsewhere counts.
    exclude         (N,) int64 gallery index left out for each query, -1 for none; for a gallery that holds
                    the queries too. Default: none with a gallery of its own, arange(N) without.
    metric          "cosine"; "dot"; or "euclidean" (nearest first; differences taken directly: exact, slow;
                    on unit vectors it ranks as "cosine" does)
    tile            (queries, gallery entries) scored at a time; bounds the memory, does not change the result
    progress        called with the number of queries just finished

    Returns a RetrievalResult. A query whose class has no other member in the gallery is left out of every
    mean and counted in `skipped`. Extra memory: O(N + M), and per tile about 28 bytes an entry.

    Raises ValueError for wrong shapes, an empty set, k out of [1, reachable gallery], NaN or infinite
    embeddings, an unknown metric, or when no query has a positive; TypeError for wrong dtypes.
    """
    if (ref_embeddings is None) != (ref_labels is None):
        raise ValueError("ref_embeddings and ref_labels belong together: give both or neither")
    problem = streaming.check(embeddings, labels, ref_embeddings, ref_labels, exclude, metric, tile)
    ks = _check_k(k, problem.reachable)
    positives = _count_positives(problem)
    counted = positives > 0
    if not bool(counted.any()):
        raise ValueError("no query has another member of its class in the gallery: nothing to evaluate")

    device = problem.queries.device
    first_hit = torch.full((len(positives),), torch.iinfo(torch.int64).max, device=device)
    average_precision = torch.zeros(len(positives), dtype=torch.float64, device=device)
    r_precision = torch.zeros_like(average_precision)
    # Queries with like R share a chunk, so that one large class does not widen everybody's top-K.
    order = torch.argsort(positives, stable=True)
    order = order[counted[order]]
    skipped = len(positives) - len(order)
    if progress and skipped:
        progress(skipped)
    for rows, _, found in streaming.stream(problem, order, positives.clamp(min=max(ks))):
        relevant = problem.gallery_labels[found] == problem.labels[rows, None]
        depth = torch.arange(1, found.shape[1] + 1, device=device)
        hit_depth = torch.where(relevant, depth, torch.iinfo(torch.int64).max)
        first_hit[rows] = hit_depth.amin(dim=1)
        within_r = relevant & (depth <= positives[rows, None])
        hits = within_r.cumsum(dim=1, dtype=torch.float64)
        average_precision[rows] = (within_r * hits / depth).sum(dim=1) / positives[rows]
        r_precision[rows] = hits[:, -1] / positives[rows]
        if progress:
            progress(len(rows))

    first_hit, average_precision = first_hit[counted], average_precision[counted]
    return RetrievalResult(
        recall={depth: (first_hit <= depth).double().mean().item() for depth in ks},
        map_at_r=average_precision.mean().item(),
        r_precision=r_precision[counted].mean().item(),
        queries=len(order),
        skipped=skipped,
    )


def recall_at_k(embeddings: Tensor, labels: Tensor, k: Sequence[int] = (1, 10), **options: Any) -> dict[int, float]:
    """k -> Recall@k: the fraction of queries with a member of their class among their k nearest.

    Arguments and errors as `evaluate`, which gives MAP@R in the same pass.
    """
    return evaluate(embeddings, labels, k, **options).recall


def map_at_r(embeddings: Tensor, labels: Tensor, **options: Any) -> float:
    """Mean average precision at R, Musgrave et al. 2020, arXiv 2003.08505 (formula at the top of the module).

    Arguments and errors as `evaluate`, which gives Recall@k in the same pass.
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
    """The k nearest gallery entries of each query: (scores, indices), (N, k) fp32 and int64, nearest first.

    Score: the cosine, the dot product, or minus the Euclidean distance; equal scores rank by lowest index.
    Arguments and errors as `evaluate`.
    """
    problem = streaming.check(embeddings, None, ref_embeddings, None, exclude, metric, tile)
    (k,) = _check_k((k,), problem.reachable)
    count, device = len(problem.queries), problem.queries.device
    scores = torch.empty(count, k, device=device)
    indices = torch.empty(count, k, dtype=torch.int64, device=device)
    for rows, score, found in streaming.stream_all(problem, k):
        scores[rows], indices[rows] = score, found
    return scores, indices


def _count_positives(problem: Problem) -> Tensor:
    """R of each query, (N,) int64: gallery entries of its class, less the excluded one where it is of that class."""
    classes, counts = torch.unique(problem.gallery_labels, return_counts=True)
    place = torch.searchsorted(classes, problem.labels).clamp(max=len(classes) - 1)
    positives = torch.where(classes[place] == problem.labels, counts[place], 0)
    own_class = problem.gallery_labels[problem.exclude.clamp(min=0)] == problem.labels
    return positives - ((problem.exclude >= 0) & own_class).long()


def _check_k(k: Sequence[int], reachable: int) -> tuple[int, ...]:
    ks = tuple(int(depth) for depth in k)
    if not ks:
        raise ValueError("k is empty: give at least one depth, such as (1, 10)")
    for depth in ks:
        if not 1 <= depth <= reachable:
            raise ValueError(f"k={depth} is out of range: each query has {reachable} gallery entries to be ranked")
    return ks

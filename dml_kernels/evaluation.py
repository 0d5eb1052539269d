"""Retrieval metrics, streamed: Recall@K, R-precision and MAP@R without an N x M matrix.

For a query i let R_i be the number of gallery entries of its class (itself left out) and rel_i(j) be 1 when
its j-th nearest gallery entry is of its class, else 0. Every metric is a mean over the queries with R_i > 0:

    Recall@k_i      1 if any of rel_i(1) ... rel_i(k) is 1, else 0          (Jegou et al., 2011; as used on
    CUB, SOP) R-precision_i   (1 / R_i) sum_{j <= R_i} rel_i(j)
    MAP@R_i         (1 / R_i) sum_{j <= R_i} rel_i(j) P_i(j),   P_i(j) = (1 / j) sum_{l <= j} rel_i(l)

MAP@R and its motive are in Musgrave, Belongie and Lim, "A Metric Learning Reality Check", ECCV 2020,
arXiv 2003.08505. All are fractions in [0, 1].

Method: chunks of queries against chunks of the gallery, merged into a running top-K where K is the larger of
max(k) and the largest R_i of the chunk. Scores are formed in fp64 and rounded to fp32, then packed with the
gallery index into one int64 key, so that equal scores rank by lowest index and the ranking does not hang on
chunk sizes, thread count or the order in which a vendor's top-k happens to meet equal values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["RetrievalResult", "evaluate", "map_at_r", "nearest", "recall_at_k"]

METRICS = ("cosine", "dot", "euclidean")
# (queries, gallery entries) of a tile. The scores, their fp32 copy and the keys take about 28 bytes an entry.
CPU_TILE = (512, 2048)
CUDA_TILE = (2048, 8192)
LOWEST_KEY = torch.iinfo(torch.int64).min
INDEX_MASK = 0xFFFFFFFF


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


@dataclass(frozen=True)
class _Problem:
    """Checked inputs: queries (N, D), gallery (M, D), their labels, and the index left out for each query."""

    queries: Tensor
    labels: Tensor
    gallery: Tensor
    gallery_labels: Tensor
    exclude: Tensor
    metric: str
    tile: tuple[int, int]

    @property
    def reachable(self) -> int:
        """Gallery entries that every query can be given."""
        return len(self.gallery) - int(bool((self.exclude >= 0).any()))


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
    ref_embeddings  (M, D) gallery with `ref_labels` (M,), on the same device; both or neither. Without them
    the
                    queries are the gallery and each leaves itself out, by index: an equal vector elsewhere
                    counts.
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
    problem = _check(embeddings, labels, ref_embeddings, ref_labels, exclude, metric, tile, need_labels=True)
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
    for rows, _, found in _stream(problem, order, positives.clamp(min=max(ks))):
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
    problem = _check(embeddings, None, ref_embeddings, None, exclude, metric, tile, need_labels=False)
    (k,) = _check_k((k,), problem.reachable)
    count, device = len(problem.queries), problem.queries.device
    scores = torch.empty(count, k, device=device)
    indices = torch.empty(count, k, dtype=torch.int64, device=device)
    everyone = torch.arange(count, device=device)
    for rows, score, found in _stream(problem, everyone, torch.full_like(everyone, k)):
        scores[rows], indices[rows] = score, found
    return scores, indices


def _stream(problem: _Problem, order: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (rows, scores, indices) for chunks of the queries in `order`.

    wanted (N,): how many neighbours each query needs; a chunk gets the most that one of its rows needs.
    """
    query_chunk, ref_chunk = problem.tile
    start = 0
    while start < len(order):
        rows = order[start : start + query_chunk]
        # Running top-K beside the tile: fewer rows where K is large, so that the memory keeps its bound.
        depth = int(wanted[rows].max())
        rows = rows[: max(1, query_chunk * ref_chunk // (ref_chunk + depth))]
        keys = _top_keys(problem, rows, int(wanted[rows].max()))
        yield rows, _score_of(keys), INDEX_MASK - (keys & INDEX_MASK)
        start += len(rows)


def _top_keys(problem: _Problem, rows: Tensor, depth: int) -> Tensor:
    """The `depth` largest keys of each row over the whole gallery, (len(rows), depth) int64, largest
    first.
    """
    queries = _prepare(problem.queries[rows], problem.metric)
    exclude = problem.exclude[rows]
    best: Tensor | None = None
    for start in range(0, len(problem.gallery), problem.tile[1]):
        refs = _prepare(problem.gallery[start : start + problem.tile[1]], problem.metric)
        if problem.metric == "euclidean":
            scores = -torch.cdist(queries, refs, compute_mode="donot_use_mm_for_euclid_dist")
        else:
            scores = queries @ refs.T
        keys = _key_of(scores.float(), start)
        (mine,) = torch.nonzero((exclude >= start) & (exclude < start + len(refs)), as_tuple=True)
        keys[mine, exclude[mine] - start] = LOWEST_KEY | (INDEX_MASK - exclude[mine])
        if best is not None:
            keys = torch.cat([best, keys], dim=1)
        best = keys.topk(min(depth, keys.shape[1]), dim=1).values
    assert best is not None
    return best


def _prepare(vectors: Tensor, metric: str) -> Tensor:
    vectors = vectors.double()
    if metric != "cosine":
        return vectors
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp(min=1e-12)


def _key_of(scores: Tensor, start: int) -> Tensor:
    """One int64 per entry that sorts by score (high 32 bits), then by lowest index (low 32 bits)."""
    # Adding 0 turns -0 into +0. A float's bits sort as an integer's once a negative one's magnitude is
    # flipped.
    bits = (scores + 0.0).view(torch.int32)
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
    index = torch.arange(start, start + scores.shape[1], device=scores.device)
    return bits.long().bitwise_left_shift_(32).bitwise_or_(INDEX_MASK - index)


def _score_of(keys: Tensor) -> Tensor:
    ordered = (keys >> 32).int()
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)


def _count_positives(problem: _Problem) -> Tensor:
    """R of each query, (N,) int64: gallery entries of its class, less the excluded one where it is of that
    class.
    """
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


def _check(
    embeddings: Tensor,
    labels: Tensor | None,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    exclude: Tensor | None,
    metric: str,
    tile: tuple[int, int] | None,
    *,
    need_labels: bool,
) -> _Problem:
    same_set = ref_embeddings is None
    if need_labels and same_set != (ref_labels is None):
        raise ValueError("ref_embeddings and ref_labels belong together: give both or neither")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    _check_vectors("embeddings", embeddings)
    gallery = embeddings if ref_embeddings is None else ref_embeddings
    if not same_set:
        _check_vectors("ref_embeddings", gallery)
    if gallery.shape[1] != embeddings.shape[1] or gallery.device != embeddings.device:
        raise ValueError(
            f"ref_embeddings {tuple(gallery.shape)} on {gallery.device} does not match "
            f"embeddings {tuple(embeddings.shape)} on {embeddings.device}"
        )
    device = embeddings.device
    if tile is None:
        tile = CUDA_TILE if device.type == "cuda" else CPU_TILE
    if len(tile) != 2 or min(tile) < 1:
        raise ValueError(f"tile must be two positive sizes (queries, gallery entries); got {tile}")
    if exclude is not None:
        exclude = _check_integers("exclude", exclude, len(embeddings), device)
        if bool(((exclude < -1) | (exclude >= len(gallery))).any()):
            raise ValueError(f"exclude must hold -1 or an index under {len(gallery)}, the gallery's size")
    elif same_set:
        exclude = torch.arange(len(embeddings), device=device)
    else:
        exclude = torch.full((len(embeddings),), -1, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    if labels is not None:
        labels = _check_integers("labels", labels, len(embeddings), device)
    if ref_labels is not None:
        ref_labels = _check_integers("ref_labels", ref_labels, len(gallery), device)
    elif same_set:
        ref_labels = labels
    labels, ref_labels = (none if given is None else given for given in (labels, ref_labels))
    return _Problem(embeddings.detach(), labels, gallery.detach(), ref_labels, exclude, metric, tile)


def _check_vectors(name: str, vectors: Tensor) -> None:
    if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor; got {getattr(vectors, 'dtype', type(vectors))}")
    if vectors.dim() != 2 or 0 in vectors.shape:
        raise ValueError(f"{name} must be a non-empty (count, dimensions) tensor; got shape {tuple(vectors.shape)}")
    if not all(bool(torch.isfinite(end)) for end in torch.aminmax(vectors)):
        raise ValueError(f"{name} holds NaN or infinity: no ranking is defined")


def _check_integers(name: str, values: Tensor, count: int, device: torch.device) -> Tensor:
    if not isinstance(values, Tensor) or values.is_floating_point() or values.is_complex():
        raise TypeError(f"{name} must be an integer tensor; got {getattr(values, 'dtype', type(values))}")
    if values.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), one for each vector; got {tuple(values.shape)}")
    return values.to(device=device, dtype=torch.int64)

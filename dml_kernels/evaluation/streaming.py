"""What every measure here is built on: checked inputs, and the top-K of each query over a streamed gallery.

Chunks of queries are compared with chunks of the gallery, and the scores are merged into a running top-K. Scores are
computed in fp64, rounded (``settle``, then to fp32), and packed with the gallery index into one int64 key. So equal
scores rank by lowest index, and the ranking does not depend on chunk sizes, on the number of threads, or on the order
in which a vendor's top-k meets equal values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..labels import integers_by_position
from ..ops.checks import check_choice, check_integer, check_sequence, check_tensor, shown

METRICS = ("cosine", "dot", "euclidean")
# (queries, gallery entries) of a tile. Scores, their fp32 copy and keys take about 28 bytes an entry.
CPU_TILE = (512, 2048)
CUDA_TILE = (2048, 8192)
LOWEST_KEY = torch.iinfo(torch.int64).min
INDEX_MASK = 0xFFFFFFFF
# Adding and subtracting it rounds a small fp64 number to a multiple of 2^-40, the spacing of numbers of its size.
GRID = 1.5 * 2.0**12
# The range of scores that fp32 holds with all its digits.
SMALLEST, LARGEST = 1e-27, 1e38


@dataclass(frozen=True)
class GallerySearch:
    """Checked inputs.

    Attributes:
        queries: (N, D).
        labels: (N,) int64; empty where there are none.
        gallery: (M, D).
        gallery_labels: (M,) int64; empty where there are none.
        exclude: (N,) int64: the gallery index that is left out for each query, -1 for none.
        metric: one of ``METRICS``.
        tile: (queries, gallery entries) that are scored at a time.
        unit_queries: whether only the queries are divided by their norm (``cosine`` divides both sides).
    """

    queries: Tensor
    labels: Tensor
    gallery: Tensor
    gallery_labels: Tensor
    exclude: Tensor
    metric: str
    tile: tuple[int, int]
    unit_queries: bool = False

    @property
    def reachable(self) -> int:
        """How many gallery entries every query can rank."""
        return len(self.gallery) - int(bool((self.exclude >= 0).any()))

    def queries_of(self, rows: Tensor) -> Tensor:
        """Some queries as they are scored, (len(rows), D) fp64."""
        return prepare(self.queries[rows], self.unit_queries or self.metric == "cosine")

    def gallery_of(self, start: int) -> Tensor:
        """The gallery entries of the tile from ``start`` on, as they are scored, (tile, D) fp64."""
        return prepare(self.gallery[start : start + self.tile[1]], self.metric == "cosine")

    def scores(self, queries: Tensor, refs: Tensor) -> Tensor:
        """The scores of prepared queries (n, D) and gallery entries (m, D), larger is nearer: (n, m) fp32."""
        if self.metric == "euclidean":
            return -torch.cdist(queries, refs, compute_mode="donot_use_mm_for_euclid_dist").float()
        return self.settled(queries @ refs.T, queries[:, None], refs)

    def settled(self, products: Tensor, one: Tensor, two: Tensor) -> Tensor:
        """Turn products of vectors into scores.

        Args:
            products: fp64, overwritten.
            one: (..., D) fp64, the vectors of one side.
            two: (..., D) fp64, the vectors of the other side.

        Returns:
            fp32 scores, of the shape of the products.
        """
        if self.metric == "cosine":
            return settle(products).float()
        sizes = lengths(one), lengths(two)
        for size in sizes:
            products /= size
        settle(products)
        for size in sizes:
            products *= size
        return products.float()


def settle(cosines: Tensor) -> Tensor:
    """Round fp64 cosines to a multiple of 2^-40, in place.

    fp32 keeps many digits of a small number, so for a cosine near 0 it keeps the rounding noise of fp64, which depends
    on the order of the sums. The rank of orthogonal vectors, or of equal vectors that are nearly orthogonal to the
    query, would depend on the shape of their tile.
    """
    return cosines.add_(GRID).sub_(GRID)


def lengths(vectors: Tensor) -> Tensor:
    """Norms of fp64 vectors (..., D) to divide by: 1 in place of 0."""
    norms = torch.linalg.vector_norm(vectors, dim=-1)
    return torch.where(norms > 0, norms, 1.0)


def prepare(vectors: Tensor, unit: bool) -> Tensor:
    """Vectors in fp64, each divided by its norm where ``unit``; a vector of norm 0 stays as it is."""
    wide = vectors.double()
    if not unit:
        return wide
    if vectors.dtype == torch.float64:  # only squares of fp64 numbers can leave the range of fp64
        largest = wide.abs().amax(dim=1, keepdim=True)
        wide = wide / torch.where(largest > 0, largest, 1.0)
    return wide / lengths(wide)[:, None]


def stream(problem: GallerySearch, order: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Find the nearest gallery entries of chunks of queries.

    Args:
        problem: the checked inputs.
        order: int64 indices of queries, in the order of the chunks.
        wanted: (N,) int64: how many neighbours each query needs; a chunk gets the most that one of its rows needs.

    Yields:
        (rows, scores, indices) of a chunk: the queries, and their neighbours, nearest first.
    """
    query_chunk, ref_chunk = problem.tile
    start = 0
    while start < len(order):
        rows = order[start : start + query_chunk]
        # The running top-K takes memory in addition to the tile; where K is large, fewer rows keep within the bound.
        depth = int(wanted[rows].max())
        rows = rows[: max(1, query_chunk * ref_chunk // (ref_chunk + depth))]
        keys = _top_keys(problem, rows, int(wanted[rows].max()))
        yield rows, score_of(keys), index_of(keys)
        start += len(rows)


def stream_all(problem: GallerySearch, depth: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """As ``stream``, over all queries in order, each with its ``depth`` nearest."""
    everyone = torch.arange(len(problem.queries), device=problem.queries.device)
    return stream(problem, everyone, torch.full_like(everyone, depth))


def tile_keys(problem: GallerySearch, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, keys) for each gallery tile, keys (len(rows), tile) int64; an excluded entry has the lowest key."""
    queries = problem.queries_of(rows)
    exclude = problem.exclude[rows]
    for start in range(0, len(problem.gallery), problem.tile[1]):
        refs = problem.gallery_of(start)
        keys = key_of(problem.scores(queries, refs), start)
        (mine,) = torch.nonzero((exclude >= start) & (exclude < start + len(refs)), as_tuple=True)
        keys[mine, exclude[mine] - start] = LOWEST_KEY | (INDEX_MASK - exclude[mine])
        yield start, keys


def _top_keys(problem: GallerySearch, rows: Tensor, depth: int) -> Tensor:
    """The ``depth`` largest keys of each row over the whole gallery, (len(rows), depth) int64, largest first."""
    best: Tensor | None = None
    for _, keys in tile_keys(problem, rows):
        merged = keys if best is None else torch.cat([best, keys], dim=1)
        best = merged.topk(min(depth, merged.shape[1]), dim=1).values
    assert best is not None
    return best


def first_ranks(problem: GallerySearch, rows: Tensor) -> Tensor:
    """The rank (1 is nearest) of the nearest gallery entry of each row's class, (len(rows),) int64.

    There are two passes over the gallery: the first finds the best key of the class, the second counts the keys above
    it. The gallery must hold an entry of the class of every row.
    """
    best = torch.full((len(rows),), LOWEST_KEY, dtype=torch.int64, device=rows.device)
    for start, keys in tile_keys(problem, rows):
        own = problem.gallery_labels[start : start + keys.shape[1]] == problem.labels[rows, None]
        best = torch.maximum(best, torch.where(own, keys, LOWEST_KEY).amax(dim=1))
    above = torch.zeros_like(best)
    for _, keys in tile_keys(problem, rows):
        above += (keys > best[:, None]).sum(dim=1)
    return above + 1


def key_of(scores: Tensor, start: int) -> Tensor:
    """Pack scores (n, m) fp32 into keys (n, m) int64 that sort by score (high 32 bits), then by lowest index (low 32).

    ``start`` is the gallery index of the first column.
    """
    # Adding 0 turns -0 into +0. The bits of a float sort as an integer once those of a negative one are flipped.
    bits = (scores + 0.0).view(torch.int32)
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
    index = torch.arange(start, start + scores.shape[1], device=scores.device)
    return bits.long().bitwise_left_shift_(32).bitwise_or_(INDEX_MASK - index)


def index_of(keys: Tensor) -> Tensor:
    """The gallery index in a key, int64."""
    return INDEX_MASK - (keys & INDEX_MASK)


def score_of(keys: Tensor) -> Tensor:
    """The score in a key, fp32."""
    ordered = (keys >> 32).int()
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)


def check(
    embeddings: Tensor,
    labels: Tensor | None,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    exclude: Tensor | None,
    metric: str,
    tile: tuple[int, int] | None,
    *,
    names: tuple[str, str] = ("ref_embeddings", "ref_labels"),
    unit_queries: bool = False,
) -> GallerySearch:
    """Check all inputs. Without references the queries are the gallery, and each query leaves itself out.

    Args:
        embeddings, labels, ref_embeddings, ref_labels, exclude, metric, tile: as in :func:`evaluate`.
        names: what the caller calls the references and their labels, for messages.
        unit_queries: whether the queries are divided by their norm.

    Raises:
        ValueError, TypeError: as the public functions say.
    """
    same_set = ref_embeddings is None
    check_choice("metric", metric, METRICS)
    check_vectors("embeddings", embeddings)
    gallery = embeddings if ref_embeddings is None else ref_embeddings
    if not same_set:
        check_vectors(names[0], gallery)
    if gallery.shape[1] != embeddings.shape[1] or gallery.device != embeddings.device:
        raise ValueError(
            f"{names[0]} {tuple(gallery.shape)} on {gallery.device} does not match "
            f"embeddings {tuple(embeddings.shape)} on {embeddings.device}"
        )
    _check_reach(embeddings, gallery, metric, names[0])
    device = embeddings.device
    tile = _check_tile(tile, device)
    exclude = _check_exclude(exclude, same_set, embeddings, gallery)
    none = torch.empty(0, dtype=torch.int64, device=device)
    if labels is not None:
        labels = check_integers("labels", labels, len(embeddings), device)
    if ref_labels is not None:
        ref_labels = check_integers(names[1], ref_labels, len(gallery), device)
    elif same_set:
        ref_labels = labels
    labels, ref_labels = (none if given is None else given for given in (labels, ref_labels))
    return GallerySearch(embeddings.detach(), labels, gallery.detach(), ref_labels, exclude, metric, tile, unit_queries)


def check_depths(name: str, depths: Sequence[int]) -> tuple[int, ...]:
    """Check a sequence of depths: integers, at least one."""
    given = check_sequence(name, depths, "integers, such as (1, 10)")
    found = tuple(check_integer(f"{name}[{i}]", depth) for i, depth in enumerate(given))
    if not found:
        raise ValueError(f"{name} is empty: give at least one depth, such as (1, 10)")
    return found


def _check_reach(queries: Tensor, gallery: Tensor, metric: str, name: str) -> None:
    """Refuse vectors whose scores leave the range that fp32 can rank; the scores of unit vectors never do."""
    if metric == "cosine":
        return
    ends = (max(abs(end.item()) for end in torch.aminmax(vectors)) for vectors in (queries, gallery))
    one, two = (math.sqrt(queries.shape[1]) * end for end in ends)
    reach = one * two if metric == "dot" else one + two
    if (reach or (one and two)) and not SMALLEST <= reach <= LARGEST:
        raise ValueError(
            f"embeddings and {name} make scores of the size {reach:.3g}, which fp32 cannot rank: divide or multiply "
            "all of them by one number, or use metric='cosine'"
        )


def _check_tile(tile: tuple[int, int] | None, device: torch.device) -> tuple[int, int]:
    if tile is None:
        return CUDA_TILE if device.type == "cuda" else CPU_TILE
    if not isinstance(tile, Sequence) or len(tile) != 2:
        raise ValueError(f"tile must be two positive sizes (queries, gallery entries); got {shown(tile)}")
    return check_integer("tile[0]", tile[0], 1), check_integer("tile[1]", tile[1], 1)


def _check_exclude(exclude: Tensor | None, same_set: bool, embeddings: Tensor, gallery: Tensor) -> Tensor:
    device = embeddings.device
    if exclude is not None:
        exclude = check_integers("exclude", exclude, len(embeddings), device, booleans=False)
        if bool(((exclude < -1) | (exclude >= len(gallery))).any()):
            raise ValueError(f"exclude must hold -1 or an index under {len(gallery)}, the gallery's size")
        return exclude
    if same_set:
        return torch.arange(len(embeddings), device=device)
    return torch.full((len(embeddings),), -1, device=device)


def check_vectors(name: str, vectors: Tensor) -> None:
    """Raise an error that names the argument unless it is a finite, non-empty floating (count, dimensions) tensor."""
    if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor; got {getattr(vectors, 'dtype', type(vectors))}")
    check_tensor(name, vectors)
    if vectors.device.type == "meta":
        raise ValueError(f"{name} is on meta, which holds no values")
    if vectors.dim() != 2 or 0 in vectors.shape:
        raise ValueError(f"{name} must be a non-empty (count, dimensions) tensor; got shape {tuple(vectors.shape)}")
    if not all(bool(torch.isfinite(end)) for end in torch.aminmax(vectors)):
        raise ValueError(f"{name} holds NaN or infinity: no ranking is defined")


def check_integers(name: str, values: Any, count: int, device: torch.device, *, booleans: bool = True) -> Tensor:
    """Convert integers (count,), in any form that ``labels`` reads, to int64 on ``device``, or raise an error."""
    out = integers_by_position(name, values, booleans=booleans)
    if out.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), one for each vector; got {tuple(out.shape)}")
    return out.to(device)

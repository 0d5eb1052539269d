"""masked_argmax: the best entry of each row in both sets, over ranges of the bank, and draws by Gumbel noise.

For each row and set a program keeps the best key, its index, the number of candidates, and for draws the score. Of
equal keys the first counts: the lowest index within a tile, then the order of tiles and ranges.
"""

import triton
import triton.language as tl

from .gradients import rows_of_tile, scores
from .noise import distance_log_weights, gumbel, row_streams
from .tiles import INF, any_same, clamped, columns, load_tile, products, same_label, used_pairs


@triton.jit
def improved(best, index, score, count, key, s, candidates, m0, LARGEST: tl.constexpr, NOISE: tl.constexpr,
             BLOCK_M: tl.constexpr):  # fmt: skip
    """The best of a set and the count of its candidates, updated with one tile."""
    if not LARGEST and not NOISE:
        key = -key
    key = tl.where(candidates, key, -INF)
    count += tl.sum((key > -INF).to(tl.int32), 1)
    value = tl.max(key, 1)
    place = tl.arange(0, BLOCK_M)[None, :]
    at = tl.min(tl.where(key == value[:, None], place, BLOCK_M), 1)
    better = value > best
    if NOISE:
        of_chosen = tl.max(tl.where(place == at[:, None], s, -INF), 1)
        score = tl.where(better, of_chosen, score)
    return tl.where(better, value, best), tl.where(better, m0 + at, index), score, count


# A new seed must not compile the kernel again.
@triton.jit(do_not_specialize=["stream"])
def argmax_kernel(
    x_ptr, w_ptr, y_ptr, c_ptr, exclude_ptr, low_ptr, high_ptr, rx_ptr, rw_ptr, sqx_ptr, sqw_ptr,
    key_ptr, index_ptr, score_ptr, count_ptr,
    N, M, span, splits, stride_xn, stride_xd, stride_wm, stride_wd, ignore_index, stream: "i64",  # noqa: F821
    cutoff2: "fp64", beyond2: "fp64", of_log: "fp64", of_log1p: "fp64",  # noqa: F821
    width, D: tl.constexpr, METRIC: tl.constexpr, NORMALIZE: tl.constexpr, SAME: tl.constexpr, DIFFERENT: tl.constexpr,
    LARGEST_SAME: tl.constexpr, LARGEST_DIFFERENT: tl.constexpr, NOISE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x (N, D), w (M, D) -> key, index (int64), count (int32) and with NOISE score, each (2, splits, N).

    The first axis is same, different; SAME and DIFFERENT say which are needed. Candidates lie within the open interval
    (low, high), each (N,) or None. The key is the score or its negative; with NOISE it is, in fp64, Gumbel noise of
    ``stream`` plus the log weight of ``noise.py``. Grid (row tiles, splits).
    """
    offs_n, mask_n = clamped(tl.program_id(0).to(tl.int64) * BLOCK_N, N, BLOCK_N)
    split = tl.program_id(1)
    start = split.to(tl.int64) * span
    tiles = tl.cdiv(tl.minimum(M - start, span), BLOCK_M).to(tl.int32)
    UNIT: tl.constexpr = NORMALIZE and METRIC == "dot"
    EXCLUDE: tl.constexpr = exclude_ptr is not None
    KEY: tl.constexpr = tl.float64 if NOISE else ACC
    _, y, exclude, _, rx, sqx = rows_of_tile(
        offs_n, mask_n, y_ptr, c_ptr, exclude_ptr, None, rx_ptr, sqx_ptr, 0, ignore_index, 0, METRIC, NORMALIZE, ACC
    )
    if NOISE:
        streams = row_streams(stream, offs_n)
    x_tile = offs_n
    if D <= BLOCK_D:
        x_tile = load_tile(x_ptr, offs_n, stride_xn, stride_xd, 0, D, BLOCK_D).to(PRODUCT)

    best_same = tl.full((BLOCK_N,), -INF, KEY)
    best_different = tl.full((BLOCK_N,), -INF, KEY)
    index_same = tl.full((BLOCK_N,), -1, tl.int64)
    index_different = tl.full((BLOCK_N,), -1, tl.int64)
    score_same = tl.full((BLOCK_N,), -INF, ACC)
    score_different = tl.full((BLOCK_N,), -INF, ACC)
    count_same = tl.zeros((BLOCK_N,), tl.int32)
    count_different = tl.zeros((BLOCK_N,), tl.int32)
    for i in range(tiles):
        m0 = start + tl.cast(i, tl.int64) * BLOCK_M
        local, left = columns(m0, M, BLOCK_M)
        s = products(
            x_ptr, w_ptr, x_tile, offs_n, m0 + local, stride_xn, stride_xd, stride_wm, stride_wd, width,
            D, BLOCK_N, BLOCK_M, BLOCK_D, PRODUCT, ACC, PRECISION,
        )  # fmt: skip
        s = scores(
            s, x_ptr, w_ptr, offs_n, m0, left, stride_xn, stride_xd, stride_wm, stride_wd, rx, sqx, rw_ptr, sqw_ptr,
            D, METRIC, NORMALIZE, BLOCK_M, ACC,
        )  # fmt: skip
        if UNIT:
            s = s * rx[:, None]
        usable = s == s
        if low_ptr is not None:
            usable = usable & (s > tl.load(low_ptr + offs_n)[:, None])
        if high_ptr is not None:
            usable = usable & (s < tl.load(high_ptr + offs_n)[:, None])
        usable = usable & used_pairs(c_ptr, None, exclude, m0, left, ignore_index, BLOCK_M, EXCLUDE)
        key = s
        if NOISE:
            key = gumbel(streams, m0 + tl.arange(0, BLOCK_M).to(tl.int64))
            key += distance_log_weights(s.to(tl.float64), cutoff2, beyond2, of_log, of_log1p, METRIC)
        if SAME:  # noqa: SIM102 (a constant: left out where False, which `and` would not)
            if any_same(y, c_ptr, m0, left, BLOCK_M):
                best_same, index_same, score_same, count_same = improved(
                    best_same, index_same, score_same, count_same, key, s,
                    usable & same_label(y, c_ptr, m0, left, BLOCK_M), m0, LARGEST_SAME, NOISE, BLOCK_M,
                )  # fmt: skip
        if DIFFERENT:
            best_different, index_different, score_different, count_different = improved(
                best_different, index_different, score_different, count_different, key, s,
                usable & (same_label(y, c_ptr, m0, left, BLOCK_M) == 0), m0, LARGEST_DIFFERENT, NOISE, BLOCK_M,
            )  # fmt: skip

    at = split.to(tl.int64) * N + offs_n
    step = tl.cast(splits, tl.int64) * N
    if SAME:
        tl.store(key_ptr + at, best_same, mask=mask_n)
        tl.store(index_ptr + at, index_same, mask=mask_n)
        tl.store(count_ptr + at, count_same, mask=mask_n)
        if NOISE:
            tl.store(score_ptr + at, score_same, mask=mask_n)
    if DIFFERENT:
        tl.store(key_ptr + step + at, best_different, mask=mask_n)
        tl.store(index_ptr + step + at, index_different, mask=mask_n)
        tl.store(count_ptr + step + at, count_different, mask=mask_n)
        if NOISE:
            tl.store(score_ptr + step + at, score_different, mask=mask_n)


@triton.jit
def argmax_merge_kernel(
    key_ptr, index_ptr, score_ptr, count_ptr, y_ptr, best_ptr, score_out_ptr, total_ptr, N, splits, ignore_index,
    LARGEST: tl.constexpr, NOISE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One set's parts (splits, N) -> index, score, count, each (N,): -1, the worst score and 0 for an empty set.

    Parallel over rows. The ranges are merged in order, so that of equal keys the lowest index stays. An ignored row has
    empty sets.
    """
    offs, mask = clamped(tl.program_id(0).to(tl.int64) * BLOCK_N, N, BLOCK_N)
    counts = tl.load(y_ptr + offs) != ignore_index
    best = tl.full((BLOCK_N,), -INF, key_ptr.dtype.element_ty)
    index = tl.full((BLOCK_N,), -1, tl.int64)
    score = tl.full((BLOCK_N,), -INF, score_out_ptr.dtype.element_ty)
    total = tl.zeros((BLOCK_N,), tl.int64)
    for split in range(splits):
        at = tl.cast(split, tl.int64) * N + offs
        key = tl.load(key_ptr + at)
        better = key > best
        best = tl.where(better, key, best)
        index = tl.where(better, tl.load(index_ptr + at), index)
        if NOISE:
            score = tl.where(better, tl.load(score_ptr + at), score)
        total += tl.load(count_ptr + at)
    if not NOISE:
        score = best
    score = tl.where(counts, score, -INF)
    if not LARGEST and not NOISE:
        score = -score
    tl.store(best_ptr + offs, tl.where(counts, index, -1), mask=mask)
    tl.store(score_out_ptr + offs, score, mask=mask)
    tl.store(total_ptr + offs, tl.where(counts, total, 0), mask=mask)

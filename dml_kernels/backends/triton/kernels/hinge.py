"""masked_hinge_sum: kernels over the tiles of masked_logsumexp, with a hinge in place of the exponential.

A term is relu(k s + offset), where each row has an offset. One function determines where a term is positive, for the
counts of the forward and the dS of the backward.
"""

import triton
import triton.language as tl

from .gradients import incoming, rows_of_tile, scores, store_gradient
from .tiles import any_same, clamped, columns, load_tile, products, same_label, used_pairs


@triton.jit
def hinge_terms(s, slope, offset, counted):
    """k s + offset of a tile, and where it is a positive term of the set. NaN counts as positive, so that it shows."""
    z = s * slope[:, None] + offset[:, None]
    return z, counted & ((z <= 0) == 0)


@triton.jit
def row_slope(k, rx, UNIT: tl.constexpr, ACC: tl.constexpr):
    """The factor of a set on the scores of a tile; for a cosine it includes the rows' norms, which the scores lack."""
    slope = tl.zeros_like(rx) + tl.cast(k, ACC)
    if UNIT:
        slope = slope * rx
    return slope


@triton.jit
def hinge_kernel(
    x_ptr, w_ptr, y_ptr, c_ptr, exclude_ptr, offset_same_ptr, offset_different_ptr,
    rx_ptr, rw_ptr, sqx_ptr, sqw_ptr, sum_ptr, count_ptr,
    N, M, span, splits, stride_xn, stride_xd, stride_wm, stride_wd, ignore_index,
    k_same: "fp64", k_different: "fp64",  # noqa: F821
    width, D: tl.constexpr, METRIC: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x (N, D), w (M, D), both offsets (N,) -> sum and count (int32), each (2, splits, N), of same and of different.

    Grid (row tiles, splits): each program walks ``span`` bank entries. An ignored row gives 0.
    """
    offs_n, mask_n = clamped(tl.program_id(0).to(tl.int64) * BLOCK_N, N, BLOCK_N)
    split = tl.program_id(1)
    start = split.to(tl.int64) * span
    tiles = tl.cdiv(tl.minimum(M - start, span), BLOCK_M).to(tl.int32)
    UNIT: tl.constexpr = NORMALIZE and METRIC == "dot"
    EXCLUDE: tl.constexpr = exclude_ptr is not None
    counts, y, exclude, _, rx, sqx = rows_of_tile(
        offs_n, mask_n, y_ptr, c_ptr, exclude_ptr, None, rx_ptr, sqx_ptr, 0, ignore_index, 0, METRIC, NORMALIZE, ACC
    )
    slope_same, slope_different = row_slope(k_same, rx, UNIT, ACC), row_slope(k_different, rx, UNIT, ACC)
    offset_same, offset_different = tl.load(offset_same_ptr + offs_n), tl.load(offset_different_ptr + offs_n)
    x_tile = offs_n
    if D <= BLOCK_D:
        x_tile = load_tile(x_ptr, offs_n, stride_xn, stride_xd, 0, D, BLOCK_D).to(PRODUCT)

    sum_same = tl.zeros((BLOCK_N,), ACC)
    sum_different = tl.zeros((BLOCK_N,), ACC)
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
        if any_same(y, c_ptr, m0, left, BLOCK_M):
            counted = used_pairs(c_ptr, None, exclude, m0, left, ignore_index, BLOCK_M, EXCLUDE)
            z, active = hinge_terms(s, slope_same, offset_same, counted & same_label(y, c_ptr, m0, left, BLOCK_M))
            sum_same += tl.sum(tl.where(active, z, 0.0), 1)
            count_same += tl.sum(active.to(tl.int32), 1)
        counted = used_pairs(c_ptr, None, exclude, m0, left, ignore_index, BLOCK_M, EXCLUDE)
        counted = counted & (same_label(y, c_ptr, m0, left, BLOCK_M) == 0)
        z, active = hinge_terms(s, slope_different, offset_different, counted)
        sum_different += tl.sum(tl.where(active, z, 0.0), 1)
        count_different += tl.sum(active.to(tl.int32), 1)

    at = split.to(tl.int64) * N + offs_n
    step = tl.cast(splits, tl.int64) * N
    tl.store(sum_ptr + at, tl.where(counts, sum_same, 0.0), mask=mask_n)
    tl.store(sum_ptr + step + at, tl.where(counts, sum_different, 0.0), mask=mask_n)
    tl.store(count_ptr + at, tl.where(counts, count_same, 0), mask=mask_n)
    tl.store(count_ptr + step + at, tl.where(counts, count_different, 0), mask=mask_n)


@triton.jit
def hinge_gradient_kernel(
    x_ptr, w_ptr, y_ptr, c_ptr, exclude_ptr, offset_same_ptr, offset_different_ptr,
    g_same_ptr, g_different_ptr, g_own_ptr, rx_ptr, rw_ptr, sqx_ptr, sqw_ptr, lift_ptr,
    e_ptr, near_ptr, flag_ptr, own_rows_ptr, own_cols_ptr,
    N, M, first, n_tiles, stride_xn, stride_xd, stride_wm, stride_wd, stride_e, ignore_index,
    k_same: "fp64", k_different: "fp64",  # noqa: F821
    width, D: tl.constexpr, METRIC: tl.constexpr, NORMALIZE: tl.constexpr, FOLD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x (N, D), chunk w (M, D) of a bank from entry ``first`` -> E and the other outputs of ``store_gradient``.

    dS is the row's g for the pair's set where the term is positive, else 0. With g_own, dS at the entry of the row's
    label, excluded or not, is g_own. Parallel over tiles, rows fastest.
    """
    n_tile, m_tile = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    offs_n, mask_n = clamped(n_tile.to(tl.int64) * BLOCK_N, N, BLOCK_N)
    m0 = m_tile.to(tl.int64) * BLOCK_M
    local, left = columns(m0, M, BLOCK_M)
    UNIT: tl.constexpr = NORMALIZE and METRIC == "dot"
    EXCLUDE: tl.constexpr = exclude_ptr is not None
    x_tile = offs_n
    if D <= BLOCK_D:
        x_tile = load_tile(x_ptr, offs_n, stride_xn, stride_xd, 0, D, BLOCK_D).to(PRODUCT)
    s = products(
        x_ptr, w_ptr, x_tile, offs_n, m0 + local, stride_xn, stride_xd, stride_wm, stride_wd, width,
        D, BLOCK_N, BLOCK_M, BLOCK_D, PRODUCT, ACC, PRECISION,
    )  # fmt: skip
    counts, place, exclude, _, rx, sqx = rows_of_tile(
        offs_n, mask_n, y_ptr, c_ptr, exclude_ptr, None, rx_ptr, sqx_ptr, 0, ignore_index, first, METRIC, NORMALIZE, ACC
    )
    s = scores(
        s, x_ptr, w_ptr, offs_n, m0, left, stride_xn, stride_xd, stride_wm, stride_wd, rx, sqx, rw_ptr, sqw_ptr,
        D, METRIC, NORMALIZE, BLOCK_M, ACC,
    )  # fmt: skip
    counted = used_pairs(c_ptr, None, exclude, m0, left, ignore_index, BLOCK_M, EXCLUDE)
    counted = counted & (same_label(place, c_ptr, m0, left, BLOCK_M) == 0)
    slope = row_slope(k_different, rx, UNIT, ACC)
    _, active = hinge_terms(s, slope, tl.load(offset_different_ptr + offs_n), counted)
    ds = tl.where(active, incoming(g_different_ptr, offs_n, counts)[:, None], 0.0)
    if any_same(place, c_ptr, m0, left, BLOCK_M):
        own = same_label(place, c_ptr, m0, left, BLOCK_M)
        counted = own & used_pairs(c_ptr, None, exclude, m0, left, ignore_index, BLOCK_M, EXCLUDE)
        slope = row_slope(k_same, rx, UNIT, ACC)
        _, active = hinge_terms(s, slope, tl.load(offset_same_ptr + offs_n), counted)
        ds = tl.where(active, incoming(g_same_ptr, offs_n, counts)[:, None], ds)
        if g_own_ptr is not None:
            ds = tl.where(own, incoming(g_own_ptr, offs_n, counts)[:, None], ds)
    store_gradient(
        ds, s, e_ptr, near_ptr, flag_ptr, own_rows_ptr, own_cols_ptr, lift_ptr, rx, sqx, rw_ptr, sqw_ptr,
        N, M, offs_n, mask_n, m0, left, n_tile, m_tile, n_tiles, stride_e, METRIC, FOLD, BLOCK_M, ACC,
    )  # fmt: skip

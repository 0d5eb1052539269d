"""normalized_distance: kernels over tiles of the N x M matrix; ``tiles.py`` computes the scores of a tile."""

import triton
import triton.language as tl

from .gradients import store_gradient
from .tiles import clamped, column, columns, distances_to_scores, load_tile, products, squared_distances


@triton.jit
def score_tile(
    x_ptr, w_ptr, rx_ptr, rw_ptr, sqx_ptr, sqw_ptr, offs_n, m0, local, left,
    stride_xn, stride_xd, stride_wm, stride_wd, width, D: tl.constexpr, METRIC: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(scores of one tile, rx, sqx)."""
    x_tile = offs_n
    if D <= BLOCK_D:
        x_tile = load_tile(x_ptr, offs_n, stride_xn, stride_xd, 0, D, BLOCK_D).to(PRODUCT)
    s = products(
        x_ptr, w_ptr, x_tile, offs_n, m0 + local, stride_xn, stride_xd, stride_wm, stride_wd, width,
        D, BLOCK_N, BLOCK_M, BLOCK_D, PRODUCT, ACC, PRECISION,
    )  # fmt: skip
    rx = tl.full((BLOCK_N,), 1.0, ACC)
    sqx = rx
    if NORMALIZE:
        rx = tl.load(rx_ptr + offs_n)
    if METRIC != "dot":
        sqx = tl.load(sqx_ptr + offs_n)
        s = squared_distances(
            s, x_ptr, w_ptr, offs_n, m0, left, stride_xn, stride_xd, stride_wm, stride_wd,
            rx, sqx, rw_ptr, sqw_ptr, D, NORMALIZE, BLOCK_M, ACC,
        )  # fmt: skip
        s = distances_to_scores(s, METRIC)
    elif NORMALIZE:
        s = s * rx[:, None] * column(rw_ptr, m0, left, BLOCK_M)[None, :]
    return s, rx, sqx


@triton.jit
def distance_kernel(
    x_ptr, w_ptr, rx_ptr, rw_ptr, sqx_ptr, sqw_ptr, out_ptr, N, M, n_tiles,
    stride_xn, stride_xd, stride_wm, stride_wd,
    width, D: tl.constexpr, METRIC: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x (N, D), w (M, D) -> out (N, M) contiguous: similarity or distance. Parallel over tiles, rows fastest."""
    offs_n, mask_n = clamped((tl.program_id(0) % n_tiles).to(tl.int64) * BLOCK_N, N, BLOCK_N)
    m0 = (tl.program_id(0) // n_tiles).to(tl.int64) * BLOCK_M
    local, left = columns(m0, M, BLOCK_M)
    s, _, _ = score_tile(
        x_ptr, w_ptr, rx_ptr, rw_ptr, sqx_ptr, sqw_ptr, offs_n, m0, local, left,
        stride_xn, stride_xd, stride_wm, stride_wd, width,
        D, METRIC, NORMALIZE, BLOCK_N, BLOCK_M, BLOCK_D, PRODUCT, ACC, PRECISION,
    )  # fmt: skip
    if METRIC != "dot":
        s = -s
    index = tl.arange(0, BLOCK_M)
    at = out_ptr + (offs_n * M + m0)[:, None] + index[None, :]
    mask = mask_n[:, None] & (index < left)[None, :]
    tl.store(at, s.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def distance_gradient_kernel(
    x_ptr, w_ptr, g_ptr, rx_ptr, rw_ptr, sqx_ptr, sqw_ptr, lift_ptr,
    e_ptr, near_ptr, flag_ptr, own_rows_ptr, own_cols_ptr, N, M, n_tiles,
    stride_xn, stride_xd, stride_wm, stride_wd, stride_gn, stride_gm, stride_e,
    width, D: tl.constexpr, METRIC: tl.constexpr, NORMALIZE: tl.constexpr, FOLD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The incoming gradient g (N, M), of any strides, -> E and the other outputs of ``gradients.store_gradient``.

    Parallel over tiles, rows fastest. The gradient of a dot product needs no scores, so no product is computed.
    """
    n_tile, m_tile = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    offs_n, mask_n = clamped(n_tile.to(tl.int64) * BLOCK_N, N, BLOCK_N)
    m0 = m_tile.to(tl.int64) * BLOCK_M
    local, left = columns(m0, M, BLOCK_M)
    index = tl.arange(0, BLOCK_M)
    mask = mask_n[:, None] & (index < left)[None, :]
    at = g_ptr + (offs_n * stride_gn + m0 * stride_gm)[:, None] + (index.to(tl.int64) * stride_gm)[None, :]
    if METRIC == "dot":
        rx = tl.full((BLOCK_N,), 1.0, ACC)
        sqx = rx
        if NORMALIZE:
            rx = tl.load(rx_ptr + offs_n)
        ds = tl.load(at, mask=mask, other=0.0).to(ACC)
        s = ds
    else:
        s, rx, sqx = score_tile(
            x_ptr, w_ptr, rx_ptr, rw_ptr, sqx_ptr, sqw_ptr, offs_n, m0, local, left,
            stride_xn, stride_xd, stride_wm, stride_wd, width,
            D, METRIC, NORMALIZE, BLOCK_N, BLOCK_M, BLOCK_D, PRODUCT, ACC, PRECISION,
        )  # fmt: skip
        ds = -tl.load(at, mask=mask, other=0.0).to(ACC)
    store_gradient(
        ds, s, e_ptr, near_ptr, flag_ptr, own_rows_ptr, own_cols_ptr, lift_ptr, rx, sqx, rw_ptr, sqw_ptr,
        N, M, offs_n, mask_n, m0, left, n_tile, m_tile, n_tiles, stride_e, METRIC, FOLD, BLOCK_M, ACC,
    )  # fmt: skip

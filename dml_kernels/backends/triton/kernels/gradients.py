"""masked_logsumexp, backward: one kernel writes E for a block of rows x a chunk of the bank, ready for two products.

The vendor's library then multiplies: grad_x += E w, grad_w = E^T x. E holds dS with the norms folded in
(E_ij = dS_ij r_i r_j), so that no normalised copy of either matrix is needed. A tile writes one partial sum of each
quantity that belongs to rows or columns alone; torch.sum on the host adds these in order, without atomics.
"""

import triton
import triton.language as tl

from .policies import circle_weights, pooled, spread
from .tiles import (
    INF,
    LOG2E,
    NEAR,
    any_same,
    clamped,
    column,
    column_bias,
    columns,
    distances_to_scores,
    load_tile,
    products,
    row_scale,
    same_label,
    squared_distances,
    used_pairs,
)


@triton.jit
def closed(lse_ptr, offs_n, counts):
    """The log-sum-exp to subtract; +inf for an empty set and for rows that do not count, so that every weight is 0."""
    lse = tl.load(lse_ptr + offs_n)
    return tl.where((lse == -INF) | (counts == 0), INF, lse)


@triton.jit
def incoming(ptr, offs_n, counts):
    return tl.where(counts, tl.load(ptr + offs_n), 0.0)


@triton.jit
def rows_of_tile(
    offs_n, mask_n, y_ptr, c_ptr, exclude_ptr, scale_ptr, rx_ptr, sqx_ptr, stride_scale, ignore_index, first,
    METRIC: tl.constexpr, NORMALIZE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What a tile needs of its rows: (which count, label's place, excluded place, scale, inverse norm, squared norm).

    A place is a bank index minus ``first``; with bank labels (c_ptr) the label's place is the label itself. A value
    that is not needed is a placeholder.
    """
    y = tl.load(y_ptr + offs_n)
    counts = mask_n & (y != ignore_index)
    place = y
    if c_ptr is None:
        place = y - first
    exclude = y
    if exclude_ptr is not None:
        exclude = tl.load(exclude_ptr + offs_n) - first
    t = row_scale(scale_ptr, offs_n, stride_scale, ACC)
    rx, sqx = t, t
    if NORMALIZE:
        rx = tl.load(rx_ptr + offs_n)
    if METRIC != "dot":
        sqx = tl.load(sqx_ptr + offs_n)
    return counts, place, exclude, t, rx, sqx


@triton.jit
def scores(
    s, x_ptr, w_ptr, offs_n, m0, left, stride_xn, stride_xd, stride_wm, stride_wd, rx, sqx, rw_ptr, sqw_ptr,
    D: tl.constexpr, METRIC: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Raw products of a tile -> scores. Those of a cosine lack the rows' norms, which the slopes contain."""
    if METRIC != "dot":
        s = squared_distances(
            s, x_ptr, w_ptr, offs_n, m0, left, stride_xn, stride_xd, stride_wm, stride_wd,
            rx, sqx, rw_ptr, sqw_ptr, D, NORMALIZE, BLOCK_M, ACC,
        )  # fmt: skip
        s = distances_to_scores(s, METRIC)
    elif NORMALIZE:
        s = s * column(rw_ptr, m0, left, BLOCK_M)[None, :]
    return s


@triton.jit
def pair_gradients(
    s, counts, place, exclude, t, rx, offs_n, m0, left, c_ptr, bias_ptr,
    same_ptr, different_ptr, g_same_ptr, g_different_ptr, h_same_ptr, h_different_ptr, ignore_index,
    k_same, o_same, k_different, o_different, number,
    UNIT: tl.constexpr, EXCLUDE: tl.constexpr, T_ROWS: tl.constexpr, QUADRATIC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scores s of a tile -> (dz, dz k, and with T_ROWS the scale's gradient by row), both sets together.

    With UNIT the scores lack the rows' norms. With QUADRATIC the factor k includes Circle's weight, whose m is
    ``number``.
    """
    # The steps of the forward, in its order, so that z - lse has no rounding error that the forward did not have.
    k_s, k_d = tl.cast(k_same, ACC), tl.cast(k_different, ACC)
    slope_same, slope_different = k_s * t, k_d * t
    base_same, base_different = slope_same * tl.cast(o_same, ACC), slope_different * tl.cast(o_different, ACC)
    if UNIT:
        slope_same, slope_different = slope_same * rx, slope_different * rx

    z = s * slope_different[:, None] - base_different[:, None]
    if QUADRATIC:
        z = z * circle_weights(s, number, False, ACC)
    if bias_ptr is not None:
        z += column_bias(bias_ptr, m0, left, BLOCK_M, ACC)[None, :]
    counted = used_pairs(c_ptr, bias_ptr, exclude, m0, left, ignore_index, BLOCK_M, EXCLUDE)
    counted = counted & (same_label(place, c_ptr, m0, left, BLOCK_M) == 0)
    dz = tl.exp2((z - closed(different_ptr, offs_n, counts)[:, None]) * LOG2E)
    dz = dz * incoming(g_different_ptr, offs_n, counts)[:, None]
    if h_different_ptr is not None:
        dz += incoming(h_different_ptr, offs_n, counts)[:, None]
    dz = tl.where(counted, dz, 0.0)
    ds = dz * k_d
    if QUADRATIC:
        ds = ds * circle_weights(s, number, False, ACC)
    t_row = tl.zeros((BLOCK_N,), ACC)
    if T_ROWS:
        t_row += tl.sum(ds * s, 1) * (rx if UNIT else 1.0) - tl.sum(ds, 1) * tl.cast(o_different, ACC)

    if any_same(place, c_ptr, m0, left, BLOCK_M):
        counted = used_pairs(c_ptr, bias_ptr, exclude, m0, left, ignore_index, BLOCK_M, EXCLUDE)
        counted = counted & same_label(place, c_ptr, m0, left, BLOCK_M)
        z = s * slope_same[:, None] - base_same[:, None]
        if QUADRATIC:
            z = z * circle_weights(s, number, True, ACC)
        if bias_ptr is not None:
            z += column_bias(bias_ptr, m0, left, BLOCK_M, ACC)[None, :]
        more = tl.exp2((z - closed(same_ptr, offs_n, counts)[:, None]) * LOG2E)
        more = more * incoming(g_same_ptr, offs_n, counts)[:, None]
        if h_same_ptr is not None:
            more += incoming(h_same_ptr, offs_n, counts)[:, None]
        more = tl.where(counted, more, 0.0)
        dz += more
        more = more * k_s
        if QUADRATIC:
            more = more * circle_weights(s, number, True, ACC)
        ds += more
        if T_ROWS:
            t_row += tl.sum(more * s, 1) * (rx if UNIT else 1.0) - tl.sum(more, 1) * tl.cast(o_same, ACC)
    return dz, ds, t_row


@triton.jit
def store_gradient(
    ds, s, e_ptr, near_ptr, flag_ptr, own_rows_ptr, own_cols_ptr, lift_ptr, rx, sqx, rw_ptr, sqw_ptr,
    N, M, offs_n, mask_n, m0, left, n_tile, m_tile, n_tiles, stride_e,
    METRIC: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dS on the scores of a tile -> E on the raw products; near pairs of a distance go to ``near``, with a flag.

    For distances dS is on |u - p|^2, E = 2 dS, and the sums of dS over rows and columns are stored for the own part
    -2 (sum dS) u. A near pair's gradient -2 dS (u - p) would cancel there, so ``near_kernel`` computes it from the
    difference.
    """
    index = tl.arange(0, BLOCK_M)
    mask = mask_n[:, None] & (index < left)[None, :]
    at = (offs_n * stride_e + m0)[:, None] + index[None, :]
    if METRIC != "dot":
        d2 = -s
        if METRIC == "euclidean":
            ds = ds * tl.where(s == 0, 0.0, -0.5 / s)
            d2 = s * s
        near = d2 < (sqx[:, None] + column(sqw_ptr, m0, left, BLOCK_M)[None, :]) * NEAR
        some = tl.max((near & mask).to(tl.int32))
        tl.store(flag_ptr + m_tile.to(tl.int64) * n_tiles + n_tile, some)
        if some > 0:
            tl.store(near_ptr + at, tl.where(near, ds, 0.0), mask=mask)
        ds = tl.where(near, 0.0, ds)
        tl.store(own_rows_ptr + m_tile.to(tl.int64) * N + offs_n, tl.sum(ds, 1), mask=mask_n)
        own = tl.sum(tl.where(mask_n[:, None], ds, 0.0), 0)
        tl.store(own_cols_ptr + n_tile.to(tl.int64) * M + m0 + index, own, mask=index < left)
        ds = 2 * ds
    if e_ptr is not None:
        if FOLD:
            ds = ds * rx[:, None] * column(rw_ptr, m0, left, BLOCK_M)[None, :]
        if lift_ptr is not None:
            ds = ds * tl.load(lift_ptr)
        tl.store(e_ptr + at, ds.to(e_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradient_kernel(
    x_ptr, w_ptr, y_ptr, c_ptr, exclude_ptr, scale_ptr, bias_ptr, rx_ptr, rw_ptr, sqx_ptr, sqw_ptr,
    same_ptr, different_ptr, g_same_ptr, g_different_ptr, h_same_ptr, h_different_ptr, lift_ptr,
    e_ptr, near_ptr, flag_ptr, own_rows_ptr, own_cols_ptr, t_rows_ptr, b_cols_ptr,
    N, M, first, n_tiles, stride_xn, stride_xd, stride_wm, stride_wd, stride_scale, stride_e, ignore_index,
    k_same: "fp64", o_same: "fp64", k_different: "fp64", o_different: "fp64", number: "fp64",  # noqa: F821
    width, D: tl.constexpr, METRIC: tl.constexpr, NORMALIZE: tl.constexpr, FOLD: tl.constexpr,
    POLICY: tl.constexpr, CENTRES: tl.constexpr, PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x (N, D), chunk w (M, D) of a bank from entry ``first`` -> E (N, M), and partial sums by tile.

    With p_ij = exp(z_ij - lse_i) of the pair's set and dz = g_i p_ij + h_i (g, h: gradients of the log-sum-exp and of
    the plain sum): dS_ij = dz k t_i. Partial sums, each stored if its pointer is not None: t_rows (m_tiles, N) the
    scale's gradient dz k (s_ij - o), b_cols (n_tiles, M) dz, and own_rows, own_cols as in ``store_gradient``. Parallel
    over tiles, rows fastest, so that programs that run together share the bank. POLICY is as in the forward; with a
    pool, ``first`` and b_cols count columns of PAD bank rows each.
    """
    n_tile, m_tile = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    offs_n, mask_n = clamped(n_tile.to(tl.int64) * BLOCK_N, N, BLOCK_N)
    m0 = m_tile.to(tl.int64) * BLOCK_M
    local, left = columns(m0, M, BLOCK_M)
    UNIT: tl.constexpr = NORMALIZE and METRIC == "dot" and POLICY == "linear"
    COLUMNS: tl.constexpr = BLOCK_M // PAD

    x_tile = offs_n
    if D <= BLOCK_D:
        x_tile = load_tile(x_ptr, offs_n, stride_xn, stride_xd, 0, D, BLOCK_D).to(PRODUCT)
    s = products(
        x_ptr, w_ptr, x_tile, offs_n, m0 + local, stride_xn, stride_xd, stride_wm, stride_wd, width,
        D, BLOCK_N, BLOCK_M, BLOCK_D, PRODUCT, ACC, PRECISION,
    )  # fmt: skip
    counts, place, exclude, t, rx, sqx = rows_of_tile(
        offs_n, mask_n, y_ptr, c_ptr, exclude_ptr, scale_ptr, rx_ptr, sqx_ptr, stride_scale, ignore_index, first,
        METRIC, NORMALIZE, ACC,
    )  # fmt: skip
    s = scores(
        s, x_ptr, w_ptr, offs_n, m0, left, stride_xn, stride_xd, stride_wm, stride_wd, rx, sqx, rw_ptr, sqw_ptr,
        D, METRIC, NORMALIZE, BLOCK_M, ACC,
    )  # fmt: skip
    if NORMALIZE and METRIC == "dot" and not UNIT:
        s = s * rx[:, None]
    v, c0, c_left = s, m0, left
    if PAD > 1:
        v = pooled(s, number, POLICY, CENTRES, PAD, ACC)
        c0, c_left = m0 // PAD, left // PAD
    dz, ds, t_row = pair_gradients(
        v, counts, place, exclude, t, rx, offs_n, c0, c_left, c_ptr, bias_ptr,
        same_ptr, different_ptr, g_same_ptr, g_different_ptr, h_same_ptr, h_different_ptr, ignore_index,
        k_same, o_same, k_different, o_different, number,
        UNIT, exclude_ptr is not None, t_rows_ptr is not None, POLICY == "quadratic", BLOCK_N, COLUMNS, ACC,
    )  # fmt: skip

    if t_rows_ptr is not None:
        tl.store(t_rows_ptr + m_tile.to(tl.int64) * N + offs_n, t_row, mask=mask_n)
    if b_cols_ptr is not None:
        index = tl.arange(0, COLUMNS)
        at = n_tile.to(tl.int64) * (M // PAD) + c0 + index
        tl.store(b_cols_ptr + at, tl.sum(dz, 0), mask=index < c_left)
    ds = ds * t[:, None]
    if PAD > 1:
        ds = spread(ds, s, v, number, POLICY, CENTRES, PAD, ACC)
    store_gradient(
        ds, s, e_ptr, near_ptr, flag_ptr, own_rows_ptr, own_cols_ptr, lift_ptr, rx, sqx, rw_ptr, sqw_ptr,
        N, M, offs_n, mask_n, m0, left, n_tile, m_tile, n_tiles, stride_e, METRIC, FOLD, BLOCK_M, ACC,
    )  # fmt: skip

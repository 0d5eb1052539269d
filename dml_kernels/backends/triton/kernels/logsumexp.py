"""masked_logsumexp, forward: the bank streams past a tile of rows; one pass gives both log-sum-exps.

A program owns BLOCK_N rows and one range of the bank. For each row and set it keeps the running maximum m, the sum l of
exp(z - m), and if needed the plain sum. The m of `different` is in units of log 2, so that one fused multiply-add comes
before its exp2. ``merge_kernel`` merges the results of the ranges, O(N x splits), in order: the same bits every run.

With KEEP the program also computes the gradient in x of `different`, as flash attention computes its output, with the
bank as keys and values: sum_j exp(z_ij - m) w_j stays in registers together with the scores. This costs 2NMD and saves
the backward a pass of 4NMD. ``merge_means_kernel`` turns it into the mean, ``owned_means_kernel`` into the gradient.
"""

import triton
import triton.language as tl

from .policies import circle_weights, pooled
from .tiles import (
    INF,
    LN2,
    LOG2E,
    any_same,
    clamped,
    column,
    column_bias,
    columns,
    described_products,
    distances_to_scores,
    factor,
    load_tile,
    products,
    row_scale,
    same_label,
    squared_distances,
    used_pairs,
)


@triton.jit
def finite(m):
    """The maximum to subtract: 0 in place of -inf, because exp(-inf - -inf) is NaN."""
    return tl.where(m == -INF, 0.0, m)


@triton.jit
def weighted(
    total, weight, w_tile, rw_ptr, m0, local, left, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
    LIFT: tl.constexpr, PRODUCT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total (BLOCK_N, BLOCK_D) + weight (BLOCK_N, BLOCK_M) . the entries, which are unit vectors with UNIT.

    A weight is at most 1. In fp16 a weight below 6e-8 would be 0, so LIFT, a power of two above 1, multiplies all.
    """
    UNITS: tl.constexpr = UNIT and LIFT > 1
    if UNIT and not UNITS:
        weight = weight * column(rw_ptr, m0, left, BLOCK_M)[None, :]
    weight = (weight * LIFT).to(PRODUCT)
    entries = factor(w_tile, rw_ptr, m0 + local, UNITS, PRODUCT, ACC)
    return tl.dot(weight, entries, total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def forward_kernel(
    x_ptr, w_ptr, y_ptr, c_ptr, exclude_ptr, scale_ptr, bias_ptr, rx_ptr, rw_ptr, sqx_ptr, sqw_ptr, out_ptr,
    mean_ptr,
    N, M, span, splits, stride_xn, stride_xd, stride_wm, stride_wd, stride_scale, ignore_index,
    k_same: "fp64", o_same: "fp64", k_different: "fp64", o_different: "fp64", peak: "fp64", number: "fp64",  # noqa: F821
    width, D: tl.constexpr, METRIC: tl.constexpr, NORMALIZE: tl.constexpr, SUMS: tl.constexpr, FIXED: tl.constexpr,
    KEEP: tl.constexpr, LIFT: tl.constexpr, POLICY: tl.constexpr, CENTRES: tl.constexpr, PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """x (N, D), w (M, D) -> out (6 or 4, splits, N): m, l of `same`; m, l of `different`; with SUMS both plain sums.

    z_ij = k t_i (s_ij - o) + b_j with the factor k and offset o of the pair's set. Grid (row tiles, splits): each
    program walks ``span`` bank entries. NORMALIZE needs the inverse norms rx and rw; distances need the squared norms
    sqx and sqw. FIXED: `different` is summed relative to the constant ``peak`` (in units of log 2) and not to a
    running maximum. TMA: tiles are loaded by tensor descriptors; the columns of x and w are contiguous, and their rows
    a multiple of 16 bytes apart. SPECIALIZE: some warps load, others multiply. POLICY takes ``number`` (m of quadratic,
    gamma of softmax_pool); in a pool PAD bank rows make a column. KEEP: mean (splits, N, D) becomes LIFT times
    sum_j exp(z_ij - m) w_j of `different`; all of D is in one block.
    """
    offs_n, mask_n = clamped(tl.program_id(0).to(tl.int64) * BLOCK_N, N, BLOCK_N)
    split = tl.program_id(1)
    start = split.to(tl.int64) * span
    tiles = tl.cdiv(tl.minimum(M - start, span), BLOCK_M).to(tl.int32)

    UNIT: tl.constexpr = NORMALIZE and METRIC == "dot"
    FOLD: tl.constexpr = UNIT and POLICY == "linear"  # the slopes contain the rows' norms
    COLUMNS: tl.constexpr = BLOCK_M // PAD
    EXCLUDE: tl.constexpr = exclude_ptr is not None
    y = tl.load(y_ptr + offs_n)
    exclude = y
    if EXCLUDE:
        exclude = tl.load(exclude_ptr + offs_n)
    t = row_scale(scale_ptr, offs_n, stride_scale, ACC)
    slope_same, slope_different = tl.cast(k_same, ACC) * t, tl.cast(k_different, ACC) * t
    base_same, base_different = slope_same * tl.cast(o_same, ACC), slope_different * tl.cast(o_different, ACC)
    rx, sqx = t, t
    if NORMALIZE:
        rx = tl.load(rx_ptr + offs_n)
    if METRIC != "dot":
        sqx = tl.load(sqx_ptr + offs_n)
    if FOLD:
        slope_same, slope_different = slope_same * rx, slope_different * rx
    x_tile = offs_n
    if D <= BLOCK_D:
        x_tile = load_tile(x_ptr, offs_n, stride_xn, stride_xd, 0, D, BLOCK_D).to(PRODUCT)

    m_same = tl.full((BLOCK_N,), -INF, ACC)
    l_same = tl.zeros((BLOCK_N,), ACC)
    m_different = tl.full((BLOCK_N,), -INF, ACC)
    l_different = tl.zeros((BLOCK_N,), ACC)
    sum_same = tl.zeros((BLOCK_N,), ACC)
    sum_different = tl.zeros((BLOCK_N,), ACC)
    if KEEP:
        total = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    if TMA:
        w_tiles = tl.make_tensor_descriptor(w_ptr, [M, D], [stride_wm, 1], [BLOCK_M, BLOCK_D])
        x_tiles = tl.make_tensor_descriptor(x_ptr, [N, D], [stride_xn, 1], [BLOCK_N, BLOCK_D])
    for i in tl.range(tiles, warp_specialize=SPECIALIZE):
        m0 = start + tl.cast(i, tl.int64) * BLOCK_M
        local, left = columns(m0, M, BLOCK_M)
        if KEEP:
            if TMA:
                w_tile = w_tiles.load([m0.to(tl.int32), 0])
            else:
                w_tile = load_tile(w_ptr, m0 + local, stride_wm, stride_wd, 0, D, BLOCK_D)
            s = tl.dot(x_tile, tl.trans(w_tile.to(PRODUCT)), input_precision=PRECISION, out_dtype=ACC)
        elif TMA:
            s = described_products(
                x_tiles, w_tiles, x_tile, tl.program_id(0) * BLOCK_N, m0.to(tl.int32), width,
                D, BLOCK_N, BLOCK_M, BLOCK_D, PRODUCT, ACC, PRECISION,
            )  # fmt: skip
        else:
            s = products(
                x_ptr, w_ptr, x_tile, offs_n, m0 + local, stride_xn, stride_xd, stride_wm, stride_wd, width,
                D, BLOCK_N, BLOCK_M, BLOCK_D, PRODUCT, ACC, PRECISION,
            )  # fmt: skip
        if METRIC != "dot":
            s = squared_distances(
                s, x_ptr, w_ptr, offs_n, m0, left, stride_xn, stride_xd, stride_wm, stride_wd,
                rx, sqx, rw_ptr, sqw_ptr, D, NORMALIZE, BLOCK_M, ACC,
            )  # fmt: skip
            s = distances_to_scores(s, METRIC)
        if UNIT:
            s = s * column(rw_ptr, m0, left, BLOCK_M)[None, :]
        if UNIT and not FOLD:
            s = s * rx[:, None]
        if PAD > 1:
            s = pooled(s, number, POLICY, CENTRES, PAD, ACC)
            m0, left = m0 // PAD, left // PAD
        # `same` comes first, so that no score is needed after `different`, which every tile has.
        if any_same(y, c_ptr, m0, left, COLUMNS):
            # In natural units, so that the result for a row's only positive is exactly its logit.
            counted = used_pairs(c_ptr, bias_ptr, exclude, m0, left, ignore_index, COLUMNS, EXCLUDE)
            counted = counted & same_label(y, c_ptr, m0, left, COLUMNS)
            z = s * slope_same[:, None] - base_same[:, None]
            if POLICY == "quadratic":
                z = z * circle_weights(s, number, True, ACC)
            if bias_ptr is not None:
                z += column_bias(bias_ptr, m0, left, COLUMNS, ACC)[None, :]
            if SUMS:
                sum_same += tl.sum(tl.where(counted, z, 0.0), 1)
            z = tl.where(counted, z, -INF)
            m_new = tl.maximum(m_same, tl.max(z, 1))
            shift = finite(m_new)
            added = tl.sum(tl.exp2((z - shift[:, None]) * LOG2E), 1)
            l_same = l_same * tl.exp2((m_same - shift) * LOG2E) + added
            m_same = m_new

        counted = used_pairs(c_ptr, bias_ptr, exclude, m0, left, ignore_index, COLUMNS, EXCLUDE)
        counted = counted & (same_label(y, c_ptr, m0, left, COLUMNS) == 0)
        z = s * slope_different[:, None] - base_different[:, None]
        if POLICY == "quadratic":
            z = z * circle_weights(s, number, False, ACC)
        if bias_ptr is not None:
            z += column_bias(bias_ptr, m0, left, COLUMNS, ACC)[None, :]
        if SUMS:
            sum_different += tl.sum(tl.where(counted, z, 0.0), 1)
        z = tl.where(counted, z, -INF)
        if FIXED:
            weight = tl.exp2(z * LOG2E - tl.cast(peak, ACC))
            l_different += tl.sum(weight, 1)
        else:
            m_new = tl.maximum(m_different, tl.max(z, 1) * LOG2E)
            shift = finite(m_new)
            weight = tl.exp2(z * LOG2E - shift[:, None])
            faded = tl.exp2(m_different - shift)
            l_different = l_different * faded + tl.sum(weight, 1)
            m_different = m_new
            if KEEP:
                total = total * faded[:, None]
        if KEEP:
            total = weighted(
                total, weight, w_tile, rw_ptr, m0, local, left, UNIT, BLOCK_M, LIFT, PRODUCT, ACC,
                PRECISION,
            )  # fmt: skip

    if FIXED:
        m_different = tl.full((BLOCK_N,), 0.0, ACC) + tl.cast(peak, ACC)
    at = out_ptr + split.to(tl.int64) * N + offs_n
    step = tl.cast(splits, tl.int64) * N
    tl.store(at, m_same, mask=mask_n)
    tl.store(at + step, l_same, mask=mask_n)
    tl.store(at + 2 * step, m_different, mask=mask_n)
    tl.store(at + 3 * step, l_different, mask=mask_n)
    if SUMS:
        tl.store(at + 4 * step, sum_same, mask=mask_n)
        tl.store(at + 5 * step, sum_different, mask=mask_n)
    if KEEP:
        offs_d = tl.arange(0, BLOCK_D)
        at_mean = mean_ptr + ((split.to(tl.int64) * N + offs_n) * D)[:, None] + offs_d[None, :]
        tl.store(at_mean, total, mask=mask_n[:, None] & (offs_d < D)[None, :])


@triton.jit
def merge_kernel(
    part_ptr, y_ptr, same_ptr, different_ptr, sum_same_ptr, sum_different_ptr, N, splits, ignore_index,
    SUMS: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The forward's partial results (6 or 4, splits, N) -> both log-sum-exps and, with SUMS, both sums, (N,) each.

    Parallel over rows; the ranges are merged in their order. An ignored row gives -inf and 0.
    """
    offs, mask = clamped(tl.program_id(0).to(tl.int64) * BLOCK_N, N, BLOCK_N)
    counts = tl.load(y_ptr + offs) != ignore_index
    step = tl.cast(splits, tl.int64) * N
    m_same = tl.full((BLOCK_N,), -INF, ACC)
    l_same = tl.zeros((BLOCK_N,), ACC)
    m_different = tl.full((BLOCK_N,), -INF, ACC)
    l_different = tl.zeros((BLOCK_N,), ACC)
    sum_same = tl.zeros((BLOCK_N,), ACC)
    sum_different = tl.zeros((BLOCK_N,), ACC)
    for split in range(splits):
        at = part_ptr + tl.cast(split, tl.int64) * N + offs
        m, total = tl.load(at), tl.load(at + step)
        m_new = tl.maximum(m_same, m)
        shift = finite(m_new)
        l_same = l_same * tl.exp2((m_same - shift) * LOG2E) + total * tl.exp2((m - shift) * LOG2E)
        m_same = m_new
        m, total = tl.load(at + 2 * step), tl.load(at + 3 * step)
        m_new = tl.maximum(m_different, m)
        shift = finite(m_new)
        l_different = l_different * tl.exp2(m_different - shift) + total * tl.exp2(m - shift)
        m_different = m_new
        if SUMS:
            sum_same += tl.load(at + 4 * step)
            sum_different += tl.load(at + 5 * step)
    tl.store(same_ptr + offs, tl.where(counts, m_same + tl.log2(l_same) * LN2, -INF), mask=mask)
    tl.store(different_ptr + offs, tl.where(counts, (m_different + tl.log2(l_different)) * LN2, -INF), mask=mask)
    if SUMS:
        tl.store(sum_same_ptr + offs, tl.where(counts, sum_same, 0.0), mask=mask)
        tl.store(sum_different_ptr + offs, tl.where(counts, sum_different, 0.0), mask=mask)


@triton.jit
def merge_means_kernel(
    part_ptr, sums_ptr, y_ptr, mean_ptr, N, splits, ignore_index, D: tl.constexpr, LIFT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The weighted sums of the ranges (splits, N, D), with their m and l of `different` -> mean (N, D).

    The mean is 0 for an empty set and for an ignored row.
    """
    offs, mask = clamped(tl.program_id(0).to(tl.int64) * BLOCK_N, N, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    inside = mask[:, None] & (offs_d < D)[None, :]
    step = tl.cast(splits, tl.int64) * N
    m = tl.full((BLOCK_N,), -INF, ACC)
    l_total = tl.zeros((BLOCK_N,), ACC)
    total = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    for split in range(splits):
        row = tl.cast(split, tl.int64) * N + offs
        m_part, l_part = tl.load(part_ptr + 2 * step + row), tl.load(part_ptr + 3 * step + row)
        m_new = tl.maximum(m, m_part)
        shift = finite(m_new)
        faded, share = tl.exp2(m - shift), tl.exp2(m_part - shift)
        m, l_total = m_new, l_total * faded + l_part * share
        sums = tl.load(sums_ptr + (row * D)[:, None] + offs_d[None, :], mask=inside, other=0.0)
        total = total * faded[:, None] + sums * share[:, None]
    some = (tl.load(y_ptr + offs) != ignore_index) & (l_total != 0)
    total = tl.where(some[:, None], total / (tl.where(some, l_total, 1.0) * LIFT)[:, None], 0.0)
    tl.store(mean_ptr + (offs * D)[:, None] + offs_d[None, :], total, mask=inside)

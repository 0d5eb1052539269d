"""masked_logsumexp, backward in the owned form: a program owns a tile of one matrix's gradient and walks the other.

Both kernels recompute the scores (2NMD) and keep the second product (2NMD) in registers. There is no dS in memory and
there are no atomics. Where one program sees all of the other matrix, it stores the finished gradient once; else the
walk is cut into splits, whose partial sums are added in order. All of D is in one block, so D is at most about 128.
Where the forward has kept the mean of `different` (KEEP there), the rows' gradient needs no walk.
"""

import triton
import triton.language as tl

from .gradients import incoming, pair_gradients, rows_of_tile, scores
from .tiles import INF, NEAR, clamped, column, columns, factor, load_tile, rounded, row_scale


@triton.jit
def point_gradients(
    ds, s, sqx, sqw_ptr, m0, left, METRIC: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """dS on the scores of distances -> dS on |u - p|^2, and which pairs are near, where it must not cancel."""
    d2 = -s
    if METRIC == "euclidean":
        ds = ds * tl.where(s == 0, 0.0, -0.5 / s)
        d2 = s * s
    near = d2 < (sqx[:, None] + column(sqw_ptr, m0, left, BLOCK_M)[None, :]) * NEAR
    return ds, near & (ds != 0)


@triton.jit
def on_products(
    ds, rx, rw_ptr, lift_ptr, m0, left, FOLD: tl.constexpr, BLOCK_M: tl.constexpr, PRODUCT: tl.constexpr
):  # fmt: skip
    """dS -> E on the raw products, as in ``store_gradient``, in the product dtype."""
    if FOLD:
        ds = ds * rx[:, None] * column(rw_ptr, m0, left, BLOCK_M)[None, :]
    if lift_ptr is not None:
        ds = ds * tl.load(lift_ptr)
    return ds.to(PRODUCT)


@triton.jit
def near_part(
    total, ds, b_ptr, rb_ptr, u, b0, stride_b, stride_bd, count,
    D: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """total (A, BLOCK_D) - sum_b ds_ab (u_a - p_b) over the ``count`` rows of the walked tile, one after the other."""
    offs_d = tl.arange(0, BLOCK_D)
    index = tl.arange(0, BLOCK_B)
    for j in range(count):
        b = b0 + j
        p = tl.load(b_ptr + b * stride_b + offs_d.to(tl.int64) * stride_bd, mask=offs_d < D, other=0.0).to(ACC)
        if NORMALIZE:
            p = rounded(p * tl.load(rb_ptr + b))
        total -= tl.sum(tl.where(index[None, :] == j, ds, 0.0), 1)[:, None] * (u - p[None, :])
    return total


@triton.jit
def points(
    t_ptr, r_ptr, offs, stride, stride_d, D: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The vectors between which distances are taken: rows as stored, or unit vectors.

    Callers add to ``t_ptr`` a number that is 0 wherever this runs, but which the compiler cannot know to be 0.
    Otherwise the compiler would load the rows that a program owns before its loop and hold them in registers
    throughout, for a branch that is seldom taken.
    """
    u = load_tile(t_ptr, offs, stride, stride_d, 0, D, BLOCK_D).to(ACC)
    if NORMALIZE:
        u = rounded(u * tl.load(r_ptr + offs)[:, None])
    return u


@triton.jit
def store_owned(
    total, own, t_ptr, r_ptr, unit_ptr, lift_ptr, out_ptr, own_ptr, offs, mask, stride, stride_d, R, split,
    D: tl.constexpr, METRIC: tl.constexpr, NORMALIZE: tl.constexpr, FOLD: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores the gradient in t, finished as ``project_kernel`` does; with PARTS, stores this split's part of it."""
    offs_d = tl.arange(0, BLOCK_D)
    inside = mask[:, None] & (offs_d < D)[None, :]
    at = (offs * D)[:, None] + offs_d[None, :]
    if PARTS:
        tl.store(out_ptr + tl.cast(split, tl.int64) * R * D + at, total, mask=inside)
        if METRIC != "dot":
            tl.store(own_ptr + tl.cast(split, tl.int64) * R + offs, own, mask=mask)
    else:
        t = load_tile(t_ptr, offs, stride, stride_d, 0, D, BLOCK_D).to(ACC)
        if lift_ptr is not None:
            total = total / tl.load(lift_ptr)
        if METRIC != "dot":
            own = 2 * own
        if NORMALIZE:
            r = tl.load(r_ptr + offs)
            unit = tl.load(unit_ptr + offs) > 0
            if not FOLD:
                total = total * r[:, None]
            if METRIC != "dot":
                own = tl.where(unit, 0.0, own * r * r)
        if METRIC != "dot":
            total -= own[:, None] * t
        if NORMALIZE:
            along = tl.where(unit, tl.sum(total * (t * r[:, None]), 1), 0.0) * r
            total -= along[:, None] * t
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def owned_rows_kernel(
    x_ptr, w_ptr, y_ptr, c_ptr, exclude_ptr, scale_ptr, bias_ptr, rx_ptr, rw_ptr, sqx_ptr, sqw_ptr, unit_ptr,
    same_ptr, different_ptr, g_same_ptr, g_different_ptr, h_same_ptr, h_different_ptr, lift_ptr,
    out_ptr, own_ptr, t_rows_ptr,
    N, M, span, stride_xn, stride_xd, stride_wm, stride_wd, stride_scale, ignore_index,
    k_same: "fp64", o_same: "fp64", k_different: "fp64", o_different: "fp64",  # noqa: F821
    D: tl.constexpr, METRIC: tl.constexpr, NORMALIZE: tl.constexpr, FOLD: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x (N, D), w (M, D) -> out: grad_x (N, D), or with PARTS the splits' parts (splits, N, D) and own (splits, N).

    t_rows (splits, N) is the scale's gradient. Either output may be None. Grid (row tiles, splits): a program owns
    BLOCK_N rows and walks ``span`` bank entries. dS is as in ``gradient_kernel``.
    """
    offs_n, mask_n = clamped(tl.program_id(0).to(tl.int64) * BLOCK_N, N, BLOCK_N)
    split = tl.program_id(1)
    start = split.to(tl.int64) * span
    tiles = tl.cdiv(tl.minimum(M - start, span), BLOCK_M).to(tl.int32)
    UNIT: tl.constexpr = NORMALIZE and METRIC == "dot"
    UNITS: tl.constexpr = NORMALIZE and not FOLD
    counts, place, exclude, t, rx, sqx = rows_of_tile(
        offs_n, mask_n, y_ptr, c_ptr, exclude_ptr, scale_ptr, rx_ptr, sqx_ptr, stride_scale, ignore_index, 0,
        METRIC, NORMALIZE, ACC,
    )  # fmt: skip
    x_tile = load_tile(x_ptr, offs_n, stride_xn, stride_xd, 0, D, BLOCK_D).to(PRODUCT)
    total = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    own = tl.zeros((BLOCK_N,), ACC)
    t_total = tl.zeros((BLOCK_N,), ACC)
    for i in range(tiles):
        m0 = start + tl.cast(i, tl.int64) * BLOCK_M
        local, left = columns(m0, M, BLOCK_M)
        w_stored = load_tile(w_ptr, m0 + local, stride_wm, stride_wd, 0, D, BLOCK_D)
        s = tl.dot(x_tile, tl.trans(w_stored.to(PRODUCT)), input_precision=PRECISION, out_dtype=ACC)
        s = scores(
            s, x_ptr, w_ptr, offs_n, m0, left, stride_xn, stride_xd, stride_wm, stride_wd, rx, sqx, rw_ptr, sqw_ptr,
            D, METRIC, NORMALIZE, BLOCK_M, ACC,
        )  # fmt: skip
        _, ds, t_row = pair_gradients(
            s, counts, place, exclude, t, rx, offs_n, m0, left, c_ptr, bias_ptr,
            same_ptr, different_ptr, g_same_ptr, g_different_ptr, h_same_ptr, h_different_ptr, ignore_index,
            k_same, o_same, k_different, o_different, 0.0,
            UNIT, exclude_ptr is not None, t_rows_ptr is not None, False, BLOCK_N, BLOCK_M, ACC,
        )  # fmt: skip
        t_total += t_row
        if out_ptr is not None:
            ds = ds * t[:, None]
            if METRIC != "dot":
                ds, near = point_gradients(ds, s, sqx, sqw_ptr, m0, left, METRIC, BLOCK_M)
                some = tl.max(near.to(tl.int32))
                if some > 0:
                    held = tl.where(near, 2 * ds, 0.0)
                    if FOLD:
                        held = held * rx[:, None]
                    if lift_ptr is not None:
                        held = held * tl.load(lift_ptr)
                    u = points(x_ptr + (some - 1), rx_ptr, offs_n, stride_xn, stride_xd, D, NORMALIZE, BLOCK_D, ACC)
                    total = near_part(
                        total, held, w_ptr, rw_ptr, u, m0, stride_wm, stride_wd, left,
                        D, NORMALIZE, BLOCK_M, BLOCK_D, ACC,
                    )  # fmt: skip
                ds = tl.where(near, 0.0, ds)
                own += tl.sum(ds, 1)
                ds = 2 * ds
            e = on_products(ds, rx, rw_ptr, lift_ptr, m0, left, FOLD, BLOCK_M, PRODUCT)
            p = factor(w_stored, rw_ptr, m0 + local, UNITS, PRODUCT, ACC)
            total = tl.dot(e, p, total, input_precision=PRECISION, out_dtype=ACC)
    if t_rows_ptr is not None:
        tl.store(t_rows_ptr + split.to(tl.int64) * N + offs_n, t_total, mask=mask_n)
    if out_ptr is not None:
        store_owned(
            total, own, x_ptr, rx_ptr, unit_ptr, lift_ptr, out_ptr, own_ptr, offs_n, mask_n, stride_xn, stride_xd,
            N, split, D, METRIC, NORMALIZE, FOLD, PARTS, BLOCK_D, ACC,
        )  # fmt: skip


@triton.jit
def owned_bank_kernel(
    x_ptr, w_ptr, y_ptr, c_ptr, exclude_ptr, scale_ptr, bias_ptr, rx_ptr, rw_ptr, sqx_ptr, sqw_ptr, unit_ptr,
    same_ptr, different_ptr, g_same_ptr, g_different_ptr, h_same_ptr, h_different_ptr, lift_ptr,
    out_ptr, own_ptr, b_cols_ptr,
    N, M, span, stride_xn, stride_xd, stride_wm, stride_wd, stride_scale, ignore_index,
    k_same: "fp64", o_same: "fp64", k_different: "fp64", o_different: "fp64",  # noqa: F821
    D: tl.constexpr, METRIC: tl.constexpr, NORMALIZE: tl.constexpr, FOLD: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x (N, D), w (M, D) -> out: grad_w (M, D), or with PARTS the splits' parts (splits, M, D) and own (splits, M).

    b_cols (splits, M) is the gradient of the biases. Either output may be None. Grid (bank tiles, splits): a program
    owns BLOCK_M bank entries and walks ``span`` rows.
    """
    m0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    local, left = columns(m0, M, BLOCK_M)
    offs_m = m0 + local
    mask_m = tl.arange(0, BLOCK_M) < left
    split = tl.program_id(1)
    start = split.to(tl.int64) * span
    tiles = tl.cdiv(tl.minimum(N - start, span), BLOCK_N).to(tl.int32)
    UNIT: tl.constexpr = NORMALIZE and METRIC == "dot"
    UNITS: tl.constexpr = NORMALIZE and not FOLD
    w_tile = load_tile(w_ptr, offs_m, stride_wm, stride_wd, 0, D, BLOCK_D).to(PRODUCT)
    total = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    own = tl.zeros((BLOCK_M,), ACC)
    b_total = tl.zeros((BLOCK_M,), ACC)
    for i in range(tiles):
        n0 = start + tl.cast(i, tl.int64) * BLOCK_N
        offs_n, mask_n = clamped(n0, N, BLOCK_N)
        x_stored = load_tile(x_ptr, offs_n, stride_xn, stride_xd, 0, D, BLOCK_D)
        s = tl.dot(x_stored.to(PRODUCT), tl.trans(w_tile), input_precision=PRECISION, out_dtype=ACC)
        counts, place, exclude, t, rx, sqx = rows_of_tile(
            offs_n, mask_n, y_ptr, c_ptr, exclude_ptr, scale_ptr, rx_ptr, sqx_ptr, stride_scale, ignore_index, 0,
            METRIC, NORMALIZE, ACC,
        )  # fmt: skip
        s = scores(
            s, x_ptr, w_ptr, offs_n, m0, left, stride_xn, stride_xd, stride_wm, stride_wd, rx, sqx, rw_ptr, sqw_ptr,
            D, METRIC, NORMALIZE, BLOCK_M, ACC,
        )  # fmt: skip
        dz, ds, _ = pair_gradients(
            s, counts, place, exclude, t, rx, offs_n, m0, left, c_ptr, bias_ptr,
            same_ptr, different_ptr, g_same_ptr, g_different_ptr, h_same_ptr, h_different_ptr, ignore_index,
            k_same, o_same, k_different, o_different, 0.0,
            UNIT, exclude_ptr is not None, False, False, BLOCK_N, BLOCK_M, ACC,
        )  # fmt: skip
        if b_cols_ptr is not None:
            b_total += tl.sum(dz, 0)
        ds = ds * t[:, None]
        if out_ptr is not None:
            # Beyond the last row are copies of it. They have no weight, but a NaN in them would spread.
            ds = tl.where(mask_n[:, None], ds, 0.0)
            if METRIC != "dot":
                ds, near = point_gradients(ds, s, sqx, sqw_ptr, m0, left, METRIC, BLOCK_M)
                some = tl.max(near.to(tl.int32))
                if some > 0:
                    held = tl.where(near, 2 * ds, 0.0)
                    if FOLD:
                        held = held * column(rw_ptr, m0, left, BLOCK_M)[None, :]
                    if lift_ptr is not None:
                        held = held * tl.load(lift_ptr)
                    u = points(w_ptr + (some - 1), rw_ptr, offs_m, stride_wm, stride_wd, D, NORMALIZE, BLOCK_D, ACC)
                    count = tl.minimum(N - n0, BLOCK_N).to(tl.int32)
                    total = near_part(
                        total, tl.trans(held), x_ptr, rx_ptr, u, n0, stride_xn, stride_xd, count,
                        D, NORMALIZE, BLOCK_N, BLOCK_D, ACC,
                    )  # fmt: skip
                ds = tl.where(near, 0.0, ds)
                own += tl.sum(ds, 0)
                ds = 2 * ds
            e = on_products(ds, rx, rw_ptr, lift_ptr, m0, left, FOLD, BLOCK_M, PRODUCT)
            u = factor(x_stored, rx_ptr, offs_n, UNITS, PRODUCT, ACC)
            total = tl.dot(tl.trans(e), u, total, input_precision=PRECISION, out_dtype=ACC)
    if b_cols_ptr is not None:
        at = split.to(tl.int64) * M + m0 + tl.arange(0, BLOCK_M)
        tl.store(b_cols_ptr + at, b_total, mask=mask_m)
    if out_ptr is not None:
        store_owned(
            total, own, w_ptr, rw_ptr, unit_ptr, lift_ptr, out_ptr, own_ptr, offs_m, mask_m, stride_wm, stride_wd,
            M, split, D, METRIC, NORMALIZE, FOLD, PARTS, BLOCK_D, ACC,
        )  # fmt: skip


@triton.jit
def owned_means_kernel(
    x_ptr, w_ptr, y_ptr, scale_ptr, rx_ptr, rw_ptr, unit_ptr, mean_ptr,
    same_ptr, different_ptr, g_same_ptr, g_different_ptr, out_ptr, t_rows_ptr,
    N, stride_xn, stride_xd, stride_wm, stride_wd, stride_scale,
    k_same: "fp64", o_same: "fp64", k_different: "fp64", o_different: "fp64",  # noqa: F821
    D: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean (N, D) of `different`, kept by the forward -> grad_x (N, D) and the scale's gradient t_rows (N,).

    A row has at most one positive, the entry whose index is its label, so its share is a gather. Either output may be
    None.
    """
    offs_n, mask_n = clamped(tl.program_id(0).to(tl.int64) * BLOCK_N, N, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    inside = mask_n[:, None] & (offs_d < D)[None, :]
    at = (offs_n * D)[:, None] + offs_d[None, :]
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    x = load_tile(x_ptr, offs_n, stride_xn, stride_xd, 0, D, BLOCK_D).to(ACC)
    # Both sets of an ignored row are empty, so neither counts.
    has_same = tl.load(same_ptr + offs_n) != -INF
    has_different = tl.load(different_ptr + offs_n) != -INF
    place = tl.where(has_same, tl.load(y_ptr + offs_n), 0)
    own = load_tile(w_ptr, place, stride_wm, stride_wd, 0, D, BLOCK_D).to(ACC)
    if NORMALIZE:
        own = own * tl.load(rw_ptr + place)[:, None]
    own = tl.where(has_same[:, None], own, 0.0)
    g_same = incoming(g_same_ptr, offs_n, has_same) * tl.cast(k_same, ACC)
    g_different = incoming(g_different_ptr, offs_n, has_different) * tl.cast(k_different, ACC)
    grad = g_same[:, None] * own + g_different[:, None] * mean
    r = tl.full((BLOCK_N,), 1.0, ACC)
    if NORMALIZE:
        r = tl.load(rx_ptr + offs_n)
    unit = x * r[:, None]
    along = tl.sum(grad * unit, 1)
    if t_rows_ptr is not None:
        offset = g_same * tl.cast(o_same, ACC) + g_different * tl.cast(o_different, ACC)
        tl.store(t_rows_ptr + offs_n, along - offset, mask=mask_n)
    if out_ptr is not None:
        if NORMALIZE:
            along = tl.where(tl.load(unit_ptr + offs_n) > 0, along, 0.0)
            grad -= along[:, None] * unit
        grad = grad * (r * row_scale(scale_ptr, offs_n, stride_scale, ACC))[:, None]
        tl.store(out_ptr + at, grad.to(out_ptr.dtype.element_ty), mask=inside)

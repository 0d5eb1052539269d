"""Device functions of every kernel over rows x bank: loads, products, scores and memberships of one tile.

A tile is (BLOCK_N rows) x (BLOCK_M bank entries). Indices are 64-bit and kept inside the matrix (``clamped``), so that
no load needs a row mask: beyond the edge there are copies of the last row, which are masked later. ACC is the
accumulation dtype, PRODUCT the dtype of the tensor-core products. Numbers that a kernel takes are annotated "fp64",
because a plain float would be fp32. Triton reads the annotations, so ``from __future__ import annotations`` is absent.
"""

import triton
import triton.language as tl

# Below this share of |u|^2 + |p|^2 a squared distance is computed from differences: the expansion has cancelled 4 bits.
NEAR = tl.constexpr(1.0 / 16)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit
def clamped(start, count, BLOCK: tl.constexpr):
    """BLOCK int64 indices from ``start``, kept below ``count``, and which of them were below it."""
    offs = start + tl.arange(0, BLOCK).to(tl.int64)
    return tl.minimum(offs, count - 1), offs < count


@triton.jit
def columns(m0, M, BLOCK_M: tl.constexpr):
    """The int32 offsets of a tile's bank entries from its start m0, kept below M, and how many entries are real.

    Code asks whether an entry is real by ``tl.arange(0, BLOCK_M) < left`` where it needs it, because an index costs no
    register.
    """
    left = tl.minimum(M - m0, BLOCK_M).to(tl.int32)
    return tl.minimum(tl.arange(0, BLOCK_M), left - 1), left


@triton.jit
def column(ptr, m0, left, BLOCK_M: tl.constexpr):
    """The part of a vector over the bank that belongs to one tile; 0 beyond its end. Addresses differ by constants."""
    index = tl.arange(0, BLOCK_M)
    return tl.load(ptr + m0 + index, mask=index < left, other=0)


@triton.jit
def load_tile(ptr, offs, stride, stride_d, d0, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The values of the rows ``offs`` in the BLOCK_D columns from d0, zero beyond D."""
    offs_d = d0 + tl.arange(0, BLOCK_D)
    at = ptr + (offs * stride)[:, None] + (offs_d.to(tl.int64) * stride_d)[None, :]
    if D % BLOCK_D == 0:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(offs_d < D)[None, :], other=0.0)
    return tile


@triton.jit
def products(
    x_ptr, w_ptr, x_tile, offs_n, offs_m, stride_xn, stride_xd, stride_wm, stride_wd, width,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x . w of a tile, in ACC. ``x_tile`` holds the rows, already loaded, where all of D fits into one block."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    if D <= BLOCK_D:
        w_tile = load_tile(w_ptr, offs_m, stride_wm, stride_wd, 0, D, BLOCK_D).to(PRODUCT)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        for d0 in range(0, width, BLOCK_D):
            x_part = load_tile(x_ptr, offs_n, stride_xn, stride_xd, d0, D, BLOCK_D).to(PRODUCT)
            w_part = load_tile(w_ptr, offs_m, stride_wm, stride_wd, d0, D, BLOCK_D).to(PRODUCT)
            acc = tl.dot(x_part, tl.trans(w_part), acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def described_products(
    x_tiles, w_tiles, x_tile, n0, m0, width, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, PRODUCT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As ``products``, for tiles loaded by tensor descriptors: beyond an edge are zeros, not copies of the last row."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    if D <= BLOCK_D:
        w_tile = w_tiles.load([m0, 0]).to(PRODUCT)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        for d0 in range(0, width, BLOCK_D):
            x_part = x_tiles.load([n0, d0]).to(PRODUCT)
            w_part = w_tiles.load([m0, d0]).to(PRODUCT)
            acc = tl.dot(x_part, tl.trans(w_part), acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def factor(tile, r_ptr, offs, UNITS: tl.constexpr, PRODUCT: tl.constexpr, ACC: tl.constexpr):
    """A stored tile as a factor of a gradient's product: unit vectors with UNITS (fp16), where no lift suits all."""
    if UNITS:
        tile = tile.to(ACC) * tl.load(r_ptr + offs)[:, None]
    return tile.to(PRODUCT)


@triton.jit
def rounded(unit):
    """A component of a unit vector, rounded: a compiler that fuses x r - w r would not give 0 for identical rows.

    The fused form leaves one of the two products unrounded, unless an opaque operation is between.
    """
    return tl.minimum(tl.maximum(unit, -1e30), 1e30)


@triton.jit
def squared_distances(
    acc, x_ptr, w_ptr, offs_n, m0, left, stride_xn, stride_xd, stride_wm, stride_wd,
    rx, sqx, rw_ptr, sqw_ptr, D: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """|u - p|^2 of a tile from its products, and for near pairs from differences.

    Only a tile with a near pair computes differences. Identical rows give exactly 0.
    """
    if NORMALIZE:
        acc = acc * rx[:, None] * column(rw_ptr, m0, left, BLOCK_M)[None, :]
    span = sqx[:, None] + column(sqw_ptr, m0, left, BLOCK_M)[None, :]
    d2 = span - 2 * acc
    # Beyond the edges, copies of the last row and of the last entry are near exactly where the originals are.
    if tl.min(d2 - span * NEAR) < 0:
        x_at = x_ptr + offs_n * stride_xn
        w_at = w_ptr + m0 * stride_wm
        index = tl.arange(0, BLOCK_M)  # times the stride in 32 bits, one register for each entry; see Operand.of
        direct = tl.zeros_like(d2)
        for _ in range(D):
            u = tl.load(x_at).to(ACC)
            p = tl.load(w_at + index * stride_wm, mask=index < left, other=0.0).to(ACC)
            if NORMALIZE:
                u, p = rounded(u * rx), rounded(p * column(rw_ptr, m0, left, BLOCK_M))
            gap = u[:, None] - p[None, :]
            direct += gap * gap
            x_at += stride_xd
            w_at += stride_wd
        d2 = tl.where(d2 < span * NEAR, direct, d2)
    return tl.where(d2 < 0, 0.0, d2)


@triton.jit
def distances_to_scores(d2, METRIC: tl.constexpr):
    """-|u - p|^2 or -|u - p|."""
    if METRIC == "euclidean":
        d2 = tl.sqrt(d2)
    return -d2


@triton.jit
def same_label(y, c_ptr, m0, left, BLOCK_M: tl.constexpr):
    """Which pairs of the tile share a label; without bank labels (c_ptr None) an entry's label is its index.

    The index is compared in 32 bits, relative to the tile, which takes one operation for each entry.
    """
    if c_ptr is None:
        same = relative(y, m0, left)[:, None] == tl.arange(0, BLOCK_M)[None, :]
    else:
        same = (y[:, None] == column(c_ptr, m0, left, BLOCK_M)[None, :]) & (tl.arange(0, BLOCK_M)[None, :] < left)
    return same


@triton.jit
def any_same(y, c_ptr, m0, left, BLOCK_M: tl.constexpr):
    """Whether any pair of the tile shares a label: most tiles of a large bank hold none."""
    if c_ptr is None:
        found = tl.max(relative(y, m0, left)) >= 0
    else:
        found = tl.max(same_label(y, c_ptr, m0, left, BLOCK_M).to(tl.int32)) > 0
    return found


@triton.jit
def relative(index, m0, left):
    """A bank index as int32 within the tile that starts at m0 and has ``left`` entries; -1 outside."""
    inside = (index >= m0) & (index < m0 + left)
    return tl.where(inside, index - m0, -1).to(tl.int32)


@triton.jit
def used_pairs(c_ptr, bias_ptr, exclude, m0, left, ignore_index, BLOCK_M: tl.constexpr, EXCLUDE: tl.constexpr):
    """Pairs that count in either set: real columns, no ignored label, no bias of -inf, not the row's own copy."""
    index = tl.arange(0, BLOCK_M)[None, :]
    used = index < left
    if c_ptr is not None:
        used = used & (column(c_ptr, m0, left, BLOCK_M) != ignore_index)[None, :]
    if bias_ptr is not None:
        used = used & (column(bias_ptr, m0, left, BLOCK_M) != -INF)[None, :]
    if EXCLUDE:
        used = used & (relative(exclude, m0, left)[:, None] != index)
    return used


@triton.jit
def column_bias(bias_ptr, m0, left, BLOCK_M: tl.constexpr, ACC: tl.constexpr):
    """Each column's bias, 0 for a column that a bias of -inf leaves out."""
    bias = column(bias_ptr, m0, left, BLOCK_M).to(ACC)
    return tl.where(bias == -INF, 0.0, bias)


@triton.jit
def row_scale(scale_ptr, offs_n, stride_scale, ACC: tl.constexpr):
    """The scale of each row, 1 where there is none; a scalar has stride 0."""
    scale = tl.full(offs_n.shape, 1.0, ACC)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs_n * stride_scale).to(ACC)
    return scale

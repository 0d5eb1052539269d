"""The gradient of near pairs, from their differences: -2 dS (u - p) would cancel if summed as -2 (dS u) + 2 (dS p)."""

import triton
import triton.language as tl

from .tiles import clamped, load_tile, rounded


@triton.jit
def near_kernel(
    a_ptr, b_ptr, ra_ptr, rb_ptr, ds_ptr, flag_ptr, lift_ptr, out_ptr, A, B, b_tiles,
    stride_a, stride_ad, stride_b, stride_bd, stride_dsa, stride_dsb, stride_flaga, stride_flagb,
    D: tl.constexpr, NORMALIZE: tl.constexpr, FOLD: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out (A, D) += -2 sum_b ds_ab (u_a - p_b), over the tiles that ``flag`` marks; times r_a with FOLD.

    u = a ra and p = b rb. In the marked tiles ``ds`` (A, B) holds near pairs, and 0 for other pairs. A program owns
    BLOCK_A rows and BLOCK_D columns of out and walks the tiles in order. Grid (row tiles, column tiles).
    """
    a_tile = tl.program_id(0)
    offs, mask = clamped(a_tile.to(tl.int64) * BLOCK_A, A, BLOCK_A)
    d0 = tl.program_id(1) * BLOCK_D
    offs_d = d0 + tl.arange(0, BLOCK_D)
    r = tl.full((BLOCK_A,), 1.0, ACC)
    if NORMALIZE:
        r = tl.load(ra_ptr + offs)
    u = load_tile(a_ptr, offs, stride_a, stride_ad, d0, D, BLOCK_D).to(ACC)
    if NORMALIZE:
        u = rounded(u * r[:, None])
    total = tl.zeros((BLOCK_A, BLOCK_D), ACC)
    marked = 0
    for b_tile in range(b_tiles):
        if tl.load(flag_ptr + a_tile.to(tl.int64) * stride_flaga + tl.cast(b_tile, tl.int64) * stride_flagb) > 0:
            marked += 1
            start = tl.cast(b_tile, tl.int64) * BLOCK_B
            for j in range(tl.minimum(B - start, BLOCK_B).to(tl.int32)):
                b = start + j
                p = tl.load(b_ptr + b * stride_b + offs_d.to(tl.int64) * stride_bd, mask=offs_d < D, other=0.0).to(ACC)
                if NORMALIZE:
                    p = rounded(p * tl.load(rb_ptr + b))
                total += tl.load(ds_ptr + offs * stride_dsa + b * stride_dsb)[:, None] * (u - p[None, :])
    if marked > 0:
        total = -2 * total
        if FOLD:
            total = total * r[:, None]
        if lift_ptr is not None:
            total = total * tl.load(lift_ptr)
        at = out_ptr + (offs * D)[:, None] + offs_d[None, :]
        mask2 = mask[:, None] & (offs_d < D)[None, :]
        tl.store(at, tl.load(at, mask=mask2, other=0.0) + total, mask=mask2)

"""Kernels over single matrices: norms, normalisation, and the projection that ends every gradient.

One program owns BLOCK_R rows and loops over ``width`` = D at run time, because the unrolled loop of a wide row spills.
Everything is read as it is stored and computed in ACC.
"""

import triton
import triton.language as tl

from .tiles import clamped, load_tile


@triton.jit
def inverse_norm(
    t_ptr, offs, stride, stride_d, eps, width, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """1 / max(|t|, eps) and |t|, in fp64, where squares of fp32 values neither overflow nor vanish."""
    total = tl.zeros((BLOCK_R,), tl.float64)
    for d0 in range(0, width, BLOCK_D):
        t = load_tile(t_ptr, offs, stride, stride_d, d0, D, BLOCK_D).to(tl.float64)
        total += tl.sum(t * t, 1)
    norm = tl.sqrt(total)
    # tl.maximum would drop a NaN.
    return 1.0 / tl.where(norm < eps, eps, norm), norm


@triton.jit
def norms_kernel(
    t_ptr, r_ptr, unit_ptr, sq_ptr, R, stride, stride_d, eps: "fp64",  # noqa: F821
    width, D: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """t (R, D) -> r = 1 / max(|t|, eps), unit = |t| >= eps (int8), sq = |t r|^2, each (R,) or None if not needed.

    Without NORMALIZE it computes only sq = |t|^2. Parallel over rows; reads t once.
    """
    offs, mask = clamped(tl.program_id(0).to(tl.int64) * BLOCK_R, R, BLOCK_R)
    r, norm = inverse_norm(t_ptr, offs, stride, stride_d, eps, width, D, BLOCK_R, BLOCK_D)
    if NORMALIZE:
        tl.store(r_ptr + offs, r.to(ACC), mask=mask)
        tl.store(unit_ptr + offs, (norm >= eps).to(tl.int8), mask=mask)
        norm = norm * r
    if sq_ptr is not None:
        tl.store(sq_ptr + offs, (norm * norm).to(ACC), mask=mask)


@triton.jit
def normalize_kernel(
    t_ptr, out_ptr, R, stride, stride_d, eps: "fp64",  # noqa: F821
    width, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out (R, D) contiguous = t r with r = 1 / max(|t|, eps). Parallel over rows; the cache serves the second read."""
    offs, mask = clamped(tl.program_id(0).to(tl.int64) * BLOCK_R, R, BLOCK_R)
    r, _ = inverse_norm(t_ptr, offs, stride, stride_d, eps, width, D, BLOCK_R, BLOCK_D)
    r = r.to(ACC)
    for d0 in range(0, width, BLOCK_D):
        offs_d = d0 + tl.arange(0, BLOCK_D)
        t = load_tile(t_ptr, offs, stride, stride_d, d0, D, BLOCK_D).to(ACC) * r[:, None]
        at = out_ptr + (offs * D)[:, None] + offs_d[None, :]
        tl.store(at, t.to(out_ptr.dtype.element_ty), mask=mask[:, None] & (offs_d < D)[None, :])


@triton.jit
def gradient_part(
    g_ptr, t_ptr, offs, stride_g, stride_gd, stride_t, stride_td, factor, own, d0,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(g factor - own t, t) of one block of columns."""
    g = load_tile(g_ptr, offs, stride_g, stride_gd, d0, D, BLOCK_D).to(ACC) * factor[:, None]
    t = load_tile(t_ptr, offs, stride_t, stride_td, d0, D, BLOCK_D).to(ACC)
    return g - own[:, None] * t, t


@triton.jit
def project_kernel(
    g_ptr, t_ptr, out_ptr, r_ptr, unit_ptr, own_ptr, lift_ptr, R, stride_g, stride_gd, stride_t, stride_td,
    width, D: tl.constexpr, NORMALIZE: tl.constexpr, FOLDED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The gradient in t (R, D) from g (R, D), the gradient in the compared vectors; out may be g.

    h = g / lift, times r unless FOLDED, when g contains r already. Where the row is not a unit vector, h also loses
    2 own r^2 t, the own part of its squared distances; from unit vectors the projection removes it anyway. Then
    out = h - u (u.h) for unit vectors u = t r, else h. Parallel over rows.
    """
    offs, mask = clamped(tl.program_id(0).to(tl.int64) * BLOCK_R, R, BLOCK_R)
    r = tl.full((BLOCK_R,), 1.0, ACC)
    free = tl.full((BLOCK_R,), 1.0, ACC)  # 1 for rows that are not divided by their norm
    if NORMALIZE:
        r = tl.load(r_ptr + offs)
        free = tl.where(tl.load(unit_ptr + offs) > 0, 0.0, 1.0).to(ACC)
    factor = tl.full((BLOCK_R,), 1.0, ACC)
    if not FOLDED:
        factor = r
    if lift_ptr is not None:
        factor = factor / tl.load(lift_ptr)
    own = tl.zeros((BLOCK_R,), ACC)
    if own_ptr is not None:
        own = 2 * free * tl.load(own_ptr + offs) * r * r
    along = tl.zeros((BLOCK_R,), ACC)
    if NORMALIZE:
        for d0 in range(0, width, BLOCK_D):
            g, t = gradient_part(
                g_ptr, t_ptr, offs, stride_g, stride_gd, stride_t, stride_td, factor, own, d0, D, BLOCK_D, ACC
            )
            along += tl.sum(g * (t * r[:, None]), 1)
        along = tl.where(free > 0, 0.0, along) * r
    for d0 in range(0, width, BLOCK_D):
        g, t = gradient_part(
            g_ptr, t_ptr, offs, stride_g, stride_gd, stride_t, stride_td, factor, own, d0, D, BLOCK_D, ACC
        )
        g -= along[:, None] * t
        offs_d = d0 + tl.arange(0, BLOCK_D)
        at = out_ptr + (offs * D)[:, None] + offs_d[None, :]
        tl.store(at, g.to(out_ptr.dtype.element_ty), mask=mask[:, None] & (offs_d < D)[None, :])

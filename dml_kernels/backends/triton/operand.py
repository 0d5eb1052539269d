"""Rows or bank of an op as the kernels take them: the matrix as it is stored, and the norms of its rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.contract import accumulate_dtype
from . import configs
from .kernels import rows as row_kernels
from .launch import ACCUMULATE, PRODUCTS, cdiv, launch
from .precision import fp32_products


def part(t: Tensor | None, rows: slice) -> Tensor | None:
    """t[rows], but t itself where that is all of it, because a view costs the host as much as a small kernel."""
    return t if t is None or rows.stop - rows.start == t.size(0) else t[rows]


# Kernels compute the offsets within a tile, of up to 128 rows, in 32 bits.
WIDEST_STRIDE = 1 << 24


class Operand(NamedTuple):
    """t (R, D) in any dtype and strides; r, unit and sq as ``norms_kernel`` gives them, None where not needed."""

    t: Tensor
    r: Tensor | None
    unit: Tensor | None
    sq: Tensor | None

    @staticmethod
    def of(t: Tensor, metric: str, normalize: bool, eps: float, dtype: torch.dtype) -> Operand:
        rows, d = t.shape
        if t.stride(0) >= WIDEST_STRIDE:
            t = t.contiguous()
        acc = accumulate_dtype(dtype)
        r = t.new_empty(rows, dtype=acc) if normalize else None
        unit = t.new_empty(rows, dtype=torch.int8) if normalize else None
        sq = t.new_empty(rows, dtype=acc) if metric != "dot" else None
        if normalize or sq is not None:
            tile, shared = _row_tile(d, acc)
            arguments = {
                "t_ptr": t, "r_ptr": r, "unit_ptr": unit, "sq_ptr": sq, "R": rows, "stride": t.stride(0),
                "stride_d": t.stride(1), "eps": eps, "NORMALIZE": normalize, **shared,
            }  # fmt: skip
            launch(row_kernels.norms_kernel, (cdiv(rows, tile.block_n),), arguments, num_warps=tile.num_warps,
                   num_stages=tile.num_stages)  # fmt: skip
        return Operand(t, r, unit, sq)

    def part(self, rows: slice) -> Operand:
        return Operand(*(part(v, rows) for v in self))

    @property
    def strides(self) -> tuple[int, int]:
        return self.t.stride(0), self.t.stride(1)

    def factor(self, dtype: torch.dtype) -> Tensor:
        """The factor of the vendor's products: t in the product dtype, but in fp16 unit vectors, because no power of
        two suits all norms.
        """
        if dtype == torch.float16 and self.r is not None:
            return (self.t * self.r[:, None]).to(dtype)
        return self.t.to(dtype)


def _row_tile(d: int, acc: torch.dtype) -> tuple[configs.Config, dict[str, Any]]:
    tile = configs.ROWS._replace(block_d=min(configs.ROWS.block_d, max(16, 1 << (d - 1).bit_length())))
    return tile, {"width": d, "D": d, "BLOCK_R": tile.block_n, "BLOCK_D": tile.block_d, "ACC": ACCUMULATE[acc]}


def tile_arguments(x: Operand, w: Operand, metric: str, dtype: torch.dtype, tile: configs.Config) -> dict[str, Any]:
    """The arguments with which every kernel over rows x bank reads its tiles."""
    return {
        "x_ptr": x.t, "w_ptr": w.t, "rx_ptr": x.r, "rw_ptr": w.r, "sqx_ptr": x.sq, "sqw_ptr": w.sq,
        "stride_xn": x.t.stride(0), "stride_xd": x.t.stride(1), "stride_wm": w.t.stride(0), "stride_wd": w.t.stride(1),
        "width": x.t.size(1), "D": x.t.size(1), "METRIC": metric, "NORMALIZE": x.r is not None,
        "BLOCK_N": tile.block_n, "BLOCK_M": tile.block_m, "BLOCK_D": tile.block_d,
        "PRODUCT": PRODUCTS[dtype], "ACC": ACCUMULATE[accumulate_dtype(dtype)],
        "PRECISION": fp32_products(configs.arch_of(x.t.device), dtype),
    }  # fmt: skip


def normalize_rows(t: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Unit vectors in ``dtype``."""
    rows, d = t.shape
    out = t.new_empty((rows, d), dtype=dtype)
    tile, shared = _row_tile(d, accumulate_dtype(t.dtype))
    arguments = {
        "t_ptr": t, "out_ptr": out, "R": rows, "stride": t.stride(0), "stride_d": t.stride(1), "eps": eps, **shared,
    }  # fmt: skip
    launch(row_kernels.normalize_kernel, (cdiv(rows, tile.block_n),), arguments, num_warps=tile.num_warps,
           num_stages=tile.num_stages)  # fmt: skip
    return out


def project(
    grad: Tensor, operand: Operand, out: Tensor, *, own: Tensor | None = None, lift: Tensor | None = None, folded: bool
) -> Tensor:
    """Runs ``project_kernel``: turns the gradient in the compared vectors into the gradient in the stored matrix."""
    rows, d = operand.t.shape
    tile, shared = _row_tile(d, accumulate_dtype(operand.t.dtype if grad.dtype != torch.float64 else grad.dtype))
    arguments = {
        "g_ptr": grad, "t_ptr": operand.t, "out_ptr": out, "r_ptr": operand.r, "unit_ptr": operand.unit,
        "own_ptr": own, "lift_ptr": lift, "R": rows, "stride_g": grad.stride(0), "stride_gd": grad.stride(1),
        "stride_t": operand.t.stride(0), "stride_td": operand.t.stride(1),
        "NORMALIZE": operand.r is not None, "FOLDED": folded, **shared,
    }  # fmt: skip
    launch(row_kernels.project_kernel, (cdiv(rows, tile.block_n),), arguments, num_warps=tile.num_warps,
           num_stages=tile.num_stages)  # fmt: skip
    return out


def finish(
    grad: Tensor, operand: Operand, own: Tensor | None, out: Tensor, *, lift: Tensor | None, folded: bool
) -> Tensor:
    """Calls :func:`project`, or copies where there is nothing to project."""
    if operand.r is None and own is None and lift is None:
        return out.copy_(grad)
    return project(grad, operand, out, own=own, lift=lift, folded=folded)

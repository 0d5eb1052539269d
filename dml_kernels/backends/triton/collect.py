"""The gradients of rows and bank from chunks of dS: the loop over chunks, the two products, and near pairs' part.

Forward and backward cost 8NMD in all: the kernel of a chunk recomputes the scores, and the vendor's library computes
the two gradient products out of a buffer that stays in the GPU's cache. For any N and M, BUFFER_BYTES bounds the memory
in addition to the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.contract import accumulate_dtype
from . import configs
from .kernels import near
from .launch import ACCUMULATE, cdiv, launch
from .operand import Operand, finish, part

# The buffers of a chunk fit into a GPU's cache. Wide embeddings do so much arithmetic on each dS that memory is fast
# enough for them; then many rows take larger chunks, so that launching does not take longer than computing.
BUFFER_BYTES = 48 << 20
LARGE_BUFFER_BYTES = 192 << 20
WIDE = 256
ROWS_AT_ONCE = 1 << 15
LARGEST_FP16 = 2.0**15


class Block(NamedTuple):
    """Some rows and a chunk of the bank, with the buffers that one launch fills; None for those not needed."""

    rows: slice
    cols: slice
    x: Operand
    w: Operand
    grid: tuple[int, int]  # row tiles, bank tiles
    e: Tensor | None  # (n, m) product dtype
    near: Tensor | None  # (n, m) accumulation dtype, written in marked tiles only
    flags: Tensor | None  # (bank tiles, row tiles) int32
    own_rows: Tensor | None  # (bank tiles, n): the own part of the rows' gradient in distances
    own_cols: Tensor | None  # (row tiles, m): that of the bank's

    def arguments(self) -> dict[str, Any]:
        return {
            "e_ptr": self.e, "near_ptr": self.near, "flag_ptr": self.flags, "own_rows_ptr": self.own_rows,
            "own_cols_ptr": self.own_cols, "n_tiles": self.grid[0], "stride_e": self.w.t.size(0),
        }  # fmt: skip


def product(a: Tensor, b: Tensor, acc: torch.dtype) -> Tensor:
    """a @ b in the accumulation dtype; for narrower operands the tensor cores write that dtype directly."""
    if a.dtype == acc:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=acc)
    return a.to(acc) @ b.to(acc)


def lift(bound: Tensor) -> Tensor:
    """The power of two that lifts the largest possible |E| near fp16's maximum; unlifted, 1e-6 / 4096 would be 0."""
    peak = bound.nan_to_num(nan=LARGEST_FP16, posinf=LARGEST_FP16).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.exp2(torch.floor(torch.log2(LARGEST_FP16 / peak)).clamp(-100, 100))


def slope_bound(x: Operand, w: Operand, metric: str) -> Tensor | float:
    """A bound on |E| / |dS|: the Euclidean slope is largest at the nearest pair that is not a near pair.

    Two rows of zeros are at distance 0, where the slope is 0, so they must not lower the lift of all others.
    """
    if metric != "euclidean":
        return 1.0 if metric == "dot" else 2.0
    (a, least_a), (b, least_b) = (
        (side.sq.amin(), torch.where(side.sq > 0, side.sq, math.inf).amin()) for side in (x, w)
    )
    return 4 / torch.minimum(least_a + b, a + least_b).clamp_min(1e-30).sqrt()


class Gradients:
    """Goes through the chunks: ``fill(block)`` launches the kernel that writes a block's dS; the rest happens here."""

    def __init__(
        self, x: Operand, w: Operand, metric: str, dtype: torch.dtype, needs: tuple[bool, bool],
        tile: configs.Config, lift: Tensor | None,
    ):  # fmt: skip
        self.x, self.w, self.metric, self.dtype, self.tile, self.lift = x, w, metric, dtype, tile, lift
        self.need_x, self.need_w = needs
        self.acc = accumulate_dtype(dtype)
        self.fold = x.r is not None and dtype != torch.float16
        self.x_factor = x.factor(dtype) if self.need_w else x.t
        self.grad_x = x.t.new_zeros(x.t.shape, dtype=self.acc) if self.need_x else None
        like = {"memory_format": torch.contiguous_format}
        self.grad_w = torch.empty_like(w.t, **like) if self.need_w else None
        distance = metric != "dot"
        self.buffers: dict[tuple[int, int], tuple[Tensor | None, ...]] = {}
        self.own_x = x.t.new_zeros(x.t.size(0), dtype=self.acc) if distance else None

    def chunk_width(self, n: int) -> int:
        """Bank entries in a chunk: its buffers take BUFFER_BYTES, or for wide embeddings 12 N x D in fp32."""
        d, item, acc = self.w.t.size(1), self.dtype.itemsize, self.acc.itemsize
        column = n * item + d * acc * self.need_w + d * item * (self.w.t.dtype != self.dtype)
        if self.metric != "dot":
            column += n * acc
        budget = BUFFER_BYTES
        if d >= WIDE:
            budget = max(budget, min(12 * n * d * 4, LARGE_BUFFER_BYTES))
        step = budget // column // self.tile.block_m * self.tile.block_m
        return max(step, self.tile.block_m)

    def blocks(self, cols: slice, row_step: int) -> Iterator[Block]:
        w, m = self.w.part(cols), cols.stop - cols.start
        for start in range(0, self.x.t.size(0), row_step):
            rows = slice(start, min(start + row_step, self.x.t.size(0)))
            n = rows.stop - rows.start
            grid = cdiv(n, self.tile.block_n), cdiv(m, self.tile.block_m)
            yield Block(rows, cols, self.x.part(rows), w, grid, *self._buffers(n, m, grid))

    def _buffers(self, n: int, m: int, grid: tuple[int, int]) -> tuple[Tensor | None, ...]:
        """e, near, flags, own_rows and own_cols of a block of this size; blocks of the same size share them."""
        if (n, m) not in self.buffers:
            self.buffers.clear()  # the last block may be smaller; never hold two sets at once
            new, acc, distance = self.x.t.new_empty, {"dtype": self.acc}, self.metric != "dot"
            self.buffers[n, m] = (
                new((n, m), dtype=self.dtype) if self.need_x or self.need_w else None,
                new((n, m), **acc) if distance else None,
                new(grid[::-1], dtype=torch.int32) if distance else None,
                new((grid[1], n), **acc) if distance else None,
                new((grid[0], m), **acc) if distance else None,
            )
        return self.buffers[n, m]

    def run(self, fill: Callable[[Block], None]) -> tuple[Tensor | None, Tensor | None]:
        """(grad_x, grad_w) in the dtypes of x and w; None where not needed."""
        n, m = self.x.t.size(0), self.w.t.size(0)
        row_step = min(n, ROWS_AT_ONCE)
        step = self.chunk_width(row_step)
        for start in range(0, m, step):
            cols = slice(start, min(start + step, m))
            chunk, own = None, None
            for block in self.blocks(cols, row_step):
                fill(block)
                chunk, own = self._add(block, chunk, own)
            if self.grad_w is not None:
                self._finish(chunk, self.w.part(cols), own, part(self.grad_w, cols))
        return self._finish_x(), self.grad_w

    def _add(self, block: Block, chunk: Tensor | None, own: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Adds a block to grad_x; returns the chunk's grad_w so far, and the column sums of its dS."""
        if self.grad_x is not None:
            rows = part(self.grad_x, block.rows)
            rows += product(block.e, block.w.factor(self.dtype), self.acc)
            if block.near is not None:
                self._near(block, rows, of_bank=False)
        if self.need_w:
            more = product(block.e.T, part(self.x_factor, block.rows), self.acc)
            chunk = more if chunk is None else chunk.add_(more)
            if block.near is not None:
                self._near(block, chunk, of_bank=True)
        if block.own_rows is not None:
            self.own_x[block.rows] += block.own_rows.sum(0)
            sums = block.own_cols.sum(0)
            own = sums if own is None else own.add_(sums)
        return chunk, own

    def _near(self, block: Block, out: Tensor, *, of_bank: bool) -> None:
        n_tile, m_tile, (a, b) = self.tile.block_n, self.tile.block_m, (block.x, block.w)
        strides, flags, side = (block.near.stride(0), 1), (1, block.flags.stride(0)), (n_tile, m_tile)
        if of_bank:
            a, b, strides, flags, side = b, a, strides[::-1], flags[::-1], side[::-1]
        d = a.t.size(1)
        block_d = min(configs.NEAR.block_d if configs.aligned(d) else 32, max(16, 1 << (d - 1).bit_length()))
        arguments = {
            "a_ptr": a.t, "b_ptr": b.t, "ra_ptr": a.r, "rb_ptr": b.r, "ds_ptr": block.near, "flag_ptr": block.flags,
            "lift_ptr": self.lift, "out_ptr": out, "A": a.t.size(0), "B": b.t.size(0),
            "b_tiles": cdiv(b.t.size(0), side[1]), "stride_a": a.t.stride(0), "stride_ad": a.t.stride(1),
            "stride_b": b.t.stride(0), "stride_bd": b.t.stride(1), "stride_dsa": strides[0], "stride_dsb": strides[1],
            "stride_flaga": flags[0], "stride_flagb": flags[1], "D": d, "NORMALIZE": a.r is not None,
            "FOLD": self.fold, "BLOCK_A": side[0], "BLOCK_B": side[1], "BLOCK_D": block_d,
            "ACC": ACCUMULATE[self.acc],
        }  # fmt: skip
        grid = cdiv(a.t.size(0), side[0]), cdiv(d, block_d)
        launch(near.near_kernel, grid, arguments, num_warps=configs.NEAR.num_warps, num_stages=1)

    def _finish(self, grad: Tensor, operand: Operand, own: Tensor | None, out: Tensor) -> Tensor:
        return finish(grad, operand, own, out, lift=self.lift, folded=self.fold)

    def _finish_x(self) -> Tensor | None:
        if self.grad_x is None:
            return None
        if self.grad_x.dtype == self.x.t.dtype:
            return self._finish(self.grad_x, self.x, self.own_x, self.grad_x)
        out = torch.empty_like(self.x.t, memory_format=torch.contiguous_format)
        return self._finish(self.grad_x, self.x, self.own_x, out)

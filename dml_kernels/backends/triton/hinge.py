"""masked_hinge_sum on the GPU: launches the kernels and allocates their memory, without a host synchronisation."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ...ops.contract import accumulate_dtype
from ...ops.signatures import ArgmaxSpec, HingeSpec, Lines, Search, Slopes
from . import configs
from .collect import Block, Gradients, lift, slope_bound
from .kernels import hinge as hinge_kernels
from .launch import launch, on_device
from .operand import Operand, part, tile_arguments


def operands(inputs: Lines | Search, spec: HingeSpec | ArgmaxSpec) -> tuple[Operand, Operand]:
    kind = (spec.metric, spec.normalize, spec.eps, spec.dtype)
    return Operand.of(inputs.x, *kind), Operand.of(inputs.w, *kind)


def pick(kernel: str, inputs: Lines | Search, spec: HingeSpec | ArgmaxSpec) -> configs.Config:
    extras = inputs.c is not None or inputs.exclude is not None
    arch = configs.arch_of(inputs.x.device)
    return configs.pick(kernel, arch, spec.dtype, inputs.x.size(1), spec.metric, inputs.w.dtype, extras)


def labels(inputs: Lines | Search, spec: HingeSpec | ArgmaxSpec) -> dict[str, Any]:
    c, exclude = (None if t is None else t.contiguous() for t in (inputs.c, inputs.exclude))
    return {"y_ptr": inputs.y.contiguous(), "c_ptr": c, "exclude_ptr": exclude, "ignore_index": spec.ignore_index}


def _line_arguments(lines: Lines) -> dict[str, Any]:
    return {
        "offset_same_ptr": lines.offset[0].contiguous(), "offset_different_ptr": lines.offset[1].contiguous(),
        "k_same": float(lines.k[0]), "k_different": float(lines.k[1]),
    }  # fmt: skip


def masked_hinge_sum_fwd(lines: Lines, spec: HingeSpec) -> tuple[Tensor, ...]:
    n, m = lines.x.size(0), lines.w.size(0)
    acc = accumulate_dtype(spec.dtype)
    if n == 0:
        return tuple(lines.x.new_zeros(0, dtype=dtype) for dtype in (acc, acc, torch.int64, torch.int64))
    with on_device(lines.x):
        x, w = operands(lines, spec)
        tile = pick("hinge", lines, spec)
        n_tiles, splits, span = configs.ranges(tile, n, m, lines.x.device)
        sums = lines.x.new_empty((2, splits, n), dtype=acc)
        counts = lines.x.new_empty((2, splits, n), dtype=torch.int32)
        arguments = {
            **tile_arguments(x, w, spec.metric, spec.dtype, tile), **labels(lines, spec), **_line_arguments(lines),
            "sum_ptr": sums, "count_ptr": counts, "N": n, "M": m, "span": span, "splits": splits,
        }  # fmt: skip
        launch(hinge_kernels.hinge_kernel, (n_tiles, splits), arguments, num_warps=tile.num_warps,
               num_stages=tile.num_stages)  # fmt: skip
        return *sums.sum(1).unbind(), *counts.sum(1, dtype=torch.int64).unbind()


def masked_hinge_sum_bwd(
    slopes: Slopes, needs: tuple[bool, bool], lines: Lines, spec: HingeSpec
) -> tuple[Tensor | None, Tensor | None]:
    if lines.x.size(0) == 0:
        wanted = zip((lines.x, lines.w), needs, strict=True)
        grad_x, grad_w = (torch.zeros_like(t) if need else None for t, need in wanted)
        return grad_x, grad_w
    with on_device(lines.x):
        x, w = operands(lines, spec)
        tile = pick("hinge_gradient", lines, spec)
        factor = None
        if spec.dtype == torch.float16:
            bound = reduce(torch.maximum, [g.abs() for g in slopes if g is not None])
            factor = lift(bound.nan_to_num(nan=0.0, posinf=0.0).amax() * slope_bound(x, w, spec.metric))
        marks = labels(lines, spec)
        rows = {
            **{name: marks[name] for name in ("y_ptr", "exclude_ptr")}, **_line_arguments(lines),
            "g_same_ptr": slopes.same, "g_different_ptr": slopes.different, "g_own_ptr": slopes.positive,
        }  # fmt: skip

        def fill(block: Block) -> None:
            arguments = {
                **tile_arguments(block.x, block.w, spec.metric, spec.dtype, tile), **block.arguments(),
                **{k: part(v, block.rows) if isinstance(v, Tensor) else v for k, v in rows.items()},
                "c_ptr": part(marks["c_ptr"], block.cols), "ignore_index": spec.ignore_index, "lift_ptr": factor,
                "N": block.x.t.size(0), "M": block.w.t.size(0), "first": block.cols.start,
                "FOLD": spec.normalize and spec.dtype != torch.float16,
            }  # fmt: skip
            launch(hinge_kernels.hinge_gradient_kernel, (block.grid[0] * block.grid[1],), arguments,
                   num_warps=tile.num_warps, num_stages=tile.num_stages)  # fmt: skip

        return Gradients(x, w, spec.metric, spec.dtype, needs, tile, factor).run(fill)

"""normalize and normalized_distance on the GPU: launches the kernels in order."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.signatures import DistanceSpec, Matrices, NormalizeSpec, Rows
from . import configs
from .collect import Block, Gradients, lift, slope_bound
from .kernels import distance
from .launch import cdiv, launch, on_device
from .operand import Operand, normalize_rows, project, tile_arguments


def normalize_fwd(rows: Rows, spec: NormalizeSpec) -> Tensor:
    with on_device(rows.x):
        return normalize_rows(rows.x, spec.eps, rows.x.dtype)


def normalize_bwd(grad: Tensor, inputs: Rows, spec: NormalizeSpec) -> Tensor:
    """r (g - u (u.g)): the projection that ends every gradient, here of a gradient without norms folded in."""
    x = inputs.x
    with on_device(x):
        rows = Operand.of(x, "dot", True, spec.eps, x.dtype)
        return project(grad, rows, torch.empty_like(x, memory_format=torch.contiguous_format), folded=False)


def normalized_distance_fwd(inputs: Matrices, spec: DistanceSpec) -> Tensor:
    (x, w), (metric, normalize, eps, dtype, _) = inputs, spec
    n, m = x.size(0), w.size(0)
    out = x.new_empty((n, m), dtype=dtype)
    if n == 0:
        return out
    with on_device(x):
        rows, bank = (Operand.of(t, metric, normalize, eps, dtype) for t in (x, w))
        tile = configs.pick("gradient", configs.arch_of(x.device), dtype, x.size(1), metric, w.dtype)
        n_tiles = cdiv(n, tile.block_n)
        arguments = {
            **tile_arguments(rows, bank, metric, dtype, tile), "out_ptr": out, "N": n, "M": m, "n_tiles": n_tiles,
        }  # fmt: skip
        launch(distance.distance_kernel, (n_tiles * cdiv(m, tile.block_m),), arguments, num_warps=tile.num_warps,
               num_stages=tile.num_stages)  # fmt: skip
    return out


def normalized_distance_bwd(grad, needs, inputs: Matrices, spec: DistanceSpec) -> tuple[Tensor | None, ...]:
    (x, w), (metric, normalize, eps, dtype, _) = inputs, spec
    if x.size(0) == 0:
        return tuple(torch.zeros_like(t) if need else None for t, need in zip((x, w), needs, strict=True))
    with on_device(x):
        rows, bank = (Operand.of(t, metric, normalize, eps, dtype) for t in (x, w))
        tile = configs.pick("gradient", configs.arch_of(x.device), dtype, x.size(1), metric, w.dtype)
        up = None
        if dtype == torch.float16:
            low, high = torch.aminmax(grad)  # unlike abs().amax() this makes no N x M temporary
            up = lift(torch.maximum(-low, high).float() * slope_bound(rows, bank, metric))

        def fill(block: Block) -> None:
            g = grad[block.rows, block.cols]
            arguments = {
                **tile_arguments(block.x, block.w, metric, dtype, tile), **block.arguments(), "g_ptr": g,
                "stride_gn": g.stride(0), "stride_gm": g.stride(1), "lift_ptr": up, "N": block.x.t.size(0),
                "M": block.w.t.size(0), "FOLD": normalize and dtype != torch.float16,
            }  # fmt: skip
            launch(distance.distance_gradient_kernel, (block.grid[0] * block.grid[1],), arguments,
                   num_warps=tile.num_warps, num_stages=tile.num_stages)  # fmt: skip

        return Gradients(rows, bank, metric, dtype, tuple(needs), tile, up).run(fill)

"""masked_argmax on the GPU: launches the kernels and allocates their memory, without a host synchronisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.contract import accumulate_dtype
from ...ops.signatures import ArgmaxSpec, Search
from . import configs
from .hinge import labels, operands, pick
from .kernels import argmax as argmax_kernels
from .launch import cdiv, launch, on_device
from .operand import tile_arguments

MASK = (1 << 64) - 1


def stream_of(seed: int) -> int:
    """The seed mixed as in ``noise.mix``, a signed 64-bit number; mixed on the host because once a call is enough."""
    h = seed & MASK
    for by, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        h = (h ^ (h >> by)) * factor & MASK
    h ^= h >> 31
    return h - (1 << 64) if h >> 63 else h


def _draw_arguments(inputs: Search, spec: ArgmaxSpec) -> dict[str, Any]:
    cutoff, beyond = spec.cutoffs
    d = inputs.x.size(1)
    return {
        "NOISE": spec.noise, "stream": stream_of(spec.seed) if spec.noise else 0,
        "cutoff2": cutoff * cutoff, "beyond2": beyond * beyond, "of_log": 0.5 * (2 - d), "of_log1p": -0.5 * (d - 3),
    }  # fmt: skip


def masked_argmax_fwd(inputs: Search, spec: ArgmaxSpec) -> list[Tensor]:
    n, m = inputs.x.size(0), inputs.w.size(0)
    acc = accumulate_dtype(spec.dtype)
    new = inputs.x.new_empty
    sizes = [n if wanted else 0 for wanted in spec.wanted]
    out = [new(size, dtype=dtype) for size in sizes for dtype in (torch.int64, acc, torch.int64)]
    if n == 0:
        return out
    with on_device(inputs.x):
        x, w = operands(inputs, spec)
        tile = pick("draw" if spec.noise else "argmax", inputs, spec)
        n_tiles, splits, span = configs.ranges(tile, n, m, inputs.x.device)
        low, high = (None if t is None else t.to(acc).contiguous() for t in (inputs.low, inputs.high))
        key = new((2, splits, n), dtype=torch.float64 if spec.noise else acc)
        index, count = (new((2, splits, n), dtype=dtype) for dtype in (torch.int64, torch.int32))
        score = new((2, splits, n), dtype=acc) if spec.noise else None
        marks = labels(inputs, spec)
        arguments = {
            **tile_arguments(x, w, spec.metric, spec.dtype, tile), **marks, **_draw_arguments(inputs, spec),
            "low_ptr": low, "high_ptr": high, "key_ptr": key, "index_ptr": index, "score_ptr": score,
            "count_ptr": count, "N": n, "M": m, "span": span, "splits": splits,
            "SAME": spec.wanted[0], "DIFFERENT": spec.wanted[1],
            "LARGEST_SAME": spec.largest[0], "LARGEST_DIFFERENT": spec.largest[1],
        }  # fmt: skip
        launch(argmax_kernels.argmax_kernel, (n_tiles, splits), arguments, num_warps=tile.num_warps,
               num_stages=tile.num_stages)  # fmt: skip
        for i in range(2):
            if spec.wanted[i]:
                arguments = {
                    "key_ptr": key[i], "index_ptr": index[i], "score_ptr": None if score is None else score[i],
                    "count_ptr": count[i], "y_ptr": marks["y_ptr"], "best_ptr": out[3 * i],
                    "score_out_ptr": out[3 * i + 1], "total_ptr": out[3 * i + 2], "N": n, "splits": splits,
                    "ignore_index": spec.ignore_index, "LARGEST": spec.largest[i], "NOISE": spec.noise, "BLOCK_N": 128,
                }  # fmt: skip
                launch(argmax_kernels.argmax_merge_kernel, (cdiv(n, 128),), arguments, num_warps=4, num_stages=2)
    return out

"""masked_argmax: the hardest, or a drawn, bank entry of a row's own label and of other labels; no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from . import choice
from .contract import accumulate_dtype, check_values
from .library import register, without_autocast
from .signatures import ArgmaxSpec, Bank, Search


def _fwd(inputs: Search, spec: ArgmaxSpec) -> tuple[Tensor, ...]:
    check_values(Bank(*inputs[:5]), spec.ignore_index)
    with without_autocast(inputs.x.device.type):
        return tuple(choice.BACKENDS[spec.backend].masked_argmax_fwd(inputs, spec))


def _fwd_fake(inputs: Search, spec: ArgmaxSpec) -> tuple[Tensor, ...]:
    dtypes = (torch.int64, accumulate_dtype(spec.dtype), torch.int64)
    sizes = [inputs.x.size(0) if wanted else 0 for wanted in spec.wanted]
    return tuple(inputs.x.new_empty(size, dtype=dtype) for size in sizes for dtype in dtypes)


fwd = register("masked_argmax_fwd", Search, ArgmaxSpec, 6, _fwd, _fwd_fake)


def masked_argmax(inputs: Search, spec: ArgmaxSpec) -> tuple[Tensor, ...]:
    """(index, score, count) of same, then of different, for checked arguments; see functional.masked_argmax."""
    return fwd(*(t if t is None else t.detach() for t in inputs), *spec)

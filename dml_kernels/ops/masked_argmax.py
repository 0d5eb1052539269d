"""masked_argmax: the hardest, or a drawn, bank entry of a row's own label and of other labels; no gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend
from .contract import Bank, accumulate_dtype, check_values
from .library import register, without_autocast

LOG_WEIGHTS = ("uniform", "distance")


class Search(NamedTuple):
    """The tensors of one call: as in Bank, and the open interval (low, high) of scores, each (N,) or None."""

    x: Tensor
    w: Tensor
    y: Tensor
    c: Tensor | None
    exclude: Tensor | None
    low: Tensor | None
    high: Tensor | None


class ArgmaxSpec(NamedTuple):
    """The numbers of one call; ``wanted`` and ``largest`` are for same and different."""

    metric: str
    normalize: bool
    wanted: list[bool]
    largest: list[bool]
    noise: bool
    seed: int
    log_weight: str
    cutoffs: list[float]
    eps: float
    ignore_index: int
    dtype: torch.dtype
    backend: str

    def empty_score(self, which: int) -> float:
        """The score of a set without candidates: worse than any."""
        return -torch.inf if self.largest[which] or self.noise else torch.inf


_INPUTS = "Tensor x, Tensor w, Tensor y, Tensor? c, Tensor? exclude, Tensor? low, Tensor? high"
_SPEC = (
    "str metric, bool normalize, bool[] wanted, bool[] largest, bool noise, int seed, str log_weight, float[] cutoffs, "
    "float eps, int ignore_index, ScalarType dtype, str backend"
)
N_INPUTS = 7


def _split(args: tuple[Any, ...]) -> tuple[Search, ArgmaxSpec]:
    return Search(*args[:N_INPUTS]), ArgmaxSpec(*args[N_INPUTS:])


def _fwd(*args: Any) -> tuple[Tensor, ...]:
    inputs, spec = _split(args)
    check_values(Bank(*inputs[:5], None, None, None), spec.ignore_index)
    with without_autocast(inputs.x.device.type):
        return tuple(backend.BACKENDS[spec.backend].masked_argmax_fwd(inputs, spec))


def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, spec = _split(args)
    dtypes = (torch.int64, accumulate_dtype(spec.dtype), torch.int64)
    sizes = [inputs.x.size(0) if wanted else 0 for wanted in spec.wanted]
    return tuple(inputs.x.new_empty(size, dtype=dtype) for size in sizes for dtype in dtypes)


fwd = register(
    "masked_argmax_fwd", f"({_INPUTS}, {_SPEC}) -> ({', '.join(['Tensor'] * 6)})", _fwd, _fwd_fake
)  # fmt: skip


def masked_argmax(inputs: Search, spec: ArgmaxSpec) -> tuple[Tensor, ...]:
    """(index, score, count) of same, then of different, for checked arguments; see functional.masked_argmax."""
    return fwd(*(t if t is None else t.detach() for t in inputs), *spec)

"""Who runs the pieces of a composed loss: a backend's kernels, or differentiable Functions around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Engine(NamedTuple):
    """The ops as plain calls: normalize(rows, spec), normalize_bwd(grad, rows, spec), lse(bank, spec) and
    lse_bwd(grads, lse, needs, bank, spec). ``ops/engines.py`` makes them.
    """

    normalize: Callable[..., Tensor]
    normalize_bwd: Callable[..., Tensor]
    lse: Callable[..., Sequence[Tensor]]
    lse_bwd: Callable[..., Sequence[Tensor | None]]

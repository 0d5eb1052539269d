"""What a composed loss needs in order to run its pieces, by a backend's kernels or by differentiable Functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Engine(NamedTuple):
    """Four functions: normalize(rows, spec), normalize_bwd(grad, rows, spec), lse(bank, spec) and
    lse_bwd(grads, lse, needs, bank, spec). ``ops/engines.py`` makes the engines.
    """

    normalize: Callable[..., Tensor]
    normalize_bwd: Callable[..., Tensor]
    lse: Callable[..., Sequence[Tensor]]
    lse_bwd: Callable[..., Sequence[Tensor | None]]

"""Who runs the pieces of a composed loss: a backend's kernels, or differentiable Functions around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from ...ops import choice as backends
from ...ops import masked_logsumexp as lse_op
from ...ops import normalize as normalize_op


class Engine(NamedTuple):
    """The ops as plain calls: normalize(rows, spec), normalize_bwd(grad, rows, spec), lse(bank, spec) and
    lse_bwd(grads, lse, needs, bank, spec).
    """

    normalize: Callable[..., Tensor]
    normalize_bwd: Callable[..., Tensor]
    lse: Callable[..., Sequence[Tensor]]
    lse_bwd: Callable[..., Sequence[Tensor | None]]

    @staticmethod
    def kernels(backend: str) -> Engine:
        """A backend's own ops; not differentiable."""
        b = backends.BACKENDS[backend]
        return Engine(b.normalize_fwd, b.normalize_bwd, b.masked_logsumexp_fwd, b.masked_logsumexp_bwd)

    @staticmethod
    def functions(backend: str) -> Engine:
        """The same ops, as Functions with derivatives."""
        return Engine(
            normalize_op.normalize,
            lambda grad, rows, spec: normalize_op._Backward.apply(grad, *rows, spec),
            lse_op.masked_logsumexp,
            lambda grads, lse, needs, bank, spec: lse_op._Backward.apply(*grads, *lse, None, needs, *bank, spec),
        )

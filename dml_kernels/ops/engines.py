"""The engines that run the pieces of a composed loss: a backend's kernels, or the ops with their derivatives."""

from __future__ import annotations

from ..backends.composed.engine import Engine
from . import choice
from . import masked_logsumexp as lse_op
from . import normalize as normalize_op


def kernels(backend: str) -> Engine:
    """The ops of a backend, called directly; not differentiable."""
    b = choice.BACKENDS[backend]
    return Engine(
        b.normalize_fwd,
        b.normalize_bwd,
        b.masked_logsumexp_fwd,
        lambda grads, lse, needs, bank, spec: b.masked_logsumexp_bwd(grads, lse, None, needs, bank, spec),
    )


def functions() -> Engine:
    """The same ops as autograd Functions; the backend is named in the specs that the loss passes."""
    return Engine(
        normalize_op.differentiable,
        lambda grad, rows, spec: normalize_op._Backward.apply(grad, *rows, spec),
        lse_op.differentiable,
        lambda grads, lse, needs, bank, spec: lse_op._Backward.apply(*grads, *lse, None, needs, *bank, spec),
    )

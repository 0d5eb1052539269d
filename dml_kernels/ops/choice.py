"""The one place that decides which backend runs an op, and can say why.

A backend is a module or object with a ``name``, ``can_run(op, device, dtype, policy, centres)``, which gives the reason
that it cannot, or None, and the ops' forward and backward functions. The choice is made in the forward and travels as
an op argument, so that the backward, which may run on another thread or after a ``with use_backend(...)`` has ended,
uses the same one.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from ..backends import cpu as cpu_backend
from ..backends import cuda as cuda_backend
from ..backends import torch as torch_backend
from ..backends import triton as triton_backend
from .library import Choices
from .signatures import Bank, Spec

OPS = (
    "normalize", "normalized_distance", "masked_logsumexp", "masked_hinge_sum", "masked_argmax",
    "proxy_nca_loss", "magnet_loss", "positive_pair_sum", "triplet_sum",
)  # fmt: skip
REFERENCE = "reference"
# In order of preference: the first that can run an op runs it.
BACKENDS: dict[str, Any] = Choices(
    "backend", {b.name: b for b in (cpu_backend, cuda_backend, triton_backend, torch_backend)}
)

# N M D up to which a GPU waits for launches rather than computes: there the C++ kernels, a launch each way, come before
# Triton's. A model, to be replaced by a measurement: counted in instructions, their step takes some 30 us at this size,
# and Triton's ten launches as long in a graph and several times that from Python; beyond it tensor cores win.
SMALL = 1 << 26

# The name in the innermost block of this thread or asyncio task.
_current: ContextVar[str | None] = ContextVar("dml_kernels.use_backend", default=None)


class _Blocks(threading.local):
    """This thread's open blocks, for torch.compile: it traces and guards these, and cannot read a context variable."""

    def __init__(self) -> None:
        self.names: list[str] = []


_blocks = _Blocks()


class Verdict(NamedTuple):
    """One backend's answer to 'can you run this?'."""

    backend: str
    ok: bool
    reason: str


def names() -> tuple[str, ...]:
    return (*BACKENDS, REFERENCE)


def _check_name(name: str) -> str:
    if not isinstance(name, str) or name not in names():
        raise ValueError(f"unknown backend {name!r}; the backends are {', '.join(names())}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` on the named backend.

    The block holds for its own thread and asyncio task, and tasks that these start; overlapping blocks elsewhere do not
    touch it. A thread started inside begins without it, as with any context variable: hand it
    ``contextvars.copy_context().run``. The backward of what ran inside uses the same backend, wherever and whenever it
    runs; what ``torch.utils.checkpoint`` runs anew runs where the backward does. A compiled function goes by its
    thread's blocks. ``DML_BACKEND=name`` in the environment serves a whole process. A backend that cannot run an op
    refuses with the reason; nothing falls back silently.

    Raises:
        ValueError: the name is not one of ``cpu``, ``cuda``, ``triton``, ``torch``, ``reference``.
    """
    _check_name(name)
    token = None if torch.compiler.is_compiling() else _current.set(name)
    names = _blocks.names
    names.append(name)
    try:
        yield
    finally:
        if token is not None:
            _current.reset(token)
        # The last of that name: blocks of other tasks may have been opened since.
        del names[len(names) - 1 - names[::-1].index(name)]


def requested(argument: str | None = None) -> str | None:
    """The backend asked for: by argument, else by the innermost ``use_backend``, else by ``DML_BACKEND``."""
    if argument is not None:
        return _check_name(argument)
    if torch.compiler.is_compiling():
        block = _blocks.names[-1] if _blocks.names else None
    else:
        block = _current.get()
    if block is not None:
        return block
    env = os.environ.get("DML_BACKEND")
    return _check_name(env) if env else None


def keeps_mean(bank: Bank, spec: Spec) -> bool:
    """Whether masked_logsumexp's forward works out the gradient in x as well: ``mean`` (N, D), kept for the backward.

    mean_i is the mean, under the softmax of ``different``, of the bank entries, as unit vectors where the scores are
    cosines: d different_i / d x_i but for the scale. A function of shapes and dtypes.
    """
    backend = BACKENDS[spec.backend]
    return hasattr(backend, "keeps_mean") and backend.keeps_mean(bank, spec)


def explain(op: str, device: torch.device | str, dtype: torch.dtype, policy: str = "linear") -> list[Verdict]:
    """Every backend's verdict on one op, in order of preference."""
    device = torch.device(device)
    verdicts = []
    for name, backend in BACKENDS.items():
        refusal = backend.can_run(op, device, dtype, policy)
        verdicts.append(Verdict(name, refusal is None, refusal or backend.describe()))
    return verdicts


def order(device: torch.device, dtype: torch.dtype, size: tuple[int, int, int] | None = None) -> list[str]:
    """The backends' names, the one to be preferred for N x M x D first."""
    names = list(BACKENDS)
    if device.type == "cpu":  # Triton's interpreter is there to prove kernels: whoever wants it asks for it
        names.remove(triton_backend.name)
        return [*names, triton_backend.name]
    large = size is not None and size[0] * size[1] * size[2] > SMALL
    if device.type == "cuda" and large and dtype != torch.float64:
        names.sort(key=lambda name: {"cuda": 1, "torch": 2}.get(name, 0))
    return names


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    policy: str = "linear",
    argument: str | None = None,
    size: tuple[int, int, int] | None = None,
    centres: int = 1,
) -> str:
    """The backend for an op on tensors of this device, product dtype and size N x M x D, and centres a class.

    Raises:
        RuntimeError: the requested backend, or every one, refuses; the message holds the reasons.
    """
    asked = requested(argument)
    if asked == REFERENCE:
        return REFERENCE
    refusals = []
    for name in (asked,) if asked else order(device, dtype, size):
        refusal = BACKENDS[name].can_run(op, device, dtype, policy, centres)
        if refusal is None:
            return name
        refusals.append(f"{name}: {refusal}")
    raise RuntimeError(f"no backend runs {op} for {dtype} on {device} with policy {policy!r}: " + "; ".join(refusals))

"""The choice of the backend that runs an op, and the reasons for it.

:class:`Backend` lists what a backend must have. The choice is made in the forward and travels as an argument of the op,
so that the backward uses the same backend, even on another thread or after the ``with use_backend(...)`` has ended.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..backends import cpu, cuda, reference, triton
from ..backends import torch as plain
from .library import Choices
from .signatures import (
    OPS,
    ArgmaxSpec,
    Bank,
    Clustered,
    DistanceSpec,
    HingeSpec,
    Lines,
    MagnetSpec,
    Matrices,
    NormalizeSpec,
    Pairs,
    PairSpec,
    Points,
    Proxied,
    ProxySpec,
    Rows,
    Search,
    Slopes,
    Spec,
    TripletSpec,
)

Needs = Sequence[bool]
Vectors = Sequence[Tensor]
Gradients = Sequence[Tensor | None]


class Backend(Protocol):
    """What a backend has: four facts, four questions, and two methods for each op in ``OPS``.

    A forward takes the op's tensors and its numbers. A backward takes, in front of these, the incoming gradients, what
    the forward kept, and ``needs``, one flag for each gradient; it returns the gradients in order, None where the flag
    is False. The methods of an op that is not in ``OPS`` may be missing. ``proxy_nca`` and ``magnet`` are composed of
    other ops where ``fuses`` returns False, and then their methods may be missing too.
    """

    name: str
    OPS: tuple[str, ...]
    OPTIONS: tuple[str, ...]  # the options that may differ from their defaults; any other is refused
    METRICS: tuple[str, ...]

    def can_run(self, op: str, device: torch.device, dtype: torch.dtype, asked: Mapping[str, Any]) -> str | None:
        """Why it cannot run an op in OPS on this device and product dtype, or None; ``asked`` has options by name."""

    def describe(self) -> str:
        """A short description of the backend, for messages."""

    def fuses(self, loss: str, inputs: Any) -> bool:
        """Whether it computes the whole loss ("proxy_nca" or "magnet") in one op for these tensors."""

    def keeps_mean(self, bank: Bank, spec: Spec) -> bool:
        """Whether masked_logsumexp_fwd also returns ``mean`` for the backward; see :func:`keeps_mean`."""

    def normalize_fwd(self, inputs: Rows, spec: NormalizeSpec) -> Tensor: ...
    def normalize_bwd(self, grad: Tensor, inputs: Rows, spec: NormalizeSpec) -> Tensor: ...
    def normalized_distance_fwd(self, inputs: Matrices, spec: DistanceSpec) -> Tensor: ...
    def normalized_distance_bwd(
        self, grad: Tensor, needs: Needs, inputs: Matrices, spec: DistanceSpec
    ) -> Gradients: ...
    def masked_logsumexp_fwd(self, inputs: Bank, spec: Spec) -> Sequence[Tensor]: ...
    def masked_logsumexp_bwd(
        self, grads: Vectors, lse: Vectors, mean: Tensor | None, needs: Needs, inputs: Bank, spec: Spec
    ) -> Gradients: ...
    def masked_hinge_sum_fwd(self, inputs: Lines, spec: HingeSpec) -> Sequence[Tensor]: ...
    def masked_hinge_sum_bwd(self, slopes: Slopes, needs: Needs, inputs: Lines, spec: HingeSpec) -> Gradients: ...
    def masked_argmax_fwd(self, inputs: Search, spec: ArgmaxSpec) -> Sequence[Tensor]: ...
    def proxy_nca_fwd(self, inputs: Proxied, spec: ProxySpec) -> Sequence[Tensor]: ...
    def proxy_nca_bwd(
        self, grad: Tensor, lse: Vectors, needs: Needs, inputs: Proxied, spec: ProxySpec
    ) -> Gradients: ...
    def magnet_fwd(self, inputs: Clustered, spec: MagnetSpec) -> Sequence[Tensor]: ...
    def magnet_bwd(
        self, grad: Tensor, different: Tensor, needs: Needs, inputs: Clustered, spec: MagnetSpec
    ) -> Gradients: ...
    def positive_pair_sum_fwd(self, inputs: Pairs, spec: PairSpec) -> Sequence[Tensor]: ...
    def positive_pair_sum_bwd(self, grad: Tensor, needs: Needs, inputs: Pairs, spec: PairSpec) -> Gradients: ...
    def triplet_sum_fwd(self, inputs: Points, spec: TripletSpec) -> Sequence[Tensor]: ...
    def triplet_sum_bwd(self, grad: Tensor, needs: Needs, inputs: Points, spec: TripletSpec) -> Gradients: ...


REFERENCE = reference.name
# In order of preference: the first that can run an op runs it.
BACKENDS: dict[str, Any] = Choices("backend", {b.name: b for b in (cpu, cuda, triton, plain)})

# Up to this N M D a GPU waits for launches longer than it computes, so the C++ kernels, with one launch in the forward
# and one in the backward, come before Triton's. The number is from a model and waits for a measurement: by a count of
# instructions, a step of the C++ kernels takes some 30 us at this size; Triton's ten launches take as long in a graph,
# and several times as long from Python. Beyond this size tensor cores win.
SMALL = 1 << 26

# The backend named by the innermost block of this thread or asyncio task.
_current: ContextVar[str | None] = ContextVar("dml_kernels.use_backend", default=None)


class _Blocks(threading.local):
    """This thread's open blocks, for torch.compile, which can trace and guard these but cannot read a context
    variable.
    """

    def __init__(self) -> None:
        self.names: list[str] = []


_blocks = _Blocks()


class Verdict(NamedTuple):
    """Whether one backend can run an op, and why or why not."""

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

    The block applies to its own thread and asyncio task, and to tasks started inside it. Blocks of other threads and
    tasks do not affect it. As with any context variable, a thread started inside begins without it; run its target
    through ``contextvars.copy_context().run``. The backward of a call inside the block uses the same backend, on any
    thread and at any time; ``torch.utils.checkpoint`` recomputes on the backend that applies where the backward runs.
    A compiled function follows the blocks of its thread. ``DML_BACKEND=name`` in the environment applies to the whole
    process. A backend that cannot run an op refuses with the reason; there is no silent fallback.

    Args:
        name: ``cpu``, ``cuda``, ``triton``, ``torch`` or ``reference``.

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
        # Delete the last of that name, as other tasks may have opened blocks since.
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
    """Whether masked_logsumexp's forward also computes ``mean`` (N, D) and keeps it for the backward.

    mean_i is the mean of the bank entries under the softmax of ``different``, of unit vectors where the scores are
    cosines. Apart from the scale it is d different_i / d x_i. The answer depends on shapes and dtypes alone.
    """
    return BACKENDS[spec.backend].keeps_mean(bank, spec)


def refusal(name: str, op: str, device: torch.device, dtype: torch.dtype, asked: Mapping[str, Any]) -> str | None:
    """Why a backend cannot run an op, or None. ``asked`` has the fields of the spec that differ from their defaults."""
    backend = BACKENDS[name]
    if op not in backend.OPS:
        return f"{op} is not implemented here"
    for option, value in asked.items():
        if not any(option in fields.__annotations__ for fields in OPS[op]):
            return f"{op} has no option {option}, such as {value!r}"
        if value not in backend.METRICS if option == "metric" else option not in backend.OPTIONS:
            return f"{option} {value!r} is not implemented here"
    return backend.can_run(op, device, dtype, asked)


def explain(op: str, device: torch.device | str, dtype: torch.dtype, **asked: Any) -> list[Verdict]:
    """Every backend's verdict on one op, in order of preference. ``asked`` has options, as ``policy="quadratic"``."""
    device = torch.device(device)
    verdicts = []
    for name, backend in BACKENDS.items():
        why = refusal(name, op, device, dtype, asked)
        verdicts.append(Verdict(name, why is None, why or backend.describe()))
    return verdicts


def order(device: torch.device, dtype: torch.dtype, size: tuple[int, int, int] | None = None) -> list[str]:
    """The names of the backends, in order of preference for a size of N x M x D."""
    names = list(BACKENDS)
    if device.type == "cpu":  # Triton's interpreter is for testing kernels, so it comes last
        names.remove(triton.name)
        return [*names, triton.name]
    large = size is not None and size[0] * size[1] * size[2] > SMALL
    if device.type == "cuda" and large and dtype != torch.float64:
        names.sort(key=lambda name: {"cuda": 1, "torch": 2}.get(name, 0))
    return names


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    argument: str | None = None,
    size: tuple[int, int, int] | None = None,
    **asked: Any,
) -> str:
    """The backend for an op on tensors of this device, product dtype and size N x M x D.

    Args:
        op: its name in ``OPS``.
        device: where the tensors are.
        dtype: the dtype of the products.
        argument: the backend that the caller asks for.
        size: N, M and D.
        asked: options of the op that differ from their defaults, and perhaps its metric.

    Returns:
        The name of the backend.

    Raises:
        RuntimeError: the requested backend refuses, or every backend does; the message holds the reasons.
    """
    wanted = requested(argument)
    if wanted == REFERENCE:
        return REFERENCE
    refusals = []
    for name in (wanted,) if wanted else order(device, dtype, size):
        why = refusal(name, op, device, dtype, asked)
        if why is None:
            return name
        refusals.append(f"{name}: {why}")
    with_what = "".join(f", {option} {value!r}" for option, value in asked.items())
    raise RuntimeError(f"no backend runs {op} for {dtype} on {device}{with_what}: " + "; ".join(refusals))


# Options that the op settles before a backend sees its tensors: every backend has them.
SETTLED = ("own",)

_Spec = TypeVar("_Spec", DistanceSpec, Spec, HingeSpec, ArgmaxSpec, PairSpec, TripletSpec)


def settle(op: str, inputs: Any, spec: _Spec, argument: str | None = None) -> _Spec:
    """The spec with its backend, chosen by the tensors, the metric, and the options that differ from their defaults.

    Raises:
        RuntimeError: no backend can run it, as for :func:`choose`.
    """
    asked = {"metric": spec.metric}
    for name, default in spec._field_defaults.items():
        value = getattr(spec, name)
        if value != default and name not in SETTLED:
            asked[name] = value
    if inputs.w is None and inputs.x.size(0) == 0:
        argument = plain.name  # a bank has rows; the loops over chunks alone need none
    elif inputs.w is None and inputs.exclude is not None and not getattr(spec, "own", False):
        asked["exclude"] = "in addition to the own copy"
    size = (inputs.x.size(0), *(inputs.x if inputs.w is None else inputs.w).shape)
    return spec._replace(backend=choose(op, inputs.x.device, spec.dtype, argument, size, **asked))

"""Hostile arguments for every registered op, one at a time; a program, because a missing check ends the process.

``python -m tests.support.raw_op_attack NAMESPACE BACKEND [LIBRARY]`` calls the public functions on small tensors,
records what reaches the ops of that namespace, and repeats each call with one argument changed. A change that a kernel
could not survive (a gradient of another shape with as many elements, a dtype that it does not read, a code that names
no choice) must be refused; any other may be refused or not. Prints a line for each fault, for each op that was not
called, and the number of calls.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dml_kernels import functional as F
from dml_kernels.backends import cpu as cpu_backend
from dml_kernels.backends import cuda as cuda_backend

CODES = {"metric": 3, "policy": 4, "reduction": 3}
# The argument that carries only a dtype.
EMPTY = "kind"
# No other argument determines the number of rows of these.
ANY_LENGTH = {"normalize_fwd x", "mlse_fwd w", "hinge_fwd w", "proxy_nca_fwd w", "magnet_fwd classes",
              "magnet_bwd classes", "all_within values", "noise_bits out", "magnet_fits x"}  # fmt: skip

Calls = dict[str, list[tuple[Any, ...]]]


class Recorder:
    """A namespace of compiled ops that keeps the arguments of each op's calls."""

    def __init__(self, ops: Any):
        self.ops, self.calls = ops, {}

    def __getattr__(self, name: str) -> Any:
        op = getattr(self.ops, name)

        def call(*args: Any) -> Any:
            self.calls.setdefault(name, []).append(args)
            return op(*args)

        return call


class Watch(TorchDispatchMode):
    """Records the arguments of the calls of dml_kernels::*."""

    calls: Calls

    def __init__(self) -> None:
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "dml_kernels":
            self.calls.setdefault(function._schema.name.split("::")[1], []).append(args)
        return function(*args, **(kwargs or {}))


def exercise(backend: str) -> None:
    """Runs the forward and backward of every op, with all of its optional tensors and without."""
    torch.manual_seed(0)
    n, m, d = 5, 6, 3
    x, w, proxies = torch.randn(n, d), torch.randn(m, d), torch.randn(m, d)
    y, c = torch.arange(n), torch.arange(m) % 4
    for t in (x, w, proxies):
        t.requires_grad_()
    scale, col_bias = (torch.rand(k, requires_grad=True) for k in (n, m))
    exclude = torch.full((n,), -1)
    on = {"backend": backend}
    twice(F.normalize(x, **on).square().sum(), x)
    twice(F.normalized_distance(x, w, **on).sum(), x, w)
    sum(F.masked_logsumexp(x, w, y, c, scale=scale, col_bias=col_bias, exclude=exclude, sums=True,
                           **on)[:4]).sum().backward()  # fmt: skip
    twice(sum(F.masked_logsumexp(x, w, y, **on)[:2]).sum(), x, w)
    weight = torch.rand(m)
    for reduction in ("mean", "none"):
        F.proxy_nca_loss(x, proxies, y, softmax_scale=scale, class_weight=weight, label_smoothing=0.1,
                         reduction=reduction, **on).sum().backward()  # fmt: skip
    variance = torch.tensor(0.5, requires_grad=True)
    F.magnet_loss(x, y, c, centers=w, variance=variance, **on).backward()
    F.magnet_loss(x, y, c, reduction="none", **on).sum().backward()
    if backend != "cuda":
        sum(F.masked_logsumexp(x, w, y // 2, policy="softmax_pool", policy_params=(2, 0.5), **on)[:2]).sum().backward()
        hinge = {"same": (-1.0, 0.5), "different": (1.0, 0.5), "exclude": exclude}
        sum(F.masked_hinge_sum(x, w, y, c, threshold=scale, **hinge, **on)[:2]).sum().backward()
        twice(F.masked_hinge_sum(x, w, y, different=(1.0, 0.5), relative=True, **on).different.sum(), x, w)
        F.masked_argmax(x, w, y, c, bounds=(-scale.detach(), None), exclude=exclude, noise_seed=1, **on)
    if backend == "torch":
        F.pair_scores(x, w, y, y).sum().backward()
        F.triplet_sum(x, w, y, c, margin=0.1).total.sum().backward()
        F.positive_pair_sum(x, w, y, c, scale, kind="softplus").total.sum().backward()


def changed(name: str, value: Any) -> Iterator[tuple[str, Any, bool]]:
    """(what, the argument changed, whether it must be refused)."""
    if isinstance(value, Tensor) and name != EMPTY and value.numel():
        if value.dim() == 2:
            yield "transposed", value.t().contiguous(), True
            yield "flat", value.flatten(), True
            yield "a row less", value[:-1], True
        if value.dim() == 1:
            yield "one less", value[:-1].clone(), True
            yield "one more", torch.cat((value, value[:1])), True
            yield "a column", value[:, None], True
        yield "of another kind", value.long() if value.is_floating_point() else value.float(), True
        yield "complex", value.to(torch.complex64), True
        yield "on meta", value.to("meta"), True
        yield "sparse", value.to_sparse() if value.dim() else value, bool(value.dim())
        if value.dtype == torch.float32 and value.dim():
            yield "of mkldnn", value.to_mkldnn(), True
    elif isinstance(value, bool):
        yield "turned", not value, False
    elif isinstance(value, int):
        for code in (-1, 99, 1 << 40):
            yield str(code), code, name in CODES
    elif isinstance(value, float):
        for number in (float("nan"), float("inf"), 0.0, -1.0):
            yield str(number), number, False
    elif isinstance(value, str):
        yield "nonsense", "nonsense", True
    elif isinstance(value, list):
        yield "empty", [], False
        yield "longer", value * 2, False


def twice(out: Tensor, *inputs: Tensor) -> None:
    """Computes both derivatives."""
    first = torch.autograd.grad(out, inputs, create_graph=True)
    sum((g * g).sum() for g in first).backward()


def attack(ops: Any, calls: Calls, memory: bool) -> None:
    """``memory``: an op that kernels run behind, which must refuse what they could not survive."""
    tried = 0
    for op, made in sorted(calls.items()):
        function = getattr(ops, op).default
        names = [argument.name for argument in function._schema.arguments]
        for args in made:
            for i, (name, value) in enumerate(zip(names, args)):
                for what, other, refused in changed(name, value):
                    fresh = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
                    fresh[i] = other
                    tried += 1
                    print(f"trying {op} {name} {what}", file=sys.stderr, flush=True)
                    try:
                        function(*fresh)
                    except (RuntimeError, ValueError, TypeError, IndexError):
                        continue
                    except Exception as error:
                        print(f"INTERNAL {op} {name} {what}: {type(error).__name__}: {error}")
                    else:
                        if memory and refused and f"{op} {name}" not in ANY_LENGTH:
                            print(f"TAKEN {op} {name} {what}")
    print(f"{tried} calls of {len(calls)} ops")


def record(namespace: str, backend: str) -> tuple[Any, Calls]:
    """The ops of the namespace and the arguments that the public functions call them with."""
    ops = getattr(torch.ops, namespace)
    if namespace == "dml_kernels":
        with Watch() as watch:
            exercise(backend)
        return ops, watch.calls
    recorder = Recorder(ops)
    {"cpu": cpu_backend, "cuda": cuda_backend}[backend]._ops = lambda: recorder
    exercise(backend)
    if backend == "cpu":
        recorder.calls["all_within"] = [(torch.arange(5), 0, 5, -1)]
        recorder.calls["noise_bits"] = [(torch.zeros(2, 3, dtype=torch.int64), 1, 2, 3)]
    return ops, recorder.calls


def main(namespace: str, backend: str, *library: str) -> None:
    torch.set_num_threads(1)
    if library:
        torch.ops.load_library(library[0])
        cuda_backend.namespace, cuda_backend.device_type = namespace, "cpu"
    ops, calls = record(namespace, backend)
    there = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{namespace}::")}
    if (namespace, backend) != ("dml_kernels", "cpu"):  # which leaves some ops to the torch backend
        for op in sorted(there - set(calls) - {"launches"}):  # the emulator's own
            print(f"NOT CALLED {op}")
    attack(ops, calls, memory=namespace != "dml_kernels")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""`python -m bench.overhead`: what a call costs apart from arithmetic, at 16 x 16 x 16 on one thread.

It measures microseconds of a forward, and of a forward and a backward, of the losses, and of the layers under two of
them: the functional op, the autograd Function, the registered op, the backend's method and the C++ behind it. Times are
medians of interleaved rounds in the processor time of the thread, which excludes the load of neighbours. In addition it
counts what does not depend on the machine: how many PyTorch ops a forward calls, how many functions of this package, in
how many files, and how often the call moves from one file to another.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dml_kernels
from dml_kernels import functional, losses
from dml_kernels.cli import tables
from dml_kernels.demo.checkpoint import write_json
from dml_kernels.ops import choice as backend
from dml_kernels.ops import masked_logsumexp, proxy_nca
from dml_kernels.profiling import interleaved_times

from . import machine

RUNS = Path(__file__).resolve().parent.parent / "runs" / "bench"
PACKAGE = str(Path(dml_kernels.__file__).parent)
SIZE = 16
PER_CLASS = 4
REPEATS = 100
# Registered op, its module, and the NamedTuples that its arguments make.
UNDER = {
    "masked_logsumexp": (masked_logsumexp, masked_logsumexp.Bank, masked_logsumexp.Spec),
    "proxy_nca": (proxy_nca, proxy_nca.Proxied, proxy_nca.ProxySpec),
}

Call = Callable[[], Any]


class Hops(NamedTuple):
    """What one call does in the package: functions called, files entered, moves from one file to another."""

    calls: int
    files: int
    moves: int


class Recorder(TorchDispatchMode):
    """Records the ops that reach PyTorch's dispatcher, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


def ops_of(call: Call) -> list[tuple[Any, tuple[Any, ...]]]:
    """All ops of a call, in order, apart from those inside another op."""
    with Recorder() as recorder:
        call()
    return recorder.seen


def called(call: Call) -> list[CodeType]:
    """All functions of the package that a call enters, in order, as the interpreter's profiling hook sees them."""
    found: list[CodeType] = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            found.append(frame.f_code)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def hops(call: Call) -> Hops:
    """Count the functions, files and moves of a call."""
    files = [code.co_filename for code in called(call)]
    return Hops(len(files), len(set(files)), sum(a != b for a, b in itertools.pairwise(files)))


def batch(family: str) -> tuple[Tensor, Tensor]:
    """Make embeddings that need a gradient, and labels: one embedding of each class, or some of each."""
    x = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return x, torch.arange(SIZE) // (1 if family == "proxies" else PER_CLASS)


def of_losses(wanted: Sequence[str]) -> dict[str, Call]:
    """Make the forward of each loss."""
    found: dict[str, Call] = {}
    for family in ("proxies", "pairs"):
        x, y = batch(family)
        given = {"num_classes": SIZE, "embedding_size": SIZE} if family == "proxies" else {}
        for name, entry in losses.family(family).items():
            if not wanted or name in wanted:
                found[name] = functools.partial(entry.loss(**given), x, y)
    return found


def layers(name: str, call: Call) -> dict[str, Call]:
    """The layers under a call that ends in the registered op ``name``, from the autograd Function down."""
    module, tensors, numbers = UNDER[name]
    args = next(args for op, args in ops_of(call) if op == module.fwd)
    inputs, spec = tensors(*args[: len(tensors._fields)]), numbers(*args[len(tensors._fields) :])
    method = getattr(backend.BACKENDS[spec.backend], f"{name}_fwd")
    compiled = [(op, args) for op, args in ops_of(lambda: method(inputs, spec)) if "dml_kernels" in str(op)]
    found = {
        "autograd Function": lambda: module.differentiable(inputs, spec),
        "registered op": lambda: module.fwd(*args),
        f"the {spec.backend} backend's method": lambda: method(inputs, spec),
    }
    if compiled:
        op, of_op = compiled[0]
        found["C++"] = lambda: op(*of_op)
    return {f"{name}: {layer}": call for layer, call in found.items()}


def contenders(wanted: Sequence[str]) -> dict[str, Call]:
    """All forwards, by their names in the table."""
    x, y = batch("proxies")
    w = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1)).requires_grad_()
    functions = {
        "masked_logsumexp": lambda: functional.masked_logsumexp(x, w, y, scale=8.0),
        "proxy_nca": lambda: losses.proxy_nca.proxy_nca_loss(x, w, y, softmax_scale=8.0),
    }
    found = of_losses(wanted)
    for name, function in functions.items():
        found |= {f"{name}: function": function, **layers(name, function)}
    return found


def _backward(out: Any) -> None:
    out = out if isinstance(out, Tensor) else out[0] + out[1]
    (out if out.dim() == 0 else out.sum()).backward()


def _repeated(call: Call) -> Call:
    def run() -> None:
        for _ in range(REPEATS):
            call()

    return run


def measure(forwards: dict[str, Call], rounds: int) -> dict[str, dict[str, float]]:
    """Median microseconds: name -> (forward, step); there is no step where no result has a gradient."""
    steps = {n: lambda f=f: _backward(f()) for n, f in forwards.items() if n.endswith(("Loss", "function", "Function"))}
    variants = {("forward", n): _repeated(f) for n, f in forwards.items()}
    variants |= {("step", n): _repeated(f) for n, f in steps.items()}
    times = interleaved_times(variants, rounds, clock=time.thread_time)
    found: dict[str, dict[str, float]] = {name: {} for name in forwards}
    for (kind, name), seconds in times.items():
        found[name][kind] = statistics.median(seconds) / REPEATS * 1e6
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--losses", default="", help="names, with commas; default: all with proxies or pairs")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved; default %(default)s")
    parser.add_argument("--out", type=Path, default=RUNS, metavar="DIR", help="default runs/bench")
    options = parser.parse_args(argv)
    wanted = [name for name in options.losses.split(",") if name]
    there = [*losses.family("proxies"), *losses.family("pairs")]
    if unknown := sorted(set(wanted) - set(there)):
        parser.error(f"no such losses: {', '.join(unknown)}; there are {', '.join(there)}")
    torch.set_num_threads(1)
    found, forwards = machine.describe(), contenders(wanted)
    times = measure(forwards, options.rounds)
    records = [
        {"name": name, **times[name], "ops": len(ops_of(call)), **hops(call)._asdict()}
        for name, call in forwards.items()
    ]
    rows = [
        (r["name"], f"{r['forward']:.1f}", f"{r['step']:.1f}" if "step" in r else "",
         *(str(r[k]) for k in ("ops", *Hops._fields)))
        for r in records
    ]  # fmt: skip
    title = f"Microseconds of a call at {SIZE} x {SIZE} x {SIZE}, one thread, {options.rounds} rounds"
    tables.show(title, ("", "forward", "and backward", "PyTorch ops", *Hops._fields), rows)
    print(machine.line(found))
    path = options.out / f"overhead-{time.strftime('%Y%m%d-%H%M%S')}.json"
    write_json(path, {"machine": found, "records": records})
    print(f"saved {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Checks on this GPU: build, fp64 truth up to 10 million classes, same bits, streams, graphs, sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dml_kernels import build_info
from dml_kernels import functional as F
from dml_kernels.ops import choice as backends

from ..case import TOLERANCES, check, compare
from ..problem import Problem, Size, make
from .store import ROOT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
LIMITS = {**TOLERANCES, torch.float16: TOLERANCES[torch.bfloat16]}
SIZES = ("33x1000x128", "128x100x128", "512x100kx128", "1024x20kx512", "64x10kx1024", "5x7x3")
HUGE = "64x10Mx16"
# Sizes that are small enough for the interpreter of a dry run.
DRY_SIZES, DRY_HUGE = ("5x7x3", "33x100x16"), "4x2kx16"
METRICS = ("cosine", "dot", "sqeuclidean", "euclidean")


def build() -> None:
    """Build the extension, in place, for this GPU alone."""
    environment = dict(os.environ)
    if torch.cuda.is_available():
        environment.setdefault("TORCH_CUDA_ARCH_LIST", ".".join(map(str, torch.cuda.get_device_capability())))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the build failed")


def built() -> dict[str, Any]:
    """What the extension holds; raises an error where it is missing."""
    extension = build_info.load()
    if extension.module is None:
        raise RuntimeError(f"the extension is {extension.reason}")
    return {"extension": {name: str(value) for name, value in extension.info.items()}}


def names(op: str, device: str, dtype: torch.dtype) -> list[str]:
    """The backends that run an op here."""
    return [v.backend for v in backends.explain(op, device, dtype) if v.ok]


def _moved(problem: Problem, device: str) -> tuple[torch.Tensor, ...]:
    return tuple(t.to(device) for t in (problem.x, problem.w, problem.y, problem.c))


def problem_on(size: str, dtype: torch.dtype, device: str) -> Problem:
    """The problem of the benchmarks, on the device."""
    found = make(Size.parse(size), dtype)
    return Problem(found.size, *_moved(found, device))


def lse_step(problem: Problem, metric: str, backend: str, few: bool) -> tuple[torch.Tensor, ...]:
    """Compute both log-sum-exps and both gradients."""
    x, w = problem.x.detach().requires_grad_(), problem.w.detach().requires_grad_()
    y, c = (problem.c[problem.y], problem.c) if few else (problem.y, None)
    scale = 8.0 / problem.size.d if metric == "dot" else 8.0
    out = F.masked_logsumexp(x, w, y, c, metric=metric, normalize=metric != "dot", scale=scale, backend=backend)
    grads = torch.autograd.grad((out.same.sum() + 2 * out.different.sum()), (x, w))
    return out.same.detach(), out.different.detach(), *grads


def loss_step(problem: Problem, backend: str | None, **options: Any) -> tuple[torch.Tensor, ...]:
    """Compute Proxy-NCA and both gradients."""
    x, w = problem.x.detach().requires_grad_(), problem.w.detach().requires_grad_()
    value = F.proxy_nca_loss(x, w, problem.y, softmax_scale=8.0, backend=backend, **options)
    return value.detach(), *torch.autograd.grad(value, (x, w))


def magnet_step(problem: Problem, backend: str | None) -> tuple[torch.Tensor, ...]:
    """Compute Magnet with the means of the batch, and its gradient."""
    x = problem.x.detach().requires_grad_()
    value = F.magnet_loss(x, problem.y, torch.arange(problem.size.m, device=x.device) // 3, backend=backend)
    return value.detach(), *torch.autograd.grad(value, x)


def _compare(
    step: Callable[[Problem, str], tuple[torch.Tensor, ...]], problem: Problem, backend: str
) -> dict[str, Any]:
    truth = step(problem.double(), "torch")  # held to the dense reference in fp64 by the tests
    errors = compare(step(problem, backend), truth)
    wrong = check(errors, LIMITS[problem.dtype])
    found = {"value_error": errors[0], "row_error": errors[1]}
    return {**found, "status": "wrong", "reason": wrong} if wrong else found


def correctness(device: str, dry: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield (name, run) of every case."""
    for size in DRY_SIZES if dry else SIZES:
        for label, dtype in DTYPES.items():
            for backend in names("masked_logsumexp", device, dtype):
                for metric in METRICS:
                    for few in (False, True):

                        def run(size=size, dtype=dtype, backend=backend, metric=metric, few=few):
                            problem = problem_on(size, dtype, device)
                            return _compare(lambda p, b: lse_step(p, metric, b, few), problem, backend)

                        yield f"lse {metric}{' 10 classes' if few else ''} {size} {label} {backend}", run
                for name, step in (("proxy-nca", loss_step), ("magnet", magnet_step)):
                    yield (
                        f"{name} {size} {label} {backend}",
                        lambda s=size, d=dtype, b=backend, f=step: _compare(f, problem_on(s, d, device), b),
                    )
    for label in ("bf16", "fp32"):
        for backend in names("proxy_nca", device, DTYPES[label]):
            size = DRY_HUGE if dry else HUGE
            yield (
                f"proxy-nca {size} {label} {backend}",
                lambda s=size, d=DTYPES[label], b=backend: _compare(loss_step, problem_on(s, d, device), b),
            )


def same_bits(device: str, dry: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield cases that must give the same bits: twice, on another stream, from a captured graph, deterministically."""
    for label in ("fp32", "bf16"):
        for backend in names("proxy_nca", device, DTYPES[label]):
            for size in DRY_SIZES if dry else SIZES[:4]:

                def run(label=label, backend=backend, size=size):
                    problem = problem_on(size, DTYPES[label], device)
                    first = loss_step(problem, backend)
                    found = {"again": _equal(first, loss_step(problem, backend))}
                    if device == "cuda":
                        found["stream"] = _equal(first, _on_a_stream(lambda: loss_step(problem, backend)))
                        found["graph"] = _equal(first, _captured(lambda: loss_step(problem, backend)))
                    different = [name for name, same in found.items() if not same]
                    return {**found, "status": "wrong", "reason": f"other bits: {different}"} if different else found

                yield f"{size} {label} {backend}", run


def _equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def _on_a_stream(step: Callable[[], Any]) -> Any:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = step()
    torch.cuda.current_stream().wait_stream(stream)
    return found


def _captured(step: Callable[[], Any]) -> Any:
    """The results of step() from a replayed graph; the capture raises where the host waits for the device."""
    _on_a_stream(step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for t in found:
        t.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return found


def sanitizer(device: str, dry: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the run of compute-sanitizer over a small step of every backend."""
    for tool in ("memcheck", "racecheck", "synccheck"):

        def run(tool=tool):
            program = shutil.which("compute-sanitizer")
            if device != "cuda" or program is None:
                return {"status": "skipped", "peer": True, "reason": "no GPU" if program else "no compute-sanitizer"}
            command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "bench.gpu.sanitized"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
            last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
            if done.returncode:
                return {"status": "wrong", "reason": f"{tool} exit {done.returncode}: {last}"}
            return {"said": last}

        yield tool, run

"""Time and memory: the ceilings of this GPU, then a training step of Proxy-NCA, compared with the peers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..case import PEER_SLACK, TOLERANCES, Tolerance, check, compare
from ..problem import Problem
from .checks import DTYPES, loss_step, names, problem_on
from .peers import peers

SIZES = ("4096x1Mx512", "512x1Mx512", "4096x1Mx128", "4096x100kx128", "512x100kx128", "1024x20kx512")
DRY_SIZES = ("16x200x8",)
ROUNDS = 10
SECONDS = 20.0  # the time limit for timing one contender


def clock(step: Callable[[], Any], device: str, rounds: int = ROUNDS, seconds: float = SECONDS) -> list[float]:
    """The seconds of each call after two warm-up calls, by device events; a slow step gets fewer rounds."""
    step()
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    rounds = max(3, min(rounds, int(seconds / max(time.perf_counter() - start, 1e-6))))
    found = []
    for _ in range(rounds):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            step()
            found.append(time.perf_counter() - start)
    return found


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ceilings(device: str, dry: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the rate of the vendor's product and the bandwidth of a copy, which the other figures are compared with."""
    side = 256 if dry else 8192

    def product(dtype: torch.dtype) -> dict[str, Any]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return {"tflops": 2 * side**3 / statistics.median(clock(lambda: a @ b, device)) / 1e12}

    def copy() -> dict[str, Any]:
        a = torch.randn((1 << 20) if dry else (1 << 28), device=device)
        b = torch.empty_like(a)
        return {"gb_s": 2 * a.nbytes / statistics.median(clock(lambda: b.copy_(a), device)) / 1e9}

    for label in ("bf16", "fp32"):
        yield f"product {label}", lambda d=DTYPES[label]: product(d)
    yield "copy", copy


def _peak(step: Callable[[], Any], device: str) -> int | None:
    """The peak bytes of a step in addition to what is held before it, gradients included."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _short(matrices: float, problem: Problem, device: str) -> str | None:
    need = int(matrices * problem.size.n * problem.size.m * 4) + 3 * problem.gradient_bytes
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else need
    return None if need <= free else f"needs about {need / 2**30:.0f} GiB, {free / 2**30:.0f} are free"


def _measure(
    make: Callable[[Problem], Callable[[], Any]], problem: Problem, device: str, matrices: float, peer: bool
) -> dict[str, Any]:
    kind = {"peer": True} if peer else {}
    if short := _short(matrices, problem, device):
        return {**kind, "status": "skipped", "reason": short}
    truth = loss_step(problem, "torch")  # in the same dtype; `checks` compares with fp64
    step = make(problem)
    limits = TOLERANCES[problem.dtype]
    # Two results in one dtype may differ by the sum of their errors; peers keep less in fp32.
    slack = 2 * (PEER_SLACK if peer else 1)
    wrong = check(
        compare(step(), tuple(t.double() for t in truth)), Tolerance(limits.value * slack, limits.rows * slack)
    )
    if wrong:
        return {**kind, "status": "wrong", "reason": wrong}
    del truth
    peak, times = _peak(step, device), clock(step, device)
    n, m, d = problem.size
    seconds = statistics.median(times)
    return {
        **kind, "seconds": seconds, "all_seconds": times, "peak_bytes": peak, "gradient_bytes": problem.gradient_bytes,
        "tflops_of_8nmd": 8 * n * m * d / seconds / 1e12,
    }  # fmt: skip


def steps(device: str, dry: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the forward and backward of Proxy-NCA on every backend of ours and by every peer."""
    for size in DRY_SIZES if dry else SIZES:
        for label in ("bf16", "fp32"):
            dtype = DTYPES[label]
            ours = {f"ours ({b})": (_ours(b), 0.0, False) for b in names("proxy_nca", device, dtype)}
            others = {name: (make, matrices, True) for name, (make, matrices) in peers(dtype).items()}
            for name, (make, matrices, peer) in {**ours, **others}.items():

                def run(size=size, dtype=dtype, make=make, matrices=matrices, peer=peer):
                    try:
                        return _measure(make, problem_on(size, dtype, device), device, matrices, peer)
                    except Exception as error:
                        if peer:
                            return {
                                "peer": True,
                                "status": "raises",
                                "reason": f"{type(error).__name__}: {error}"[:200],
                            }
                        raise

                yield f"{size} {label}: {name}", run


def _ours(backend: str) -> Callable[[Problem], Callable[[], Any]]:
    return lambda problem: lambda: loss_step(problem, backend)


def forwards(device: str, dry: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the forward alone, 2NMD, as a share of the measured rate of the product."""
    from dml_kernels import functional as F

    for size in DRY_SIZES if dry else SIZES[:3]:
        for backend in names("masked_logsumexp", device, torch.bfloat16):

            def run(size=size, backend=backend):
                problem = problem_on(size, torch.bfloat16, device)
                step = lambda: F.masked_logsumexp(  # noqa: E731
                    problem.x, problem.w, problem.y, metric="cosine", scale=16.0, backend=backend
                )
                with torch.no_grad():
                    seconds = statistics.median(clock(step, device))
                n, m, d = problem.size
                return {"seconds": seconds, "tflops_of_2nmd": 2 * n * m * d / seconds / 1e12}

            yield f"{size} bf16: {backend}", run

"""Small problems, bound by launches: from Python, from a CUDA graph, and how many launches a step takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .checks import loss_step, magnet_step, names, problem_on
from .peers import peers
from .speed import clock

REPEATS = 50


def cases(device: str, dry: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield Proxy-NCA at 128 x 100 x 128 and 512 x 1,000 x 512, and Magnet with 12 clusters x 4, in fp32."""
    for size in ("16x12x8",) if dry else ("128x100x128", "512x1000x512"):
        for backend in names("proxy_nca", device, torch.float32):
            yield f"{size}: ours ({backend})", _case(lambda p, b=backend: lambda: loss_step(p, b), size, device, False)
        for name, (make, _) in peers(torch.float32).items():
            yield f"{size}: {name}", _case(make, size, device, True)
    for backend in names("magnet", device, torch.float32):
        make = lambda p, b=backend: lambda: magnet_step(p, b)  # noqa: E731
        yield f"magnet 48x12x64: ours ({backend})", _case(make, "48x12x64", device, False)


def _case(make: Callable[..., Any], size: str, device: str, peer: bool) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        step = make(problem_on(size, torch.float32, device))
        found: dict[str, Any] = {"peer": True} if peer else {}
        times = clock(lambda: [step() for _ in range(REPEATS)], device)
        found["seconds"] = statistics.median(times) / REPEATS
        if device == "cuda":
            found["launches"] = _launches(step)
            try:
                graph = _graph(step)
            except RuntimeError as error:
                found["graph"] = str(error).splitlines()[0][:120]
            else:
                times = clock(lambda: [graph.replay() for _ in range(REPEATS)], device)
                found["graph_seconds"] = statistics.median(times) / REPEATS
        return found

    return run


def _launches(step: Callable[[], Any]) -> int:
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)


def _graph(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph

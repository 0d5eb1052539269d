"""Time and memory of a step, measured so that every allocator counts and the drift of the machine cancels.

Memory is what the operating system counts as resident, not what PyTorch counts, so it includes the buffers of a C++
extension, of the BLAS and of the allocator. Time is measured in interleaved rounds, so that a change of the clock rate
or of the load of other processes affects every variant equally.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "cpu_model",
    "interleaved_medians",
    "interleaved_times",
    "machine",
    "peak_extra_bytes",
    "run_in_child",
    "usable_cores",
]

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def peak_extra_bytes(fn: Callable[[], object], warmup: Callable[[], object] | None = None) -> int:
    """Measure the peak resident memory during fn(), less the resident memory just before it.

    The result counts all memory that fn makes the process touch, by any allocator, including gradients, results, and
    what a BLAS or an allocator keeps afterwards. It does not count what is resident before, such as inputs, or pages
    that are allocated but never written. Run it in a fresh process (``run_in_child``) for each variant, because memory
    that an earlier call left in a pool is reused and does not count.

    It is accurate to about 1 MB, because the operating system counts pages in batches for each core. The peak is reset
    through /proc/self/clear_refs. Where that is refused, the peak of the whole life of the process is used.

    Args:
        fn: the step to measure.
        warmup: called first. Give the same code on a tiny problem: it loads code pages, starts threads and fills caches
            whose size is the same for every problem, so that fn is charged only with what grows with the problem.

    Returns:
        Bytes.

    Raises:
        RuntimeError: the peak could not be reset and an earlier one was higher, so the number would be too small.
        OSError: not on Linux.
    """
    if not STATUS.exists():
        raise OSError("peak_extra_bytes reads /proc/self/status: Linux only")
    if warmup is not None:
        warmup()
    _release_free_memory()
    was_reset = _reset_peak()
    before, peak_before = _status_bytes("VmRSS"), _status_bytes("VmHWM")
    result = fn()  # held until the peak is read
    peak = _status_bytes("VmHWM")
    del result
    if not was_reset and peak <= peak_before and before < peak_before:
        raise RuntimeError(
            "the peak could not be reset and an earlier one was higher: measure in a fresh process with a small warm-up"
        )
    return peak - before


def run_in_child(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run ``python -m module arguments...`` in a fresh interpreter.

    Args:
        module: the name of the module.
        arguments: its command line.
        environment: variables in addition to those of this process.

    Returns:
        The standard output of the run.

    Raises:
        RuntimeError: the run failed; the message has the end of its error output.
    """
    # The parent's import path, so that a checkout that is not installed is found from any directory.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    child = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        raise RuntimeError(
            f"python -m {module} {' '.join(arguments)} ended with status {child.returncode}:\n{child.stderr[-2000:]}"
        )
    return child.stdout


def interleaved_times(
    variants: Mapping[str, Callable[[], object]],
    rounds: int = 3,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], object] | None = None,
    progress: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Time all variants in rounds; every round runs every variant once.

    The order rotates by one place per round, so that no variant always follows the same one. The garbage collector is
    off while a call runs.

    Args:
        variants: the steps to time, by name.
        rounds: how many rounds are timed.
        warmup: how many rounds run before those.
        clock: returns seconds; time.thread_time leaves out what other processes do on the core.
        synchronize: called before each clock reading, such as torch.cuda.synchronize.
        progress: called after each call, including those of the warm-up.

    Returns:
        name -> the seconds of each round.

    Raises:
        ValueError: no round or no variant.
    """
    if rounds < 1 or not variants:
        raise ValueError(f"need at least one round and one variant; got {rounds} and {len(variants)}")
    wait = synchronize or (lambda: None)
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(warmup + rounds):
        shift = turn % len(names)
        gc.collect()
        for name in names[shift:] + names[:shift]:
            with _no_garbage_collection():
                wait()
                start = clock()
                variants[name]()
                wait()
                elapsed = clock() - start
            if turn >= warmup:
                times[name].append(elapsed)
            if progress:
                progress()
    return times


def interleaved_medians(
    variants: Mapping[str, Callable[[], object]], rounds: int = 3, **options: Any
) -> dict[str, float]:
    """The median seconds of each variant. Arguments are those of :func:`interleaved_times`."""
    times = interleaved_times(variants, rounds, **options)
    return {name: statistics.median(samples) for name, samples in times.items()}


def cpu_model() -> str:
    """The name of the processor, as the operating system reports it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, str | int]:
    """The machine of a measurement: processor, cores, threads, system, Python and PyTorch versions."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _status_bytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _reset_peak() -> bool:
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _release_free_memory() -> None:
    """Give freed heap memory back to the system, so that its reuse counts."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)

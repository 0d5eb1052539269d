"""The fastest tiles of the Triton kernels on this GPU, as rows for their table: `--stages autotune`, on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from dml_kernels.backends.triton import configs
from dml_kernels.backends.triton.tools import autotune

N, M = 4096, 200_000


def tasks(device: str, dry: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield a case for each bf16 entry of the table; there is nothing to time in a dry run."""
    for kernel in autotune.KERNELS:
        for distance in (False, True):
            for width in (w or autotune.WIDEST for w in configs.WIDTHS):
                task = autotune.Task(kernel, torch.bfloat16, distance, width)
                if task.exists:
                    yield str(task), partial(_skipped if dry else _tuned, task, device)


def _skipped(task: autotune.Task, device: str) -> dict[str, Any]:
    return {"status": "skipped", "reason": "tiles are timed on the GPU that they are for"}


def _tuned(task: autotune.Task, device: str) -> dict[str, Any]:
    arch = configs.arch_of(torch.device(device))
    found = autotune.tune(task, arch, N, M)
    if found["config"] is None:
        return {"status": "skipped", "reason": f"no candidate fits: {found['dropped']}"}
    now = configs.TABLE[arch].get((task.kernel, configs.KINDS[task.dtype], task.distance))
    row = autotune.row(task.kernel, task.dtype, task.distance, [found["config"]])
    return {**found, "row": row, "in_table": now is not None and found["config"] in now}

"""Every registered loss on this GPU, compared with itself in fp64, on the backends that would be chosen for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from dml_kernels.losses import REGISTRY, LossEntry
from dml_kernels.ops import choice as backends

from ..case import check, compare
from .checks import DTYPES, LIMITS

SIZE, DRY_SIZE = (256, 1000, 128), (12, 20, 16)  # N, classes of a bank, D
PER_CLASS = 8  # of a batch compared with itself


def _inputs(entry: LossEntry, size: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    n, m, d = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    if entry.family == "pairs":
        return x.to(device, dtype), (torch.arange(n) // PER_CLASS).to(device)
    w, y = torch.randn(m * entry.centres, d, generator=generator), torch.randint(m, (n,), generator=generator)
    return x.to(device, dtype), w.to(device, dtype), y.to(device)


def _step(entry: LossEntry, inputs: tuple[torch.Tensor, ...], gradients: bool) -> tuple[torch.Tensor, ...]:
    points = [t.detach().requires_grad_() for t in inputs if t.is_floating_point()]
    value = entry.function(*points, inputs[-1], **entry.options[0])
    return value.detach(), *(torch.autograd.grad(value.sum(), points) if gradients else ())


def every_loss(device: str, dry: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield (name, run) of every case: the defaults of each loss in fp32 and bf16, apart from Magnet."""
    for name, entry in REGISTRY.items():
        if entry.family == "clusters":
            continue
        for label in ("fp32", "bf16"):

            def run(entry=entry, dtype=DTYPES[label]):
                inputs = _inputs(entry, DRY_SIZE if dry else SIZE, dtype, device)
                # In half precision a hinge or a maximum switches at another place than in fp64, and its gradient jumps.
                gradients = dtype == torch.float32
                with backends.use_backend("torch"):
                    wide = tuple(t.double() if t.is_floating_point() else t for t in inputs)
                    truth = _step(entry, wide, gradients)
                errors = compare(_step(entry, inputs, gradients), truth)
                wrong = check(errors, LIMITS[dtype])
                found = {"value_error": errors[0], "row_error": errors[1]}
                return {**found, "status": "wrong", "reason": wrong} if wrong else found

            yield f"{name} {label}", run

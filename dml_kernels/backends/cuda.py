"""The ``cuda`` backend: the C++/CUDA kernels of the extension, for fp64 and where launches take most of the time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..ops.library import EXTENSION, gradients_like
from ..ops.signatures import Bank, DistanceSpec, Matrices, NormalizeSpec, Rows, Spec
from .compiled import (
    METRIC_CODES,
    banked,
    clustered,
    distance_numbers,
    lse_numbers,
    magnet_numbers,
    proxied,
    proxy_numbers,
    targets_with_scale,
    wanted,
    wanted_with_scale,
)

name = "cuda"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPS = ("normalize", "normalized_distance", "masked_logsumexp", "proxy_nca", "magnet")
OPTIONS = ("sums", "keep")
METRICS = tuple(METRIC_CODES)
OLDEST = (8, 0)  # compute capability of the oldest architecture that the extension is built for
# The namespace of the ops, and their device; the tests' emulator has the same ops for CPU tensors.
namespace, device_type = "dml_kernels_cuda", "cuda"


def can_run(op: str, device: torch.device, dtype: torch.dtype, asked: Mapping[str, object]) -> str | None:
    if device.type != device_type:
        return f"runs on NVIDIA GPUs; the tensors are on {device.type}"
    if dtype not in DTYPES:
        return f"multiplies float32, float64, bfloat16 and float16; not {dtype}"
    return _refuse_device(device) if device.type == "cuda" else None


def _refuse_device(device: torch.device) -> str | None:
    if EXTENSION.module is None:
        return f"the extension is {EXTENSION.reason}"
    if not hasattr(torch.ops.dml_kernels_cuda, "mlse_fwd"):
        return f"the extension was built without CUDA kernels: {EXTENSION.info['why_no_cuda']}"
    if not torch.cuda.is_available():
        return "no GPU is visible"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return "needs compute capability 8.0 (Ampere) or newer"
    return None


def describe() -> str:
    return "CUDA C++ kernels, one launch each way"


def fuses(loss: str, inputs) -> bool:
    """Whether one launch can compute the batch: Magnet takes up to 512 rows and clusters, Proxy-NCA at least 1 row."""
    if loss == "magnet":
        return _ops().magnet_fits(inputs.x, inputs.classes.size(0), inputs.centers is not None)
    return inputs.x.size(0) > 0


def keeps_mean(bank: Bank, spec: Spec) -> bool:
    return False


def _ops():
    return getattr(torch.ops, namespace)


def normalize_fwd(rows: Rows, spec: NormalizeSpec) -> Tensor:
    return _ops().normalize_fwd(rows.x, spec.eps)


def normalize_bwd(grad: Tensor, rows: Rows, spec: NormalizeSpec) -> Tensor:
    return _ops().normalize_bwd(grad, rows.x, spec.eps)


def normalized_distance_fwd(inputs: Matrices, spec: DistanceSpec) -> Tensor:
    out = inputs.x.new_empty((inputs.x.size(0), inputs.w.size(0)), dtype=spec.dtype)
    _ops().distance_fwd(out, *inputs, *distance_numbers(spec))
    return out


def normalized_distance_bwd(grad, needs, inputs: Matrices, spec: DistanceSpec) -> list[Tensor | None]:
    targets = gradients_like(inputs, needs, inputs.x)
    if inputs.x.size(0) == 0:
        return wanted(_zeroed(targets), needs)
    _ops().distance_bwd(*targets, grad, *inputs, *distance_numbers(spec))
    return wanted(targets, needs)


def masked_logsumexp_fwd(bank: Bank, spec: Spec) -> tuple[Tensor, ...]:
    return _ops().mlse_fwd(*banked(bank), *lse_numbers(spec), spec.sums)


def masked_logsumexp_bwd(grads, lse, mean, needs, bank: Bank, spec: Spec) -> list[Tensor | None]:
    targets = targets_with_scale((bank.x, bank.w, None, bank.col_bias), needs, bank, spec)
    if bank.x.size(0) == 0:
        _zeroed(targets)
    else:
        _ops().mlse_bwd(*targets, *grads, *(t.contiguous() for t in lse), *banked(bank), *lse_numbers(spec))
    return wanted_with_scale(targets, needs, bank)


def proxy_nca_fwd(inputs, spec) -> tuple[Tensor, ...]:
    """Runs in one launch."""
    return _ops().proxy_nca_fwd(*proxied(inputs), *proxy_numbers(spec))


def proxy_nca_bwd(grad, lse, needs, inputs, spec) -> list[Tensor | None]:
    """Runs in one launch, apart from the sum that a scalar scale's gradient needs."""
    targets = targets_with_scale((inputs.x, inputs.w, None), needs, inputs, spec)
    saved = (t.contiguous() for t in lse)
    _ops().proxy_nca_bwd(*targets, grad, *saved, *proxied(inputs), *proxy_numbers(spec))
    return wanted_with_scale(targets, needs, inputs)


def magnet_fwd(inputs, spec) -> tuple[Tensor, ...]:
    """Runs in one launch."""
    return _ops().magnet_fwd(*clustered(inputs), *magnet_numbers(spec))


def magnet_bwd(grad, different, needs, inputs, spec) -> list[Tensor | None]:
    """Runs in one launch: distances, a barrier of all blocks, gradients."""
    targets = gradients_like((inputs.x, *inputs[3:]), needs, inputs.x)
    _ops().magnet_bwd(*targets, grad, different.contiguous(), *clustered(inputs), *magnet_numbers(spec))
    return wanted(targets, needs)


def _zeroed(targets: Iterable[Tensor]) -> list[Tensor]:
    return [t.zero_() for t in targets]

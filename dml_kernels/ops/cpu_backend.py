"""The ``cpu`` backend: the fused C++ kernels of the extension, behind the op contract."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import build_info
from .contract import Bank, Spec

name = "cpu"
METRIC_CODES = {"dot": 0, "sqeuclidean": 1, "euclidean": 2}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def can_run(op: str, device: torch.device, dtype: torch.dtype, policy: str) -> str | None:
    if device.type != "cpu":
        return f"runs on the CPU; the tensors are on {device.type}"
    if dtype not in DTYPES:
        return f"multiplies float32, float64 and bfloat16; not {dtype}"
    if policy != "linear":
        return f"logit policy {policy!r} is not implemented here"
    extension = build_info.load()
    return None if extension else f"the extension is {extension.reason}"


def describe() -> str:
    return f"fused C++; {build_info.load().reason}"


def _ops():
    return torch.ops.dml_kernels_cpu


def normalize_fwd(x: Tensor, eps: float) -> Tensor:
    return _ops().normalize_fwd(x, eps)


def normalize_bwd(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    return _ops().normalize_bwd(grad, x, eps)


def normalized_distance_fwd(x, w, metric, normalize, eps, dtype) -> Tensor:
    out = x.new_empty((x.size(0), w.size(0)), dtype=dtype)
    _ops().distance_fwd(out, x, w, METRIC_CODES[metric], normalize, eps)
    return out


def normalized_distance_bwd(grad, x, w, needs, metric, normalize, eps, dtype) -> tuple[Tensor, Tensor]:
    grad_x, grad_w = _like(x, needs[0]), _like(w, needs[1])
    _ops().distance_bwd(grad_x, grad_w, grad, x, w, METRIC_CODES[metric], normalize, eps)
    return grad_x, grad_w


def masked_logsumexp_fwd(bank: Bank, spec: Spec) -> tuple[Tensor, ...]:
    # Half-precision products: a zero-element tensor carries the product dtype.
    return _ops().mlse_fwd(*bank, bank.x.new_empty(0, dtype=spec.dtype), *_numbers(spec), spec.sums)


def masked_logsumexp_bwd(grads, lse, needs, bank: Bank, spec: Spec) -> tuple[Tensor, ...]:
    targets = [_like(t, need) for t, need in zip((bank[0], bank[1], *bank[5:]), needs, strict=True)]
    _ops().mlse_bwd(*targets, *grads, *lse, *bank, *_numbers(spec))
    return tuple(targets)


def _like(t: Tensor, need: bool) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format) if need else torch.empty(0)


def _numbers(spec: Spec) -> tuple:
    return METRIC_CODES[spec.metric], spec.normalize, *spec.logit, spec.eps, spec.ignore_index

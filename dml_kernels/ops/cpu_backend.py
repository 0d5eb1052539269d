"""The ``cpu`` backend: the fused C++ kernels of the extension, behind the op contract."""

from __future__ import annotations

import torch
from torch import Tensor

from ..torch_backend import scale_grad
from .contract import Bank, Spec, accumulate_dtype
from .library import EXTENSION

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
    return None if EXTENSION.module is not None else f"the extension is {EXTENSION.reason}"


def describe() -> str:
    return f"fused C++; {EXTENSION.reason}"


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
    return _ops().mlse_fwd(_kind(spec), *_plain(bank), *_numbers(spec), spec.sums)


def masked_logsumexp_bwd(grads, lse, needs, bank: Bank, spec: Spec) -> tuple[Tensor, ...]:
    need_x, need_w, need_t, need_q, need_b = needs
    # The scale's gradient comes one value a row; a scalar's is their sum.
    per_row = bank.x.new_empty(bank.x.size(0) if need_t else 0, dtype=accumulate_dtype(spec.dtype))
    grad_x, grad_w = _like(bank.x, need_x), _like(bank.w, need_w)
    grad_q, grad_b = _like(bank.col_scale, need_q), _like(bank.col_bias, need_b)
    _ops().mlse_bwd(grad_x, grad_w, per_row, grad_q, grad_b, *grads, *lse, _kind(spec), *_plain(bank), *_numbers(spec))
    return grad_x, grad_w, scale_grad(per_row, bank) if need_t else per_row, grad_q, grad_b


def _like(t: Tensor | None, need: bool) -> Tensor:
    return torch.empty(0) if t is None or not need else torch.empty_like(t, memory_format=torch.contiguous_format)


def _kind(spec: Spec) -> Tensor:
    """An empty tensor that carries the product dtype."""
    return torch.empty(0, dtype=spec.dtype)


def _plain(bank: Bank) -> Bank:
    """Label vectors contiguous, the rest as it is; fp16 vectors, which C++ does not read, widened."""
    x, w, y, c, exclude, *vectors = bank
    vectors = [t.float() if t is not None and t.dtype == torch.float16 else t for t in vectors]
    return Bank(x, w, y.contiguous(), *(t if t is None else t.contiguous() for t in (c, exclude)), *vectors)


def _numbers(spec: Spec) -> tuple:
    return METRIC_CODES[spec.metric], spec.normalize, *spec.logit, spec.eps, spec.ignore_index

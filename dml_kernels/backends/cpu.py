"""The ``cpu`` backend: the fused C++ kernels of the extension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.library import EXTENSION, Choices, gradients_like
from ..ops.signatures import Bank, DistanceSpec, Matrices, NormalizeSpec, Rows, Spec
from .compiled import (
    METRIC_CODES,
    banked,
    clustered,
    distance_numbers,
    labelled,
    lse_numbers,
    magnet_numbers,
    proxied,
    proxy_numbers,
    targets_with_scale,
    wanted,
    wanted_with_scale,
)

name = "cpu"
POLICY_CODES = Choices("policy", {"linear": 0, "quadratic": 1, "max_pool": 2, "softmax_pool": 3})
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPS = (
    "normalize", "normalized_distance", "masked_logsumexp", "masked_hinge_sum", "masked_argmax", "proxy_nca", "magnet",
)  # fmt: skip
OPTIONS = ("sums", "keep", "policy", "policy_params", "exclude", "first_class")
METRICS = tuple(METRIC_CODES)


def can_run(op: str, device: torch.device, dtype: torch.dtype, asked: Mapping[str, object]) -> str | None:
    if device.type != "cpu":
        return f"runs on the CPU; the tensors are on {device.type}"
    if dtype not in DTYPES:
        return f"multiplies float32, float64, bfloat16 and float16; not {dtype}"
    if EXTENSION.module is None:
        return f"the extension is {EXTENSION.reason}"
    return None


def describe() -> str:
    return f"fused C++; {EXTENSION.reason}"


def fuses(loss: str, inputs: object) -> bool:
    return True


def keeps_mean(bank: Bank, spec: Spec) -> bool:
    return False


def _ops():
    return torch.ops.dml_kernels_cpu


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
    _ops().distance_bwd(*targets, grad, *inputs, *distance_numbers(spec))
    return wanted(targets, needs)


def masked_logsumexp_fwd(bank: Bank, spec: Spec) -> tuple[Tensor, ...]:
    return _ops().mlse_fwd(_kind(spec), *banked(bank), *lse_numbers(spec), *_policy(spec), _first(spec), spec.sums)


def masked_logsumexp_bwd(grads, lse, mean, needs, bank: Bank, spec: Spec) -> list[Tensor | None]:
    targets = targets_with_scale((bank.x, bank.w, None, bank.col_bias), needs, bank, spec)
    _ops().mlse_bwd(
        *targets, *grads, *lse, _kind(spec), *banked(bank), *lse_numbers(spec), *_policy(spec), _first(spec)
    )
    return wanted_with_scale(targets, needs, bank)


def masked_hinge_sum_fwd(lines, spec) -> tuple[Tensor, ...]:
    return _ops().hinge_fwd(_kind(spec), *_plain_lines(lines), *_pair_numbers(spec))


def masked_hinge_sum_bwd(slopes, needs, lines, spec) -> list[Tensor | None]:
    targets = gradients_like((lines.x, lines.w), needs, lines.x)
    _ops().hinge_bwd(*targets, *slopes, _kind(spec), *_plain_lines(lines), *_pair_numbers(spec))
    return wanted(targets, needs)


def _plain_lines(lines) -> tuple:
    return *labelled(*lines[:5]), *lines.offset, *lines.k


def masked_argmax_fwd(inputs, spec) -> tuple[Tensor, ...]:
    return _ops().argmax_fwd(
        _kind(spec), *labelled(*inputs[:5]), *inputs[5:], *spec.wanted, *spec.largest, spec.noise,
        spec.seed, *spec.cutoffs, *_pair_numbers(spec),
    )  # fmt: skip


def _pair_numbers(spec) -> tuple:
    return METRIC_CODES[spec.metric], spec.normalize, spec.eps, spec.ignore_index, _first(spec)


def proxy_nca_fwd(inputs, spec) -> tuple[Tensor, ...]:
    return _ops().proxy_nca_fwd(_kind(spec), *proxied(inputs), *proxy_numbers(spec), _first(spec))


def proxy_nca_bwd(grad, lse, needs, inputs, spec) -> list[Tensor | None]:
    targets = targets_with_scale((inputs.x, inputs.w, None), needs, inputs, spec)
    _ops().proxy_nca_bwd(*targets, grad, *lse, _kind(spec), *proxied(inputs), *proxy_numbers(spec), _first(spec))
    return wanted_with_scale(targets, needs, inputs)


def magnet_fwd(inputs, spec) -> tuple[Tensor, ...]:
    return _ops().magnet_fwd(_kind(spec), *clustered(inputs), *magnet_numbers(spec))


def magnet_bwd(grad, different, needs, inputs, spec) -> list[Tensor | None]:
    targets = gradients_like((inputs.x, *inputs[3:]), needs, inputs.x)
    _ops().magnet_bwd(*targets, grad, different, _kind(spec), *clustered(inputs), *magnet_numbers(spec))
    return wanted(targets, needs)


def _kind(spec: Spec) -> Tensor:
    """An empty tensor that carries the product dtype."""
    return torch.empty(0, dtype=spec.dtype)


def _first(spec: Any) -> int:
    """The label of the bank's first entry where labels are no argument."""
    return max(spec.first_class, 0)


def _policy(spec: Spec) -> tuple:
    """The policy's code, the number of bank rows that make a column, and its last parameter: m or gamma."""
    return POLICY_CODES[spec.policy], spec.centres, spec.policy_params[-1] if spec.policy_params else 0.0

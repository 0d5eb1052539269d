"""The ``triton`` backend: streaming kernels for GPUs, and in Triton's interpreter (TRITON_INTERPRET=1) for CPU tensors.

| file | what is there |
|---|---|
| ``logsumexp.py``, ``hinge.py``, ``argmax.py``, ``distance.py`` | the ops: which kernels they launch, in which order |
| ``guard.py`` | checks of shapes and dtypes before a kernel reads by address |
| ``collect.py``, ``operand.py``, ``launch.py`` | gradients from chunks of dS; matrices for kernels; launching |
| ``configs.py``, ``precision.py`` | tiles and forms by architecture; arithmetic of fp32 products |
| ``interpreter.py`` | corrections to Triton's interpreter |
| ``kernels/tiles.py``, ``kernels/policies.py`` | device functions: products, scores and memberships of a tile; logits |
| ``kernels/rows.py`` | norms, normalisation, projection of gradients |
| ``kernels/logsumexp.py``, ``kernels/gradients.py``, ``kernels/near.py`` | masked_logsumexp; near pairs' gradients |
| ``kernels/logsumexp_owned.py`` | its backward in the owned form, and from what the forward kept |
| ``kernels/hinge.py``, ``kernels/distance.py`` | masked_hinge_sum; normalized_distance |
| ``kernels/argmax.py``, ``kernels/noise.py`` | masked_argmax; its draws' bits |
| ``triton/tools/model.py`` | the cost model that determines the form of the backward |
| ``triton/tools/autotune.py`` | timing of tiles on a real GPU, for the table |
| ``triton/tools/aot.py``, ``triton/tools/report.py`` | compilation without a GPU, and a report of the results |

Importing this package imports Triton only where Triton could run: with a PyTorch built for GPUs, or in the interpreter.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...ops.contract import check_pair
from ...ops.signatures import Bank, DistanceSpec, Matrices, NormalizeSpec, Rows, Spec

name = "triton"
OPS = (
    "normalize", "normalized_distance", "masked_logsumexp", "masked_hinge_sum", "masked_argmax", "proxy_nca", "magnet",
)  # fmt: skip
OPTIONS = ("sums", "keep", "policy", "policy_params")
METRICS = ("dot", "sqeuclidean", "euclidean")
POLICIES = ("linear", "quadratic", "max_pool", "softmax_pool")
INSTALL = "pip install -r requirements/triton.txt"
OLDEST = (8, 0)  # the first compute capability with bf16 tensor cores


# Triton reads the variable when a kernel is defined, so later changes have no effect.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _load() -> str | None:
    """Imports Triton if it could run here; returns None, or the reason why it cannot be used."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # a folder with the name on the path is not an installation
        return f"Triton is not installed: {INSTALL}"
    if not (INTERPRETED or torch.version.cuda or torch.version.hip):
        return "this PyTorch is built without CUDA and ROCm"
    try:
        importlib.import_module("triton")
        if INTERPRETED:
            importlib.import_module(".interpreter", __name__).mend()
    except Exception as error:  # the installation is broken, or does not work with this NumPy
        return f"Triton cannot be imported ({type(error).__name__}: {error}): {INSTALL}"
    return None


# The most centres of a class that a tile can hold.
MOST_CENTRES = 64

# Imported here and not at the first call, because Dynamo cannot trace an import.
MISSING = _load()


def can_run(op: str, device: torch.device, dtype: torch.dtype, asked: Mapping[str, Any]) -> str | None:
    policy = asked.get("policy", "linear")
    if policy not in POLICIES:
        return f"logit policy {policy!r} is not implemented here"
    centres = asked["policy_params"][0] if str(policy).endswith("_pool") and asked.get("policy_params") else 1
    if centres > MOST_CENTRES:
        return f"pools at most {MOST_CENTRES} centres a class in a tile; got {centres:.0f}"
    if device.type == "cpu" and not INTERPRETED:
        return "runs on GPUs; CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1 before the first import)"
    if device.type not in ("cpu", "cuda"):
        return f"runs on GPUs; the tensors are on {device.type}"
    if device.type == "cuda" and (refusal := _refuse_device(device)):
        return refusal
    return MISSING


def _refuse_device(device: torch.device) -> str | None:
    if INTERPRETED:
        return "TRITON_INTERPRET=1 is set: the interpreter takes CPU tensors"
    if not torch.cuda.is_available():
        return "no GPU is visible"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        return "needs compute capability 8.0 (Ampere) or newer"
    return None


def describe() -> str:
    import triton

    return f"streaming kernels, Triton {triton.__version__}" + (", interpreted on the CPU" if INTERPRETED else "")


def status() -> str:
    """One line for ``python -m dml_kernels info``: how Triton runs, or why it does not."""
    if INTERPRETED:
        return MISSING or describe()
    return can_run("masked_logsumexp", torch.device("cuda"), torch.float32, {}) or describe()


def fuses(loss: str, inputs: object) -> bool:
    return False


def _host(module: str) -> Any:
    return importlib.import_module("." + module, __name__)


def normalize_fwd(rows: Rows, spec: NormalizeSpec) -> Tensor:
    return _host("distance").normalize_fwd(rows, spec)


def normalize_bwd(grad: Tensor, rows: Rows, spec: NormalizeSpec) -> Tensor:
    _host("guard").same_shape(grad, *rows.x.shape)
    return _host("distance").normalize_bwd(grad, rows, spec)


def normalized_distance_fwd(inputs: Matrices, spec: DistanceSpec) -> Tensor:
    check_pair(*inputs)
    return _host("distance").normalized_distance_fwd(inputs, spec)


def normalized_distance_bwd(grad, needs, inputs: Matrices, spec: DistanceSpec) -> tuple[Tensor | None, ...]:
    check_pair(*inputs)
    _host("guard").same_shape(grad, inputs.x.size(0), inputs.w.size(0))
    return _host("distance").normalized_distance_bwd(grad, needs, inputs, spec)


def masked_logsumexp_fwd(bank: Bank, spec: Spec) -> tuple[Tensor, ...]:
    _guard(bank, spec)
    return _host("logsumexp").masked_logsumexp_fwd(bank, spec)


def keeps_mean(bank: Bank, spec: Spec) -> bool:
    return _host("logsumexp").keeps_mean(bank, spec)


def masked_logsumexp_bwd(grads, lse, mean, needs, bank: Bank, spec: Spec) -> list[Tensor | None]:
    _guard(bank, spec)
    _host("guard").vectors(bank.x.size(0), (*grads, *lse))
    return _host("logsumexp").masked_logsumexp_bwd(grads, lse, mean, needs, bank, spec)


def _guard(bank: Bank, spec: Spec) -> None:
    guard = _host("guard")
    guard.comparison(*bank[:5], spec.centres)
    guard.vectors(bank.x.size(0), (bank.scale,))
    guard.vectors(bank.w.size(0) // spec.centres, (bank.col_bias,))


def masked_hinge_sum_fwd(lines, spec) -> tuple[Tensor, ...]:
    _host("guard").comparison(*lines[:5])
    _host("guard").vectors(lines.x.size(0), lines.offset)
    return _host("hinge").masked_hinge_sum_fwd(lines, spec)


def masked_hinge_sum_bwd(slopes, needs, lines, spec) -> tuple[Tensor | None, Tensor | None]:
    _host("guard").comparison(*lines[:5])
    _host("guard").vectors(lines.x.size(0), (*lines.offset, *slopes))
    return _host("hinge").masked_hinge_sum_bwd(slopes, needs, lines, spec)


def masked_argmax_fwd(inputs, spec) -> list[Tensor]:
    _host("guard").comparison(*inputs[:5])
    _host("guard").vectors(inputs.x.size(0), (inputs.low, inputs.high))
    return _host("argmax").masked_argmax_fwd(inputs, spec)

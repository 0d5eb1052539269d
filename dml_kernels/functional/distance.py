"""Unit vectors, and the N x M matrix for those who want it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..ops import choice as backends
from ..ops import contract
from ..ops import normalize as _normalize
from ..ops import normalized_distance as _distance
from ..ops.checks import check_tensor
from ..ops.signatures import DistanceSpec, Matrices, NormalizeSpec, Rows


def normalize(x: Tensor, eps: float = 1e-12, *, backend: str | None = None) -> Tensor:
    """Unit vectors along the last dimension: x / max(|x|, eps).

    Args:
        x: (..., D), float32, float64, bfloat16 or float16.
        eps: the norm below which a vector is divided by ``eps`` instead, with gradient g / eps.
        backend: overrides the choice of backend for this call.

    Returns:
        Tensor like x. Norms are taken in fp32 (fp64 for fp64). Differentiable twice.

    Raises:
        TypeError: x is not a floating tensor. ValueError: x has no last dimension, or eps is not positive.
    """
    check_tensor("x", x)
    if x.dim() == 0 or x.size(-1) == 0:
        raise ValueError(f"x must have shape (..., D) with D at least 1; got {tuple(x.shape)}")
    rows = x.reshape(-1, x.size(-1))
    contract.check_matrix("x", rows)
    eps = contract.check_eps(eps)
    chosen = backends.choose("normalize", x.device, x.dtype, argument=backend)
    if chosen == backends.REFERENCE:
        return reference.normalize(x, eps)
    return _normalize.normalize(Rows(rows), NormalizeSpec(eps=eps, backend=chosen)).view(x.shape)


def normalized_distance(
    x: Tensor,
    w: Tensor,
    metric: str = "euclidean",
    *,
    normalize: bool = True,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """All N x M similarities or distances, with no N x M temporary in the backward.

    ``cosine`` x^.w^ and ``dot`` x.w are similarities (larger is closer); ``sqeuclidean`` |u - p|^2 and ``euclidean``
    |u - p| are distances, on unit vectors u = x^, p = w^ unless ``normalize=False``. Small distances are summed from
    differences, so identical rows give exactly 0; the gradient at zero distance is 0.

    Args:
        x: (N, D) rows. w: (M, D) bank, in a dtype of its own, as :func:`masked_logsumexp` has it.
        metric: ``cosine``, ``dot``, ``sqeuclidean`` or ``euclidean``.
        normalize: compare unit vectors (``cosine`` always does, ``dot`` never).
        eps: guards the division by the norm.
        backend: overrides the choice of backend for this call.

    Returns:
        (N, M) in the product dtype: autocast's if on, else the inputs'; of two dtypes fp64 where one is, the half
        beside fp32, fp32 for fp16 beside bf16. Differentiable twice.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or metric; the message names the fix.
    """
    contract.check_pair(x, w)
    return matrix_in(contract.product_dtype(x, w), x, w, metric, normalize=normalize, eps=eps, backend=backend)


def matrix_in(
    dtype: torch.dtype, x: Tensor, w: Tensor, metric: str, *, normalize: bool, eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """:func:`normalized_distance` of a checked pair, multiplied and returned in ``dtype`` whatever the inputs'."""
    base, unit = contract.split_metric(metric, normalize, plain_dot=True)
    eps = contract.check_eps(eps)
    size = (x.size(0), w.size(0), x.size(1))
    chosen = backends.choose("normalized_distance", x.device, dtype, argument=backend, size=size)
    if chosen == backends.REFERENCE:
        return reference.normalized_distance(x.to(dtype), w.to(dtype), base, unit, eps)
    spec = DistanceSpec(metric=base, normalize=unit, eps=eps, dtype=dtype, backend=chosen)
    return _distance.normalized_distance(Matrices(x, contract.apart(w, x)), spec)

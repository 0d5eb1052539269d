"""The arguments of the compiled ops, made from those of an op: shared by the ``cpu`` and the ``cuda`` backend."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.contract import accumulate_dtype
from ..ops.library import Choices, gradients_like
from ..ops.signatures import Bank, Clustered, DistanceSpec, MagnetSpec, Proxied, ProxySpec, Spec
from .torch.logsumexp import scale_grad

METRIC_CODES = Choices("metric", {"dot": 0, "sqeuclidean": 1, "euclidean": 2})
REDUCTION_CODES = Choices("reduction", {"none": 0, "sum": 1, "mean": 2})


def labelled(x: Tensor, w: Tensor, y: Tensor, c: Tensor | None, exclude: Tensor | None) -> tuple[Any, ...]:
    """The arguments with contiguous label vectors."""
    c, exclude = c if c is None else c.contiguous(), exclude if exclude is None else exclude.contiguous()
    return x, w, y.contiguous(), c, exclude


def banked(bank: Bank) -> tuple[Any, ...]:
    """The tensors of masked_logsumexp, with contiguous label vectors."""
    return *labelled(*bank[:5]), *bank[5:]


def proxied(inputs: Proxied) -> tuple[Any, ...]:
    """The tensors of proxy_nca, with contiguous labels."""
    return inputs._replace(y=inputs.y.contiguous())


def clustered(inputs: Clustered) -> tuple[Any, ...]:
    """The tensors of magnet, with contiguous ids."""
    x, clusters, classes, centers, variance = inputs
    return x, clusters.contiguous(), classes.contiguous(), centers, variance


def distance_numbers(spec: DistanceSpec) -> tuple[Any, ...]:
    """The numbers of normalized_distance."""
    return METRIC_CODES[spec.metric], spec.normalize, spec.eps


def lse_numbers(spec: Spec) -> tuple[Any, ...]:
    """The numbers of masked_logsumexp."""
    return METRIC_CODES[spec.metric], spec.normalize, *spec.logit, spec.eps, spec.ignore_index


def proxy_numbers(spec: ProxySpec) -> tuple[Any, ...]:
    """The numbers of proxy_nca."""
    reduction = REDUCTION_CODES[spec.reduction]
    return spec.factor, spec.exclude_positive, spec.label_smoothing, spec.eps, spec.ignore_index, reduction


def magnet_numbers(spec: MagnetSpec) -> tuple[Any, ...]:
    """The numbers of magnet."""
    return spec.alpha, spec.normalize, spec.min_variance, spec.eps, spec.ignore_index, REDUCTION_CODES[spec.reduction]


def wanted(targets: Any, needs: list[bool]) -> list[Tensor | None]:
    """The gradients as an op's backward returns them: None where not needed."""
    return [t if need else None for t, need in zip(targets, needs, strict=True)]


def targets_with_scale(tensors: Any, needs: list[bool], inputs: Bank | Proxied, spec: Spec | ProxySpec) -> list[Tensor]:
    """Room for gradients, the third that of the scale: the kernel writes one value a row, also for a scalar."""
    targets = [*gradients_like(tensors, needs, inputs.x)]
    if needs[2]:
        targets[2] = inputs.x.new_empty(inputs.x.size(0), dtype=accumulate_dtype(spec.dtype))
    return targets


def wanted_with_scale(targets: list[Tensor], needs: list[bool], inputs: Bank | Proxied) -> list[Tensor | None]:
    """As :func:`wanted`; the gradient of a scalar scale is the sum of its rows."""
    if needs[2]:
        targets[2] = scale_grad(targets[2], inputs)
    return wanted(targets, needs)

"""The Magnet loss, composed of masked_logsumexp and passes over the rows.

With s = 1 / (2 sigma^2), mu(i) the centre of row i's cluster, which has n(i) rows, d_i = |r_i - mu(i)|^2, and h_i the
incoming gradient of an active row (one whose loss is above 0)::

    dL/dL-_i = h_i        dL/dd_i = h_i s + (dL/dsigma^2) / (n - 1)        dL/ds = sum_i h_i (d_i + dL-_i/ds)
    dL/dsigma^2 = -2 s^2 dL/ds, 0 at the floor        batch means: dL/dr_i += (dL/dmu(i)) / n(i)

masked_logsumexp gives L- and its derivatives. No size depends on the data, so a GPU need not synchronise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.contract import accumulate_dtype
from ...ops.signatures import Bank, Clustered, MagnetSpec, NormalizeSpec, Rows, Spec
from .engine import Engine


class State(NamedTuple):
    """What the forward and the backward both need.

    Attributes:
        r, y: the rows, normalised where the spec says so, and their classes.
        counted: which rows count.
        centers, c: the centres and their classes.
        center: the index of the centre of each row's cluster.
        rows_in: the number of rows in each centre's cluster; None for given centres.
        distance: the squared distance of each row from the centre of its cluster.
        measured: the variance before its floor.
        exact_scale: 0.5 over the variance, in fp64 as the variance is, because their squares under- or overflow fp32.
        scale: the same in the dtype of the rows.
    """

    r: Tensor
    y: Tensor
    counted: Tensor
    centers: Tensor
    c: Tensor
    center: Tensor
    rows_in: Tensor | None
    distance: Tensor
    measured: Tensor
    exact_scale: Tensor
    scale: Tensor

    @property
    def count(self) -> Tensor:
        """The number of rows that count, ()."""
        return self.counted.sum()

    def from_center(self) -> Tensor:
        """r_i - mu(i), 0 for rows that do not count."""
        return torch.where(self.counted[:, None], self.r - self.centers[self.center], 0)


def other_classes(r: Tensor, centers: Tensor, y: Tensor, c: Tensor, scale: Tensor) -> Bank:
    """The comparison that gives L-: rows with the centres of classes ``c``, by logits -scale |r - mu|^2."""
    return Bank(r, centers, y, c, scale=scale)


def _sum_by(index: Tensor, rows: Tensor, count: int) -> Tensor:
    """(count, D): the sum of the rows of each index, added in a fixed order on the CPU and on a GPU."""
    out = rows.new_zeros(count, rows.size(1))
    return out.index_put((index,), rows, accumulate=True) if rows.is_cuda else out.index_add(0, index, rows)


def _slots(clusters: Tensor, y: Tensor, counted: Tensor, classes: Tensor, ignore: int) -> tuple[Tensor, Tensor, Tensor]:
    """A place for each row's cluster, the class at each place, and the number of rows at each place.

    There are at most min(K, N) places: the ids of a large index are ranked, so that the bank is never larger than the
    batch.
    """
    size, n = min(classes.numel(), clusters.numel()), clusters.numel()
    place = torch.where(counted, clusters, 0)
    if classes.numel() > n > 0:
        key, order = torch.where(counted, clusters, classes.numel()).sort(stable=True)
        rank = torch.cat((key.new_zeros(1), (key[1:] != key[:-1]).cumsum(0)))
        place = torch.empty_like(rank).scatter(0, order, rank)
        classes = torch.full_like(place, ignore).scatter(0, place, y)
    rows_in = torch.zeros_like(classes[:size]).scatter_add(0, place, counted.to(torch.int64))
    return place, torch.where(rows_in > 0, classes[:size], ignore), rows_in


def measure(inputs: Clustered, spec: MagnetSpec, engine: Engine) -> State:
    """The means, the distances from them, and the variance; differentiable if the engine is."""
    x, clusters, classes, centers, variance = inputs
    acc, ignore = accumulate_dtype(spec.dtype), spec.ignore_index
    r = engine.normalize(Rows(x.to(acc)), _unit_spec(spec)) if spec.normalize else x.to(acc)
    counted = clusters != ignore
    y = torch.where(counted, classes[torch.where(counted, clusters, 0)], ignore)
    counted = y != ignore
    rows_in = None
    if centers is None:
        center, c, rows_in = _slots(clusters, y, counted, classes, ignore)
        centers = _sum_by(center, torch.where(counted[:, None], r, 0), c.numel()) / rows_in.clamp_min(1)[:, None]
    else:
        center, c, centers = torch.where(counted, clusters, 0), classes, centers.to(acc)
    distance = torch.where(counted[:, None], r - centers[center], 0).square().sum(1)
    if variance is None:
        measured = distance.sum(dtype=torch.float64) / (counted.sum() - 1).clamp_min(1)
    else:
        measured = variance.double()
    scale = 0.5 / torch.where(measured <= spec.min_variance, spec.min_variance, measured)  # keeps a NaN
    return State(r, y, counted, centers, c, center, rows_in, distance, measured, scale, scale.to(acc))


def _unit_spec(spec: MagnetSpec) -> NormalizeSpec:
    return NormalizeSpec(eps=spec.eps, backend=spec.backend)


def _lse_spec(spec: MagnetSpec) -> Spec:
    return Spec(
        metric="sqeuclidean", normalize=False, logit=[1.0, 0.0, 1.0, 0.0], eps=spec.eps, ignore_index=spec.ignore_index,
        dtype=spec.dtype, backend=spec.backend,
    )  # fmt: skip


def _hinge(state: State, different: Tensor, spec: MagnetSpec) -> Tensor:
    return spec.alpha + state.scale * state.distance + different


def _different(state: State, spec: MagnetSpec, engine: Engine) -> Tensor:
    if state.centers.size(0) == 0:
        return state.distance.new_empty(0)
    bank = other_classes(state.r, state.centers, state.y, state.c, state.scale)
    return engine.lse(bank, _lse_spec(spec))[1]


def magnet_fwd(inputs: Clustered, spec: MagnetSpec, engine: Engine) -> tuple[Tensor, Tensor, Tensor]:
    """(the loss, L- of each row, the variance before its floor)."""
    state = measure(inputs, spec, engine)
    different = _different(state, spec, engine)
    value = torch.where(state.counted, _hinge(state, different, spec).relu(), 0)
    if spec.reduction != "none":
        value = value.sum()
    if spec.reduction == "mean":
        value = value / state.count.clamp_min(1)
    return value, different, state.measured.to(value.dtype, copy=True)  # an op must not return an input


def magnet_bwd(grad, different, needs, inputs: Clustered, spec: MagnetSpec, engine: Engine) -> list[Tensor | None]:
    """The gradients of x, centers and variance, None where not needed."""
    return _backward(grad, different, needs, inputs, measure(inputs, spec, engine), spec, engine)


def differentiable_bwd(grad, needs, inputs: Clustered, spec: MagnetSpec, engine: Engine) -> list[Tensor | None]:
    """As magnet_bwd. With an engine of Functions the result is differentiable in grad and in all inputs."""
    state = measure(inputs, spec, engine)
    return _backward(grad, _different(state, spec, engine), needs, inputs, state, spec, engine)


def _backward(
    grad: Tensor, different: Tensor, needs: Sequence[bool], inputs: Clustered, state: State, spec: MagnetSpec,
    engine: Engine,
) -> list[Tensor | None]:  # fmt: skip
    need_x, need_centers, need_variance = needs
    if state.centers.size(0) == 0:  # the batch has no rows, so it has no centres
        return [torch.zeros_like(inputs.x), None, torch.zeros_like(inputs.variance) if need_variance else None]
    g = torch.where(state.counted & ~(_hinge(state, different, spec) <= 0), grad, 0)
    if spec.reduction == "mean":
        g = g / state.count.clamp_min(1)
    batch_means, batch_variance = inputs.centers is None, inputs.variance is None
    wanted = [need_x, need_centers or batch_means, need_variance or batch_variance, False]
    g_r, g_centers, g_scale = _lse_backward(g, different, wanted, state, spec, engine)
    g_measured = torch.zeros_like(state.measured)
    if g_scale is not None:
        slope = -2 * state.exact_scale.square() * (g_scale + (g * state.distance).sum(dtype=torch.float64))
        g_measured = torch.where(state.measured <= spec.min_variance, 0, slope)
    per_distance = g * state.scale
    if batch_variance:
        per_distance = per_distance + (g_measured / (state.count - 1).clamp_min(1)).to(per_distance.dtype)
    from_center = 2 * per_distance[:, None] * state.from_center()
    if g_centers is not None:
        g_centers = g_centers - _sum_by(state.center, from_center, g_centers.size(0))
    g_x = None
    if g_r is not None:
        g_x = g_r + from_center
        if state.rows_in is not None and g_centers is not None:
            means = (g_centers / state.rows_in.clamp_min(1)[:, None])[state.center]
            g_x = g_x + torch.where(state.counted[:, None], means, 0)
        if spec.normalize:
            g_x = engine.normalize_bwd(g_x, Rows(inputs.x.to(g_x.dtype)), _unit_spec(spec))
    found = (g_x, g_centers if need_centers else None, g_measured if need_variance else None)
    sources = (inputs.x, inputs.centers, inputs.variance)
    return [None if f is None or t is None else f.to(t.dtype) for f, t in zip(found, sources, strict=True)]


def _lse_backward(
    g: Tensor, different: Tensor, wanted: list[bool], state: State, spec: MagnetSpec, engine: Engine
) -> list[Any]:
    none = g.new_zeros(0)
    bank = other_classes(state.r, state.centers, state.y, state.c, state.scale)
    lse = (torch.full_like(different, -math.inf), different)
    out = engine.lse_bwd((torch.zeros_like(g), g, none, none), lse, wanted, bank, _lse_spec(spec))
    return [t if need else None for t, need in zip(out[:3], wanted[:3], strict=True)]

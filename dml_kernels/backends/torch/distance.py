"""normalized_distance on the ``torch`` backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.signatures import DistanceSpec, Matrices
from . import tiles
from .double import Tangents
from .tiles import Gradients, Side


def _to_distance(s: Tensor, metric: str) -> Tensor:
    return s if metric == "dot" else s.neg_()


def normalized_distance_fwd(inputs: Matrices, spec: DistanceSpec) -> Tensor:
    (x, w), (metric, normalize, eps, dtype, _) = inputs, spec
    rows = Side.of(x, normalize, eps, dtype)
    out = x.new_empty((x.size(0), w.size(0)), dtype=dtype)
    for k in tiles.chunks(x.size(0), *w.shape):
        out[:, k] = _to_distance(tiles.scores(rows, Side.of(w[k], normalize, eps, dtype), metric).s, metric)
    return out


def normalized_distance_bwd(grad, needs, inputs: Matrices, spec: DistanceSpec) -> tuple[Tensor | None, ...]:
    (x, w), (metric, normalize, eps, dtype, _) = inputs, spec
    rows = Side.of(x, normalize, eps, dtype)
    grads = Gradients(rows, metric, *needs)
    grad_w = torch.empty_like(w, memory_format=torch.contiguous_format) if needs[1] else None
    for k in tiles.chunks(x.size(0), *w.shape):
        b = Side.of(w[k], normalize, eps, dtype)
        # Contiguous for any strides of grad, and a copy because it is overwritten.
        ds = grad[:, k].to(rows.full.dtype, copy=True, memory_format=torch.contiguous_format)
        part = grads.chunk(b, tiles.scores(rows, b, metric), ds if metric == "dot" else ds.neg_())
        if grad_w is not None:
            grad_w[k] = part.to(w.dtype)
    grad_x = grads.finish()
    return None if grad_x is None else grad_x.to(x.dtype), grad_w


def normalized_distance_dbl(directions, grad, inputs: Matrices, spec: DistanceSpec) -> tuple[Tensor, Tensor, Tensor]:
    (v_x, v_w), (x, w), (metric, normalize, eps, dtype, _) = directions, inputs, spec
    tangents = Tangents(x, v_x, metric, normalize, eps, dtype)
    sign = 1.0 if metric == "dot" else -1.0
    d_grad = torch.empty_like(grad, memory_format=torch.contiguous_format)
    d_w = torch.empty_like(w, memory_format=torch.contiguous_format)
    for k in tiles.chunks(x.size(0), *w.shape):
        step = tangents.chunk(w[k], v_w[k] if v_w.numel() else None)
        d_grad[:, k] = (sign * step.ds).to(grad.dtype)
        d_w[k] = tangents.pull_back(step, None, grad[:, k].to(step.s.dtype) * sign).to(w.dtype)
    return d_grad, tangents.finish().to(x.dtype), d_w

"""normalize on the ``torch`` backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.signatures import NormalizeSpec, Rows
from . import tiles


def forward(x: Tensor, eps: float) -> Tensor:
    r, _ = tiles.norms(x, eps)
    return (x * r).to(x.dtype).contiguous()


def backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    r, unit = tiles.norms(x, eps)
    u, g = x * r, grad.to(r.dtype)
    return (r * torch.where(unit, g - u * (u * g).sum(-1, keepdim=True), g)).to(x.dtype).contiguous()


def double(v: Tensor, grad: Tensor, x: Tensor, eps: float) -> Tensor:
    """The gradient in x of <v, backward(grad, x)>: -r^2 [x^ (v.g - 3 (v.x^)(g.x^)) + (g.x^) v + (v.x^) g]."""
    r, unit = tiles.norms(x, eps)
    u, v, g = x * r, v.to(r.dtype), grad.to(r.dtype)
    vg, vu, gu = ((a * b).sum(-1, keepdim=True) for a, b in ((v, g), (v, u), (g, u)))
    return torch.where(unit, -(r * r) * (u * (vg - 3 * vu * gu) + gu * v + vu * g), 0).to(x.dtype).contiguous()


def normalize_fwd(rows: Rows, spec: NormalizeSpec) -> Tensor:
    return forward(rows.x, spec.eps)


def normalize_bwd(grad: Tensor, rows: Rows, spec: NormalizeSpec) -> Tensor:
    return backward(grad, rows.x, spec.eps)


def normalize_dbl(v: Tensor, grad: Tensor, rows: Rows, spec: NormalizeSpec) -> Tensor:
    return double(v, grad, rows.x, spec.eps)

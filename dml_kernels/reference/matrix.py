"""Unit vectors, and the dense matrix of scores or distances."""

from __future__ import annotations

import torch
from torch import Tensor


def normalize(x: Tensor, eps: float = 1e-12) -> Tensor:
    """x / max(|x|, eps) over the last dimension."""
    x = x.contiguous()  # the order of a sum depends on strides, so the norms of equal rows could differ
    return x / x.square().sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny).sqrt().clamp_min(eps)


def scores(x: Tensor, w: Tensor, metric: str, normalized: bool, eps: float = 1e-12) -> Tensor:
    """s_ij, larger is closer: u.p, -|u - p|^2 or -|u - p|, on unit vectors when ``normalized``."""
    if normalized or metric == "cosine":
        x, w = normalize(x, eps), normalize(w, eps)
    if metric in ("cosine", "dot"):
        return x @ w.T
    d2 = (x[:, None] - w[None]).square().sum(-1)
    if metric == "sqeuclidean":
        return -d2
    return -torch.where(d2 == 0, 0, torch.where(d2 == 0, 1, d2).sqrt())


def normalized_distance(x: Tensor, w: Tensor, metric: str = "euclidean", normalized: bool = True, eps: float = 1e-12):
    """Similarity for cosine and dot, distance for sqeuclidean and euclidean."""
    s = scores(x, w, metric, normalized, eps)
    return s if metric in ("cosine", "dot") else -s

"""Dense masked_logsumexp, written from its definition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import matrix
from .sets import sets


def _logsumexp(z: Tensor, members: Tensor) -> Tensor:
    """The log-sum-exp of each row over ``members``; -inf without a gradient for a row that has none."""
    some = members.any(1)
    z = torch.where(members, z, -math.inf)
    return torch.where(some, torch.logsumexp(torch.where(some[:, None], z, 0), 1), -math.inf)


def pool(s: Tensor, policy: str, params: Sequence[float]) -> Tensor:
    """The score of each class from those of its K centres, in adjacent columns: the maximum or SoftTriple's softmax."""
    if not policy.endswith("_pool"):
        return s
    s = s.reshape(s.size(0), s.size(1) // int(params[0]), int(params[0]))
    if policy == "max_pool":
        return torch.max(s, dim=2).values
    return torch.sum(torch.softmax(s / params[1], dim=2) * s, dim=2)


def circle_logits(s, scale, same, different, m) -> tuple[Tensor, Tensor]:
    """Circle loss's logits, their weights detached: -alpha_p (s - (1 - m)) and alpha_n (s - m), times the scale."""
    alpha_p, alpha_n = (1 + m - s).relu().detach(), (s + m).relu().detach()
    (k_p, o_p), (k_n, o_n) = same, different
    return -k_p * scale * alpha_p * (s - (1 - m) - o_p), k_n * scale * alpha_n * (s - m - o_n)


def masked_logsumexp(
    x, w, y, c=None, *, metric="cosine", normalized=False, scale=1.0, same=(1.0, 0.0), different=(1.0, 0.0),
    col_bias=None, exclude=None, ignore_index=-100, eps=1e-12, policy="linear", policy_params=(),
    first_class=0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(lse_same, lse_different, sum_same, sum_different); functional.masked_logsumexp has the formulas."""
    s = pool(matrix.scores(x, w, metric, normalized, eps), policy, policy_params)
    members = sets(y, c, s.size(1), exclude, ignore_index, first_class)
    t = scale[:, None] if isinstance(scale, Tensor) and scale.dim() == 1 else scale
    if policy == "quadratic":
        z_same, z_different = circle_logits(s, t, same, different, *policy_params)
    else:
        z_same, z_different = (k * t * (s - o) for k, o in (same, different))
    if col_bias is not None:
        members = [each & (col_bias != -math.inf) for each in members]
        bias = torch.where(col_bias == -math.inf, 0, col_bias)
        z_same, z_different = z_same + bias, z_different + bias
    both = list(zip((z_same, z_different), members, strict=True))
    return *(_logsumexp(z, each) for z, each in both), *(torch.where(each, z, 0).sum(1) for z, each in both)

"""Logit policies of masked_logsumexp in plain PyTorch: what lies between a chunk's scores and its logits.

Pooling makes one score S of a class's K centre scores s_k; the logit, its mask and its weights then have a column a
class. With slope_k = dS/ds_k, the first derivative spreads dS to dS slope_k, and the second adds slope's own:

    max_pool      S = max_k s_k                    slope_k = 1 at the first maximum, else 0: constant
    softmax_pool  S = sum_k p_k s_k                slope_k = p_k (1 + (s_k - S) / gamma),  p = softmax(s / gamma)
                  d slope_l / d s_k = (delta_lk (slope_k + p_k) - slope_l p_k - p_l slope_k) / gamma

``quadratic`` multiplies each logit's factor by a weight that counts as a constant in every derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.signatures import Spec


class Pooled:
    """One chunk's scores by class: ``s`` (N, classes), from the centres' scores (N, classes K), class by class."""

    def __init__(self, s: Tensor, spec: Spec):
        k = spec.centres
        self.pools, self.max = k > 1, spec.policy == "max_pool"
        if not self.pools:
            self.s = s
            return
        self.each = s.view(s.size(0), s.size(1) // k, k)
        if self.max:
            self.s, self.first = self.each.max(2)
        else:
            self.gamma = spec.policy_params[1]
            self.p = torch.softmax(self.each / self.gamma, 2)
            self.s = (self.p * self.each).sum(2)

    def _slope(self) -> Tensor:
        """dS/ds, (N, classes, K)."""
        if self.max:
            return torch.zeros_like(self.each).scatter_(2, self.first[..., None], 1)
        return self.p * (1 + (self.each - self.s[..., None]) / self.gamma)

    def spread(self, ds: Tensor) -> Tensor:
        """The gradient of the centres' scores, (N, classes K), from that of the pooled, (N, classes)."""
        return (ds[..., None] * self._slope()).flatten(1) if self.pools else ds

    def tangent(self, ds: Tensor) -> Tensor:
        """The pooled scores' derivative along that of the centres' scores."""
        return (ds.view_as(self.each) * self._slope()).sum(2) if self.pools else ds

    def pull_back(self, on_s: Tensor, on_ds: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
        """Weights on the pooled scores and on their tangents, to those on the centres' scores and tangents ``ds``."""
        if not self.pools:
            return on_s, on_ds
        slope, b = self._slope(), on_ds[..., None]
        on_each = on_s[..., None] * slope
        if not self.max:
            d = ds.view_as(self.each)
            total, mean = ((part * d).sum(2, keepdim=True) for part in (slope, self.p))
            on_each += b * (d * (slope + self.p) - self.p * total - slope * mean) / self.gamma
        return on_each.flatten(1), (b * slope).flatten(1)


def circle_weight(s: Tensor, same: Tensor, m: float) -> Tensor:
    """alpha of Circle loss: relu(1 + m - s) in the same set, relu(s + m) in the other."""
    return torch.where(same, 1 + m - s, s + m).clamp_min_(0)

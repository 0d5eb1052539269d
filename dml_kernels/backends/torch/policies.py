"""Logit policies of masked_logsumexp in plain PyTorch: the step between the scores of a chunk and its logits.

Pooling turns the K centre scores s_k of a class into one score S. The logits, their mask and their weights then have
one column for each class. With slope_k = dS/ds_k, the first derivative spreads dS to dS slope_k; the second derivative
adds the derivative of the slope:

    max_pool      S = max_k s_k                    slope_k = 1 at the first maximum, else 0: constant
    softmax_pool  S = sum_k p_k s_k                slope_k = p_k (1 + (s_k - S) / gamma),  p = softmax(s / gamma)
                  d slope_l / d s_k = (delta_lk (slope_k + p_k) - slope_l p_k - p_l slope_k) / gamma

``quadratic`` multiplies the factor of each logit by a weight that is a constant in every derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.signatures import Spec


class Pooled:
    """The scores of a chunk by class: ``s`` (N, classes), from the centres' scores (N, classes K), class by class."""

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
        """The gradient in the centres' scores, (N, classes K), from that in the pooled scores, (N, classes)."""
        return (ds[..., None] * self._slope()).flatten(1) if self.pools else ds

    def tangent(self, ds: Tensor) -> Tensor:
        """The tangent of the pooled scores, from the tangent of the centres' scores."""
        return (ds.view_as(self.each) * self._slope()).sum(2) if self.pools else ds

    def pull_back(self, on_s: Tensor, on_ds: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients in the centres' scores and in their tangents ``ds``, from those in the pooled ones."""
        if not self.pools:
            return on_s, on_ds
        slope, b = self._slope(), on_ds[..., None]
        on_each = on_s[..., None] * slope
        if not self.max:
            d = ds.view_as(self.each)
            total, mean = ((part * d).sum(2, keepdim=True) for part in (slope, self.p))
            on_each += b * (d * (slope + self.p) - self.p * total - slope * mean) / self.gamma
        return on_each.flatten(1), (b * slope).flatten(1)

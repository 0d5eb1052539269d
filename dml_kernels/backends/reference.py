"""The backend ``reference``: the dense formulas of :mod:`dml_kernels.reference`, differentiated by autograd.

It runs only if a call asks for it by name. Its functions take the tensors and the numbers of an op, as those of a
backend do, but are differentiable, so there are no backward functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..ops.signatures import (
    ArgmaxSpec,
    Bank,
    DistanceSpec,
    Hinged,
    HingeSpec,
    Matrices,
    Pairs,
    PairSpec,
    Points,
    Search,
    Spec,
    TripletSpec,
)
from ..pairs import dense

name = "reference"
normalize = reference.normalize


def normalized_distance(inputs: Matrices, spec: DistanceSpec) -> Tensor:
    x, w = (t.to(spec.dtype) for t in inputs)
    return reference.normalized_distance(x, w, spec.metric, spec.normalize, spec.eps)


def masked_logsumexp(inputs: Bank, spec: Spec) -> tuple[Tensor, ...]:
    """``spec.logit`` holds the factors and offsets as the caller states them, under every policy."""
    x, w, y, c, exclude, scale, col_bias = inputs
    return reference.masked_logsumexp(
        x, w, y, c, metric=spec.metric, normalized=spec.normalize, same=spec.logit[:2], different=spec.logit[2:],
        scale=torch.ones((), dtype=x.dtype) if scale is None else scale, col_bias=col_bias, exclude=exclude,
        ignore_index=spec.ignore_index, eps=spec.eps, policy=spec.policy, policy_params=spec.policy_params,
        first_class=max(spec.first_class, 0),
    )  # fmt: skip


def masked_hinge_sum(inputs: Hinged, spec: HingeSpec) -> tuple[Tensor, ...]:
    x, w, y, c, exclude, t_same, t_different = inputs
    return reference.masked_hinge_sum(
        x, w, y, c, metric=spec.metric, normalized=spec.normalize, same=spec.hinge[:2], different=spec.hinge[2:],
        t_same=t_same, t_different=t_different, relative=spec.relative, exclude=exclude,
        ignore_index=spec.ignore_index, eps=spec.eps, first_class=max(spec.first_class, 0),
    )  # fmt: skip


@torch.no_grad()
def masked_argmax(inputs: Search, spec: ArgmaxSpec) -> list[Tensor]:
    x, w, y, c, exclude, low, high = inputs
    return reference.masked_argmax(
        x, w, y, c, metric=spec.metric, normalized=spec.normalize, largest=spec.largest, low=low, high=high,
        seed=spec.seed if spec.noise else None, cutoffs=spec.cutoffs, exclude=exclude, ignore_index=spec.ignore_index,
        eps=spec.eps, first_class=max(spec.first_class, 0),
    )  # fmt: skip


def positive_pair_sum(inputs: Pairs, spec: PairSpec) -> tuple[Tensor, ...]:
    x, w, y, c, exclude, u, v = inputs
    same, _ = reference.sets(y, c, w.size(0), exclude, spec.ignore_index)
    s = reference.scores(x, w, spec.metric, spec.normalize, spec.eps)
    return dense.positive_pair_sum(s, same, u, v, spec)


def triplet_sum(inputs: Points, spec: TripletSpec) -> tuple[Tensor, ...]:
    x, w, y, c, exclude = inputs
    same, different = reference.sets(y, c, w.size(0), exclude, spec.ignore_index)
    s, between = (reference.scores(t, w, spec.metric, spec.normalize, spec.eps) for t in (x, w))
    return dense.triplet_sum(s, same, different, spec.margin, spec.smooth, between if spec.swap else None)

"""Dense, literal sums over positive pairs and over triplets, which autograd can differentiate any number of times.

They take a score matrix, so that they serve the tests (with scores from reference.scores) and the second derivative.
The terms of positives and of the Circle loss, for all computations in plain PyTorch, are here too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..logspace import log1pexp, logaddexp
from ..ops.signatures import PairSpec


def term(s: Tensor, u: Tensor, v: Tensor | None, kind: str, params: Sequence[float]) -> Tensor:
    """The term of a positive pair of score s, where u and v stand for the negatives of its anchor and its positive.

    ``softplus``, (k,): log(1 + exp(u - k s)). ``lifted``, (k, o): relu(logaddexp(u, v) - k s - o)^2 / 2, where -inf (no
    negatives) in both u and v counts as a log-sum-exp of 0. Arguments are broadcast. Autograd can differentiate the
    term twice also where u or v is -inf.
    """
    if kind == "softplus":
        (k,) = params
        return log1pexp(u - k * s)
    if kind != "lifted":
        raise ValueError(f"kind must be softplus or lifted; got {kind!r}")
    if v is None:
        raise ValueError(f"kind {kind!r} needs v")
    k, o = params
    return torch.relu(logaddexp(u, v, empty=0.0) - k * s - o).square() / 2


def circle_logit(logit: Sequence[float], m: float) -> list[float]:
    """(k_same, o_same, k_different, o_different) with the signs and optima of Circle loss; k takes circle_weight."""
    k_same, o_same, k_different, o_different = logit
    return [-k_same, o_same + 1 - m, k_different, o_different + m]


def circle_weight(s: Tensor, same: Tensor, m: float) -> Tensor:
    """The weight alpha of the Circle loss: relu(1 + m - s) in the same set, relu(s + m) in the other (same: bool)."""
    return torch.where(same, 1 + m - s, s + m).clamp_min_(0)


def positive_pair_sum(
    s: Tensor, same: Tensor, u: Tensor, v: Tensor | None, spec: PairSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of :func:`term` over ``same``, the number of terms, and of those above 0; O(number of positives)."""
    i, j = same.nonzero(as_tuple=True)
    return _by_row(term(s[i, j], u[i], None if v is None else v[j], spec.kind, spec.params), i, s.size(0))


def triplet_sum(
    s: Tensor, same: Tensor, different: Tensor, margin: float, smooth: bool, between: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums over all triplets, the number of terms, and of those above 0; O(number of positives x M).

    ``between`` (M, M), for ``swap``, are the scores of bank entries with each other.
    """
    i, j = same.nonzero(as_tuple=True)
    negatives = different[i]
    s_n = s[i] if between is None else torch.maximum(s[i], between[j])
    violation = s_n - s[i, j, None] + margin
    value = torch.nn.functional.softplus(violation, threshold=40) if smooth else torch.relu(violation)
    value = value[negatives]
    return _by_row(value, i[:, None].expand(negatives.shape)[negatives], s.size(0))


def _by_row(value: Tensor, i: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    # The sum is in fp64, because the rounding of a reference must not be the larger error.
    total = value.new_zeros(n, dtype=torch.float64).index_add(0, i, value.double()).to(value.dtype)
    number, active = (
        torch.zeros(n, dtype=torch.int64, device=i.device).index_add(0, i, counted.long())
        for counted in (torch.ones_like(i), value > 0)
    )
    return total, number, active

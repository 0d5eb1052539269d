"""Dense, literal sums over positive pairs and over triplets, differentiated by autograd as often as one likes.

Of a given score matrix, so that they serve the tests (scores from reference.scores) and the second derivative. Also the
terms of positives and of Circle loss, for whatever computes them in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..logspace import log1pexp, logaddexp
from ..ops.signatures import PairSpec


def term(s: Tensor, u: Tensor, v: Tensor | None, kind: str, params: Sequence[float]) -> Tensor:
    """What a positive pair of score s adds to a loss whose negatives are summed in u (those of its anchor) and v.

    ``softplus``, (k,): log(1 + exp(u - k s)). ``lifted``, (k, o): relu(logaddexp(u, v) - k s - o)^2 / 2, where -inf (no
    negatives) in both u and v counts as a log-sum-exp of 0. Broadcast; autograd differentiates it twice where u or v is
    -inf, too.
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
    """Sums of :func:`term` over ``same``, how many, and how many over 0; O(number of positives) terms."""
    i, j = same.nonzero(as_tuple=True)
    return _by_row(term(s[i, j], u[i], None if v is None else v[j], spec.kind, spec.params), i, s.size(0))


def triplet_sum(
    s: Tensor, same: Tensor, different: Tensor, margin: float, smooth: bool, between: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over all triplets, how many, and how many over 0; ``between`` (M, M) are the bank's own scores for swap.

    O(number of positives x M) terms.
    """
    i, j = same.nonzero(as_tuple=True)
    negatives = different[i]
    s_n = s[i] if between is None else torch.maximum(s[i], between[j])
    violation = s_n - s[i, j, None] + margin
    value = torch.nn.functional.softplus(violation, threshold=40) if smooth else torch.relu(violation)
    value = value[negatives]
    return _by_row(value, i[:, None].expand(negatives.shape)[negatives], s.size(0))


def _by_row(value: Tensor, i: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    # Through fp64: a reference's own sum must not be the larger error.
    total = value.new_zeros(n, dtype=torch.float64).index_add(0, i, value.double()).to(value.dtype)
    number, active = (
        torch.zeros(n, dtype=torch.int64, device=i.device).index_add(0, i, counted.long())
        for counted in (torch.ones_like(i), value > 0)
    )
    return total, number, active

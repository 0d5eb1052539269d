"""Dense, literal sums over positive pairs and over triplets, differentiated by autograd as often as one likes.

Of a given score matrix, so that they serve the tests (scores from reference.scores) and the second derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..logspace import log1pexp, logaddexp
from ..ops.signatures import PairSpec


def term(s: Tensor, u: Tensor, v: Tensor | None, spec: PairSpec) -> Tensor:
    """f(s, u, v), broadcast; differentiable twice by autograd where u or v is -inf, too."""
    if spec.kind == "softplus":
        return log1pexp(u - spec.params[0] * s)
    if v is None:
        raise ValueError(f"kind {spec.kind!r} needs v")
    return torch.relu(logaddexp(u, v, empty=0.0) - spec.params[0] * s - spec.params[1]).square() / 2


def members(y: Tensor, c: Tensor, exclude: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(N, M) bool each: the positives and the negatives of every row."""
    used = (y != ignore_index)[:, None] & (c != ignore_index)
    if exclude is not None:
        used = used & (exclude[:, None] != torch.arange(c.numel(), device=c.device))
    same = y[:, None] == c
    return same & used, ~same & used


def positive_pair_sum(
    s: Tensor, same: Tensor, u: Tensor, v: Tensor | None, spec: PairSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of :func:`term` over ``same``, how many, and how many over 0; O(number of positives) terms."""
    i, j = same.nonzero(as_tuple=True)
    return _by_row(term(s[i, j], u[i], None if v is None else v[j], spec), i, s.size(0))


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

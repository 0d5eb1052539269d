"""The tolerance rule: how far a result may be from the truth in fp64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from dml_kernels import reference

# The error from the fp64 truth is at most twice that of the dense PyTorch expression in the same dtype, or ULPS units
# in the last place of the output's largest value. This rule is used for every comparison with the truth.
#
# A distance has two dense expressions, of which the worse one counts: from differences (N M D values, the reference)
# and from the matrix product, as torch.cdist computes it and as every kernel must. The second uses differences where
# the expansion would cancel, so that it does not excuse errors of small distances.

ULPS = 4
NEAR = 1 / 16


def product_scores(x: Tensor, w: Tensor, metric: str, normalized: bool, eps: float = 1e-12) -> Tensor:
    """reference.scores, computed from the matrix product."""
    if metric in ("cosine", "dot"):
        return by_differences(x, w, metric, normalized, eps)
    u, p = (reference.normalize(t, eps) for t in (x, w)) if normalized else (x, w)
    span = u.square().sum(1)[:, None] + p.square().sum(1)
    d2 = span - 2 * (u @ p.T)
    d2 = torch.where(d2 < NEAR * span, (u[:, None] - p).square().sum(-1), d2)
    return -d2 if metric == "sqeuclidean" else -torch.where(d2 == 0, 0, torch.where(d2 == 0, 1, d2).sqrt())


by_differences = reference.scores


def error(value: Tensor, truth: Tensor, *, by_row: bool = False) -> float:
    """The largest error relative to the truth's largest value, over all or the worst row. Infinities and NaN agree."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape, f"shape {tuple(value.shape)}, the truth has {tuple(truth.shape)}"
    if truth.numel() == 0:
        return 0.0
    finite = truth.isfinite()
    if not torch.equal(value[~finite].nan_to_num(nan=7.0), truth[~finite].nan_to_num(nan=7.0)):
        return math.inf
    value, truth = (torch.where(finite, t, 0) for t in (value, truth))
    if not value.isfinite().all():
        return math.inf
    rows = truth.size(0) if by_row and truth.dim() > 1 else 1
    off, scale = (t.abs().reshape(rows, -1).amax(1) for t in (value - truth, truth))
    # Where the truth is 0 throughout, so must the value be.
    return torch.where(scale > 0, off / scale, torch.where(off > 0, math.inf, 0.0)).max().item()


class Yardstick(NamedTuple):
    """The truth of one output, and the dense expression's error against it: over all, and in the worst row."""

    truth: Tensor
    error: float
    error_by_row: float

    @staticmethod
    def of(dense: Tensor, truth: Tensor) -> Yardstick:
        return Yardstick(truth, error(dense, truth), error(dense, truth, by_row=True))

    def or_worse(self, *others: Yardstick) -> Yardstick:
        """This truth, with the dense error of the worst of several draws: one alone may be luckily small."""
        every = (self, *others)
        return Yardstick(self.truth, max(s.error for s in every), max(s.error_by_row for s in every))

    def in_fp64(self, truth: Tensor) -> Yardstick:
        """The yardstick in fp64, where the truth is the dense expression itself: the error of fp32 times the ratio of
        the units, times 8, because that truth has rounding errors too. In fp64 the formula is tested, not the rounding.
        """
        shrink = 8 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return Yardstick(truth, self.error * shrink, self.error_by_row * shrink)


def worst(sticks: Sequence[Mapping[str, Yardstick]]) -> dict[str, Yardstick]:
    """The first truths, each with the worst dense error."""
    return {k: stick.or_worse(*(s[k] for s in sticks[1:])) for k, stick in sticks[0].items()}


@contextlib.contextmanager
def scores_by(form: Callable[..., Tensor]) -> Iterator[None]:
    """Makes the dense references compute their scores in this form."""
    with mock.patch.object(reference, "scores", form), mock.patch.object(reference.matrix, "scores", form):
        yield


def dense_forms(metric: str) -> tuple[Callable[..., Tensor], ...]:
    return (by_differences, product_scores) if metric.endswith("euclidean") else (by_differences,)


def assert_accurate(value: Tensor, stick: Yardstick, what: str, *, by_row: bool = False) -> None:
    """Checks the tolerance rule."""
    theirs = stick.error_by_row if by_row else stick.error
    assert math.isfinite(theirs), f"{what}: the dense expression has no finite error here, so it is no yardstick"
    ours, bound = (
        error(value, stick.truth, by_row=by_row),
        max(2 * theirs, ULPS * torch.finfo(value.dtype).eps),
    )
    assert ours <= bound, f"{what}: error {ours:.3g}, allowed {bound:.3g} (the dense expression's is {theirs:.3g})"


def assert_all_accurate(ours: Mapping[str, Tensor], sticks: Mapping[str, Yardstick]) -> None:
    assert ours.keys() == sticks.keys()
    for name, value in ours.items():
        assert_accurate(value, sticks[name], name)
        if name in ("grad x", "grad w"):
            assert_accurate(value, sticks[name], f"{name}, row by row", by_row=True)


def assert_same_bits(a: Any, b: Any) -> None:
    for s, t in zip(a, b, strict=True):
        assert s.dtype == t.dtype
        assert s.shape == t.shape
        assert torch.equal(s.isnan(), t.isnan())
        assert torch.equal(s.nan_to_num(nan=0.0), t.nan_to_num(nan=0.0))

"""Shared by the tests of positive_pair_sum and triplet_sum: labelled problems, and value with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.support.dtypes import FP32, FP64, Dtype
from tests.support.problems import randint, randn
from tests.support.tolerance import Yardstick, assert_all_accurate, dense_forms, scores_by, worst


class Labelled(NamedTuple):
    """x (N, D), y, and w (M, D), c: the batch itself, or references. A fraction of the rows' own copies is left out."""

    x: Tensor
    w: Tensor | None
    y: Tensor
    c: Tensor
    exclude: Tensor | None

    @staticmethod
    def random(n: int = 23, m: int = 0, d: int = 7, classes: int = 5, seed: int = 0) -> Labelled:
        """Classes of several sizes and an ignored row; with references also an ignored entry and unused labels."""
        y = randint(0, classes, n, seed=seed + 1)
        y[: n // 8] = -100
        x = randn(n, d, seed=seed) / math.sqrt(d)
        if not m:
            return Labelled(x, None, y, y, torch.arange(n))
        c = randint(-1, classes + 1, m, seed=seed + 2)
        c[: m // 8] = -100
        return Labelled(x, randn(m, d, seed=seed + 3) / math.sqrt(d), y, c, randint(-1, m, n, seed=seed + 4))

    def leaves(self, dtype: Dtype) -> list[Tensor]:
        return [self.x.to(dtype.x).requires_grad_()] + ([] if self.w is None else [self.w.to(dtype.w).requires_grad_()])

    def rounded(self, dtype: Dtype) -> Labelled:
        """The same problem with vectors that the dtype holds exactly."""
        return self._replace(**{k: t.to(dtype.x).double() for k, t in (("x", self.x), ("w", self.w)) if t is not None})


def with_gradients(out: Any, leaves: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
    """The outputs, and the gradients of <grad, total>."""
    found = torch.autograd.grad(out.total, leaves, grad.to(out.total))
    named = {f"grad {'xwuv'[i]}": g for i, g in enumerate(found)}
    return {"total": out.total.detach(), "number": out.number, "active": out.active, **named}


def sticks(run: Callable[[Dtype, str], dict[str, Tensor]], truth: dict[str, Tensor], metric: str, dtype: Dtype):
    """Yardsticks of run(dtype, backend) on the reference, whose scores may be taken in several ways."""
    if dtype == FP64:
        return {k: s.in_fp64(truth[k]) for k, s in sticks(run, truth, metric, FP32).items()}
    found = []
    for form in dense_forms(metric):
        with scores_by(form):
            dense = run(dtype, "reference")
        found.append({k: Yardstick.of(dense[k], t) for k, t in truth.items()})
    return worst(found)


def assert_counts_and_all_accurate(out: dict[str, Tensor], limits: dict[str, Yardstick]) -> None:
    """Compares the counts exactly, and all else by the tolerance rule."""
    for key in ("number", "active"):
        count = out.pop(key)
        assert count.dtype == torch.int64
        assert torch.equal(count, limits.pop(key).truth), key
    assert_all_accurate(out, limits)

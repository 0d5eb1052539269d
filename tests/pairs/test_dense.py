"""The terms of positive pairs, by arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from dml_kernels import losses
from dml_kernels.pairs import dense

FP64 = torch.float64


def test_softplus_is_exact_in_fp64():
    u, s = torch.tensor([-40.0, 0.0, 21.0, 30.0], dtype=FP64), torch.tensor([1.0, -1.0, -2.0, 0.5], dtype=FP64)
    expected = [math.log1p(math.exp(a - 2 * b)) for a, b in zip(u.tolist(), s.tolist(), strict=True)]
    found = dense.term(u=u, s=s, v=None, kind="softplus", params=(2.0,))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=FP64), rtol=1e-15, atol=0)


def test_lifted():
    u, v, s = (torch.tensor([t], dtype=FP64) for t in (0.5, -torch.inf, 0.25))
    found = dense.term(s, u, v, "lifted", (1.0, -0.5))
    assert found.item() == pytest.approx((0.5 - 0.25 + 0.5) ** 2 / 2)
    assert dense.term(s, v, v, "lifted", (1.0, -0.5)).item() == pytest.approx(0.25**2 / 2)
    for kind, of, message in (("lifted", None, "needs v"), ("cubic", v, "softplus or lifted")):
        with pytest.raises(ValueError, match=message):
            dense.term(s, u, of, kind, (1.0, 0.0))


def test_ntxent_of_a_miners_pairs_is_exact_in_fp64():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], dtype=FP64)
    a, p, n = (torch.tensor([i]) for i in (0, 1, 2))
    found = losses.NTXentLoss(temperature=0.08)(x, torch.tensor([0, 0, 1]), (a, p, a, n))
    assert found.item() == pytest.approx(math.log1p(math.exp(25)), rel=1e-15)

"""Log-space helpers: values and gradients where an operand is -inf or huge."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from dml_kernels import logspace
from tests.support.problems import randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log1pexp_is_accurate_everywhere(dtype):
    x = torch.tensor([-1e4, -80.0, -30.0, -19.9, -1.0, 0.0, 1e-6, 1.0, 19.9, 20.1, 39.9, 40.1, 80.0, 1e4], dtype=dtype)
    values = [v + math.log1p(math.exp(-v)) if v > 0 else math.log1p(math.exp(v)) for v in x.tolist()]
    expected = torch.tensor(values, dtype=torch.float64)
    found = logspace.log1pexp(x)
    torch.testing.assert_close(found, expected.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=1e-37)


def test_log1pexp_derivatives():
    x = (randn(8, seed=1) * 10).requires_grad_()
    assert gradcheck(logspace.log1pexp, (x,))
    assert gradgradcheck(logspace.log1pexp, (x,))


def test_log1pexp_of_minus_infinity_is_0_with_zero_derivatives():
    x = torch.tensor([-math.inf, 1.0], requires_grad=True)
    out = logspace.log1pexp(x)
    assert out[0] == 0
    (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert first[0] == 0
    assert second[0] == 0


def test_log1pexp_of_nan_is_nan():
    assert logspace.log1pexp(torch.tensor(math.nan)).isnan()


def test_logaddexp_derivatives_where_operands_are_equal_or_minus_infinity():
    u, v = randn(4, seed=1), randn(4, seed=2)
    v[0] = u[0]
    call = lambda u, v: logspace.logaddexp(u, v, 0.0)  # noqa: E731
    torch.testing.assert_close(call(u, v), torch.logaddexp(u, v))
    assert gradcheck(call, (u.requires_grad_(), v.requires_grad_()))
    assert gradgradcheck(call, (u, v))
    u, v = (torch.tensor(t, requires_grad=True) for t in ([-math.inf, 2.0, -math.inf], [3.0, -math.inf, -math.inf]))
    out = logspace.logaddexp(u, v, 7.0)
    assert out.tolist() == [3, 2, 7]
    first = torch.autograd.grad(out.sum(), (u, v), create_graph=True)
    assert [t.tolist() for t in first] == [[0, 1, 0], [1, 0, 0]]
    assert all((t == 0).all() for t in torch.autograd.grad(first[0].sum() - first[1].sum(), (u, v)))

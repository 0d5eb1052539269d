"""Sizes whose products pass 2^31, without the memory: overlapping windows, far-apart rows, expanded gradients."""

from __future__ import annotations

import os

import pytest
import torch

from dml_kernels import functional as F
from tests.across.test_memory import MB, probe
from tests.support.backends import on_backends
from tests.support.problems import randn

# The torch backend indexes through PyTorch, and would take minutes.
compiled_only = pytest.mark.parametrize("backend", [pytest.param("cpu", marks=pytest.mark.cpp)])


@on_backends
def test_offsets_past_2_31_elements_in_300_mb(backend):
    found = probe("far_apart", backend)
    assert found["span"] > 1 << 31
    assert all(found["same"]), found
    assert found["peak"] < 300 * MB


@on_backends
@pytest.mark.slow
def test_m_times_d_past_2_31_in_300_mb(backend):
    m, d = 2_200_000, 1030
    found = probe("windows", backend, m, d)
    assert m * d > 1 << 31
    # same, different, sum_same, sum_different of bf16 products; the sum over all columns has terms of both signs.
    assert max(found["errors"][:3]) < 0.02, found
    assert found["grad_finite"]
    assert found["peak"] < 300 * MB


@compiled_only
@pytest.mark.slow
def test_n_times_m_past_2_31_with_an_expanded_gradient(backend):
    n, m = 4300, 500_000
    assert n * m > 1 << 31
    found = probe("wide_gradient", backend, n, m)
    assert max(found["errors"]) < 1e-4, found
    assert found["peak"] < 300 * MB


@compiled_only
@pytest.mark.slow
def test_n_times_m_past_2_31(backend):
    n, m = 4100, 600_000
    assert n * m > 1 << 31
    # The two sets of points are far apart, because near pairs take a slower way.
    x, w = ((randn(k, 2, seed=k) + off).float().requires_grad_() for k, off in ((n, 5), (m, -5)))
    y = torch.arange(n) * 146
    out = F.masked_logsumexp(x, w, y, metric="sqeuclidean", scale=0.1, sums=True, backend=backend)
    # Rows at both ends and on both sides of the element 2^31; only they send a gradient back.
    rows = torch.tensor([0, 17, (1 << 31) // m, (1 << 31) // m + 1, n - 1])
    upstream = torch.zeros(n)
    upstream[rows] = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5])
    grads = torch.autograd.grad(out.different, (x, w), upstream)

    a, b = x.detach()[rows].double().requires_grad_(), w.detach().double().requires_grad_()
    z = -0.1 * ((a[:, None, 0] - b[:, 0]).square() + (a[:, None, 1] - b[:, 1]).square())
    others = z.scatter(1, y[rows, None], -torch.inf).logsumexp(1)
    torch.testing.assert_close(out.different[rows].double(), others, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.same[rows].double(), z.gather(1, y[rows, None]).squeeze(1), rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(others, (a, b), upstream[rows].double())
    torch.testing.assert_close(grads[0][rows].double(), expected[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(grads[1].double(), expected[1], rtol=1e-3, atol=1e-9)
    silent = torch.ones(n, dtype=torch.bool)
    silent[rows] = False
    assert grads[0][silent].count_nonzero() == 0


@on_backends
@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_ten_million_classes_are_as_accurate_as_a_few(scale, backend):
    n, m, d = 4, 10_000_000, 16
    x = randn(n, d, seed=1).float().requires_grad_()
    w = torch.randn(m, d, generator=torch.Generator().manual_seed(2))
    y = torch.tensor([0, 123, m - 1, m // 2])
    out = F.masked_logsumexp(x, w, y, scale=scale, sums=True, backend=backend)
    (grad,) = torch.autograd.grad(out.different.sum(), x)

    unit = x.detach().double()
    unit = unit / unit.norm(dim=1, keepdim=True)
    z = torch.empty(n, m, dtype=torch.float64)
    for k in range(0, m, 500_000):
        bank = w[k : k + 500_000].double()
        z[:, k : k + 500_000] = scale * unit @ (bank / bank.norm(dim=1, keepdim=True)).T
    own = z.gather(1, y[:, None]).squeeze(1)
    sums = z.sum(1) - own
    z.scatter_(1, y[:, None], -torch.inf)
    lse = z.logsumexp(1)
    weights = z.sub_(lse[:, None]).exp_()
    mean = torch.zeros(n, d, dtype=torch.float64)
    for k in range(0, m, 500_000):
        bank = w[k : k + 500_000].double()
        mean += weights[:, k : k + 500_000] @ (bank / bank.norm(dim=1, keepdim=True))
    raw = scale * mean
    expected = (raw - unit * (unit * raw).sum(1, keepdim=True)) / x.detach().double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(out.different.double(), lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.same.double(), own, rtol=1e-5, atol=1e-6)
    # With ten million terms of either sign the error is relative to their size, not to their small sum.
    assert (out.sum_different.double() - sums).abs().max() < 1e-6 * scale * m**0.5 * 40
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=2e-5 * raw.abs().max().item())


def memory_available():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@on_backends
@pytest.mark.slow
def test_a_bank_gradient_of_more_than_2_31_values(backend):
    """The one case that needs the memory: grad_w in bf16 is 4.3 GB."""
    if memory_available() < 8 << 30:
        pytest.skip("needs 8 GB of free memory")
    m, d = 2_100_000, 1024
    assert m * d > 1 << 31
    buffer = randn(m + d, seed=1).bfloat16()
    w = buffer.as_strided((m, d), (1, 1)).detach().requires_grad_()
    x = randn(1, d, seed=2).bfloat16()
    rows = [0, 5, (1 << 31) // d - 1, (1 << 31) // d, (1 << 31) // d + 1, m - 1]
    # One large logit at each of these rows, which takes nearly all of the gradient.
    bias = torch.zeros(m)
    bias[rows] = 30.0
    out = F.masked_logsumexp(x, w, torch.tensor([9]), metric="dot", scale=0.01, col_bias=bias, backend=backend)
    (grad,) = torch.autograd.grad(out.different, w)
    assert grad.shape == (m, d)
    z = 0.01 * (w.detach()[rows].double() @ x[0].double())
    expected = 0.01 * z.softmax(0)[:, None] * x.double()
    torch.testing.assert_close(grad[rows].double(), expected, rtol=0.03, atol=1e-6)
    assert grad[1:5].abs().max() < 1e-6

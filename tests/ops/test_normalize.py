"""normalize: unit vectors and their derivatives against fp64 truth, and what must hold exactly."""

from __future__ import annotations

import functools

import pytest
import torch

from dml_kernels import functional as F
from dml_kernels import reference
from tests.support.backends import on_backends, on_backends_and
from tests.support.dtypes import DTYPES, FP32, FP64
from tests.support.features import every_other
from tests.support.problems import randn
from tests.support.tolerance import Yardstick, assert_accurate, assert_same_bits

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

SHAPES = ((1, 2), (2, 3), (127, 64), (252, 127), (507, 252), (127, 507), (33, 1030), (3, 4, 2, 5), (7,))
LAYOUTS = {
    "contiguous": lambda t: t,
    "strided": every_other,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "with a gap": lambda t: torch.cat((t, torch.full_like(t, float("nan"))), -1)[..., : t.size(-1)],
    "expanded": lambda t: t[:1].expand_as(t),
}


def outputs(function, x, grad, layout):
    leaf = x.clone().requires_grad_()
    out = function(layout(leaf))
    (found,) = torch.autograd.grad(out, leaf, grad.to(out.dtype))
    return out, found


@functools.lru_cache(maxsize=4)
def drawn(shape, dtype, layout, eps):
    """x, the incoming gradient, the truth and the dense expression's error, as problems.drawn."""
    every = []
    for seed in range(0, 500, 100):
        x = randn(*shape, seed=seed).to(dtype.x)
        if layout == "expanded":
            x = x[:1].expand_as(x).clone()
        grad = randn(*shape, seed=seed + 1).to(dtype.x)
        lower = FP32.x if dtype == FP64 else dtype.x
        truth = outputs(lambda t: reference.normalize(t, eps), x.double(), grad.double(), LAYOUTS[layout])
        dense = outputs(lambda t: reference.normalize(t, eps), x.to(lower), grad.to(lower), LAYOUTS[layout])
        wide = outputs(
            lambda t: reference.normalize(t, eps), *(t.to(lower).double() for t in (x, grad)), LAYOUTS[layout]
        )
        sticks = [Yardstick.of(d, t) for d, t in zip(dense, wide)]
        every.append((x, grad, [s.in_fp64(t) if dtype == FP64 else s for s, t in zip(sticks, truth)]))
    x, grad, first = every[0]
    return x, grad, [s.or_worse(*(e[2][i] for e in every[1:])) for i, s in enumerate(first)]


@on_backends_and(DTYPES[:3] + DTYPES[4:])
@pytest.mark.parametrize(
    ("shape", "layout", "eps"),
    [(s, "contiguous", 1e-12) for s in SHAPES]
    + [((127, 65), layout, 1e-12) for layout in LAYOUTS]
    + [((127, 65), "contiguous", 8.0), ((3, 4, 2, 5), "transposed", 1e-12)],
    ids=str,
)
def test_values_and_gradients_are_accurate(shape, layout, eps, dtype, backend):
    x, grad, sticks = drawn(shape, dtype, layout, eps)
    ours = outputs(lambda t: F.normalize(t, eps, backend=backend), x, grad, LAYOUTS[layout])
    for name, value, stick in zip(("value", "gradient"), ours, sticks):
        assert value.dtype == dtype.x
        assert_accurate(value, stick, name)
        if len(shape) == 2:
            assert_accurate(value, stick, f"{name}, row by row", by_row=True)


@on_backends_and((FP32, FP64))
def test_one_dimension_leaves_only_the_sign(dtype, backend):
    x = torch.tensor([[3.0], [-0.25], [1e-3]], dtype=dtype.x, requires_grad=True)
    out = F.normalize(x, backend=backend)
    torch.testing.assert_close(out, x.sign().detach())
    (grad,) = torch.autograd.grad(out.sum(), x)
    # The truth is 0, so the gradient is rounding of the 1 / |x| that the projection removes.
    assert (grad.abs() * x.abs()).max() <= 4 * torch.finfo(dtype.x).eps


@on_backends_and((FP32, FP64))
def test_rows_shorter_than_eps_are_divided_by_eps(dtype, backend):
    x = torch.tensor([[3e-4, 4e-4], [0.0, 0.0], [3.0, 4.0]], dtype=dtype.x, requires_grad=True)
    out = F.normalize(x, 1e-2, backend=backend)
    torch.testing.assert_close(out, torch.tensor([[3e-2, 4e-2], [0.0, 0.0], [0.6, 0.8]], dtype=dtype.x))
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    torch.testing.assert_close(grad[:2], torch.full((2, 2), 100.0, dtype=dtype.x))
    torch.testing.assert_close(grad[2], torch.tensor([0.2 * 0.16, -0.2 * 0.12], dtype=dtype.x))


@on_backends
@pytest.mark.parametrize("norm", [1e-20, 1e15])
def test_extreme_norms_give_unit_vectors(norm, backend):
    x = randn(9, 33, seed=1)
    out = F.normalize((x * norm).float(), 1e-30, backend=backend)
    torch.testing.assert_close(out.double(), F.normalize(x), rtol=1e-5, atol=1e-5)


@on_backends
def test_nan_stays_in_its_row(backend):
    x = randn(9, 33, seed=1).float()
    x[4, 7] = float("nan")
    leaf = x.clone().requires_grad_()
    out = F.normalize(leaf, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert out[4].isnan().all()
    assert grad[4].isnan().all()
    others = torch.arange(9) != 4
    assert out[others].isfinite().all()
    assert grad[others].isfinite().all()


@on_backends
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
def test_an_empty_batch_works(shape, backend):
    x = torch.zeros(shape, requires_grad=True)
    out = F.normalize(x, backend=backend)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape


@on_backends
def test_the_incoming_gradient_may_have_stride_0(backend):
    x = randn(9, 33, seed=1).requires_grad_()
    (expected,) = torch.autograd.grad(reference.normalize(x).sum(), x)
    (found,) = torch.autograd.grad(F.normalize(x, backend=backend).sum(), x)
    torch.testing.assert_close(found, expected)


@on_backends
def test_the_result_is_a_new_contiguous_tensor(backend):
    x = randn(6, 4, seed=1)
    x = (x / x.norm(dim=1, keepdim=True)).t().contiguous().t()
    out = F.normalize(x, backend=backend)
    assert out.is_contiguous()
    assert out.data_ptr() != x.data_ptr()
    assert_same_bits([out], [F.normalize(x.contiguous(), backend=backend)])

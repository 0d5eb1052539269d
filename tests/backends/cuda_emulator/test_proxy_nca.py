"""The fused Proxy-NCA: one launch forward, one backward, against the paper's formula."""

from __future__ import annotations

import math

import pytest
import torch

from dml_kernels import functional as F
from dml_kernels.losses.proxy_nca import proxy_nca_reference
from tests.support.dtypes import BF16, FP16, FP32, FP64, MIXED, MIXES
from tests.support.problems import randint, randn
from tests.support.tolerance import Yardstick, assert_all_accurate, assert_same_bits, worst


def fused(x, w, scale, y, exclude_positive=False, reduction="mean", label_smoothing=0.0, class_weight=None):
    return F.proxy_nca_loss(
        x, w, y, softmax_scale=scale, exclude_positive=exclude_positive, reduction=reduction,
        label_smoothing=label_smoothing, class_weight=class_weight, backend="cuda",
    )  # fmt: skip


pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), pytest.mark.cuda_emulator]


def draw(n, m, d, seed):
    x, w = randn(n, d, seed=seed), randn(m, d, seed=seed + 1)
    y = randint(0, m, n, seed=seed + 2)
    y[::5] = -100
    return x, w, y


def gradients(function, x, w, scale, seed):
    leaves = {"x": x.requires_grad_(), "w": w.requires_grad_(), "scale": scale.requires_grad_()}
    value = function(*leaves.values())
    incoming = randn(*value.shape, seed=seed).float().to(value.dtype)
    found = torch.autograd.grad(value, list(leaves.values()), incoming)
    return {"value": value.detach(), **{f"grad {k}": g for k, g in zip(leaves, found, strict=True)}}


def by_products(x, w, scale, y, exclude_positive, reduction):
    """The loss in plain PyTorch as users write it, with distances from a matrix product."""
    u, p = torch.nn.functional.normalize(x), torch.nn.functional.normalize(w)
    z = -scale.reshape(-1, 1) * (2 - 2 * u @ p.T)
    positive = torch.arange(w.size(0)) == y[:, None]
    sum_over = z.masked_fill(positive, -math.inf) if exclude_positive else z
    rows = torch.logsumexp(sum_over, 1) - torch.where(positive, z, 0).sum(1)
    rows = torch.where(y == -100, 0, rows)
    if reduction == "none":
        return rows
    return rows.sum() / ((y != -100).sum() if reduction == "mean" else 1)


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, FP16, MIXED, *MIXES[:2]], ids=lambda d: d.name)
@pytest.mark.parametrize("per_row", [False, True], ids=["one scale", "scale per row"])
@pytest.mark.parametrize("exclude_positive", [False, True], ids=["positive in", "positive out"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_value_and_gradients_are_accurate(reduction, exclude_positive, per_row, dtype):
    options = {"exclude_positive": exclude_positive, "reduction": reduction}

    def reference(x, w, s):
        return proxy_nca_reference(x, w, y, softmax_scale=s, **options)

    def plain(x, w, s):
        return by_products(x, w, s, y, **options)

    sticks = []
    for seed in (0, 100, 200):
        x, w, y = draw(29, 71, 20, seed)
        scale = randn(29, seed=seed + 3).exp() * 8 if per_row else torch.tensor(9.0).double()
        rounded = (x.to(dtype.x), w.to(dtype.w), scale.to(dtype.vectors))
        truth = gradients(reference, *(t.double() for t in rounded), seed)
        low = torch.float32 if dtype == FP64 else dtype.product
        sums = torch.promote_types(low, torch.float32)
        forms = [
            gradients(form, *(t.to(low) for t in rounded[:2]), rounded[2].to(sums), seed) for form in (reference, plain)
        ]
        drawn = worst([{k: Yardstick.of(f[k], t) for k, t in truth.items()} for f in forms])
        sticks.append({k: s.in_fp64(truth[k]) for k, s in drawn.items()} if dtype == FP64 else drawn)
        if seed == 0:
            first = (rounded, y)
    rounded, y = first
    ours = gradients(lambda *leaves: fused(*leaves, y, exclude_positive, reduction), *rounded, 0)
    assert_all_accurate(ours, worst(sticks))


@pytest.mark.parametrize("exclude_positive", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_first_derivative(reduction, exclude_positive):
    x, w, y = draw(7, 9, 5, 3)
    leaves = [t.requires_grad_() for t in (x, w, randn(7, seed=4).exp())]
    assert torch.autograd.gradcheck(lambda *a: fused(*a, y, exclude_positive, reduction), leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_first_derivative_with_smoothing_and_weights(reduction):
    x, w, y = draw(7, 9, 5, 3)
    leaves = [t.requires_grad_() for t in (x, w, randn(7, seed=4).exp())]
    options = {"reduction": reduction, "label_smoothing": 0.2, "class_weight": randn(9, seed=5).exp()}
    assert torch.autograd.gradcheck(lambda *a: fused(*a, y, **options), leaves)
    expected = proxy_nca_reference(x, w, y, softmax_scale=leaves[2], **options)
    torch.testing.assert_close(fused(*leaves, y, **options), expected)


@pytest.mark.parametrize("exclude_positive", [False, True])
def test_a_row_without_negatives_and_ignored_rows_contribute_0(exclude_positive):
    leaves = [t.requires_grad_() for t in (randn(3, 4, seed=1), randn(1, 4, seed=2), torch.ones(()).double())]
    for y in (torch.zeros(3, dtype=torch.int64), torch.full((3,), -100)):
        value = fused(*leaves, y, exclude_positive)
        assert value == 0
        assert all(g.count_nonzero() == 0 for g in torch.autograd.grad(value, leaves))


def test_nan_is_never_hidden():
    x, w, y = draw(29, 71, 20, 0)
    x[1, 3] = math.nan
    for exclude_positive in (False, True):
        assert fused(x, w, 1.0, y, exclude_positive).isnan()


def test_the_order_of_blocks_does_not_matter():
    x, w, y = (t.float() if t.is_floating_point() else t for t in draw(50, 400, 40, 0))
    runs = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, w, torch.tensor(3.0))]
        value = fused(*leaves, y)
        runs.append((value.detach(), *torch.autograd.grad(value, leaves)))
    assert_same_bits(*runs)

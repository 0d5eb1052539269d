"""Compared with pytorch-metric-learning 2.9.0: the same numbers where it is right, the truth where it is not."""

from __future__ import annotations

import pytest
import torch

from dml_kernels import losses, use_backend
from dml_kernels.losses.proxy_nca import proxy_nca_reference
from tests.support.backends import on_backends
from tests.support.problems import randint, randn


def pair(pml, scale, dtype=torch.float32, classes=30, width=16):
    """pytorch-metric-learning's loss and ours with the same proxies, made by the same call."""
    theirs = pml.losses.ProxyNCALoss(classes, width, softmax_scale=scale).to(dtype)
    ours = losses.ProxyNCALoss(classes, width, softmax_scale=scale).to(dtype)
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def value_and_grads(loss, x, y):
    x = x.clone().requires_grad_()
    value = loss(x, y)
    value.backward()
    return value.detach(), x.grad, loss.proxies.grad


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1, 3, 8, 32])
def test_value_and_gradients_are_theirs(scale, dtype, backend, pml):
    theirs, ours = pair(pml, scale, dtype)
    x, y = randn(20, 16, seed=1).to(dtype) * 3, randint(0, 30, 20, seed=2)
    with use_backend(backend):
        found = value_and_grads(ours, x, y)
    for name, a, b in zip(("value", "embeddings", "proxies"), found, value_and_grads(theirs, x, y), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_the_defaults_and_the_seeded_start_are_theirs(pml):
    torch.manual_seed(3)
    theirs = pml.losses.ProxyNCALoss(30, 16)
    torch.manual_seed(3)
    ours = losses.ProxyNCALoss(30, 16)
    assert torch.equal(theirs.proxies, ours.proxies)
    assert theirs.softmax_scale == ours.softmax_scale


@on_backends
def test_an_underflowed_row_counts_where_theirs_is_dropped(backend, pml):
    """Of two opposite proxies, one embedding is on its class's and one on the other: losses of 0 and 32 x 4."""
    proxies = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    x, y = torch.tensor([[3.0, 0.0], [-2.0, 0.0]]), torch.tensor([0, 0])
    theirs, ours = pair(pml, 32, classes=2, width=2)
    for loss in (theirs, ours):
        loss.proxies.data.copy_(proxies)
    truth = proxy_nca_reference(x.double(), proxies.double(), y, softmax_scale=32.0)
    with use_backend(backend):
        value, grad, _ = value_and_grads(ours, x, y)
    torch.testing.assert_close(value.double(), truth)
    assert value == 64
    assert grad.isfinite().all()
    assert theirs(x, y) == 0  # the reason to differ


@on_backends
@pytest.mark.parametrize("degrees", [90, 120, 150, 170])
def test_rows_far_from_their_proxy_keep_their_loss_and_gradient(degrees, backend, pml):
    angle = torch.deg2rad(torch.tensor([float(degrees)]))
    x = torch.stack((angle.cos(), angle.sin()), 1)
    _, ours = pair(pml, 64, classes=2, width=2)
    ours.proxies.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    with use_backend(backend):
        found = value_and_grads(ours, x, torch.tensor([0]))
    leaves = [t.double().detach().requires_grad_() for t in (x, ours.proxies)]
    truth = proxy_nca_reference(*leaves, torch.tensor([0]), softmax_scale=64.0)
    expected = (truth.detach(), *torch.autograd.grad(truth, leaves))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


@on_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_embeddings_leave_the_proxies_in_fp32(dtype, backend, pml):
    theirs, ours = pair(pml, 4)
    x, y = randn(20, 16, seed=1), randint(0, 30, 20, seed=2)
    with use_backend(backend):
        value, grad, _ = value_and_grads(ours, x.to(dtype), y)
    assert ours.proxies.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(value, theirs(x.float(), y), rtol=0.02, atol=0.02)


@on_backends
def test_minus_1_is_refused_or_ignored_never_nan(backend, pml):
    theirs, ours = pair(pml, 4)
    x, y = randn(20, 16, seed=1).float(), randint(0, 30, 20, seed=2)
    y[3] = -1
    with use_backend(backend):
        with pytest.raises(ValueError, match="labels"):
            ours(x, y)
        ours.ignore_index = -1
        found = ours(x, y)
    keep = y != -1
    torch.testing.assert_close(found, theirs(x[keep], y[keep]))


def test_arguments_of_theirs_that_mean_nothing_here_are_refused(pml):
    ours = losses.ProxyNCALoss(5, 3)
    x, y = torch.ones(2, 3), torch.tensor([0, 1])
    for extra in ({"ref_emb": x + 1}, {"ref_labels": y + 1}):
        with pytest.raises(ValueError, match=next(iter(extra))):
            ours(x, y, **extra)

"""ProxyNCALoss: its formulas, its options one by one, and proxies from data."""

from __future__ import annotations

import math

import pytest
import torch

from dml_kernels import functional as F
from dml_kernels import losses
from dml_kernels.losses.proxy_nca import proxy_nca_reference
from tests.support.backends import on_backends
from tests.support.problems import randint, randn


def points(n=11, m=9, d=4):
    return randn(n, d, seed=1), randn(m, d, seed=2), randint(0, m, n, seed=3)


@on_backends
def test_the_papers_worked_example(backend):
    """Three proxies on the axes, an embedding on the first: squared distances 0, 2, 2."""
    x, proxies, y = torch.tensor([[2.0, 0, 0]]), torch.eye(3), torch.tensor([0])
    included = F.proxy_nca_loss(x, proxies, y, backend=backend)
    excluded = F.proxy_nca_loss(x, proxies, y, exclude_positive=True, backend=backend)
    torch.testing.assert_close(included, torch.tensor(math.log(1 + 2 * math.exp(-2))))
    torch.testing.assert_close(excluded, torch.tensor(math.log(2) - 2))
    assert excluded < 0


@on_backends
def test_a_step_downhill_pulls_to_the_own_proxy_and_pushes_from_others(backend):
    """Some published code has the wrong sign of the distance."""
    x = torch.tensor([[1.0, 1.0]], requires_grad=True)
    F.proxy_nca_loss(x, torch.eye(2), torch.tensor([0]), backend=backend).backward()
    assert x.grad[0, 0] < 0 < x.grad[0, 1]


@on_backends
@pytest.mark.parametrize("epsilon", [0.1, 0.9])
def test_label_smoothing_is_that_of_torchs_cross_entropy(epsilon, backend):
    x, w, y = points()
    y[4] = -100
    logits = -3 * torch.cdist(torch.nn.functional.normalize(x), torch.nn.functional.normalize(w)).square()
    weight = torch.rand(9).double()
    for reduction in ("mean", "sum", "none"):
        expected = torch.nn.functional.cross_entropy(logits, y, label_smoothing=epsilon, reduction=reduction)
        found = F.proxy_nca_loss(
            x, w, y, softmax_scale=3, label_smoothing=epsilon, reduction=reduction, backend=backend
        )
        torch.testing.assert_close(found, expected)
    expected = torch.nn.functional.cross_entropy(logits, y, weight=weight)
    torch.testing.assert_close(
        F.proxy_nca_loss(x, w, y, softmax_scale=3, class_weight=weight, backend=backend), expected
    )


@on_backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("exclude_positive", [True, False])
def test_class_weights(reduction, exclude_positive, backend):
    x, w, y = points()
    y[3] = -100
    options = {"class_weight": torch.arange(9).double(), "reduction": reduction, "exclude_positive": exclude_positive}
    torch.testing.assert_close(
        F.proxy_nca_loss(x, w, y, **options, backend=backend), proxy_nca_reference(x, w, y, **options)
    )


@on_backends
def test_a_mean_of_weightless_rows_is_0(backend):
    x, w, y = points()
    x.requires_grad_()
    value = F.proxy_nca_loss(x, w, y, class_weight=torch.zeros(9).double(), backend=backend)
    value.backward()
    assert value == 0
    assert x.grad.count_nonzero() == 0


@on_backends
def test_a_weight_of_an_ignored_class_changes_nothing(backend):
    x, w, y = points()
    y[3] = 5
    weights = [torch.ones(9).double(), torch.ones(9).double()]
    weights[1][5] = 100.0
    a, b = (F.proxy_nca_loss(x, w, y, class_weight=v, ignore_index=5, backend=backend) for v in weights)
    torch.testing.assert_close(a, b)


@on_backends
def test_labels_may_share_a_proxy(backend):
    x, w, _ = points(m=3)
    label_to_proxy = torch.tensor([0, 1, 2, 0, 1, 2])
    y = randint(0, 6, 11, seed=4)
    y[5] = -100
    for options in ({}, {"exclude_positive": True}, {"class_weight": torch.arange(6).double() + 1}):
        found = F.proxy_nca_loss(x, w, y, label_to_proxy=label_to_proxy, **options, backend=backend)
        expected = proxy_nca_reference(x, w, y, label_to_proxy=label_to_proxy, **options)
        torch.testing.assert_close(found, expected)


@on_backends
def test_the_scale_may_be_one_per_row_and_gets_a_gradient(backend):
    x, w, y = points()
    scale = (randn(11, seed=5).exp()).requires_grad_()
    found = F.proxy_nca_loss(x, w, y, softmax_scale=scale, backend=backend)
    expected = proxy_nca_reference(x, w, y, softmax_scale=scale)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, scale)[0] for v in (found, expected)))


@on_backends
def test_an_embedding_opposite_its_proxy_keeps_its_whole_loss(backend):
    """At scale 32 the positive's share underflows in fp32. In log space the loss is 4 x 32 minus the logit of the
    nearest other proxy.
    """
    proxies = torch.eye(4)
    x = -proxies[:1]
    x.requires_grad_()
    value = F.proxy_nca_loss(x, proxies, torch.tensor([0]), softmax_scale=32.0, backend=backend)
    torch.testing.assert_close(value, torch.tensor(32 * (4 - 2) + math.log(3)))
    value.backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int64])
def test_labels_of_any_integer_dtype(dtype):
    loss = losses.ProxyNCALoss(9, 4)
    x, _, y = points()
    assert torch.equal(loss(x.float(), y.to(dtype)), loss(x.float(), y))


def test_scalar_tensor_scale_of_the_module_can_be_learned():
    loss = losses.ProxyNCALoss(9, 4)
    loss.softmax_scale = torch.nn.Parameter(torch.tensor(2.0))
    x, _, y = points()
    loss(x.float(), y).backward()
    assert loss.softmax_scale.grad.abs() > 0
    assert "softmax_scale" in dict(loss.named_parameters())


def test_the_proxies_can_be_assigned_anew():
    loss = losses.ProxyNCALoss(9, 4)
    x, w, y = points()
    loss.proxies = torch.nn.Parameter(w.float())
    assert torch.equal(loss(x.float(), y), F.proxy_nca_loss(x.float(), w.float(), y))


def test_the_proxies_dtype_survives_any_embedding():
    loss = losses.ProxyNCALoss(9, 4)
    x, _, y = points()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        loss(x.to(dtype), y).backward()
        assert loss.proxies.dtype == loss.proxies.grad.dtype == torch.float32


def test_given_proxies_are_copied_and_converted():
    w = points()[1]
    loss = losses.ProxyNCALoss(9, 4, proxies=w, dtype=torch.float32)
    assert loss.proxies.dtype == torch.float32
    w.zero_()
    assert loss.proxies.abs().sum() > 0


def test_random_proxies_are_standard_normal_and_seeded():
    loss = losses.ProxyNCALoss(500, 64)
    assert abs(loss.proxies.mean()) < 0.03
    assert abs(loss.proxies.std() - 1) < 0.03
    torch.manual_seed(7)
    a = losses.ProxyNCALoss(9, 4).proxies
    torch.manual_seed(7)
    assert torch.equal(a, losses.ProxyNCALoss(9, 4).proxies)
    assert losses.ProxyNCALoss(9, 4, dtype=torch.float64).proxies.dtype == torch.float64
    assert losses.ProxyNCALoss(9, 4, device="meta").proxies.device.type == "meta"


# --- proxies from data


def data():
    """Class 0: three points, the second nearest their mean direction; class 1: one; class 2: none; one row ignored."""
    x = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 3.0], [-5.0, 0.0], [9.0, 9.0]])
    return x, torch.tensor([0, 0, 0, 1, -100])


ROOT = math.sqrt(0.5)
EXPECTED = {
    "mean": [[(1 + ROOT) / 3, (1 + ROOT) / 3], [-1.0, 0.0]],
    "sample": [[1.0, 0.0], [-1.0, 0.0]],
    "nearest": [[ROOT, ROOT], [-1.0, 0.0]],
}


@pytest.mark.parametrize("how", EXPECTED)
def test_proxies_from_data(how):
    loss = losses.ProxyNCALoss(3, 2)
    untouched = loss.proxies[2].clone()
    loss.init_from_data(*data(), how=how)
    torch.testing.assert_close(loss.proxies[:2].detach(), torch.tensor(EXPECTED[how]))
    assert torch.equal(loss.proxies[2], untouched)
    assert loss.proxies.requires_grad
    assert loss.proxies.is_leaf


@pytest.mark.parametrize("how", EXPECTED)
def test_proxies_from_shuffled_data(how):
    x = randn(200, 8, seed=1).float()
    y = randint(0, 20, 200, seed=2)
    loss = losses.ProxyNCALoss(20, 8)
    loss.init_from_data(x, y, how=how)
    unit = torch.nn.functional.normalize(x)
    for k in range(20):
        members = unit[y == k]
        mean = members.mean(0)
        expected = {"mean": mean, "sample": members[0], "nearest": members[(members @ mean).argmax()]}[how]
        torch.testing.assert_close(loss.proxies[k].detach(), expected)


@pytest.mark.parametrize("how", EXPECTED)
def test_proxies_from_data_follow_the_label_map(how):
    loss = losses.ProxyNCALoss(4, 2, label_to_proxy=torch.tensor([1, 1, 0, 0]), ignore_index=-1)
    x, y = data()
    loss.init_from_data(x, torch.where(y == -100, -1, y), how=how)
    first = torch.nn.functional.normalize(x[:4])
    if how == "mean":
        torch.testing.assert_close(loss.proxies[1].detach(), first.mean(0))
    else:
        assert (loss.proxies[1] == first).all(1).any()


@pytest.mark.parametrize("how", EXPECTED)
def test_no_data_leaves_the_proxies(how):
    loss = losses.ProxyNCALoss(3, 2)
    before = loss.proxies.detach().clone()
    loss.init_from_data(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), how=how)
    loss.init_from_data(torch.ones(2, 2), torch.full((2,), -100), how=how)
    assert torch.equal(loss.proxies, before)


def test_training_finds_the_classes():
    """After a few steps on separable classes each proxy is nearest to its class."""
    centres = randn(8, 16, seed=1).float() * 3
    y = torch.arange(160) % 8
    x = centres[y] + randn(160, 16, seed=2).float()
    loss = losses.ProxyNCALoss(8, 16, softmax_scale=8, exclude_positive=True)
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        loss(x, y).backward()
        optimiser.step()
    found = F.normalized_distance(x, loss.proxies.detach()).argmin(1)
    assert (found == y).float().mean() > 0.98

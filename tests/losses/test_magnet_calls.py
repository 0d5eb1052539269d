"""Calls of the Magnet loss: reductions, threads, transforms, dtypes, the Module, bad input."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from dml_kernels import functional as F
from dml_kernels import losses, use_backend
from dml_kernels.losses.magnet import batch_variance, magnet_reference
from tests.support.backends import on_backends
from tests.support.magnet import OPTIONS, evaluate, on_given, problem
from tests.support.problems import randn

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@on_backends
def test_reductions_agree(backend):
    x, clusters, classes, _ = problem()
    rows, total, mean = (
        F.magnet_loss(x, clusters, classes, alpha=4.0, reduction=r, backend=backend) for r in ("none", "sum", "mean")
    )
    counted = (clusters != -100) & (classes[clusters.clamp_min(0)] != -100)
    assert rows[~counted].count_nonzero() == 0
    torch.testing.assert_close(rows.sum(), total)
    torch.testing.assert_close(total / counted.sum(), mean)


@pytest.mark.cpp
@pytest.mark.parametrize("shape", [(48, 12, 64), (500, 300, 33), (2000, 40, 16)], ids=str)
@on_given
def test_the_same_bits_at_any_number_of_threads(given, shape, any_threads):
    x, clusters, classes, centers = (t.float() if t.is_floating_point() else t for t in problem(*shape))
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(evaluate(F.magnet_loss, x, clusters, classes, centers if given else None, normalize=True))
    for other in found[1:]:
        assert all(torch.equal(other[key], value) for key, value in found[0].items())


@on_backends
def test_compiled_whole_equals_eager(backend):
    torch._dynamo.reset()
    x, clusters, classes, _ = problem()
    function = functools.partial(F.magnet_loss, normalize=True, backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = (evaluate(f, x.float(), clusters, classes) for f in (compiled, function))
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key])


@on_backends
def test_functional_transforms(backend):
    x, clusters, classes, _ = problem(9, 5, 3)

    def function(x):
        return F.magnet_loss(x, clusters, classes, alpha=2.0, backend=backend)

    expected = evaluate(F.magnet_loss, x, clusters, classes, alpha=2.0, backend=backend)["grad x"]
    torch.testing.assert_close(torch.func.grad(function)(x), expected)
    direction = randn(9, 3, seed=8)
    product = torch.func.grad(lambda x: (torch.func.grad(function)(x) * direction).sum())(x)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first, leaf, direction)
    torch.testing.assert_close(product, second)
    both = torch.func.vmap(function)(torch.stack((x, 2 * x)))
    torch.testing.assert_close(both, torch.stack((function(x), function(2 * x))))


@on_backends
def test_autocast_multiplies_in_bf16_and_keeps_the_rest(backend):
    x, clusters, classes, _ = (t.float() if t.is_floating_point() else t for t in problem())
    with torch.autocast("cpu", torch.bfloat16):
        out = evaluate(F.magnet_loss, x, clusters, classes, backend=backend)
    assert [t.dtype for t in out.values()] == [torch.float32] * 2
    expected = evaluate(F.magnet_loss, x, clusters, classes, backend=backend)
    assert not torch.equal(out["value"], expected["value"])
    torch.testing.assert_close(out["value"], expected["value"], rtol=0.02, atol=0.02)


def test_the_reference_backend_is_the_reference():
    x, clusters, classes, centers = problem()
    with use_backend("reference"):
        found = F.magnet_loss(x, clusters, classes, centers=centers)
    assert torch.equal(found, magnet_reference(x, clusters, classes, centers=centers))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_ids_of_any_integer_dtype(dtype):
    x, clusters, classes, _ = problem()
    clusters, classes = clusters.clamp_min(0), classes.clamp_min(0)
    found = F.magnet_loss(x, clusters.to(dtype), classes.to(dtype))
    assert torch.equal(found, F.magnet_loss(x, clusters, classes))


# --- the Module


def test_the_module_is_the_function():
    x, clusters, classes, centers = problem()
    for options in OPTIONS:
        if "variance" in options:
            continue
        for given in (None, centers):
            expected = F.magnet_loss(x, clusters, classes, centers=given, **options)
            assert torch.equal(losses.MagnetLoss(**options)(x, clusters, classes, given), expected)


@pytest.mark.parametrize("mode", ["batch", "running"])
def test_the_running_variance_is_an_average_of_training_batches(mode):
    loss = losses.MagnetLoss(variance=mode, momentum=0.25, normalize=True)
    batches = [problem(seed=seed)[:3] for seed in (0, 10, 20)]
    measured = [batch_variance(*b, normalize=True).float() for b in batches]
    expected = measured[0]
    for i, batch in enumerate(batches):
        expected = measured[0] if i == 0 else torch.lerp(expected, measured[i], 0.25)
        value = loss(*batch)
        torch.testing.assert_close(loss.running_variance, expected)
        given = None if mode == "batch" else loss.running_variance
        torch.testing.assert_close(value, F.magnet_loss(*batch, variance=given, normalize=True))
    loss.eval()
    loss(*batches[0])
    torch.testing.assert_close(loss.running_variance, expected)
    assert loss.batches_seen == 3
    restored = losses.MagnetLoss(variance=mode)
    restored.load_state_dict(loss.state_dict())
    assert restored.running_variance == loss.running_variance


def test_the_batchs_variance_is_that_of_the_formula():
    x, clusters, classes, centers = problem(9, 5, 3)
    for given in (None, centers):
        leaf = x.clone()
        found = batch_variance(leaf, clusters, classes, centers=given)
        mu = {k: x[(clusters == k)].mean(0) if given is None else centers[k] for k in range(5)}
        kept = [i for i in range(9) if clusters[i] != -100 and classes[clusters[i]] != -100]
        total = sum((x[i] - mu[int(clusters[i])]).square().sum() for i in kept)
        torch.testing.assert_close(found, total / (len(kept) - 1))


def test_training_pulls_a_class_of_two_modes_into_clusters():
    """XOR: each class has two blobs, so that one proxy for each class could not represent it. The clusters end pure."""
    corners = torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]])
    clusters = torch.arange(80) % 4
    inputs = corners[clusters] + 0.3 * randn(80, 2, seed=1).float()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    optimiser, loss = torch.optim.Adam(net.parameters(), lr=0.01), losses.MagnetLoss(alpha=2.0)
    classes = torch.tensor([0, 0, 1, 1])
    before = loss(net(inputs), clusters, classes).item()
    for _ in range(150):
        optimiser.zero_grad()
        value = loss(net(inputs), clusters, classes)
        value.backward()
        optimiser.step()
    assert value < 0.2 * before
    with torch.no_grad():
        r = net(inputs)
    means = torch.stack([r[clusters == k].mean(0) for k in range(4)])
    assert (classes[torch.cdist(r, means).argmin(1)] == classes[clusters]).all()


# --- bad input

X, K, C = torch.randn(4, 3), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1])
BAD = {
    "embeddings must": ((X[0], K, C), {}),
    "clusters must be integers": ((X, K.float(), C), {}),
    r"clusters must have shape \(4,\)": ((X, K[:3], C), {}),
    "clusters must be a torch.Tensor": ((X, [0, 1, 0, 1], C), {}),
    r"clusters must be in \[0, 2\).*got 2": ((X, K + 1, C), {}),
    r"clusters must be in \[0, 2\).*got -1": ((X, K - 1, C), {}),
    "cluster_classes must be integers": ((X, K, C.float()), {}),
    r"cluster_classes must have shape \(K,\)": ((X, K, C[:0]), {}),
    "centers must have a row for each of the 2": ((X, K, C), {"centers": torch.randn(3, 3)}),
    "embeddings and centers must have the same embedding size": ((X, K, C), {"centers": torch.randn(2, 4)}),
    "variance must not be negative": ((X, K, C), {"variance": -1.0}),
    "variance must not be negative; got -2": ((X, K, C), {"variance": torch.tensor(-2.0)}),
    "variance must be finite": ((X, K, C), {"variance": math.nan}),
    "variance must be a number or a floating": ((X, K, C), {"variance": torch.ones(2)}),
    "min_variance must be positive": ((X, K, C), {"min_variance": 0.0}),
    "alpha must be finite": ((X, K, C), {"alpha": math.inf}),
    "alpha must be a number": ((X, K, C), {"alpha": "7"[:0]}),
    "eps must be positive": ((X, K, C), {"eps": 0.0}),
    "reduction must be one of": ((X, K, C), {"reduction": "median"}),
    "ignore_index must be an integer": ((X, K, C), {"ignore_index": 1.5}),
    "unknown backend": ((X, K, C), {"backend": "abacus"}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_with_the_fix(message):
    args, options = BAD[message]
    with pytest.raises((TypeError, ValueError), match=message):
        F.magnet_loss(*args, **options)


@pytest.mark.parametrize("options", [{"variance": "mine"}, {"momentum": 0}, {"min_variance": 0}, {"reduction": "max"}])
def test_a_bad_option_of_the_module_is_refused_at_once(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        losses.MagnetLoss(**options)

"""The Magnet loss against the paper's formula: accuracy, derivatives, layouts, degenerate batches, the Module."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from dml_kernels import functional as F
from dml_kernels.losses.magnet import magnet_reference
from tests.support.backends import on_backends, on_backends_and
from tests.support.dtypes import BF16, FP16, FP32, FP64, MIXED, MIXES
from tests.support.magnet import OPTIONS, evaluate, on_given, on_options, problem
from tests.support.problems import randn
from tests.support.tolerance import Yardstick, assert_all_accurate, worst

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def by_products(x, clusters, classes, *, centers=None, alpha=1.0, variance=None, normalize=False, reduction="mean"):
    """The loss in plain PyTorch with distances from a matrix product, which is the other dense expression."""
    r = torch.nn.functional.normalize(x) if normalize else x
    counted = clusters != -100
    counted[counted.clone()] = classes[clusters[counted]] != -100
    ids, r = clusters[counted], r[counted]
    if centers is None:
        one = torch.nn.functional.one_hot(ids, classes.numel()).to(r.dtype)
        used = (one.sum(0) > 0) & (classes != -100)
        centers = (one.T @ r) / one.sum(0)[:, None].clamp_min(1)
    else:
        used = classes != -100
    own = (r - centers[ids]).square().sum(1)
    sigma2 = own.sum() / max(ids.numel() - 1, 1) if variance is None else variance
    d2 = r.square().sum(1)[:, None] + centers.square().sum(1) - 2 * r @ centers.T
    z = (-d2 / (2 * sigma2)).masked_fill((classes[ids][:, None] == classes) | ~used, -math.inf)
    rows = torch.relu(alpha + own / (2 * sigma2) + torch.logsumexp(z, 1))
    total = rows.sum()
    return total / ids.numel() if reduction == "mean" else total


def yardsticks(x, clusters, classes, centers, options, dtype):
    def rounded(function, x_dtype, w_dtype):
        w = None if centers is None else centers.to(dtype.w).to(w_dtype)
        return evaluate(function, x.to(dtype.x).to(x_dtype), clusters, classes, w, **options)

    truth = rounded(magnet_reference, torch.float64, torch.float64)
    if dtype.product == torch.float64:
        fp32 = yardsticks(x, clusters, classes, centers, options, FP32)
        return {k: stick.in_fp64(truth[k]) for k, stick in fp32.items()}
    sticks = []
    for form in (magnet_reference, by_products):
        dense = rounded(form, dtype.product, dtype.product)
        sticks.append({k: Yardstick.of(dense[k], t) for k, t in truth.items()})
    return worst(sticks)


@functools.lru_cache(maxsize=1)
def drawn(which, shape, given, dtype):
    problems = [problem(*shape, seed=seed) for seed in range(0, 300, 100)]
    sticks = [yardsticks(*p[:3], p[3] if given else None, OPTIONS[which], dtype) for p in problems]
    return problems[0], worst(sticks)


@on_backends_and((FP32, FP64, BF16, MIXED, FP16, MIXES[0]))  # without centres x alone has a dtype
@pytest.mark.parametrize("shape", [(31, 9, 24), (20, 100, 3)], ids=str)
@on_given
@on_options
def test_value_and_gradient_are_accurate(which, given, shape, dtype, backend):
    (x, clusters, classes, centers), sticks = drawn(which, shape, given, dtype)
    w = centers.to(dtype.w) if given else None
    out = evaluate(F.magnet_loss, x.to(dtype.x), clusters, classes, w, **OPTIONS[which], backend=backend)
    kinds = [dtype.accumulated, dtype.x, dtype.w]
    assert [t.dtype for t in out.values()] == kinds[: len(out)]
    assert_all_accurate(out, sticks)


# --- derivatives


@on_backends
@on_given
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("variance", [None, 0.3, "tensor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_first_and_second_derivative(reduction, variance, normalize, given, backend):
    x, clusters, classes, centers = problem(9, 5, 3)
    leaves = [x, *([centers] if given else []), *([torch.tensor(0.3).double()] if variance == "tensor" else [])]
    leaves = [t.clone().requires_grad_() for t in leaves]

    def function(*args):
        return F.magnet_loss(
            args[0], clusters, classes, centers=args[1] if given else None, alpha=2.0, normalize=normalize,
            variance=args[-1] if variance == "tensor" else variance, reduction=reduction, backend=backend,
        )  # fmt: skip

    assert function(*leaves).sum() > 0
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@on_backends
def test_only_what_asks_for_a_gradient_gets_one(backend):
    x, clusters, classes, centers = problem()
    variance = torch.tensor(0.4, requires_grad=True)
    value = F.magnet_loss(x, clusters, classes, centers=centers, variance=variance, backend=backend)
    (alone,) = torch.autograd.grad(value, variance)
    everything = [t.clone().requires_grad_() for t in (x, centers)]
    value = F.magnet_loss(everything[0], clusters, classes, centers=everything[1], variance=variance, backend=backend)
    *_, together = torch.autograd.grad(value, (*everything, variance))
    torch.testing.assert_close(alone, together)


@on_backends
def test_detached_means_are_constants(backend):
    """The same value as with the batch's own means, and the gradient of the formula with the means held still."""
    x, clusters, classes, _ = problem()
    counted = (clusters != -100) & (classes[clusters.clamp_min(0)] != -100)
    one = torch.nn.functional.one_hot(torch.where(counted, clusters, 0), classes.numel()).double() * counted[:, None]
    classes = torch.where(one.sum(0) > 0, classes, -100)
    means = (one.T @ x) / one.sum(0)[:, None].clamp_min(1)
    own, held = (
        evaluate(F.magnet_loss, x, clusters, classes, backend=backend),
        evaluate(F.magnet_loss, x, clusters, classes, means, backend=backend),
    )
    torch.testing.assert_close(own["value"], held["value"])
    assert not torch.allclose(own["grad x"], held["grad x"])
    expected = evaluate(magnet_reference, x, clusters, classes, means)
    torch.testing.assert_close(held["grad x"], expected["grad x"])


# --- the formula


@on_backends
def test_the_papers_formula_by_hand(backend):
    """Two clusters on a line, at 0 and 4, have two examples each, at distance 1 from the centre: sigma^2 = 4 / 3."""
    x = torch.tensor([[-1.0], [1.0], [3.0], [5.0]])
    found = F.magnet_loss(
        x, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1]), alpha=7.0, reduction="none", backend=backend
    )
    half = 1 / (2 * 4 / 3)
    torch.testing.assert_close(
        found, torch.tensor([7 + half - 25 * half, *[7 + half - 9 * half] * 2, 7 - 24 * half]).relu()
    )


@on_backends
def test_the_variance_is_not_squared(backend):
    """Stretching space does not change the loss; with sigma^4 in place of sigma^2 it would."""
    x, clusters, classes, _ = problem()
    a, b = (F.magnet_loss(s * x, clusters, classes, backend=backend) for s in (1.0, 7.0))
    torch.testing.assert_close(a, b)


@on_backends
def test_clusters_of_the_own_class_are_no_impostors(backend):
    x, clusters, _, _ = problem()
    far = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    moved = x + 1e3 * (far[clusters.clamp_min(0)] == 1)[:, None]
    options = {"variance": 0.5, "reduction": "none", "backend": backend}
    in_class_0 = far[clusters.clamp_min(0)] == 0
    without = torch.where(far[clusters.clamp_min(0)] == 1, -100, clusters)
    a = F.magnet_loss(moved, clusters, far, **options)
    b = F.magnet_loss(x, without, far, **options)
    torch.testing.assert_close(a[in_class_0], b[in_class_0])


@on_backends
@on_given
@on_options
def test_the_order_of_examples_and_the_names_of_clusters_do_not_matter(which, given, backend):
    x, clusters, classes, centers = problem()
    function = functools.partial(F.magnet_loss, **OPTIONS[which], backend=backend)
    expected = function(x, clusters, classes, centers=centers if given else None)
    rows, names = torch.randperm(31), torch.randperm(9)
    renamed = torch.where(clusters == -100, -100, names[clusters.clamp_min(0)])
    shuffled = torch.empty_like(classes).scatter(0, names, classes)
    moved = torch.empty_like(centers).index_copy(0, names, centers)
    found = function(x[rows], renamed[rows], shuffled, centers=moved if given else None)
    torch.testing.assert_close(found, expected)


@on_backends
@pytest.mark.parametrize("ids", ["few", "as many as rows", "global"])
def test_ids_of_a_large_index_serve_as_they_are(ids, backend):
    x, clusters, classes, _ = problem()
    expected = evaluate(F.magnet_loss, x, clusters, classes, backend=backend)
    size = {"few": 9, "as many as rows": 31, "global": 100_000}[ids]
    names = torch.randperm(size)[:9]
    large = torch.full((size,), 77).scatter(0, names, classes)
    renamed = torch.where(clusters == -100, -100, names[clusters.clamp_min(0)])
    found = evaluate(F.magnet_loss, x, renamed, large, backend=backend)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key])


@on_backends
def test_far_from_every_cluster_the_loss_grows_and_keeps_its_gradient(backend):
    """exp followed by log with an epsilon would limit the loss and leave no gradient."""
    x = torch.tensor([[0.0, 0], [1000, 0], [2.0, 0], [2.0, 1]], requires_grad=True)
    rows = F.magnet_loss(
        x, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1]), centers=torch.tensor([[0.0, 0], [2, 0]]), variance=1.0,
        reduction="none", backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(rows[1], torch.tensor(1 + (1000.0**2 - 998.0**2) / 2))
    rows.sum().backward()
    torch.testing.assert_close(x.grad[1], torch.tensor([2.0, 0]))


# --- degenerate batches

ONE_CLASS = torch.zeros(9, dtype=torch.int64)
DEGENERATE = {
    "one example a cluster": lambda x, k, c: (x[:9], torch.arange(9), torch.arange(9) // 2),
    "one cluster": lambda x, k, c: (x, k * 0, c),
    "all clusters of one class": lambda x, k, c: (x, k.clamp_min(0), ONE_CLASS),
    "all clusters of one class but an absent one": lambda x, k, c: (
        x,
        k.clamp_min(0).clamp_max(7),
        torch.arange(9) // 8,
    ),
    "no spread": lambda x, k, c: (torch.arange(9.0).double()[k.clamp_min(0), None].expand(31, 24), k, c),
    "no spread, all at one place": lambda x, k, c: (torch.ones_like(x), k, c),
    "one example": lambda x, k, c: (x[:1], k[:1], c),
    "two examples": lambda x, k, c: (x[:2], torch.tensor([0, 8]), c),
    "no examples": lambda x, k, c: (x[:0], k[:0], c),
    "all ignored": lambda x, k, c: (x, torch.full_like(k, -100), c),
    "all classes ignored": lambda x, k, c: (x, k, torch.full_like(c, -100)),
    "a zero embedding": lambda x, k, c: (torch.cat((x[:1] * 0, x[1:])), k, c),
}


@on_backends
@on_given
@pytest.mark.parametrize("alpha", [0.0, 1.0, 50.0])
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_batches_match_the_reference(kind, alpha, given, backend):
    *batch, centers = problem()
    x, clusters, classes = DEGENERATE[kind](*batch)
    centers = centers if given else None
    found, expected = (
        evaluate(f, x, clusters, classes, centers, alpha=alpha, **o)
        for f, o in ((F.magnet_loss, {"backend": backend}), (magnet_reference, {}))
    )
    for key, value in found.items():
        unit = max(1.0, expected[key].abs().max().item() if value.numel() else 1.0)
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-9 * unit)
    if kind in ("one cluster", "all clusters of one class", "no examples", "all ignored") and not given:
        assert found["value"] == 0
        assert found["grad x"].count_nonzero() == 0


@on_backends
def test_at_its_floor_the_variance_is_a_constant(backend):
    x, clusters, classes, _ = problem()
    floored = evaluate(F.magnet_loss, x, clusters, classes, min_variance=9.0, alpha=5.0, backend=backend)
    given = evaluate(F.magnet_loss, x, clusters, classes, variance=9.0, alpha=5.0, backend=backend)
    torch.testing.assert_close(floored["grad x"], given["grad x"])
    variance = torch.tensor(1e-9, requires_grad=True)
    F.magnet_loss(x, clusters, classes, variance=variance, backend=backend).backward()
    assert variance.grad == 0


@on_backends
@pytest.mark.parametrize("power", [-40, 36])
def test_a_change_of_unit_changes_no_digit(power, backend):
    """In fp32 the square of the variance under- or overflows in either unit; loss and gradients are those of unit 1."""
    found = []
    for unit in (1.0, 2.0**power):
        x, clusters, classes, _ = problem(12, 4, 5)
        x = (x.float() * unit).requires_grad_()
        loss = F.magnet_loss(x, clusters, classes, alpha=3.0, min_variance=1e-37, backend=backend)
        (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad((first * randn(12, 5, seed=3)).sum(), x)
        found.append((loss.detach(), first.detach() * unit, plain * unit, second * unit * unit))
    assert found[0][3].abs().max() > 0.01
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@on_backends
def test_an_inactive_example_has_no_gradient(backend):
    x, clusters, classes, _ = problem()
    out = evaluate(F.magnet_loss, x, clusters, classes, variance=1e-3, alpha=-1e6, reduction="none", backend=backend)
    assert out["value"].count_nonzero() == 0
    assert out["grad x"].count_nonzero() == 0


@on_backends
@on_given
def test_an_ignored_example_is_as_if_it_were_not_there(given, backend):
    x, clusters, classes, centers = problem()
    keep = (clusters != -100) & (classes[clusters.clamp_min(0)] != -100)
    assert 0 < keep.sum() < 30
    x[~keep] = 1e6
    centers = centers if given else None
    every = evaluate(F.magnet_loss, x, clusters, classes, centers, backend=backend)
    kept = evaluate(F.magnet_loss, x[keep], clusters[keep], classes, centers, backend=backend)
    torch.testing.assert_close(every["value"], kept["value"])
    torch.testing.assert_close(every["grad x"][keep], kept["grad x"])
    assert every["grad x"][~keep].count_nonzero() == 0


@on_backends
def test_nan_is_never_hidden(backend):
    x, clusters, classes, _ = problem()
    x[0, 0] = math.nan
    assert F.magnet_loss(x, clusters, classes, backend=backend).isnan()
    rows = F.magnet_loss(x, clusters, classes, variance=0.5, reduction="none", backend=backend)
    assert rows[0].isnan()

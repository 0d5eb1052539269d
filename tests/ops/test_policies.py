"""Logit policies of masked_logsumexp: pooling over a class's centres, and Circle loss's detached weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from dml_kernels import functional as F
from dml_kernels import reference
from dml_kernels.backends import torch as torch_backend
from tests.support.backends import on_backends, on_backends_and, require
from tests.support.dtypes import BF16, EVERY_DTYPE, FP16, FP32, FP64, MIXED, MIXES
from tests.support.features import FEATURES
from tests.support.problems import METRICS, Problem, on_metrics, randint, randn
from tests.support.problems import check as check_problem
from tests.support.tolerance import assert_same_bits

POOLS = ("max_pool", "softmax_pool")
on_pools = pytest.mark.parametrize("policy", POOLS)
on_policies = pytest.mark.parametrize("policy", [*POOLS, "quadratic"])


class Columns(Problem):
    """A problem whose bank has K centres for each of its columns."""

    @property
    def sizes(self):
        n, d, m = super().sizes
        return n, d, m // centres(self.options["policy"], self.options["policy_params"])


def centres(policy, params):
    return int(params[0]) if policy.endswith("_pool") else 1


def params_of(policy, k):
    return {"max_pool": (k,), "softmax_pool": (k, 0.3), "quadratic": (0.25,)}[policy]


def problem(policy, k, n, classes, d, metric, normalize, seed, clear=False):
    """With ``clear`` each class has two centres, one for each half of the rows, that lead all others by far.

    Without it, half precision sends the gradient of a maximum to another centre, also in dense PyTorch.
    """
    seed += n + classes + d
    p = Problem.random(n, classes * centres(policy, params_of(policy, k)), d, metric, normalize, seed=seed)
    p.y = randint(0, classes, n, seed=seed + 2)
    if clear and policy == "max_pool" and k > 1:
        axis = 3 * torch.nn.functional.normalize(randn(1, d, seed=seed + 7))
        p.tensors["x"] *= 0.5
        p.tensors["w"] *= 0.5
        p.tensors["x"] += axis * (2 * randint(0, 2, n, seed=seed + 8) - 1)[:, None]
        leaders = randn(classes, k, seed=seed + 9).topk(2).indices
        shift = torch.zeros(classes, k).scatter_(1, leaders, torch.tensor([[1.0, -1.0]]).expand(classes, 2))
        p.tensors["w"] += axis * shift.view(-1, 1)
    p.options |= {"policy": policy, "policy_params": params_of(policy, k)}
    return Columns(p.tensors, p.y, p.options, p.grads, seed=seed)


def clear_problem(*key, seed):
    return problem(*key, seed, clear=True)


def check(make, key, dtype, backend, clear=False):
    check_problem(clear_problem if clear else make, key, dtype, backend)


# Centres, rows, classes, width: one tile, many tiles, a ragged end, more rows than centres.
POOLED_SIZES = (
    (2, 33, 61, 24), (3, 37, 401, 16), (5, 9, 503, 33), (7, 61, 151, 12), (10, 17, 211, 48), (64, 21, 19, 20),
    (64, 5, 1, 7), (513, 7, 3, 8), (3, 611, 11, 24), (1, 30, 40, 8),
)  # fmt: skip


@on_backends_and((FP32, BF16))
@on_pools
@pytest.mark.parametrize("sizes", POOLED_SIZES, ids=str)
def test_pooling_is_accurate_for_any_number_of_centres(sizes, policy, dtype, backend):
    which = POOLED_SIZES.index(sizes) + 2 * POOLS.index(policy) + 3 * (dtype == BF16)
    check(problem, (policy, *sizes, *METRICS[which % len(METRICS)]), dtype, backend, clear=dtype == BF16)


@on_backends_and((FP64, MIXED, FP16, *MIXES))
@on_policies
def test_the_rarer_dtypes_are_accurate(policy, dtype, backend):
    check(
        problem,
        (policy, 3, 33, 127, 24, *METRICS[EVERY_DTYPE.index(dtype) % len(METRICS)]),
        dtype,
        backend,
        clear=dtype != FP64,
    )


@on_backends_and((FP32, BF16))
@on_policies
@on_metrics
def test_every_metric_is_accurate(metric, normalize, policy, dtype, backend):
    check(problem, (policy, 5, 41, 107, 24, metric, normalize), dtype, backend, clear=dtype == BF16)


# Options that do not change the bank's rows; kinds of points concern the metrics and are tested without a policy.
NAMES = [name for name in FEATURES if not name.endswith("_rows") and name != "far_from_the_origin"] + ["ignored_rows"]


def with_feature(name, policy, sizes, metric, normalize, seed):
    p = problem(policy, *sizes, metric, normalize, seed + sum(map(ord, name)))
    FEATURES[name](p)
    return p


# Circle at scale 10,000 is left out: there a near tie of two logits determines the error, in dense PyTorch as well.
OPTIONS = [(n, p) for n in NAMES for p in (*POOLS, "quadratic") if (n, p) != ("scale_ten_thousand", "quadratic")]


@on_backends_and((FP32,))
@pytest.mark.parametrize(("name", "policy"), OPTIONS)
def test_every_option_is_accurate(name, policy, dtype, backend):
    which = NAMES.index(name) + len(policy)
    check(with_feature, (name, policy, (3, 19, 43, 12), *METRICS[which % len(METRICS)]), dtype, backend)


@on_backends
def test_all_memory_is_written(backend, nan_filled_memory):
    for policy in (*POOLS, "quadratic"):
        check(with_feature, ("everything_at_once", policy, (7, 29, 90, 12), "euclidean", False), FP32, backend)


@on_backends
@on_policies
def test_columns_that_all_rows_leave_out_get_no_gradient(policy, backend):
    k = 4 if policy in POOLS else 1
    x, w = randn(9, 6, seed=1).requires_grad_(), randn(20 * k, 6, seed=2).requires_grad_()
    bias = torch.zeros(20, dtype=torch.float64)
    bias[7] = -math.inf
    c = torch.arange(20)
    c[11] = -100
    out = F.masked_logsumexp(
        x, w, torch.arange(9) % 5, c, col_bias=bias, policy=policy, policy_params=params_of(policy, k), backend=backend
    )
    (grad,) = torch.autograd.grad((out.same + out.different).sum(), w)
    used = grad.view(20, k, 6).abs().amax((1, 2)) > 0
    assert used.logical_not().nonzero().flatten().tolist() == [7, 11]


# ---------------------------------------------------------------------------------------------------------------------
# Pools


@on_backends
@on_pools
def test_a_pool_of_one_centre_is_no_pool(policy, backend):
    x, w, y = randn(7, 5, seed=1), randn(30, 5, seed=2), randint(0, 30, 7, seed=3)
    plain = F.masked_logsumexp(x, w, y, backend=backend)
    assert_same_bits(
        F.masked_logsumexp(x, w, y, policy=policy, policy_params=params_of(policy, 1), backend=backend)[:2], plain[:2]
    )


@on_backends_and((FP32, FP64, BF16))
def test_the_gradient_of_a_maximum_goes_to_the_first(dtype, backend):
    """Scores are integers and tie exactly on every backend: centres 1 and 3 of class 0, and all of class 1."""
    w = torch.tensor([[1, 0], [2, 1], [0, 1], [2, 1], *[[1, 1]] * 4]).to(dtype.w).requires_grad_()
    x = torch.ones(1, 2, dtype=dtype.x)
    out = F.masked_logsumexp(
        x, w, torch.tensor([0]), metric="dot", policy="max_pool", policy_params=(4,), backend=backend
    )
    assert out.same.item() == 3
    (grad,) = torch.autograd.grad(out.same + out.different, w)
    assert grad.tolist() == [[0, 0], [1, 1], [0, 0], [0, 0], [1, 1], *[[0, 0]] * 3]


@on_backends
def test_a_nan_among_the_centres_is_not_lost(backend):
    for k in range(3):
        for policy in POOLS:
            w = randn(12, 5, seed=2)
            w[3 + k] = math.nan
            out = F.masked_logsumexp(
                randn(4, 5, seed=1), w, torch.tensor([0, 1, 2, 3]), policy=policy, policy_params=params_of(policy, 3),
                backend=backend,
            )  # fmt: skip
            assert out.same.isnan().tolist() == [False, True, False, False]
            assert out.different.isnan().tolist() == [True, False, True, True]


@on_backends
@pytest.mark.parametrize("gamma", [1e-4, 1e4])
def test_extreme_gamma_is_the_maximum_or_the_mean(gamma, backend):
    x, w, y = (t.float() for t in (randn(9, 6, seed=1), randn(60, 6, seed=2), randint(0, 12, 9, seed=3)))
    found = F.masked_logsumexp(x, w, y.long(), policy="softmax_pool", policy_params=(5, gamma), backend=backend)
    s = reference.scores(x, w, "cosine", True).view(9, 12, 5)
    pooled = s.max(2).values if gamma < 1 else s.mean(2)
    expected = pooled.gather(1, y.long()[:, None]).squeeze(1)
    torch.testing.assert_close(found.same, expected, rtol=1e-3, atol=1e-4)


@on_backends
def test_soft_triple_and_sub_centres_of_pytorch_metric_learning(backend):
    """Its (D, M K) weights are class-major, as ours: loss = logaddexp(m(z_y), L-) - m(z_y) with a margin on z_y."""
    losses = require("pytorch_metric_learning.losses")
    classes, d, k = 23, 9, 5
    theirs = losses.SoftTripleLoss(classes, d, centers_per_class=k, la=20, gamma=0.1, margin=0.01).double()
    x, y = randn(31, d, seed=1).requires_grad_(), randint(0, classes, 31, seed=2)
    out = F.masked_logsumexp(
        x, theirs.fc.t(), y, scale=20, policy="softmax_pool", policy_params=(k, 0.1), backend=backend
    )
    ours = torch.nn.functional.softplus(out.different - (out.same - 20 * 0.01)).mean()
    expected = theirs(x, y)
    torch.testing.assert_close(ours, expected)
    found, wanted = (torch.autograd.grad(loss, (x, theirs.fc)) for loss in (ours, expected))
    torch.testing.assert_close(found, wanted)
    sub = losses.SubCenterArcFaceLoss(num_classes=classes, embedding_size=d, sub_centers=3, margin=0, scale=16).double()
    out = F.masked_logsumexp(x, sub.W.t(), y, scale=16, policy="max_pool", policy_params=(3,), backend=backend)
    ours, expected = torch.nn.functional.softplus(out.different - out.same).mean(), sub(x, y)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    found, wanted = (torch.autograd.grad(loss, (x, sub.W)) for loss in (ours, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@on_backends
@on_pools
@on_metrics
def test_pooling_differentiates_twice(metric, normalize, policy, backend):
    n, classes, k, d = 3, 4, 3, 2
    y, c = torch.tensor([0, 1, 9]), torch.tensor([0, 1, 0, -100])
    exclude = torch.tensor([-1, 1, 0])
    given = [randn(n, d, seed=1), randn(classes * k, d, seed=2), *(randn(s, seed=s).abs() + 0.5 for s in (n, 4))]

    def function(x, w, scale, col_bias):
        out = F.masked_logsumexp(
            x, w, y, c, metric=metric, normalize=normalize, scale=scale, col_bias=col_bias,
            same=(-1.5, 0.1), different=(2.0, -0.3), exclude=exclude, sums=True, policy=policy,
            policy_params=params_of(policy, k), backend=backend,
        )  # fmt: skip
        return tuple(torch.where(v == -math.inf, 0, v) for v in out)

    inputs = [t.requires_grad_() for t in given]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@on_policies
@pytest.mark.parametrize("k", [3, 40, 64])
def test_chunks_of_whole_classes_make_no_difference(k, policy, monkeypatch):
    """The torch backend and the double backward of all backends use chunks: here many, with a ragged last one."""
    sizes = (5, 47, k if policy in POOLS else 1, 4)

    def both(elements):
        monkeypatch.setattr(torch_backend.tiles, "CHUNK_ELEMENTS", elements)
        p = problem(policy, sizes[2], sizes[0], sizes[1], sizes[3], "sqeuclidean", True, seed=1)
        FEATURES["everything_at_once"](p)
        leaves = p.leaves(FP64)
        out = p.ours(leaves, "torch")
        total = sum(torch.where(v > -math.inf, v, 0).square().sum() for v in out.values())
        first = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))

    torch.testing.assert_close(both(1 << 6), both(1 << 20), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Quadratic


@on_backends
@on_metrics
def test_the_weights_of_circle_loss_are_constants_in_both_derivatives(metric, normalize, backend):
    """Finite differences would include the change of the weights, so the truth is autograd of the dense expression
    with detached weights.
    """
    x, w, y, c = randn(6, 4, seed=1), randn(11, 4, seed=2), randint(0, 3, 6, seed=3), randint(0, 3, 11, seed=4)
    tensors = [t.requires_grad_() for t in (x, w, *(randn(s, seed=s).abs() + 0.5 for s in (6, 11)))]

    def second(name):
        x, w, scale, col_bias = tensors
        out = F.masked_logsumexp(
            x, w, y, c, metric=metric, normalize=normalize, scale=scale, col_bias=col_bias,
            same=(1.5, 0.1), different=(0.5, -0.3), sums=True, policy="quadratic", policy_params=(0.3,), backend=name,
        )  # fmt: skip
        first = torch.autograd.grad(sum(v.square().sum() for v in out), tensors, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    torch.testing.assert_close(second(backend), second("reference"), rtol=1e-9, atol=1e-9)


@on_backends
def test_circle_loss_of_pytorch_metric_learning(backend):
    losses = require("pytorch_metric_learning.losses")
    x, y = randn(40, 8, seed=1).requires_grad_(), randint(0, 6, 40, seed=2)
    expected = losses.CircleLoss(m=0.4, gamma=80)(x, y)
    out = F.masked_logsumexp(
        x, x, y, y, scale=80, exclude=torch.arange(40), policy="quadratic", policy_params=(0.4,), backend=backend
    )
    ours = torch.nn.functional.softplus(out.same + out.different).mean()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(expected, x))


# ---------------------------------------------------------------------------------------------------------------------
# Promises


def outputs(policy, shape, metric, dtype, backend):
    n, classes, k, d = shape
    m = classes * centres(policy, params_of(policy, k))
    x, w = randn(n, d, seed=1).to(dtype.x).requires_grad_(), randn(m, d, seed=2).to(dtype.w).requires_grad_()
    vectors = [randn(size, seed=3).to(dtype.vectors).requires_grad_() for size in (n, classes)]
    out = F.masked_logsumexp(
        x, w, randint(0, 5, n, seed=4), randint(0, 5, classes, seed=5), metric=metric, scale=vectors[0],
        same=(-2.0, 0.1), different=(3.0, 0.2), col_bias=vectors[1], sums=True,
        exclude=randint(-1, classes, n, seed=6), policy=policy, policy_params=params_of(policy, k), backend=backend,
    )  # fmt: skip
    kept = (out.different > -torch.inf) & (out.same > -torch.inf)
    return *out, *torch.autograd.grad(sum(torch.where(kept, v, 0).sum() for v in out), (x, w, *vectors))


@pytest.mark.cpp
@on_policies
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=lambda d: d.name)
def test_any_number_of_threads_gives_the_same_bits(dtype, policy, any_threads):
    for shape, metric in (((33, 700, 7, 24), "euclidean"), ((1500, 13, 10, 9), "cosine"), ((7, 90, 64, 5), "dot")):
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(outputs(policy, shape, metric, dtype, "cpu"))
        for other in results[1:]:
            assert_same_bits(other, results[0])


@on_backends
@on_policies
def test_compiled_whole_equals_eager(policy, backend):
    def step(x, w, y):
        k = 3 if policy in POOLS else 1
        out = F.masked_logsumexp(x, w, y, policy=policy, policy_params=params_of(policy, k), backend=backend)
        return (out.different - out.same).sum()

    rows = centres(policy, params_of(policy, 3)) * 11
    x, w = randn(9, 4, seed=1).float().requires_grad_(), randn(rows, 4, seed=2).float().requires_grad_()
    y = randint(0, 11, 9, seed=3)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for f in (compiled, step):
        value = f(x, w, y)
        found = value.detach(), *torch.autograd.grad(value, (x, w))
        if f is compiled:
            first = found
    torch.testing.assert_close(first, found, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


@on_backends
@pytest.mark.parametrize("centres", [2, 5, 64])
def test_of_equal_centres_the_first_takes_the_gradient(centres, backend):
    """Scores are small integers, exact in any order, and no tile holds a whole number of classes."""
    n, classes, d = 9, 37, 5
    w = randint(-2, 3, classes * d, seed=1).view(classes, 1, d).expand(-1, centres, -1).reshape(-1, d)
    x, w = randint(-2, 3, n * d, seed=2).view(n, d).double(), w.double().requires_grad_()
    y = torch.arange(n)
    out = F.masked_logsumexp(
        x, w, y, metric="dot", scale=0.1, policy="max_pool", policy_params=(centres,), backend=backend
    )  # fmt: skip
    (grad,) = torch.autograd.grad((out.different + out.same).sum(), w)
    grad = grad.view(classes, centres, d)
    assert grad[:, 1:].count_nonzero() == 0
    assert grad[:, 0].count_nonzero() > 0

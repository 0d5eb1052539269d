"""masked_hinge_sum: values, counts and derivatives against fp64 truth, and the contract's exact promises."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from dml_kernels import functional as F
from tests.support.backends import on_backends, on_backends_and
from tests.support.dtypes import BF16, EVERY_DTYPE, FP16, FP32, FP64, MIXED, MIXES
from tests.support.features import FEATURES
from tests.support.hinges import DIFFERENT, SAME, HingeProblem
from tests.support.problems import METRICS, check, leaf, on_metrics, randn

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

SHAPES = (
    (1, 1, 3), (1, 2, 64), (127, 1, 2), (1, 507, 252), (127, 252, 2), (507, 2, 252), (16, 61, 1030), (2, 5003, 127),
    (252, 127, 64), (9, 20011, 3), (611, 79, 48),
)  # fmt: skip


def shaped(n, m, d, metric, normalize, relative, seed):
    return HingeProblem.random(n, m, d, metric, normalize, n + m + d + seed, relative)


@on_backends_and((FP32, BF16))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_accurate(shape, dtype, backend):
    which = SHAPES.index(shape) + 3 * (dtype == BF16)
    check(shaped, (*shape, *METRICS[which % len(METRICS)], which % 4 == 1), dtype, backend)


@on_backends_and((FP64, MIXED, FP16, *MIXES))
@pytest.mark.parametrize("relative", [False, True])
def test_the_rarer_dtypes_are_accurate(relative, dtype, backend):
    check(shaped, (127, 252, 24, *METRICS[EVERY_DTYPE.index(dtype) % len(METRICS)], relative), dtype, backend)


@on_backends_and((FP32, BF16))
@pytest.mark.parametrize("relative", [False, True])
@on_metrics
def test_every_metric_is_accurate(metric, normalize, relative, dtype, backend):
    check(shaped, (61, 131, 24, metric, normalize, relative), dtype, backend)


# The options and layouts of masked_logsumexp that do not change the points.
NAMES = (
    "many_positives_per_row", "all_of_one_class", "rows_without_positive", "no_row_with_a_positive",
    "row_without_negative", "labels_beyond_32_bits", "negative_bank_labels", "ignored_rows", "all_rows_ignored",
    "another_ignore_index", "ignored_bank_entries", "whole_bank_ignored", "exclude", "exclude_the_only_positive",
    "transposed", "rows_with_a_gap", "offset_into_storage", "incoming_gradient_of_stride_0",
)  # fmt: skip


def with_feature(name, sizes, metric, normalize, seed):
    problem = HingeProblem.random(*sizes, metric, normalize, sum(map(ord, name)) + seed)
    FEATURES[name](problem)
    return problem


@on_backends_and((FP32, FP64, MIXED))
@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_accurate(name, dtype, backend):
    which = NAMES.index(name) + 2 * (FP32, FP64, MIXED).index(dtype)
    sizes = (331, 67, 12) if which % 3 == 0 else (37, 131, 24)
    check(with_feature, (name, sizes, *METRICS[which % len(METRICS)]), dtype, backend)


def without(what, metric, normalize, seed):
    problem = HingeProblem.random(37, 131, 24, metric, normalize, seed + 5)
    for name in what:
        if name.startswith("t_"):
            del problem.tensors[name]
        else:
            problem.options[name] = None
    return problem


LEFT_OUT = (("t_same",), ("t_different",), ("t_same", "t_different"), ("same", "t_same"), ("different", "t_different"))


@on_backends
@pytest.mark.parametrize("what", LEFT_OUT, ids=str)
def test_what_is_left_out_is_zero(what, backend):
    problem = without(what, "cosine", False, 0)
    leaves = problem.leaves(FP64)
    found = problem.call(leaves, backend)
    expected = problem.call(leaves, "reference")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    for name in ("same", "different"):
        if name in what:
            assert getattr(found, name).count_nonzero() == 0
            assert getattr(found, f"count_{name}").count_nonzero() == 0
    total = found.same.sum() + found.different.sum()
    assert all(g is not None for g in torch.autograd.grad(total, list(leaves.values())))


# ---------------------------------------------------------------------------------------------------------------------
# Counts, and promises that hold exactly


@on_backends_and((FP32, FP64, BF16, MIXED))
@pytest.mark.parametrize("relative", [False, True])
@on_metrics
def test_counts_are_those_of_positive_terms(metric, normalize, relative, dtype, backend):
    problem = HingeProblem.random(300, 1000, 17, metric, normalize, 3, relative)
    found = problem.call(problem.leaves(dtype), backend)
    truth = problem.call(problem.leaves(FP64), "reference")
    assert found.count_same.dtype == found.count_different.dtype == torch.int64
    assert torch.equal(found.count_same, truth.count_same)
    assert torch.equal(found.count_different, truth.count_different)
    assert 0 < truth.count_different.sum() < 300 * 1000


def call(x, w, y, c=None, **given):
    given = {"same": SAME, "different": DIFFERENT, **given}
    return F.masked_hinge_sum(x, w, y, c, **given)


@on_backends
def test_the_slope_at_exactly_zero_is_zero(backend):
    x, w = torch.eye(3, requires_grad=True), torch.eye(3, requires_grad=True)
    t = torch.zeros(3, requires_grad=True)
    # s is 1 on the diagonal and 0 elsewhere: every term is relu(0).
    out = F.masked_hinge_sum(
        x, w, torch.arange(3), metric="dot", same=(1, -1), different=(1, 0), threshold=t, backend=backend
    )
    assert all(v.count_nonzero() == 0 for v in out)
    assert all(g.count_nonzero() == 0 for g in torch.autograd.grad(out.same.sum() + out.different.sum(), (x, w, t)))


@on_backends_and((FP32, FP64, BF16))
@pytest.mark.parametrize("normalize", [True, False])
def test_identical_points_are_at_distance_0_with_zero_gradient(normalize, dtype, backend):
    x, w = leaf(5, 37, seed=1, dtype=dtype.x), randn(300, 37, seed=2).to(dtype.w)
    w[120:125] = x.detach()
    w.requires_grad_()
    # relu(d) of the positive, and relu(1 - d); without a guard, the slope of a root at 0 would be a half.
    for k, o in ((-1.0, 0.0), (1.0, 1.0)):
        out = F.masked_hinge_sum(x, w, torch.arange(120, 125), same=(k, o), normalize=normalize, backend=backend)
        assert (out.same == o).all()
        assert (out.count_same == int(o)).all()
        assert all(g.count_nonzero() == 0 for g in torch.autograd.grad(out.same.sum(), (x, w)))


@on_backends
@on_metrics
@pytest.mark.parametrize("relative", [False, True])
def test_ignored_rows_and_columns_get_no_gradient(relative, metric, normalize, backend):
    x, w, t = leaf(9, 5, seed=1), leaf(40, 5, seed=2), leaf(9, seed=3)
    y, c = torch.arange(9) % 3, None if relative else torch.arange(40) % 3
    y[4] = -100
    if c is not None:
        c[7] = -100
    out = call(x, w, y, c, metric=metric, normalize=normalize, different=(2.0, 50.0), same=(-1.0, 50.0), threshold=t,
               relative=relative, backend=backend)  # fmt: skip
    assert all(v[4] == 0 for v in out)
    grads = torch.autograd.grad(out.same.sum() + out.different.sum(), (x, w, t))
    assert grads[0][4].count_nonzero() == 0
    assert grads[2][4] == 0
    assert (grads[0].abs().sum(1) > 0).sum() == 8
    assert relative or grads[1][7].count_nonzero() == 0
    assert (grads[1].abs().sum(1) > 0).sum() == (40 if relative else 39)


@on_backends_and((FP32, FP64, BF16, MIXED))
def test_an_empty_batch_gives_empty_results_and_zero_gradients(dtype, backend):
    problem = HingeProblem.random(0, 7, 3)
    out = problem.run(dtype, backend)
    assert out["same"].shape == out["different"].shape == (0,)
    assert out["grad w"].count_nonzero() == 0
    assert out["grad x"].shape == (0, 3)


@on_backends
@on_metrics
def test_nan_stays_in_its_row(metric, normalize, backend):
    x = randn(9, 6, seed=1).float()
    broken = x.clone()
    broken[4] = torch.nan
    w, others = randn(700, 6, seed=2).float(), torch.arange(9) != 4
    good, bad = (call(v, w, torch.arange(9), metric=metric, normalize=normalize, backend=backend) for v in (x, broken))
    assert bad.same[4].isnan()
    assert bad.different[4].isnan()
    for g, b in zip(good, bad, strict=True):
        torch.testing.assert_close(b[others], g[others])


@on_backends
def test_one_threshold_serves_both_sets_and_a_scalar_all_rows(backend):
    x, w, y = randn(9, 6, seed=1), randn(90, 6, seed=2), torch.arange(9)
    grads = []
    for t in (torch.full((9,), 0.4, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)):
        t.requires_grad_()
        one, two = (call(x, w, y, threshold=v, backend=backend) for v in (t, (t, t)))
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)
        grads.append(torch.autograd.grad(one.same.sum() + 2 * one.different.sum(), t)[0])
        assert torch.equal(grads[-1], torch.autograd.grad(two.same.sum() + 2 * two.different.sum(), t)[0])
    assert torch.equal(grads[0], (one.count_same + 2 * one.count_different).double())
    assert grads[0].sum() == grads[1]


@on_backends
@on_metrics
def test_relative_equals_a_threshold_of_the_positives_own_score(metric, normalize, backend):
    x, w, y = randn(9, 6, seed=1), randn(90, 6, seed=2), torch.arange(9) * 10
    given = {"metric": metric, "normalize": normalize, "backend": backend}
    own = F.masked_hinge_sum(x, w, y, same=(1.0, 1e6), **given).same - 1e6
    relative = F.masked_hinge_sum(x, w, y, different=(1.0, 0.2), relative=True, **given)
    threshold = F.masked_hinge_sum(x, w, y, different=(1.0, 0.2), threshold=-own, **given)
    torch.testing.assert_close(relative.different, threshold.different, rtol=1e-7, atol=1e-7)


@on_backends
@on_metrics
def test_contrastive_loss_from_its_paper(metric, normalize, backend):
    """Hadsell et al. 2006, with distances and both margins, of the batch with itself."""
    x, y = randn(40, 6, seed=1).requires_grad_(), torch.arange(40) % 7
    out = F.masked_hinge_sum(
        x, x, y, y, metric=metric, normalize=normalize, same=(-1, -0.1), different=(1, 0.9), exclude=torch.arange(40),
        backend=backend,
    )  # fmt: skip
    distance = F.normalized_distance(x, x, metric, normalize=normalize, backend="reference")
    d = -distance if metric in ("cosine", "dot") else distance
    match, eye = y[:, None] == y, torch.eye(40).bool()
    pull, push = torch.relu(d - 0.1) * (match & ~eye), torch.relu(0.9 - d) * ~match
    torch.testing.assert_close(out.same, pull.sum(1))
    torch.testing.assert_close(out.different, push.sum(1))
    grads = [torch.autograd.grad(loss, x)[0] for loss in (out.same.sum() + out.different.sum(), (pull + push).sum())]
    torch.testing.assert_close(*grads)


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives against finite differences

N, M, D = 4, 6, 2
Y, C = torch.tensor([0, 1, 0, 9]), torch.tensor([0, 1, 2, 0, 1, -100])
EXCLUDE = torch.tensor([-1, 1, 0, -1])
NEEDS = ((1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 1, 1), (1, 1, 0, 0))


def differentiate(function, inputs, needs=(1, 1, 1, 1)):
    inputs = [t.clone().requires_grad_(bool(need)) for t, need in zip(inputs, needs, strict=True)]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@on_backends
@pytest.mark.parametrize("relative", [False, True])
@on_metrics
def test_first_and_second_derivatives(metric, normalize, relative, backend):
    y, c = (torch.tensor([0, 1, 5, -100]), None) if relative else (Y, C)

    def function(x, w, *threshold):
        return call(x, w, y, c, metric=metric, normalize=normalize, threshold=threshold, relative=relative,
                    exclude=EXCLUDE, backend=backend)[:2]  # fmt: skip

    inputs = randn(N, D, seed=1), randn(M, D, seed=2), randn(N, seed=3) + 0.5, randn(N, seed=4) + 0.5
    assert any(v.count_nonzero() > 1 for v in function(*inputs))
    differentiate(function, inputs)


@on_backends
@pytest.mark.parametrize("needs", NEEDS, ids=lambda n: "".join("xwst"[i] for i in range(4) if n[i]))
def test_derivatives_with_any_inputs_frozen(needs, backend):
    metric, normalize = METRICS[NEEDS.index(needs)]

    def function(x, w, *threshold):
        return call(x, w, Y, C, metric=metric, normalize=normalize, threshold=threshold, backend=backend)[:2]

    inputs = randn(N, D, seed=1), randn(M, D, seed=2), torch.tensor(0.7).double(), randn(N, seed=4) + 0.5
    differentiate(function, inputs, needs)

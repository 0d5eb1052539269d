"""masked_logsumexp: values and first derivatives against fp64 truth, and the contract's exact promises."""

from __future__ import annotations

import math

import pytest
import torch

from dml_kernels import functional as F
from tests.support.backends import on_backends, on_backends_and
from tests.support.dtypes import BF16, EVERY_DTYPE, FP16, FP32, FP64, MIXED, MIXES
from tests.support.features import FEATURES
from tests.support.problems import METRICS, OUTPUTS, Problem, check, leaf, on_metrics, randint, randn
from tests.support.tolerance import assert_all_accurate, assert_same_bits

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# Rows, bank, width: powers of two and their neighbours, primes, tails of every tile, several tiles and slices.
SHAPES = (
    (1, 1, 3), (1, 2, 64), (2, 1, 127), (127, 1, 2), (1, 507, 252), (127, 252, 2), (252, 127, 3), (507, 2, 252),
    (64, 127, 127), (16, 61, 1030), (2, 5003, 127), (17, 5003, 13), (252, 127, 64), (507, 252, 12), (9, 20011, 3),
)  # fmt: skip
# Shapes whose dense Euclidean truth, several times N M D x 8 bytes, would be too large.
WIDE_SHAPES = ((507, 507, 507), (127, 252, 1030), (64, 5003, 252), (33, 20011, 64))


def shaped(n, m, d, metric, normalize, seed):
    return Problem.random(n, m, d, metric, normalize, seed=n + m + d + seed)


@on_backends_and((FP32, BF16))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_accurate(shape, dtype, backend):
    metric = METRICS[(SHAPES.index(shape) + 3 * (dtype == BF16)) % len(METRICS)]
    check(shaped, (*shape, *metric), dtype, backend)


@on_backends_and((FP64, MIXED, FP16, *MIXES))
@pytest.mark.parametrize("shape", [(127, 252, 2), (252, 127, 3), (33, 507, 64)], ids=str)
def test_the_rarer_dtypes_are_accurate(shape, dtype, backend):
    check(shaped, (*shape, *METRICS[EVERY_DTYPE.index(dtype) % len(METRICS)]), dtype, backend)


@on_backends_and((FP32, BF16, MIXED))
@pytest.mark.parametrize("shape", WIDE_SHAPES, ids=str)
def test_wide_shapes_are_accurate(shape, dtype, backend):
    check(shaped, (*shape, *METRICS[(WIDE_SHAPES.index(shape) + (dtype == FP32)) % 2]), dtype, backend)


@on_backends_and((FP32, BF16))
@pytest.mark.parametrize("sizes", [(61, 509, 48), (611, 79, 48)], ids=["more columns", "many more rows"])
@on_metrics
def test_every_metric_is_accurate(metric, normalize, sizes, dtype, backend):
    check(shaped, (*sizes, metric, normalize), dtype, backend)


def with_feature(name, sizes, metric, normalize, seed):
    problem = Problem.random(*sizes, metric, normalize, seed=sum(map(ord, name)) + seed)
    FEATURES[name](problem)
    return problem


@on_backends_and((FP32, FP64, MIXED))
@pytest.mark.parametrize("name", FEATURES)
def test_every_option_is_accurate(name, dtype, backend):
    which = list(FEATURES).index(name) + 2 * (FP32, FP64, MIXED).index(dtype)
    check(with_feature, (name, (37, 131, 24), *METRICS[which % len(METRICS)]), dtype, backend)


@on_backends_and((FP32,))
@pytest.mark.parametrize("name", FEATURES)
def test_every_option_is_accurate_with_many_more_rows_than_columns(name, dtype, backend):
    """The CPU kernels then cut the rows into slices and keep a partial gradient of the bank for each slice."""
    which = list(FEATURES).index(name)
    check(with_feature, (name, (331, 67, 12), *METRICS[which % len(METRICS)]), dtype, backend)


# ---------------------------------------------------------------------------------------------------------------------
# Promises that hold exactly


@on_backends_and((FP32, FP64, BF16, MIXED))
def test_an_empty_batch_gives_empty_results_and_zero_gradients(dtype, backend):
    problem = Problem.random(0, 7, 3, "sqeuclidean", True)
    problem.tensors["scale"] = torch.ones(0, dtype=torch.float64)
    problem.tensors["col_bias"] = torch.zeros(7, dtype=torch.float64)
    problem.grads = {k: g[:0] for k, g in problem.grads.items()}
    out = problem.run(dtype, backend)
    assert all(out[k].shape == (0,) for k in OUTPUTS)
    for name in ("grad w", "grad col_bias"):
        assert out[name].count_nonzero() == 0
    assert out["grad x"].shape == (0, 3)


@on_backends
@on_metrics
def test_empty_sets_are_minus_infinity_with_zero_gradient(metric, normalize, backend):
    x, w, scale = leaf(4, 5, seed=1), leaf(6, 5, seed=2), leaf(4, seed=3)
    c = torch.tensor([0, 0, 0, 0, 0, 0])
    y = torch.tensor([0, 1, -100, 1])  # no different, no same, ignored, no same
    call = {"metric": metric, "normalize": normalize, "sums": True, "backend": backend}
    out = F.masked_logsumexp(x, w, y, c, scale=scale, **call)
    empty_same, empty_different = [1, 2, 3], [0, 2]
    assert (out.same[empty_same] == -math.inf).all()
    assert (out.different[empty_different] == -math.inf).all()
    assert (out.sum_same[empty_same] == 0).all()
    assert (out.sum_different[empty_different] == 0).all()
    assert out.same[0].isfinite()
    assert out.different[[1, 3]].isfinite().all()
    # Even the gradient of an infinite value is 0, here 1 times each -inf.
    grads = torch.autograd.grad(
        [out.same[empty_same], out.different[empty_different], out.sum_same[empty_same]], (x, w, scale), [
            torch.ones(3), torch.ones(2), torch.ones(3)]
    )  # fmt: skip
    assert all(g.count_nonzero() == 0 for g in grads)


@on_backends
@on_metrics
def test_ignored_rows_and_columns_get_no_gradient(metric, normalize, backend):
    x, w = leaf(9, 5, seed=1), leaf(40, 5, seed=2)
    y, c = torch.arange(9) % 3, torch.arange(40) % 3
    y[4], c[7] = -100, -100
    bias = torch.where(torch.arange(40) == 11, -math.inf, 0.0).requires_grad_()
    out = F.masked_logsumexp(x, w, y, c, metric=metric, normalize=normalize, col_bias=bias, sums=True, backend=backend)
    grads = torch.autograd.grad([out[i][y != -100].sum() for i in range(4)], (x, w, bias))
    assert grads[0][4].count_nonzero() == 0
    assert grads[1][[7, 11]].count_nonzero() == 0
    assert grads[2][[7, 11]].count_nonzero() == 0
    assert (grads[0].abs().sum(1) > 0).sum() == 8
    assert (grads[1].abs().sum(1) > 0).sum() == 38


@on_backends_and((FP32, FP64, BF16))
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_identical_points_are_at_distance_0_with_zero_gradient(metric, normalize, dtype, backend):
    x, w = leaf(5, 37, seed=1, dtype=dtype.x), randn(300, 37, seed=2).to(dtype.w)
    w[120:125] = x.detach()
    w.requires_grad_()
    # One positive, the row itself: its logit is the only one in `same`.
    out = F.masked_logsumexp(
        x,
        w,
        torch.arange(120, 125),
        metric=metric,
        normalize=normalize,
        scale=1e4,
        sums=True,
        backend=backend,
    )
    assert (out.same == 0).all()
    assert (out.sum_same == 0).all()
    grads = torch.autograd.grad(out.same.sum(), (x, w))
    assert all(g.count_nonzero() == 0 for g in grads)
    assert all(g.isfinite().all() for g in torch.autograd.grad(F.masked_logsumexp(
        x, w, torch.arange(120, 125), metric=metric, normalize=normalize, scale=1e4, backend=backend
    ).different.sum(), (x, w)))  # fmt: skip


@on_backends
@on_metrics
def test_a_single_positive_is_its_own_sum_and_log_sum_exp(metric, normalize, backend):
    out = F.masked_logsumexp(
        randn(9, 6, seed=1), randn(200, 6, seed=2), torch.arange(9) * 20, metric=metric, normalize=normalize,
        scale=30.0, sums=True, backend=backend,
    )  # fmt: skip
    assert torch.equal(out.same, out.sum_same)


@on_backends_and((FP32, BF16))
def test_sums_are_an_extra_that_changes_nothing_else(dtype, backend):
    x, w, y = leaf(9, 6, seed=1, dtype=dtype.x), leaf(200, 6, seed=2, dtype=dtype.w), torch.arange(9)
    with_sums = F.masked_logsumexp(x, w, y, sums=True, backend=backend)
    without = F.masked_logsumexp(x, w, y, backend=backend)
    assert without.sum_same is None
    assert without.sum_different is None
    assert_same_bits(with_sums[:2], without[:2])
    assert_same_bits(*(torch.autograd.grad(o.same.sum() + o.different.sum(), (x, w)) for o in (with_sums, without)))


@on_backends
@on_metrics
def test_nan_stays_in_its_row(metric, normalize, backend):
    def run(x):
        x = x.clone().requires_grad_()
        w = randn(700, 6, seed=2).float().requires_grad_()
        out = F.masked_logsumexp(x, w, torch.arange(9), metric=metric, normalize=normalize, sums=True, backend=backend)
        return *out, torch.autograd.grad(out.different.sum() + out.same.sum(), (x, w))

    clean = randn(9, 6, seed=1).float()
    for broken_part in (slice(None), slice(2, 3)):
        broken = clean.clone()
        broken[4, broken_part] = math.nan
        *good, (grad_x, _) = run(clean)
        *bad, (bad_grad_x, bad_grad_w) = run(broken)
        others = torch.arange(9) != 4
        assert all(v[4].isnan() for v in bad)
        assert bad_grad_x[4].isnan().all()
        assert bad_grad_w.isnan().any()
        for v, b in zip((*good, grad_x), (*bad, bad_grad_x), strict=True):
            torch.testing.assert_close(b[others], v[others])


@on_backends
@on_metrics
def test_nan_in_the_bank_reaches_every_row(metric, normalize, backend):
    w = randn(700, 6, seed=2).float()
    w[650] = math.nan
    out = F.masked_logsumexp(
        randn(5, 6, seed=1).float(),
        w,
        torch.arange(5),
        metric=metric,
        normalize=normalize,
        sums=True,
        backend=backend,
    )
    assert out.different.isnan().all()
    assert out.sum_different.isnan().all()
    assert out.same.isfinite().all()


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [1e-20, 1e-6, 1e15])
@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean", "euclidean"])
def test_extreme_norms_are_taken_out_by_normalisation(metric, norm, dtype, backend):
    # 1e-20 is above this eps, so these are unit vectors. fp32 cannot represent its square.
    call = {"metric": metric, "normalize": True, "eps": 1e-30, "sums": True, "backend": backend}
    x, w, y = randn(9, 16, seed=1), randn(150, 16, seed=2), torch.arange(9)
    expected = F.masked_logsumexp(x, w, y, **call)
    small, large = (x * norm).to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
    out = F.masked_logsumexp(small, large, y, **call)
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    for value, truth in zip(out, expected, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=tolerance)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.different.sum(), (small, large)))


@on_backends_and((FP32, FP64, BF16))
@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean", "euclidean"])
def test_rows_shorter_than_eps_are_divided_by_eps(metric, dtype, backend):
    problem = Problem.random(7, 40, 5, metric, True, seed=3)
    problem.options["eps"] = 0.1
    problem.tensors["x"][0] *= 1e-3
    problem.tensors["x"][1] = 0
    problem.tensors["w"][::3] *= 1e-3
    problem.tensors["w"][4] = 0
    assert_all_accurate(problem.run(dtype, backend), problem.yardsticks(dtype))


@on_backends
def test_zero_rows_are_harmless(backend):
    x, w = torch.zeros(3, 4, requires_grad=True), torch.zeros(5, 4, requires_grad=True)
    for metric in ("cosine", "sqeuclidean", "euclidean"):
        for eps in (1e-12, 1e-18):
            out = F.masked_logsumexp(x, w, torch.arange(3), metric=metric, normalize=True, eps=eps, backend=backend)
            torch.testing.assert_close(out.different, torch.full((3,), math.log(4)))
            grads = torch.autograd.grad(out.different.sum() + out.same.sum(), (x, w))
            assert all(g.isfinite().all() for g in grads)


@on_backends
@on_metrics
def test_bank_labels_default_to_the_column_index(metric, normalize, backend):
    x, w, y = randn(9, 6, seed=1), randn(300, 6, seed=2), randint(0, 300, 9, seed=3)
    call = {"metric": metric, "normalize": normalize, "sums": True, "backend": backend}
    by_index, by_label = (F.masked_logsumexp(x, w, y, c, **call) for c in (None, torch.arange(300)))
    for a, b in zip(by_index, by_label, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@on_backends
def test_ignore_index_without_bank_labels_leaves_every_column_in(backend):
    # As in torch.nn.functional.cross_entropy, class 3 is ignored as a target and stays in all denominators.
    x, w, y = randn(6, 5, seed=1), randn(8, 5, seed=2), torch.tensor([0, 3, 2, 7, 3, 1])
    out = F.masked_logsumexp(x, w, y, metric="dot", ignore_index=3, backend=backend)
    loss = torch.where(y == 3, 0, torch.logaddexp(out.same, out.different) - out.same)
    expected = torch.nn.functional.cross_entropy(x @ w.T, y, ignore_index=3, reduction="none")
    torch.testing.assert_close(loss, expected)


@on_backends
def test_a_number_and_a_tensor_scale_agree(backend):
    x, w, y = randn(9, 6, seed=1), randn(90, 6, seed=2), torch.arange(9)
    call = {"same": (2.0, 0.3), "different": (-1.5, 0.1), "sums": True, "backend": backend}
    outs = [
        F.masked_logsumexp(x, w, y, scale=s, **call) for s in (7.0, torch.tensor(7.0).double(), torch.full((9,), 7.0))
    ]
    for out in outs[1:]:
        for a, b in zip(outs[0], out, strict=True):
            torch.testing.assert_close(a, b.double(), rtol=1e-13, atol=1e-13)


@on_backends
def test_adding_to_every_bias_shifts_the_log_sum_exps(backend):
    x, w, y = randn(9, 6, seed=1), randn(300, 6, seed=2), torch.arange(9)
    bias = randn(300, seed=3)
    plain, shifted = (F.masked_logsumexp(x, w, y, col_bias=b, scale=20.0, backend=backend) for b in (bias, bias + 1000))
    for a, b in zip(plain[:2], shifted[:2], strict=True):
        torch.testing.assert_close(a + 1000, b, rtol=1e-12, atol=1e-12)


@on_backends
def test_the_offset_of_a_set_moves_that_set_alone(backend):
    x, w, y = randn(9, 6, seed=1), randn(300, 6, seed=2), torch.arange(9)
    plain, moved = (F.masked_logsumexp(x, w, y, same=(3.0, o), different=(5.0, 0), backend=backend) for o in (0, 0.5))
    torch.testing.assert_close(plain.same - 1.5, moved.same)
    torch.testing.assert_close(plain.different, moved.different)

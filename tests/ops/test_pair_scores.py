"""pair_scores: the scores of listed pairs, and the sums over their segments."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.library import opcheck

from dml_kernels import functional as F
from dml_kernels import reference
from dml_kernels.backends import torch as torch_backend
from dml_kernels.ops import pair_scores as ops
from dml_kernels.ops import segments
from tests.support.dtypes import FP32, FP64
from tests.support.problems import on_metrics, randint, randn
from tests.support.tolerance import Yardstick, assert_accurate, assert_same_bits

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def problem(n=9, m=7, d=5, pairs=40, seed=0):
    x, w = randn(n, d, seed=seed), randn(m, d, seed=seed + 1)
    return x, w, randint(0, n, pairs, seed=seed + 2), randint(0, m, pairs, seed=seed + 3)


def with_gradients(function, x, w, rows, cols, grad):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    s = function(x, w, rows, cols)
    return s.detach(), *torch.autograd.grad(s, (x, w), grad.to(s.dtype))


def dense(metric, normalize):
    return lambda x, w, rows, cols: reference.scores(x, w, metric, normalize)[rows, cols]


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=lambda d: d.name)
@pytest.mark.parametrize("elements", [1, 1 << 19], ids=["small blocks", "one block"])
@on_metrics
def test_scores_and_gradients_are_accurate(metric, normalize, elements, dtype, monkeypatch):
    monkeypatch.setattr(torch_backend.tiles, "CHUNK_ELEMENTS", elements)
    x, w, rows, cols = problem(d=24)
    grad = randn(40, seed=9)
    cast = [t.to(dtype.x) for t in (x, w)]
    truth = with_gradients(dense(metric, normalize), *(t.double() for t in cast), rows, cols, grad.to(dtype.x).double())
    low = with_gradients(dense(metric, normalize), *(t.float() for t in cast), rows, cols, grad)
    found = with_gradients(lambda *a: F.pair_scores(*a, metric, normalize=normalize), *cast, rows, cols, grad)
    for name, ours, theirs, true in zip(("s", "grad x", "grad w"), found, low, truth):
        stick = Yardstick.of(theirs, true)
        assert_accurate(ours, stick.in_fp64(true) if dtype == FP64 else stick, name)


@on_metrics
def test_differentiable_twice_and_within_one_batch(metric, normalize):
    x, w, rows, cols = problem()
    leaves = (x.requires_grad_(), w.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: F.pair_scores(x, w, rows, cols, metric, normalize=normalize), leaves)
    assert torch.autograd.gradgradcheck(
        lambda x, w: F.pair_scores(x, w, rows, cols, metric, normalize=normalize), leaves, fast_mode=True
    )
    assert torch.autograd.gradcheck(lambda x: F.pair_scores(x, x, rows, cols, metric, normalize=normalize), leaves[:1])


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_equal_rows_have_distance_0_and_gradient_0(metric):
    x = randn(3, 40, seed=1).float()
    x = torch.cat((x, x)).requires_grad_()
    s = F.pair_scores(x, x, torch.arange(3), torch.arange(3) + 3, metric, normalize=True)
    s.sum().backward()
    assert s.count_nonzero() == 0
    assert x.grad.count_nonzero() == 0


def test_close_pairs_keep_their_distance_and_direction():
    x = randn(5, 40, seed=1)
    w = (x + 1e-4 * randn(5, 40, seed=2)).float()
    x, i = x.float(), torch.arange(5)
    grad = torch.ones(5, dtype=torch.float64)
    truth = with_gradients(dense("euclidean", False), x.double(), w.double(), i, i, grad)
    found = with_gradients(lambda *a: F.pair_scores(*a, "euclidean"), x, w, i, i, grad)
    for ours, true in zip(found, truth):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=0)


def test_half_precision_is_scored_in_fp32():
    x, w, rows, cols = problem(d=64)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype), w.to(dtype)
        found = with_gradients(lambda *a: F.pair_scores(*a, "cosine"), *half, rows, cols, torch.ones(40))
        assert [t.dtype for t in found] == [torch.float32, dtype, dtype]
        truth = F.pair_scores(*(t.double() for t in half), rows, cols, "cosine")
        torch.testing.assert_close(found[0].double(), truth, rtol=0, atol=1e-6)


def test_the_same_bits_again(any_threads):
    x, w, rows, cols = (t.float() if t.is_floating_point() else t for t in problem(300, 200, 64, 5000))
    runs = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        runs.append(with_gradients(lambda *a: F.pair_scores(*a, "cosine"), x, w, rows, cols, torch.ones(5000)))
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


def test_no_pairs_and_no_rows():
    x, w, rows, cols = problem()
    s, g_x, g_w = with_gradients(F.pair_scores, x, w, rows[:0], cols[:0], torch.ones(0))
    assert s.shape == (0,)
    assert g_x.count_nonzero() == g_w.count_nonzero() == 0
    assert F.pair_scores(x[:0], w, rows[:0], cols[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("metric", "unit"), list(itertools.product(("dot", "sqeuclidean", "euclidean"), (False, True)))
)
def test_the_ops_pass_opcheck(metric, unit):
    x, w, rows, cols = problem()
    spec, tests = (metric, unit, 1e-12, torch.float64), ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(ops.fwd, (x, w, rows, cols, *spec), test_utils=tests)
    s = ops.fwd(x, w, rows, cols, *spec)
    for needs in ([True, True], [True, False]):
        opcheck(ops.bwd, (torch.ones_like(s), s, needs, x, w, rows, cols, *spec), test_utils=tests)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.tensor([9])}, ValueError, r"rows of the embeddings, in \[0, 9\); got 9"),
        ({"rows": torch.tensor([-1])}, ValueError, "got -1"),
        ({"cols": torch.tensor([7])}, ValueError, r"in \[0, 7\); got 7"),
        ({"cols": torch.tensor([1, 2])}, ValueError, r"cols must have shape \(1,\); got \(2,\)"),
        ({"rows": torch.tensor([1.0])}, TypeError, r"rows must be int64"),
        ({"metric": "manhattan"}, ValueError, "metric must be one of"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    x, w, _, _ = problem()
    with pytest.raises(error, match=message):
        F.pair_scores(**{"x": x, "w": w, "rows": torch.tensor([0]), "cols": torch.tensor([0]), **change})


def test_segments_sum_spread_and_find_the_largest():
    rows = torch.tensor([0, 0, 2, 2, 2])
    bounds = segments.offsets(rows, 4)
    v = torch.tensor([1.0, 2.0, -5.0, -4.0, -6.0], dtype=torch.float64, requires_grad=True)
    per_row = randn(4, seed=1).requires_grad_()
    assert segments.total(v, rows, bounds).tolist() == [3, 0, -15, 0]
    assert segments.maximum(v, bounds).tolist() == [2, -torch.inf, -4, -torch.inf]
    assert segments.spread(per_row, rows, bounds).tolist() == per_row[rows].tolist()
    for function, leaf in ((segments.total, v), (segments.spread, per_row)):
        assert torch.autograd.gradcheck(lambda t, f=function: f(t, rows, bounds), (leaf,))
        assert torch.autograd.gradgradcheck(lambda t, f=function: f(t.exp(), rows, bounds), (leaf,))

"""Regularisers: their formulas, their values compared with pytorch-metric-learning's, and no M x M matrix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck

from dml_kernels import reducers, regularizers
from dml_kernels.profiling import run_in_child
from tests.support.problems import randn

C, K, D = 4, 3, 5
MAKE = {
    "LpRegularizer": lambda m: m.LpRegularizer(),
    "LpRegularizer of p=1, squared": lambda m: m.LpRegularizer(p=1, power=2),
    "ZeroMeanRegularizer": lambda m: m.ZeroMeanRegularizer(),
    "CenterInvariantRegularizer": lambda m: m.CenterInvariantRegularizer(),
    "RegularFaceRegularizer": lambda m: m.RegularFaceRegularizer(),
    "SparseCentersRegularizer": lambda m: m.SparseCentersRegularizer(C, K),
}
on_all = pytest.mark.parametrize("name", MAKE)


def value_and_grad(regularizer, w):
    w = w.clone().requires_grad_()
    value = regularizer(w)
    return value.detach(), torch.autograd.grad(value, w)[0]


def dense(name, w):
    """Each formula written out, pair by pair."""
    norms = w.norm(dim=1)
    unit = w / norms[:, None]
    if name == "LpRegularizer":
        return norms.mean()
    if name.startswith("LpRegularizer"):
        return w.abs().sum(1).square().mean()
    if name == "ZeroMeanRegularizer":
        return w.sum(1).abs().mean()
    if name == "CenterInvariantRegularizer":
        return ((norms**2 - (norms**2).mean()) ** 2).mean() / 4
    if name == "RegularFaceRegularizer":
        return torch.stack([max(unit[i] @ unit[j] for j in range(len(w)) if j != i) for i in range(len(w))]).mean()
    pairs = [(c * K + k, c * K + j) for c in range(C) for k in range(K) for j in range(k)]
    return sum((unit[i] - unit[j]).norm() for i, j in pairs) / (C * K * (K - 1))


@on_all
def test_the_formula(name):
    w = randn(C * K, D, seed=3) * 2
    found, expected = (value_and_grad(f, w) for f in (MAKE[name](regularizers), lambda w: dense(name, w)))
    torch.testing.assert_close(found, expected)


@on_all
def test_value_and_gradient_are_theirs_and_theirs_turns_into_ours(name, pml):
    theirs, w = MAKE[name](pml.regularizers), randn(C * K, D, seed=4)
    turned = regularizers.accept(theirs)
    assert isinstance(turned, getattr(regularizers, name.split()[0]))
    for ours in (MAKE[name](regularizers), turned):
        torch.testing.assert_close(value_and_grad(ours, w), value_and_grad(theirs, w))


def test_a_reducer_says_how_rows_become_one(pml):
    from pytorch_metric_learning.reducers import SumReducer

    w = randn(C * K, D, seed=5)
    for reducer in (reducers.SumReducer(), SumReducer()):
        found = regularizers.RegularFaceRegularizer(reducer=reducer)(w)
        torch.testing.assert_close(found, regularizers.RegularFaceRegularizer()(w) * C * K)
    turned = regularizers.accept(pml.regularizers.RegularFaceRegularizer(reducer=SumReducer()))
    assert isinstance(turned.reducer, reducers.SumReducer)


@on_all
def test_gradcheck(name):
    regularizer = MAKE[name](regularizers)
    assert gradcheck(regularizer, randn(C * K, D, seed=6).requires_grad_())


@on_all
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_other_dtypes_are_taken_in_fp32(name, dtype):
    regularizer, w = MAKE[name](regularizers), randn(C * K, D, seed=7).to(dtype)
    value, grad = value_and_grad(regularizer, w)
    assert (value.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(value, regularizer(w.float()))
    torch.testing.assert_close(value.double(), regularizer(w.double()), rtol=1e-5, atol=1e-6)


@on_all
def test_equal_and_zero_rows_have_finite_gradients(name):
    regularizer = MAKE[name](regularizers)
    for w in (torch.ones(C * K, D), torch.zeros(C * K, D), torch.full((C * K, D), 1e4)):
        value, grad = value_and_grad(regularizer, w)
        assert value.isfinite()
        assert grad.isfinite().all()
    if name.startswith("Sparse"):
        assert value == 0  # merged centres
        assert grad.count_nonzero() == 0


def test_one_row_has_no_other():
    value, grad = value_and_grad(regularizers.RegularFaceRegularizer(), torch.ones(1, D))
    assert value == 0
    assert grad.count_nonzero() == 0


def test_what_cannot_be_is_refused(pml):
    from pytorch_metric_learning.distances import DotProductSimilarity

    face = pml.regularizers.RegularFaceRegularizer
    for call, error, message in (
        (lambda: regularizers.SparseCentersRegularizer(3, 1), ValueError, "one class of two centres; got 3 of 1"),
        (lambda: regularizers.SparseCentersRegularizer(3, 2)(torch.ones(5, 2)), ValueError, "3 x 2 rows.*got 5"),
        (lambda: regularizers.LpRegularizer()(torch.ones(5)), ValueError, r"weights must have shape \(rows, D\)"),
        (lambda: regularizers.accept(3), TypeError, "must be callable on rows"),
        (lambda: regularizers.accept(face(distance=DotProductSimilarity())), ValueError,
         "RegularFaceRegularizer is defined on CosineSimilarity"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


def test_any_callable_is_taken_as_it_is():
    assert regularizers.accept(torch.sum) is torch.sum
    assert regularizers.accept(None) is None


def test_regular_face_builds_no_matrix_of_all_pairs():
    """8,000 x 8,000 fp32 would be 256 MB; pytorch-metric-learning holds several such matrices."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    found = json.loads(run_in_child("tests.support.memory_probe", "regular_face", "8000", "8"))
    assert (found["peak"] - found["gradients"]) / (1 << 20) <= 64

"""First and second derivatives of every op against finite differences in fp64, for any subset of inputs."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from dml_kernels import functional as F
from dml_kernels.losses import REGISTRY, family
from tests.support.backends import on_backends, on_losses
from tests.support.problems import METRICS, on_metrics, randn

N, M, D = 4, 6, 2
Y = torch.tensor([0, 1, 0, 9])  # the last row has no positive
C = torch.tensor([0, 1, 2, 0, 1, -100])
EXCLUDE = torch.tensor([-1, 1, 0, -1])


def tensors(scale_shape=(N,)):
    """x, w, scale, col_bias."""
    t = randn(*scale_shape, seed=3).abs() + 0.5
    return randn(N, D, seed=1), randn(M, D, seed=2), t, randn(M, seed=5)


def finite(outputs):
    """The outputs with 0 in place of -inf, because finite differences of an infinite value are NaN."""
    return tuple(torch.where(v == -math.inf, 0, v) for v in outputs)


def lse(metric, normalize, backend, **options):
    call = {
        "metric": metric,
        "normalize": normalize,
        "same": (-1.5, 0.1),
        "different": (2.0, -0.3),
        "sums": True,
    }

    def function(x, w, scale=None, col_bias=None):
        scale = 1.3 if scale is None else scale
        given = {"scale": scale, "col_bias": col_bias}
        return finite(F.masked_logsumexp(x, w, Y[: x.size(0)], C, **call, **given, **options, backend=backend))

    return function


def check(function, inputs, needs):
    inputs = [t if t is None else t.clone().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@on_backends
@on_metrics
def test_masked_logsumexp_with_every_tensor(metric, normalize, backend):
    check(lse(metric, normalize, backend, exclude=EXCLUDE), tensors(), [True] * 4)


# Each of the four alone, all but one, and the pairs that occur in training: a frozen bank, frozen rows.
NEEDS = sorted({n for k in (1, 2, 3) for n in itertools.permutations([True] * k + [False] * (4 - k)) if k != 2 or n[0]})


@on_backends
@pytest.mark.parametrize("needs", NEEDS, ids=lambda n: "".join("xwtb"[i] for i in range(4) if n[i]))
def test_masked_logsumexp_with_any_inputs_frozen(needs, backend):
    metric, normalize = METRICS[NEEDS.index(needs) % len(METRICS)]
    check(lse(metric, normalize, backend, exclude=EXCLUDE), tensors(), needs)


@on_backends
@pytest.mark.parametrize("given", list(itertools.product([True, False], repeat=2)), ids=str)
def test_masked_logsumexp_with_any_optional_tensor_left_out(given, backend):
    metric, normalize = METRICS[sum(given) % len(METRICS)]
    x, w, *optional = tensors()
    optional = [t if there else None for t, there in zip(optional, given, strict=True)]
    check(lse(metric, normalize, backend), (x, w, *optional), [True] * 4)


@on_backends
def test_masked_logsumexp_with_one_scale_for_all_rows(backend):
    check(lse("sqeuclidean", True, backend), tensors(()), [True] * 4)


@on_backends
def test_masked_logsumexp_with_columns_left_out_by_bias(backend):
    bias = torch.where(torch.arange(M) % 3 == 1, -math.inf, randn(M, seed=5))
    x, w, t, _ = tensors()

    def function(x, w, t):
        return lse("euclidean", True, backend)(x, w, t, bias)

    check(function, (x, w, t), [True] * 3)


@on_backends
@on_metrics
def test_masked_logsumexp_of_rows_shorter_than_eps(metric, normalize, backend):
    x, w, *rest = tensors()
    x[0] *= 0.01 / x[0].norm()
    w[1:3] *= 0.02
    check(lse(metric, normalize, backend, eps=0.2), (x, w, *rest), [True] * 4)


@on_backends
def test_masked_logsumexp_without_sums(backend):
    x, w, *_ = tensors()

    def function(x, w):
        return finite(F.masked_logsumexp(x, w, Y, C, scale=3.0, backend=backend)[:2])

    check(function, (x, w), [True] * 2)


@on_backends
def test_masked_logsumexp_of_an_empty_batch(backend):
    x, w, t, b = tensors()
    check(lse("sqeuclidean", True, backend), (x[:0], w, t[:0], b), [True] * 4)


@on_backends
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=["xw", "x", "w"])
@on_metrics
def test_normalized_distance(metric, normalize, needs, backend):
    def function(x, w):
        return F.normalized_distance(x, w, metric, normalize=normalize, backend=backend)

    check(function, tensors()[:2], needs)


@on_backends
def test_normalized_distance_of_an_empty_batch(backend):
    x, w, *_ = tensors()
    check(lambda x, w: F.normalized_distance(x, w, backend=backend), (x[:0], w), [True] * 2)


@on_backends
@pytest.mark.parametrize("eps", [1e-12, 1.5])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (4,), (0, 3), (3, 1)], ids=str)
def test_normalize(shape, eps, backend):
    check(lambda x: F.normalize(x, eps, backend=backend), [randn(*shape, seed=1)], [True])


@on_losses(family("proxies"), options=False)
def test_losses(name, backend):
    y = torch.tensor([0, 1, -100, 5])
    x, w = randn(4, 2, seed=1), randn(6 * REGISTRY[name].centres, 2, seed=2)
    for options in REGISTRY[name].options:

        def function(x, w, options=options):
            return REGISTRY[name].function(x, w, y, **options, backend=backend)

        check(function, [x, w], [True] * 2)


@on_backends
def test_a_third_derivative_is_never_silent(backend):
    """Two derivatives are promised. Asking for a third must fail, or at least make PyTorch warn."""
    x = randn(3, 4, seed=1).requires_grad_()

    def derivative(y):
        return torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)[0]

    second = derivative(derivative(F.normalize(x, backend=backend)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.autograd.grad(second.sum(), x)
        except RuntimeError:
            return
    assert any("autograd kernel was not registered" in str(w.message) for w in caught)

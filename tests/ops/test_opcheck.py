"""torch.library.opcheck on every registered op: schema, fake kernels, aliasing and dispatch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from dml_kernels.ops import magnet, normalize, normalized_distance, proxy_nca
from dml_kernels.ops import masked_argmax as argmax
from dml_kernels.ops import masked_hinge_sum as hinge
from dml_kernels.ops import masked_logsumexp as lse
from dml_kernels.ops.signatures import ArgmaxSpec, DistanceSpec, HingeSpec, MagnetSpec, ProxySpec, Spec
from tests.support.backends import on_backends
from tests.support.problems import randint, randn

N, M, D = 5, 40, 3
# Autograd is not registered with the ops but wraps them, so opcheck compares without gradients.
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def check(op, args):
    results = opcheck(op, args, test_utils=TESTS, raise_exception=False)
    failures = {name: f"{type(r).__name__}: {r}" for name, r in results.items() if r != "SUCCESS"}
    assert not failures, f"{op}: {failures}"


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def bank(dtype, which):
    x, w = randn(N, D, seed=1).to(dtype), randn(M, D, seed=2).to(dtype)
    if which == "strided":
        x, w = x.t().contiguous().t(), w.t().contiguous().t()
    if which == "bare":
        return x, w, randint(0, M, N, seed=3), None, None, None, None
    bias = torch.where(torch.arange(M) % 5 == 0, -math.inf, randn(M, seed=6)).to(acc(dtype))
    scale = randn(N, seed=4).to(acc(dtype)) if which == "full" else torch.tensor(2.0, dtype=acc(dtype))
    c = randint(0, 4, M, seed=7)
    return x, w, randint(0, 4, N, seed=3), c, randint(-1, M, N, seed=8), scale, bias


def spec(dtype, which, backend):
    logit = [2.0, 0.1, -1.0, 0.3] if which == "full" else [1.0, 0.0, 1.0, 0.0]
    return Spec(**comparison(dtype, which, backend), logit=logit, ignore_index=-100, sums=which != "bare", keep=True)


def comparison(dtype, which, backend):
    metric, unit = {"full": ("sqeuclidean", True), "strided": ("euclidean", False), "bare": ("dot", True)}[which]
    return {"metric": metric, "normalize": unit, "eps": 1e-12, "dtype": dtype, "backend": backend}


WHICH = pytest.mark.parametrize("which", ["full", "strided", "bare"])
ON_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@on_backends
@ON_DTYPES
@WHICH
def test_masked_logsumexp(which, dtype, backend):
    check_logsumexp(bank(dtype, which), spec(dtype, which, backend))


@on_backends
@pytest.mark.parametrize(("policy", "params"), [("quadratic", [0.25]), ("max_pool", [4.0]), ("softmax_pool", [4, 0.1])])
def test_masked_logsumexp_with_a_policy(policy, params, backend):
    x, w, y, c, exclude, scale, col_bias = bank(torch.float32, "full")
    columns = M if policy == "quadratic" else M // 4
    exclude, c, col_bias = exclude.clamp_max(columns - 1), c[:columns], col_bias[:columns]
    numbers = spec(torch.float32, "full", backend)._replace(policy=policy, policy_params=params)
    check_logsumexp((x, w, y, c, exclude, scale, col_bias), numbers)


def check_logsumexp(b, s):
    check(lse.fwd, (*b, *s))
    *out, mean = lse.fwd(*b, *s)
    grads = [randn(*t.shape, seed=9).to(t.dtype) for t in out]
    everything = [True, b[1] is not None, *(t is not None for t in b[5:])]
    for needs in (everything, [True, False, False, False], [False, True, False, False]):
        check(lse.bwd, (*grads, *out[:2], mean, needs, *b, *s))
    directions = [
        b[0].new_empty(0) if t is None else randn(*t.shape, seed=10).to(t.dtype) for t in (b[0], b[1], *b[5:])
    ]
    check(lse.dbl, (*directions, *grads, *out[:2], *b, *s))


@on_backends
@ON_DTYPES
def test_the_batch_as_its_own_bank(dtype, backend):
    x, y, number = randn(N, D, seed=1).to(dtype), torch.arange(N) % 3, randn(N, seed=4).to(acc(dtype))
    s = spec(dtype, "full", backend)
    check_logsumexp((x, None, y, None, None, number, number), s)
    check_logsumexp((x, None, y, None, None, None, None), s._replace(own=True))
    check_hinge_sum((x, None, y, None, None, number, None), comparison(dtype, "strided", backend))
    search = ArgmaxSpec(
        **comparison(dtype, "full", backend), wanted=[True, True], largest=[False, True], noise=False, seed=0,
        cutoffs=[0.5, 1.4], ignore_index=-100,
    )  # fmt: skip
    check(argmax.fwd, (x, None, y, None, None, None, number, *search))


@on_backends
@ON_DTYPES
@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_normalized_distance(metric, dtype, backend):
    x, w, *_ = bank(dtype, "strided")
    spec = DistanceSpec(metric=metric, normalize=True, eps=1e-12, dtype=dtype, backend=backend)
    check(normalized_distance.fwd, (x, w, *spec))
    grad = randn(N, M, seed=9).to(dtype)
    for g in (grad, grad[:1, :1].expand(N, M)):
        for needs in ([True, True], [True, False], [False, True]):
            check(normalized_distance.bwd, (g, needs, x, w, *spec))
    check(
        normalized_distance.dbl,
        (randn(N, D, seed=3).to(dtype), randn(M, D, seed=4).to(dtype), grad, x, w, *spec),
    )


@on_backends
@ON_DTYPES
def test_normalize(dtype, backend):
    x, v, g = (randn(N, D, seed=i).to(dtype) for i in range(3))
    check(normalize.fwd, (x.t(), 1e-12, backend))
    check(normalize.bwd, (g, x, 1e-12, backend))
    check(normalize.bwd, (g[:1].expand_as(g), x.t().contiguous().t(), 1e-12, backend))
    check(normalize.dbl, (v, g, x, 1e-12, backend))


@on_backends
@ON_DTYPES
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_proxy_nca(smoothing, dtype, backend):
    x, w, *_ = bank(dtype, "strided")
    scale, weight = (randn(N, seed=4).to(acc(dtype)), torch.rand(N).to(acc(dtype))) if smoothing else (None, None)
    for reduction in ("mean", "none"):
        spec = ProxySpec(
            factor=2.0, exclude_positive=not smoothing, label_smoothing=smoothing, eps=1e-12, ignore_index=-100,
            reduction=reduction, dtype=dtype, backend=backend,
        )  # fmt: skip
        inputs = (x, w, torch.tensor([0, 2, -100, 2, 7]), scale, weight)
        check(proxy_nca.fwd, (*inputs, *spec))
        value, same, different = proxy_nca.fwd(*inputs, *spec)
        for needs in ([True, True, scale is not None], [True, False, False]):
            check(proxy_nca.bwd, (torch.ones_like(value), same, different, needs, *inputs, *spec))


@on_backends
@ON_DTYPES
@pytest.mark.parametrize("given", [False, True])
def test_magnet(given, dtype, backend):
    x, centers, *_ = bank(dtype, "strided")
    centers, variance = (centers, torch.tensor(0.5, dtype=acc(dtype))) if given else (None, None)
    for reduction in ("mean", "none"):
        spec = MagnetSpec(
            alpha=1.0, normalize=given, min_variance=1e-6, eps=1e-12, ignore_index=-100, reduction=reduction,
            dtype=dtype, backend=backend,
        )  # fmt: skip
        inputs = (x, torch.tensor([0, 2, -100, 2, 7]), torch.arange(M) % 3, centers, variance)
        check(magnet.fwd, (*inputs, *spec))
        value, different, _ = magnet.fwd(*inputs, *spec)
        for needs in ([True, given, given], [True, False, False]):
            check(magnet.bwd, (torch.ones_like(value), different, needs, *inputs, *spec))


@on_backends
@ON_DTYPES
@WHICH
def test_masked_hinge_sum(which, dtype, backend):
    x, w, y, c, exclude, *_ = bank(dtype, which)
    relative = c is None
    t_same, t_different = (
        (None, None) if which == "bare" else (randn(N, seed=4).to(acc(dtype)), torch.tensor(0.4, dtype=acc(dtype)))
    )
    inputs = (x, w, y, c, exclude, t_same, t_different)
    check_hinge_sum(inputs, comparison(dtype, which, backend), relative)


def check_hinge_sum(inputs, compared, relative=False):
    s = HingeSpec(**compared, hinge=[2.0, 0.1, -1.0, 0.3], relative=relative, ignore_index=-100)
    check(hinge.fwd, (*inputs, *s))
    out = hinge.fwd(*inputs, *s)
    grads = [randn(N, seed=9).to(out[0].dtype) for _ in range(2)]
    given = [inputs[i] is not None for i in (0, 1, 5, 6)]
    for needs in (given, [True, False, False, given[3]]):
        check(hinge.bwd, (*grads, *out[2:], needs, *inputs, *s))
    directions = [
        inputs[0].new_empty(0) if t is None else randn(*t.shape, seed=10).to(t.dtype)
        for t in (inputs[0], inputs[1], *inputs[5:])
    ]
    check(hinge.dbl, (*directions, *grads, *out[2:], *inputs, *s))


@on_backends
@ON_DTYPES
@WHICH
def test_masked_argmax(which, dtype, backend):
    x, w, y, c, exclude, *_ = bank(dtype, which)
    low, high = (None, None) if which == "bare" else (randn(N, seed=4).to(acc(dtype)) - 3, randn(N, seed=5).to(dtype))
    wanted, noise = {"full": ([True, True], False), "strided": ([False, True], False), "bare": ([True, False], True)}[
        which
    ]
    s = ArgmaxSpec(
        **comparison(dtype, which, backend), wanted=wanted, largest=[False, True], noise=noise, seed=7,
        cutoffs=[0.5, 1.4], ignore_index=-100,
    )  # fmt: skip
    check(argmax.fwd, (x, w, y, c, exclude, low, high, *s))


def test_every_registered_op_is_checked_here():
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("dml_kernels::")}
    checked = {
        f"{op}_{kind}"
        for op in ("normalize", "normalized_distance", "masked_logsumexp", "masked_hinge_sum")
        for kind in ("fwd", "bwd", "dbl")
    } | {"proxy_nca_fwd", "proxy_nca_bwd", "magnet_fwd", "magnet_bwd", "masked_argmax_fwd"}
    # These ops are checked next to the tests of their values, in test_triplet_sum.py, test_positive_pair_sum.py and
    # test_pair_scores.py.
    checked |= {f"{op}_{kind}" for op in ("triplet_sum", "positive_pair_sum", "pair_scores") for kind in ("fwd", "bwd")}
    assert names == checked

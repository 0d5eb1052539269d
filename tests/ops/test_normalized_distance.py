"""normalized_distance: the N x M matrix and its gradients against fp64 truth, and what must hold exactly."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from dml_kernels import functional as F
from dml_kernels import reference
from tests.support.backends import on_backends, on_backends_and
from tests.support.dtypes import BF16, DTYPES, FP32, FP64, MIXED, MIXES
from tests.support.features import every_other
from tests.support.problems import METRICS, draws, on_metrics, randn
from tests.support.tolerance import Yardstick, assert_all_accurate, dense_forms, scores_by, worst

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

SHAPES = (
    (1, 1, 3), (1, 507, 64), (2, 1, 127), (127, 252, 2), (252, 127, 3), (507, 2, 252), (64, 127, 127), (16, 61, 1030),
    (3, 5003, 63), (507, 252, 12),
)  # fmt: skip
LAYOUTS = {
    "contiguous": lambda t: t,
    "strided": every_other,
    "transposed": lambda t: t.t().contiguous().t(),
    "with a gap": lambda t: torch.cat((t, torch.full_like(t, math.nan)), 1)[:, : t.size(1)],
}


def run(function, x, w, grad, layout):
    """Computes the matrix and both gradients; `grad` may be expanded."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    out = function(layout(x), layout(w))
    return dict(zip(("distance", "grad x", "grad w"), (out, *torch.autograd.grad(out, (x, w), grad(out)))))


def incoming(kind, seed):
    def grad(out):
        if kind == "sum":
            return torch.ones((), dtype=out.dtype).expand_as(out)
        full = randn(*out.shape, seed=seed).to(torch.bfloat16)  # the same values in every dtype
        return LAYOUTS[kind](full.to(out.dtype))

    return grad


def yardsticks(x, w, metric, dtype, grad, layout):
    """The truth on the rounded inputs, and the error of the dense expressions."""
    dense = functools.partial(reference.normalized_distance, metric=metric[0], normalized=metric[1])
    truth = run(dense, x.to(dtype.x).double(), w.to(dtype.w).double(), grad, layout)
    if dtype.product == torch.float64:
        return {k: s.in_fp64(truth[k]) for k, s in yardsticks(x, w, metric, FP32, grad, layout).items()}
    sticks = []
    for form in dense_forms(metric[0]):
        with scores_by(form):
            rounded = lambda x, w: dense(x.to(dtype.product), w.to(dtype.product))  # noqa: E731
            low = run(rounded, x.to(dtype.x), w.to(dtype.w), grad, layout)
        sticks.append({k: Yardstick.of(low[k], t) for k, t in truth.items()})
    return worst(sticks)


@functools.lru_cache(maxsize=1)
def drawn(shape, metric, dtype, kind, layout):
    """Inputs and yardsticks of the first draw, with the dense error of the worst, as problems.drawn."""
    n, m, d = shape
    inputs, sticks = [], []
    for seed in draws(n, m, d):
        x, w = randn(n, d, seed=seed) / math.sqrt(d), randn(m, d, seed=seed + 1) / math.sqrt(d)
        inputs.append((x.to(dtype.x), w.to(dtype.w)))
        sticks.append(yardsticks(x, w, metric, dtype, incoming(kind, seed), LAYOUTS[layout]))
    return *inputs[0], worst(sticks)


def check(shape, metric, dtype, backend, kind="contiguous", layout="contiguous"):
    x, w, sticks = drawn(shape, metric, dtype, kind, layout)
    ours = functools.partial(F.normalized_distance, metric=metric[0], normalize=metric[1], backend=backend)
    out = run(ours, x, w, incoming(kind, 0), LAYOUTS[layout])
    assert [out[k].dtype for k in out] == [dtype.product, dtype.x, dtype.w]
    assert_all_accurate(out, sticks)


@on_backends_and(DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_accurate(shape, dtype, backend):
    check(shape, METRICS[(SHAPES.index(shape) + DTYPES.index(dtype)) % len(METRICS)], dtype, backend)


@on_backends_and((FP32, BF16))
@on_metrics
def test_every_metric_is_accurate(metric, normalize, dtype, backend):
    check((61, 509, 48), (metric, normalize), dtype, backend)


@on_backends_and(MIXES)
def test_every_mix_of_dtypes_is_accurate(dtype, backend):
    check((61, 209, 48), METRICS[MIXES.index(dtype) % len(METRICS)], dtype, backend)


@on_backends_and((FP32, MIXED))
@pytest.mark.parametrize("kind", [*LAYOUTS, "sum"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_accurate(layout, kind, dtype, backend):
    which = list(LAYOUTS).index(layout) + 2 * (dtype == MIXED)
    check((37, 131, 24), METRICS[which % len(METRICS)], dtype, backend, kind, layout)


@on_backends
def test_cosine_is_always_of_unit_vectors_and_dot_never(backend):
    x, w = randn(5, 4, seed=1), randn(6, 4, seed=2)
    for normalize in (True, False):
        cosine, dot = (F.normalized_distance(x, w, m, normalize=normalize, backend=backend) for m in ("cosine", "dot"))
        torch.testing.assert_close(cosine, reference.normalize(x) @ reference.normalize(w).T)
        torch.testing.assert_close(dot, x @ w.T)


@on_backends
def test_the_default_is_the_euclidean_distance_of_unit_vectors(backend):
    x, w = randn(5, 4, seed=1), randn(6, 4, seed=2)
    expected = torch.cdist(reference.normalize(x), reference.normalize(w))
    torch.testing.assert_close(F.normalized_distance(x, w, backend=backend), expected)


@on_backends
@on_metrics
def test_an_empty_batch_gives_zero_gradients(metric, normalize, backend):
    x, w = torch.zeros(0, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    out = F.normalized_distance(x, w, metric, normalize=normalize, backend=backend)
    assert out.shape == (0, 4)
    out.sum().backward()
    assert x.grad.shape == (0, 3)
    assert w.grad.count_nonzero() == 0


@on_backends_and((FP32, FP64, BF16, MIXED))
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_identical_rows_are_at_distance_0_with_zero_gradient(metric, normalize, dtype, backend):
    x = randn(5, 37, seed=1).to(dtype.x).requires_grad_()
    w = randn(300, 37, seed=2).to(dtype.w)
    w[120:125] = x.detach().to(dtype.w)
    w.requires_grad_()
    out = F.normalized_distance(x, w, metric, normalize=normalize, backend=backend)
    own = out[range(5), range(120, 125)]
    assert (own == 0).all()
    assert (out > 0).sum() == out.numel() - 5
    grads = torch.autograd.grad(own.sum(), (x, w))
    assert all(g.count_nonzero() == 0 for g in grads)


EVERY_LAYOUT = {
    **LAYOUTS,
    "unaligned": lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape),
}


@on_backends_and((FP32, FP64, BF16, MIXED))
@pytest.mark.parametrize("shape", [(20, 20, 67), (1, 40, 513), (40, 3, 24), (2, 20, 1700)], ids=str)
@pytest.mark.parametrize(
    ("metric", "normalize"), [("euclidean", True), ("sqeuclidean", True), ("euclidean", False)], ids=str
)
def test_identical_rows_behind_any_strides_are_at_distance_0(metric, normalize, shape, dtype, backend):
    """The order of a sum of squares may depend on strides, but equal rows are equal in all derivatives."""
    n, m, d = shape
    base = randn(max(n, m), d, seed=1).to(dtype.x)
    own = torch.arange(min(n, m))
    for layout in EVERY_LAYOUT.values():
        for other in EVERY_LAYOUT.values():
            x = layout(base[:n]).to(dtype.x).detach().requires_grad_()
            w = other(base[:m].to(dtype.w)).detach().requires_grad_()
            distance = F.normalized_distance(x, w, metric, normalize=normalize, backend=backend)[own, own]
            for value in (distance, F.pair_scores(x, w, own, own, metric, normalize=normalize)):
                assert (value == 0).all()
                first = torch.autograd.grad(value.sum(), (x, w), create_graph=True)
                second = torch.autograd.grad(sum((g * randn(*g.shape, seed=3)).sum() for g in first), (x, w))
                if metric == "euclidean":
                    assert not any(g.count_nonzero() for g in (*first, *second))
                else:
                    assert all(g.abs().max() < 1e-6 for g in first)
                    assert all(g.abs().max() < 100 for g in second)


@on_backends_and((FP32, FP64))
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_small_distances_do_not_cancel(metric, dtype, backend):
    """Points far from the origin and near each other: |x|^2 + |w|^2 - 2 x.w would lose every digit."""
    eps = torch.finfo(dtype.x).eps
    base = randn(1, 20, seed=1) * 100
    x = (base + randn(30, 20, seed=2) * 1e-2).to(dtype.x)
    w = (base + randn(400, 20, seed=3) * 1e-2).to(dtype.w)
    found = F.normalized_distance(x, w, metric, normalize=False, backend=backend)
    truth = torch.tensor((x.numpy()[:, None].astype("longdouble") - w.numpy()).__pow__(2).sum(-1).astype("float64"))
    truth = truth if metric == "sqeuclidean" else truth.sqrt()
    assert ((found.double() - truth).abs() <= 24 * eps * truth).all()


@on_backends
def test_antipodal_rows_are_at_distance_2(backend):
    x = randn(5, 37, seed=1)
    call = {"normalize": True, "backend": backend}
    torch.testing.assert_close(
        F.normalized_distance(x, -x, "sqeuclidean", **call).diagonal(), torch.full((5,), 4.0).double()
    )
    torch.testing.assert_close(
        F.normalized_distance(x, -x, "euclidean", **call).diagonal(), torch.full((5,), 2.0).double()
    )
    torch.testing.assert_close(F.normalized_distance(x, -x, "cosine", **call).diagonal(), -torch.ones(5).double())


@on_backends
@on_metrics
def test_nan_stays_in_its_row(metric, normalize, backend):
    x, w = randn(9, 6, seed=1).float(), randn(700, 6, seed=2).float()
    x[4, 2] = math.nan
    x.requires_grad_()
    out = F.normalized_distance(x, w, metric, normalize=normalize, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), x)
    others = torch.arange(9) != 4
    assert out[4].isnan().all()
    assert metric == "dot" or grad[4].isnan().any()
    assert out[others].isfinite().all()
    assert grad[others].isfinite().all()


@on_backends
@on_metrics
def test_nan_in_the_bank_stays_in_its_column(metric, normalize, backend):
    x, w = randn(9, 6, seed=1).float(), randn(700, 6, seed=2).float()
    w[650, 1] = math.nan
    out = F.normalized_distance(x, w, metric, normalize=normalize, backend=backend)
    others = torch.arange(700) != 650
    assert out[:, 650].isnan().all()
    assert out[:, others].isfinite().all()

"""functional.positive_pair_sum: a term for each positive pair, compared with the dense expression, without N x M."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from torch.library import opcheck

from dml_kernels import functional as F
from dml_kernels.backends.torch import by_class as blocks
from dml_kernels.ops import positive_pair_sum as ops
from dml_kernels.profiling import run_in_child
from tests.support.class_sums import Labelled, assert_counts_and_all_accurate, sticks, with_gradients
from tests.support.dtypes import BF16, FP32, FP64, MIXED
from tests.support.problems import METRIC_IDS, METRICS, on_metrics, randn
from tests.support.tolerance import assert_same_bits, worst

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

KINDS = {"softplus": (3.0,), "lifted": (1.5, -0.4)}
on_kinds = pytest.mark.parametrize("kind", KINDS)
on_both = pytest.mark.parametrize("m", [0, 31], ids=["batch", "references"])


def leaves_of(p, kind, dtype=FP64, seed=0):
    """x, w where there are references, u, and v for lifted; some of u and v is -inf, in both for one class."""
    m = p.c.numel()
    u, v = randn(p.x.size(0), seed=seed + 5), randn(m, seed=seed + 6)
    u[1::4], v[::4] = -torch.inf, -torch.inf
    u[p.y == 1], v[p.c == 1] = -torch.inf, -torch.inf
    extra = (u,) if kind == "softplus" else (u, v)
    return p.leaves(dtype) + [t.to(dtype.vectors).requires_grad_() for t in extra]


def call(leaves, p, kind, backend="torch", **options):
    n = 1 if p.w is None else 2
    u, *v = leaves[n:]
    options = {"metric": "cosine", "exclude": p.exclude, **options}
    return F.positive_pair_sum(
        leaves[0], leaves[n - 1], p.y, p.c, u, *v, kind=kind, params=KINDS[kind], backend=backend, **options
    )


def evaluated(p, kind, backend="torch", dtype=FP64, seed=0, **options):
    leaves = leaves_of(p, kind, dtype, seed)
    out = with_gradients(call(leaves, p, kind, backend, **options), leaves, randn(p.x.size(0), seed=seed + 9))
    names = ["grad x", *(["grad w"] if p.w is not None else []), "grad u", "grad v"]
    return dict(zip(("total", "number", "active", *names), out.values()))


def problem_and_sticks(kind, m, metric, normalize, dtype, seed):
    p = Labelled.random(m=m, seed=seed)

    def run(dtype, backend):
        return evaluated(p, kind, backend, dtype, seed, metric=metric, normalize=normalize)

    # u and v, too, as they are rounded.
    leaves = [t.detach().double().requires_grad_() for t in leaves_of(p, kind, dtype, seed)]
    with mock.patch(f"{__name__}.leaves_of", return_value=leaves):
        truth = evaluated(p.rounded(dtype), kind, "reference", FP64, seed, metric=metric, normalize=normalize)
    return run, sticks(run, truth, metric, dtype)


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=lambda d: d.name)
@on_both
@on_kinds
@on_metrics
def test_value_counts_and_gradients_are_accurate(metric, normalize, kind, m, dtype):
    found = [problem_and_sticks(kind, m, metric, normalize, dtype, seed) for seed in (0, 100, 200)]
    assert_counts_and_all_accurate(found[0][0](dtype, "torch"), worst([stick for _, stick in found]))


@pytest.mark.parametrize("dtype", [BF16, MIXED], ids=lambda d: d.name)
@on_kinds
def test_half_precision_is_near(kind, dtype):
    p = Labelled.random(m=31, d=16)
    found, truth = evaluated(p, kind, dtype=dtype), evaluated(p, kind, "reference")
    assert found["total"].dtype == found["grad u"].dtype == torch.float32
    assert [found[f"grad {k}"].dtype for k in "xw"] == [dtype.x, dtype.w]
    for key in ("total", "grad x", "grad w", "grad u"):
        scale = truth[key].abs().max().item()
        torch.testing.assert_close(found[key].double(), truth[key], rtol=0, atol=0.03 * scale)


@on_both
@on_kinds
@pytest.mark.parametrize(("metric", "normalize"), METRICS[::2], ids=METRIC_IDS[::2])
def test_gradcheck_twice(metric, normalize, kind, m):
    p = Labelled.random(9, m and 8, 3, classes=3, seed=5)
    n = 1 if p.w is None else 2
    leaves = p.leaves(FP64)
    leaves += [randn(size, seed=size).requires_grad_() for size in (9, p.c.numel())[: len(KINDS[kind])]]

    def function(*leaves):
        return call(leaves, p, kind, metric=metric, normalize=normalize).total

    assert len(leaves) == n + len(KINDS[kind])
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@on_kinds
def test_without_negatives(kind, backend):
    """With u = v = -inf a softplus is 0, and in the lifted term the logarithm is 0, so that only the pair counts."""
    p = Labelled(randn(6, 3, seed=1), None, torch.arange(6) % 2, torch.arange(6) % 2, torch.arange(6))
    leaves = p.leaves(FP64) + [torch.full((6,), -torch.inf).double().requires_grad_() for _ in KINDS[kind]]
    out = call(leaves, p, kind, backend, metric="euclidean")
    if kind == "softplus":
        assert (out.total == 0).all()
        assert (out.active == 0).all()
    else:
        zeros = [leaves[0], *(torch.full((6,), -1e300, dtype=torch.float64) for _ in "uv")]
        k, o = KINDS[kind]
        d = (p.x[:, None] - p.x).norm(dim=2)
        same = (p.y[:, None] == p.y) & ~torch.eye(6, dtype=torch.bool)
        torch.testing.assert_close(out.total, torch.where(same, (k * d - o).relu().square() / 2, 0).sum(1))
        assert (call(zeros, p, kind, backend, metric="euclidean").total == 0).all()  # a negative, but far
    assert (out.number == 2).all()
    for again in (False, True):
        grads = torch.autograd.grad(out.total.sum(), leaves, create_graph=again, retain_graph=True)
        assert all(g.isfinite().all() for g in grads)
        assert all(g.count_nonzero() == 0 for g in grads[1:])


# Rows and entries in a tile: one of each, fewer than a class, more than all.
@pytest.mark.parametrize(("tile", "rows"), [(1, 1), (40, 3), (1 << 19, 256)])
@on_both
@on_kinds
def test_any_tiling_gives_the_same(kind, m, tile, rows):
    p = Labelled.random(60, m and 90, 3, classes=4, seed=2)
    with mock.patch.multiple(blocks, TILE=tile, MOST_ROWS=rows):
        found = evaluated(p, kind)
    for key, value in evaluated(p, kind, "reference").items():
        torch.testing.assert_close(found[key], value)


@on_kinds
@pytest.mark.parametrize("size", [1, 2, 49, 119, 120])
def test_classes_of_every_size(kind, size):
    n = 120
    p = Labelled(randn(n, 4, seed=1), None, torch.arange(n) // size, torch.arange(n) // size, torch.arange(n))
    found, expected = evaluated(p, kind), evaluated(p, kind, "reference")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    assert found["number"].sum() == sum(s * (s - 1) for s in torch.bincount(p.y).tolist())


EXTREMES = {
    "one row": (randn(1, 4, seed=1), torch.zeros(1, dtype=torch.long)),
    "all equal": (randn(1, 4, seed=1).expand(9, 4).clone(), torch.arange(9) % 3),
    "all ignored": (randn(9, 4, seed=1), torch.full((9,), -100)),
    "all distinct": (randn(9, 4, seed=1), torch.arange(9)),
    "antipodal": (randn(1, 4, seed=1) * (1 - 2 * (torch.arange(9) % 2))[:, None], torch.arange(9) // 3),
    "scale 1e4": (randn(9, 4, seed=1) * 1e4, torch.arange(9) % 3),
}


@on_metrics
@on_kinds
@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_inputs(case, kind, metric, normalize):
    x, y = EXTREMES[case]
    p = Labelled(x, None, y, y, torch.arange(len(y)))
    found = evaluated(p, kind, metric=metric, normalize=normalize)
    for key, value in evaluated(p, kind, "reference", metric=metric, normalize=normalize).items():
        assert found[key].isfinite().all(), key
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-9 * scale, msg=lambda m, k=key: f"{k}: {m}")


@on_kinds
def test_an_empty_batch(kind):
    p = Labelled(torch.zeros(0, 4).double(), randn(5, 4, seed=1), *(torch.arange(k) for k in (0, 5)), None)
    found = evaluated(p, kind)
    assert found["total"].shape == (0,)
    assert found["grad w"].count_nonzero() == 0


@on_kinds
def test_opcheck(kind):
    p = Labelled.random(9, 8, 3, classes=3)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for dtype in (torch.float32, torch.bfloat16):
        u, v = randn(9, seed=1).float(), randn(8, seed=2).float() if kind == "lifted" else None
        inputs = (p.x.to(dtype).t().contiguous().t(), p.w.to(dtype), p.y, p.c, p.exclude, u, v)
        spec = (kind, list(KINDS[kind]), "euclidean", True, 1e-12, -100, dtype, "torch", False)
        opcheck(ops.fwd, (*inputs, *spec), test_utils=tests)
        for needs in ([True, True, True, v is not None], [True, False, False, False], [False, False, True, False]):
            opcheck(ops.bwd, (randn(9, seed=3).float(), needs, *inputs, *spec), test_utils=tests)
        batch = (inputs[0], None, p.y, None, None, u, None if v is None else u.clone())
        opcheck(ops.fwd, (*batch, *spec), test_utils=tests)
        needs = [True, False, True, v is not None]
        opcheck(ops.bwd, (randn(9, seed=3).float(), needs, *batch, *spec), test_utils=tests)


@on_kinds
def test_compiles_as_one_graph(kind):
    p = Labelled.random(seed=1)
    torch._dynamo.reset()

    def function(*leaves):
        return call(leaves, p, kind, None)

    results = []
    for f in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        leaves = leaves_of(p, kind, FP32)
        results.append(list(with_gradients(f(*leaves), leaves, torch.ones(23)).values()))
    assert_same_bits(*results)


@on_kinds
def test_the_same_bits_again_and_the_same_numbers_at_any_number_of_threads(kind, any_threads):
    p, runs = Labelled.random(300, 0, 16, classes=40), []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        runs.append(list(evaluated(p, kind, dtype=FP32).values()))
    assert_same_bits(runs[0], runs[1])
    for found, expected in zip(runs[2], runs[0], strict=True):  # PyTorch's products and sums differ with the threads
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "hinge"}, ValueError, "kind must be one of softplus, lifted"),
        ({"params": (1.0, 2.0)}, ValueError, "kind 'softplus' takes 1 params; got 2"),
        ({"params": (float("inf"),)}, ValueError, r"params\[0\] must be finite"),
        ({"v": torch.ones(4)}, ValueError, "kind 'softplus' takes no v"),
        ({"kind": "lifted"}, ValueError, "kind 'lifted' needs v"),
        ({"u": torch.ones(4)}, ValueError, r"u must have shape \(3,\)"),
        ({"exclude": torch.tensor([0, 1, 9])}, ValueError, r"exclude must be a bank index in \[0, 4\)"),
        ({"backend": "cpu"}, RuntimeError, "positive_pair_sum is not implemented here|extension"),
    ],
    ids=str,
)
def test_bad_input_is_refused(change, error, message):
    good = {
        "x": torch.ones(3, 2), "w": torch.ones(4, 2), "y": torch.arange(3), "c": torch.arange(4), "u": torch.ones(3),
        "kind": "softplus",
    }  # fmt: skip
    with pytest.raises(error, match=message):
        F.positive_pair_sum(**{**good, **change})


@pytest.mark.parametrize(("n", "each"), [(6000, 8), (4000, 4000)], ids=str)
def test_memory_is_bounded(n, each):
    """This holds also where one class is the whole batch, with 16 million pairs."""
    out = json.loads(run_in_child("tests.support.memory_probe", "positive_pairs", str(n), str(each), "64"))
    assert out["peak"] < out["gradients"] + (64 << 20), out
    assert out["peak"] > 0

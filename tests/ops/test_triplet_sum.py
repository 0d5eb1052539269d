"""functional.triplet_sum: all triplets of each anchor, compared with the dense expression, without a list of them."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from torch.library import opcheck

from dml_kernels import functional as F
from dml_kernels import reference
from dml_kernels.backends.torch import by_class as blocks
from dml_kernels.ops import choice as backends
from dml_kernels.ops import triplet_sum as ops
from dml_kernels.profiling import run_in_child
from tests.support.class_sums import Labelled, assert_counts_and_all_accurate, sticks, with_gradients
from tests.support.dtypes import BF16, FP32, FP64, MIXED
from tests.support.problems import METRIC_IDS, METRICS, on_metrics, randint, randn
from tests.support.tolerance import assert_same_bits, worst

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

VARIANTS = ({}, {"smooth": True}, {"swap": True}, {"smooth": True, "swap": True})
on_variants = pytest.mark.parametrize("variant", VARIANTS, ids=["plain", "smooth", "swap", "smooth-swap"])
on_both = pytest.mark.parametrize("m", [0, 31], ids=["batch", "references"])


def call(leaves, p, backend="torch", **options):
    x, w = leaves[0], leaves[-1]
    options = {"margin": 0.3, "metric": "euclidean", **options}
    return F.triplet_sum(x, w, p.y, p.c, exclude=p.exclude, backend=backend, **options)


def in_a_gap(p, metric, normalize, swap):
    """A margin that no triplet is near, so that the same terms are above 0 in every dtype."""
    w = p.x if p.w is None else p.w
    s, between = (reference.scores(t, w, metric, normalize) for t in (p.x, w))
    same, different = reference.sets(p.y, p.c, p.c.numel(), p.exclude)
    i, j = same.nonzero(as_tuple=True)
    violation = (torch.maximum(s[i], between[j]) if swap else s[i]) - s[i, j, None]
    v = violation[different[i]].sort().values
    v = v[v.numel() // 3 : 2 * v.numel() // 3]
    at = v.diff().argmax()
    return -(v[at] + v[at + 1]).item() / 2


def problem_and_sticks(variant, m, metric, normalize, dtype, seed):
    p = Labelled.random(m=m, seed=seed)
    margin = in_a_gap(p, metric, normalize, "swap" in variant)
    grad = randn(p.x.size(0), seed=seed + 9)

    def run(dtype, backend):
        leaves = p.leaves(dtype)
        return with_gradients(
            call(leaves, p, backend, margin=margin, metric=metric, normalize=normalize, **variant), leaves, grad
        )

    rounded = p.rounded(dtype)
    leaves = rounded.leaves(FP64)
    truth = with_gradients(
        call(leaves, rounded, "reference", margin=margin, metric=metric, normalize=normalize, **variant), leaves, grad
    )
    return run, sticks(run, truth, metric, dtype)


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=lambda d: d.name)
@on_both
@on_variants
@on_metrics
def test_value_counts_and_gradients_are_accurate(metric, normalize, variant, m, dtype):
    found = [problem_and_sticks(variant, m, metric, normalize, dtype, seed) for seed in (0, 100, 200)]
    assert_counts_and_all_accurate(found[0][0](dtype, "torch"), worst([stick for _, stick in found]))


@pytest.mark.parametrize("dtype", [BF16, MIXED], ids=lambda d: d.name)
@on_variants
def test_half_precision_is_near(variant, dtype):
    """bf16 rounds a score to 1 in 256 and moves terms over the hinge, so the tolerance rule does not hold."""
    p = Labelled.random(m=31, d=16)
    leaves, exact = p.leaves(dtype), p.leaves(FP64)
    grad = torch.ones(23)
    found = with_gradients(call(leaves, p, **variant), leaves, grad)
    truth = with_gradients(call(exact, p, "reference", **variant), exact, grad)
    assert found["total"].dtype == torch.float32
    assert [found[f"grad {k}"].dtype for k in "xw"] == [dtype.x, dtype.w]
    for key in ("total", "grad x", "grad w"):
        scale = truth[key].abs().max().item()
        torch.testing.assert_close(found[key].double(), truth[key], rtol=0, atol=0.06 * scale)


@on_both
@on_variants
@pytest.mark.parametrize(("metric", "normalize"), METRICS[::2], ids=METRIC_IDS[::2])
def test_gradcheck_twice(metric, normalize, variant, m):
    p = Labelled.random(9, m and 8, 3, classes=3, seed=5)
    leaves = p.leaves(FP64)

    def function(*leaves):
        return call(leaves, p, metric=metric, normalize=normalize, **variant).total

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


# Rows and entries in a tile: one of each, fewer than a class, more than all.
@pytest.mark.parametrize(("tile", "rows"), [(1, 1), (40, 3), (1 << 19, 256)])
@on_both
@on_variants
def test_any_tiling_gives_the_same(variant, m, tile, rows):
    p = Labelled.random(60, m and 90, 3, classes=4, seed=2)
    grad, found = randn(60, seed=3), []
    for backend in ("torch", "reference"):
        leaves = p.leaves(FP64)
        with mock.patch.multiple(blocks, TILE=tile, MOST_ROWS=rows):
            found.append(with_gradients(call(leaves, p, backend, **variant), leaves, grad))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key])


@pytest.mark.parametrize("size", [1, 2, 5, 49, 60, 119, 120])
def test_classes_of_every_size(size):
    """Few thresholds are walked over, many are searched; with one class there is no negative."""
    n = 120
    p = Labelled(randn(n, 4, seed=1), None, torch.arange(n) // size, torch.arange(n) // size, torch.arange(n))
    found = []
    for backend in ("torch", "reference"):
        leaves = p.leaves(FP64)
        found.append(with_gradients(call(leaves, p, backend), leaves, randn(n, seed=3)))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key])
    expected = sum((s - 1) * (n - s) * s for s in torch.bincount(p.y).tolist())
    assert found[0]["number"].sum() == expected


def equal(n, seed=0):
    return randn(1, 4, seed=seed).expand(n, 4).clone()


EXTREMES = {
    "no rows": lambda: (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
    "one row": lambda: (equal(1), torch.zeros(1, dtype=torch.long)),
    "all equal": lambda: (equal(9), torch.arange(9) % 3),
    "one class": lambda: (randn(9, 4, seed=1), torch.zeros(9, dtype=torch.long)),
    "all distinct": lambda: (randn(9, 4, seed=1), torch.arange(9)),
    "all ignored": lambda: (randn(9, 4, seed=1), torch.full((9,), -100)),
    "antipodal": lambda: (equal(9) * (1 - 2 * (torch.arange(9) % 2))[:, None], torch.arange(9) // 3),
    "scale 1e4": lambda: (randn(9, 4, seed=1) * 1e4, torch.arange(9) % 3),
    "a zero row": lambda: (torch.cat((torch.zeros(1, 4), randn(8, 4, seed=1))), torch.arange(9) % 3),
}


@on_metrics
@pytest.mark.parametrize("kind", EXTREMES)
@on_variants
def test_extreme_inputs(variant, kind, metric, normalize):
    x, y = EXTREMES[kind]()
    if not len(x):
        w, c, p = randn(5, 4, seed=1), torch.arange(5), None
        leaves = [x.double().requires_grad_(), w.requires_grad_()]
        p = Labelled(x, w, y, c, None)
    else:
        p = Labelled(x.double(), None, y, y, torch.arange(len(y)))
        leaves = p.leaves(FP64)
    found, expected = (
        with_gradients(call(leaves, p, b, metric=metric, normalize=normalize, **variant), leaves, torch.ones(len(y)))
        for b in ("torch", "reference")
    )
    for key, value in found.items():
        assert value.isfinite().all(), key
        if not expected[key].isfinite().all():
            continue  # the reference takes a zero row's norm from a square root
        scale = max(1.0, expected[key].abs().max().item()) if value.numel() else 1.0
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-9 * scale, msg=lambda m, k=key: f"{k}: {m}")


def test_a_tie_at_the_margin_is_no_violation():
    """All numbers are integers, so every score is exact, and s_an = s_ap - margin is on the hinge."""
    x = torch.tensor([[1.0, 0], [5, 0], [3, 0], [2, 0], [9, 0]])
    y = torch.tensor([0, 0, 1, 1, 1])
    out = F.triplet_sum(x[:1], x, y[:1], y, margin=2.0, metric="dot", exclude=torch.tensor([0]))
    assert out == (torch.tensor([6.0]), torch.tensor([3]), torch.tensor([1]))


@pytest.mark.parametrize("n", [[3.0, 0], [4.0, -1], [0.0, 3]], ids=["tie", "the anchor's", "the positive's"])
def test_swap_gives_the_gradient_to_the_closer_pair_and_a_tie_to_both(n):
    """Dot products of whole numbers: s_an is n_0, s_pn is n_0 + 2 n_1, but a tie where n_1 is 0."""
    x = torch.tensor([[1.0, 0], [1, 2], n], requires_grad=True)
    y, own = torch.tensor([0, 0, 1]), torch.tensor([0])
    found = []
    for backend in ("torch", "reference"):
        out = F.triplet_sum(x[:1], x, y[:1], y, margin=1.0, metric="dot", swap=True, exclude=own, backend=backend)
        found.append(torch.autograd.grad(out.total, x, torch.ones(1))[0])
    assert torch.equal(*found)


def test_nan_is_never_silent():
    p = Labelled.random(40, 0, 4, classes=3)
    for row in (-1, -2):
        x = p.x.clone()
        x[row, 1] = torch.nan
        for variant in VARIANTS:
            total = call([x], p, metric="cosine", **variant).total
            rows = p.y != -100
            assert total[rows].isnan().any()
            assert total[row].isnan()


def test_counts_pass_2_to_the_31():
    """Two classes of 2,000: 8e9 triplets, every one of them over 0 where all points are equal; dot products of 1."""
    x, y = torch.zeros(4000, 1), torch.arange(4000) % 2
    out = F.triplet_sum(x, x, y, y, margin=1.0, metric="dot", exclude=torch.arange(4000))
    assert out.number.sum() == out.active.sum() == 4000 * 1999 * 2000 > 1 << 31
    assert (out.total == 1999 * 2000).all()


@on_variants
def test_opcheck(variant):
    p = Labelled.random(9, 8, 3, classes=3)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = (p.x.to(dtype).t().contiguous().t(), p.w.to(dtype), p.y, p.c, p.exclude)
        spec = (0.3, "smooth" in variant, "swap" in variant, "euclidean", True, 1e-12, -100, dtype, "torch", False)
        tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        opcheck(ops.fwd, (*inputs, *spec), test_utils=tests)
        for needs in ([True, True], [True, False], [False, True]):
            opcheck(ops.bwd, (randn(9, seed=3).float(), needs, *inputs, *spec), test_utils=tests)
        batch = (inputs[0], None, p.y, None, None)
        opcheck(ops.fwd, (*batch, *spec), test_utils=tests)
        opcheck(ops.bwd, (randn(9, seed=3).float(), [True, False], *batch, *spec), test_utils=tests)


@on_variants
def test_compiles_as_one_graph(variant):
    p = Labelled.random(seed=1)
    torch._dynamo.reset()

    def function(x):
        return call([x], p, backend=None, **variant)

    results = []
    for f in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        leaves = p.leaves(FP32)
        results.append(list(with_gradients(f(*leaves), leaves, torch.ones(23)).values()))
    assert_same_bits(*results)


@on_variants
def test_the_same_bits_again_and_the_same_numbers_at_any_number_of_threads(variant, any_threads):
    p, runs = Labelled.random(300, 0, 16, classes=40), []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        leaves = p.leaves(FP32)
        runs.append(list(with_gradients(call(leaves, p, **variant), leaves, torch.ones(300)).values()))
    assert_same_bits(runs[0], runs[1])
    for found, expected in zip(runs[2], runs[0], strict=True):  # PyTorch's products and sums differ with the threads
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"margin": float("nan")}, ValueError, "margin must be finite"),
        ({"metric": "manhattan"}, ValueError, "metric must be one of"),
        ({"exclude": torch.tensor([0, 1, 9])}, ValueError, r"exclude must be a bank index in \[0, 4\)"),
        ({"y": torch.arange(2)}, ValueError, r"y must have shape \(3,\)"),
        ({"c": torch.arange(4).int()}, TypeError, "c must be int64"),
        ({"eps": 0}, ValueError, "eps must be positive"),
        ({"backend": "cpu"}, RuntimeError, "triplet_sum is not implemented here|extension"),
    ],
    ids=str,
)
def test_bad_input_is_refused(change, error, message):
    good = {"x": torch.ones(3, 2), "w": torch.ones(4, 2), "y": torch.arange(3), "c": torch.arange(4), "margin": 0.1}
    with pytest.raises(error, match=message):
        F.triplet_sum(**{**good, **change})


def test_without_c_an_entry_is_its_own_class():
    x, w, y = randn(6, 3, seed=1), randn(4, 3, seed=2), randint(0, 4, 6, seed=3)
    found = F.triplet_sum(x, w, y, margin=0.2)
    assert torch.equal(found.total, F.triplet_sum(x, w, y, torch.arange(4), margin=0.2).total)
    assert (found.number == 3).all()


def test_others_say_that_it_is_not_theirs():
    verdicts = {v.backend: v for v in backends.explain("triplet_sum", "cpu", torch.float32)}
    assert [name for name, v in verdicts.items() if v.ok] == ["torch"]
    assert "triplet_sum is not implemented here" in verdicts["cpu"].reason


MB = 1 << 20


# Examples, and how many a class has: few, half of all, in one class all.
@pytest.mark.parametrize(
    ("n", "each", "variant"),
    [(6000, 8, ""), (3000, 1500, ""), (4000, 2000, ""), (6000, 3000, ""), (600, 300, "swap")],
    ids=str,
)
def test_memory_is_bounded(n, each, variant):
    out = json.loads(run_in_child("tests.support.memory_probe", "triplets", str(n), str(each), "32", variant))
    assert out["peak"] < out["gradients"] + 64 * MB, out
    assert out["peak"] > 0


@pytest.mark.slow
def test_8192_examples_exactly_and_in_little_memory():
    """Some anchors are compared with triplets in fp64. pytorch-metric-learning would list 470 million triplets."""
    out = json.loads(run_in_child("tests.support.memory_probe", "triplets", "8192", "8", "128", ""))
    assert out["peak"] < 200 * MB, out
    y = torch.randperm(8192, generator=torch.Generator().manual_seed(1)) % 1024
    x = (randn(1024, 128, seed=2)[y] + randn(8192, 128, seed=3)).float()
    found = F.triplet_sum(x, x, y, y, margin=0.05, metric="euclidean", normalize=True, exclude=torch.arange(8192))
    assert (found.number == 7 * 8184).all()
    u = torch.nn.functional.normalize(x.double())
    for a in range(0, 8192, 300):
        d = (u[a] - u).norm(dim=1)
        same = (y == y[a]) & (torch.arange(8192) != a)
        violation = d[same][:, None] - d[y != y[a]] + 0.05
        torch.testing.assert_close(found.total[a].double(), violation.relu().sum(), rtol=2e-4, atol=1e-5)
        assert (found.active[a] - (violation > 0).sum()).abs() <= 1

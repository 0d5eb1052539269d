"""masked_hinge_sum and masked_argmax under torch.compile, torch.func, autocast, threads; their memory; bad input."""

from __future__ import annotations

import math

import pytest
import torch

from dml_kernels import functional as F
from tests.across.test_memory import MB, large_allocations, probe
from tests.support.backends import on_backends, on_backends_and
from tests.support.dtypes import BF16, FP32, FP64
from tests.support.features import every_other
from tests.support.problems import METRIC_IDS, METRICS, randint, randn
from tests.support.tolerance import assert_same_bits  # fmt: skip
from tests.support.transforms import (
    assert_compiles_whole,
    assert_grad_of_grad_is_double_backward,
    assert_vmap_of_grad_is_a_loop,
)


def inputs(n=5, m=7, d=3, dtype=torch.float32):
    return [randn(*s, seed=i).to(dtype).requires_grad_() for i, s in enumerate(((n, d), (m, d), (n,)))]


def everything(x, w, t, metric="sqeuclidean", normalize=True, backend=None):
    """A scalar made of all outputs that have a gradient."""
    y, c, own = torch.arange(x.size(0)) % 3, torch.arange(w.size(0)) % 3, torch.arange(x.size(0))
    both = {"metric": metric, "normalize": normalize, "same": (-1.5, 0.1), "different": (2.0, 0.3), "backend": backend}
    a = F.masked_hinge_sum(x, w, y, c, threshold=t, exclude=own, **both)
    b = F.masked_hinge_sum(x, w, y, threshold=(None, t), relative=True, **both)
    return sum((v * (i + 1)).sum() for i, v in enumerate((*a[:2], *b[:2])))


@on_backends
@pytest.mark.parametrize(("metric", "normalize"), METRICS[::2], ids=METRIC_IDS[::2])
def test_compiled_whole_equals_eager(metric, normalize, backend, fresh_dynamo):
    def function(*args):
        return everything(*args, metric, normalize, backend)

    assert_compiles_whole(function, inputs())


@on_backends
def test_a_mined_triplet_loss_compiles_whole(backend, fresh_dynamo):
    """The batch chooses in itself by score, by draws and within bounds, and a loss uses the chosen entries."""

    def function(x):
        y, own = torch.arange(x.size(0)) % 3, torch.arange(x.size(0))
        call = {"exclude": own, "backend": backend}
        hard = F.masked_argmax(x, x, y, y, **call)
        semi = F.masked_argmax(x, x, y, y, which="different", bounds=(None, hard.same.score), **call).different
        drawn = F.masked_argmax(x, x, y, y, noise_seed=3, nonzero_loss_cutoff=1.9, **call)
        total = x.new_zeros(())
        for choice in (*hard, semi, *drawn):
            pair = (x - x[choice.index.clamp_min(0)]).square().sum(1)
            total = total + torch.where(choice.index >= 0, pair * choice.count, 0).sum()
        return total

    assert_compiles_whole(function, *([randn(n, 4, seed=1).requires_grad_()] for n in (8, 11)), dynamic=True)


@on_backends
def test_values_are_checked_in_a_compiled_graph_too(backend, fresh_dynamo):
    def function(x, w, y):
        return F.masked_hinge_sum(x, w, y, different=(1, 1), backend=backend).different

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, w, _ = inputs()
    compiled(x, w, torch.arange(5))
    with pytest.raises((ValueError, RuntimeError), match="labels must be in"):
        compiled(x, w, torch.arange(5) + 5)


@on_backends
def test_grad_of_grad_equals_double_backward(backend):
    x, *rest = (t.detach() for t in inputs(dtype=torch.float64))
    assert_grad_of_grad_is_double_backward(lambda x: everything(x, *rest, backend=backend), x)


@on_backends
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_of_grad_equals_a_loop(backend):
    x, *rest = (t.detach() for t in inputs(dtype=torch.float64))
    assert_vmap_of_grad_is_a_loop(lambda x: everything(x, *rest, backend=backend), x)


@on_backends
def test_forward_mode_is_refused_not_silently_zero(backend):
    x, w, t = (v.detach() for v in inputs())
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: everything(x, w, t, backend=backend), (x,), (torch.ones_like(x),))


@on_backends
def test_autocast_multiplies_in_bf16_and_returns_fp32(backend):
    x, w, t = inputs(9, 50, 16)
    own = torch.arange(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = F.masked_hinge_sum(x, w, own, same=(-1, 2), different=(1, 2), threshold=t, backend=backend)
        chosen = F.masked_argmax(x, w, own, backend=backend)
    low = F.masked_hinge_sum(
        x.bfloat16(), w.bfloat16(), own, same=(-1, 2), different=(1, 2), threshold=t, backend=backend
    )
    exact = F.masked_hinge_sum(x, w, own, same=(-1, 2), different=(1, 2), threshold=t, backend="reference")
    assert out.same.dtype == out.different.dtype == chosen.different.score.dtype == torch.float32
    assert 0 < (out.different - exact.different).abs().max() < 0.5
    torch.testing.assert_close(out.different, low.different, rtol=0.02, atol=0.02)
    grads = torch.autograd.grad(out.same.sum() + out.different.sum(), (x, w, t))
    assert [g.dtype for g in grads] == [torch.float32] * 3


# --- the same bits


SHAPES = ((7, 1, 5), (64, 100, 33), (5, 513, 64), (300, 1000, 17), (1500, 130, 9), (33, 9001, 24))


def outputs(shape, dtype, backend, metric, normalize):
    n, m, d = shape
    x, w = randn(n, d, seed=1).to(dtype.x).requires_grad_(), randn(m, d, seed=2).to(dtype.w).requires_grad_()
    t = randn(n, seed=3).to(dtype.vectors).requires_grad_()
    y, c, exclude = randint(0, 5, n, seed=4), randint(0, 5, m, seed=5), randint(-1, m, n, seed=6)
    call = {"metric": metric, "normalize": normalize, "exclude": exclude, "backend": backend}
    sets = {"same": (-2.0, 0.1), "different": (3.0, 0.2)}
    out = F.masked_hinge_sum(x, w, y, c, threshold=t, **sets, **call)
    relative = F.masked_hinge_sum(x, w, y % m, relative=True, threshold=t, **sets, **call)
    grads = torch.autograd.grad(sum(v.sum() for v in (*out[:2], *relative[:2])), (x, w, t))
    draw = {**call, "metric": "cosine" if metric == "dot" else metric, "normalize": True, "noise_seed": 3}
    chosen = [F.masked_argmax(x, w, y, c, **how) for how in (call, draw)]
    return *out, *relative, *grads, *(v for found in chosen for choice in found for v in choice)


@on_backends_and((FP32, BF16))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_run_gives_the_same_bits(shape, dtype, backend):
    metric = METRICS[SHAPES.index(shape) % len(METRICS)]
    assert_same_bits(outputs(shape, dtype, backend, *metric), outputs(shape, dtype, backend, *metric))


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=lambda d: d.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape, dtype, any_threads):
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(outputs(shape, dtype, "cpu", *METRICS[SHAPES.index(shape)]))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@on_backends
def test_a_draw_does_not_depend_on_tiling(backend, monkeypatch):
    """The whole bank, and each half of it as a bank in a larger one: the first half's columns draw the same noise."""
    x, w = randn(50, 8, seed=1), randn(2000, 8, seed=2)
    y, c = torch.zeros(50).long(), torch.ones(2000).long()
    call = {"noise_seed": 9, "backend": backend}
    whole = F.masked_argmax(x, w, y, c, **call).different.index
    first = F.masked_argmax(x, w[:1300], y, c[:1300], **call).different.index
    assert 0 < (whole < 1300).sum() < 50
    assert torch.equal(first[whole < 1300], whole[whole < 1300])
    monkeypatch.setattr("dml_kernels.backends.torch.tiles.CHUNK_ELEMENTS", 5000)
    assert torch.equal(F.masked_argmax(x, w, y, c, **call).different.index, whole)


# --- memory


@on_backends
@pytest.mark.parametrize("n", [16, 200])
def test_a_step_allocates_the_banks_gradient_and_nothing_else_of_its_size(n, backend):
    """This holds with `relative` too, whose positives the graph gathers nowhere."""
    m, d = 20_000, 128
    x, w, y = torch.randn(n, d, requires_grad=True), torch.randn(m, d, requires_grad=True), torch.randint(0, m, (n,))

    def step():
        out = F.masked_hinge_sum(x, w, y, different=(1, 1.3), relative=True, backend=backend)
        F.masked_argmax(x, w, y, backend=backend)
        out.different.sum().backward()

    assert [size for size, _ in large_allocations(step, 0.9 * m * d * 4)] == [m * d * 4]


@on_backends
@pytest.mark.parametrize(
    ("what", "n", "m", "d"),
    [
        ("hinge", 256, 300_000, 16),
        ("draw", 8192, 8192, 16),
        pytest.param("hinge", 8192, 8192, 16, marks=pytest.mark.slow),
        pytest.param("draw", 256, 300_000, 16, marks=pytest.mark.slow),
        pytest.param("argmax", 8192, 8192, 16, marks=pytest.mark.slow),
    ],
)
def test_peak_memory_is_the_gradients_plus_64_mb(n, m, d, what, backend):
    """The matrices would be 307 and 268 MB."""
    found = probe("pairs", backend, n, m, d, what)
    extra = (found["peak"] - found["gradients"]) / MB
    assert extra <= 64, f"{extra:.0f} MB beside the gradients"


# --- bad input

X, W, Y = torch.ones(4, 3), torch.ones(6, 3), torch.arange(4)
NAN = math.nan


def hinge(**given):
    return F.masked_hinge_sum(**{"x": X, "w": W, "y": Y, "different": (1, 0.5), **given})


def argmax(**given):
    return F.masked_argmax(**{"x": X, "w": W, "y": Y, **given})


BOTH = (
    (ValueError, r"x must have shape \(rows, D\)", {"x": X[0]}),
    (TypeError, r"x must be float32.*x\.float\(\)", {"x": X.long()}),
    (ValueError, r"same embedding size; got 2 and 3", {"x": X[:, :2]}),
    (ValueError, r"w has no rows", {"w": W[:0]}),
    (ValueError, r"y must have shape \(4,\)", {"y": Y[:3]}),
    (TypeError, r"y must be int64.*y\.long\(\)", {"y": Y.float()}),
    (ValueError, r"c must have shape \(6,\)", {"c": Y}),
    (ValueError, r"exclude must have shape \(4,\)", {"exclude": Y[:2]}),
    (ValueError, r"labels must be in \[0, 6\) or ignore_index \(-100\).*got 9$", {"y": torch.tensor([0, 9, 1, 2])}),
    (ValueError, r"exclude must be a bank index in \[0, 6\), or -1.*got -2$", {"exclude": torch.tensor([0, -2, 1, 5])}),
    (ValueError, r"metric must be one of", {"metric": "l2"}),
    (ValueError, r"eps must be positive", {"eps": 0.0}),
    (TypeError, r"ignore_index must be an integer", {"ignore_index": 0.5}),
    (ValueError, r"unknown backend 'gpu'", {"backend": "gpu"}),
)
HINGE = (
    (ValueError, r"neither set is asked for", {"different": None}),
    (TypeError, r"same must be a pair \(factor, offset\) or None; got 1", {"same": 1}),
    (ValueError, r"same must be a pair", {"same": (1.0, 2.0, 3.0)}),
    (ValueError, r"different\[1\] must be finite", {"different": (1.0, NAN)}),
    (ValueError, r"relative=True.*needs c=None", {"relative": True, "c": torch.arange(6)}),
    (ValueError, r"threshold must have shape \(4,\) or \(\)", {"threshold": torch.ones(3)}),
    (TypeError, r"threshold must be a floating dtype", {"threshold": torch.ones(4).long()}),
    (TypeError, r"threshold must be a tensor, a pair", {"threshold": 0.5}),
    (TypeError, r"threshold must be a torch\.Tensor; got float", {"threshold": (None, 0.5)}),
    (ValueError, r"threshold must be finite; got nan", {"threshold": torch.tensor(NAN)}),
    (RuntimeError, r"masked_hinge_sum is not implemented here", {"backend": "cuda"}),
)
ARGMAX = (
    (ValueError, r"which must be one of same, different, both; got 'positive'", {"which": "positive"}),
    (TypeError, r"bounds must be a pair", {"bounds": 0.5}),
    (ValueError, r"bounds must have shape \(4,\)", {"bounds": (None, torch.ones(()))}),
    (TypeError, r"noise_seed must be an integer", {"noise_seed": 0.5}),
    (ValueError, r"noise_seed must be an integer of at least 0; got -1", {"noise_seed": -1}),
    (ValueError, r"noise_seed draws.*unit vectors.*normalize=True", {"noise_seed": 1, "normalize": False}),
    (ValueError, r"noise_seed draws.*unit vectors", {"noise_seed": 1, "metric": "dot"}),
    (ValueError, r"cutoff and nonzero_loss_cutoff must be positive", {"noise_seed": 1, "cutoff": 0.0}),
)  # fmt: skip
TABLE = [(f, *row) for f, rows in ((hinge, BOTH + HINGE), (argmax, BOTH + ARGMAX)) for row in rows]


@on_backends
@pytest.mark.parametrize(("function", "error", "message", "given"), TABLE)
def test_bad_input_is_refused_with_the_argument_and_the_fix(function, error, message, given, backend):
    with pytest.raises(error, match=message):
        function(**{"backend": backend, **given})


@on_backends
def test_good_input_is_not_refused(backend):
    hinge(backend=backend)
    argmax(backend=backend)


@on_backends
def test_gaps_between_the_values_are_not_read(backend):
    """Every tensor is strided and has NaN or wrong labels in the gaps."""
    x, w, t = (v.detach() for v in inputs(37, 131, 24, torch.float64))
    y, c, exclude = randint(0, 4, 37, seed=4), randint(0, 4, 131, seed=5), randint(-1, 131, 37, seed=6)
    found = []
    for layout, chosen in ((lambda v: v, "reference"), (every_other, backend)):
        a, b, labels, bank_labels, left_out, threshold = (layout(v) for v in (x, w, y, c, exclude, t))
        call = {"exclude": left_out, "metric": "cosine", "backend": chosen}
        sums = F.masked_hinge_sum(
            a, b, labels, bank_labels, same=(-1, 0.1), different=(1, 0.1), threshold=threshold, **call
        )
        choice = F.masked_argmax(a, b, labels, bank_labels, bounds=(-threshold.abs(), threshold.abs()), **call)
        found.append((*sums, *choice.same, *choice.different))
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected)

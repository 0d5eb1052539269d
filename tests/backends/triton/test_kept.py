"""The owned form whose forward keeps the mean of `different`: the rows' gradient without a second walk of the bank.

The tests use the same rule and the same sanitizer as the rest, and each checks whether the mean was kept.
"""

from __future__ import annotations

import math

import pytest
import torch

from dml_kernels import functional as F
from dml_kernels.backends.triton import configs, logsumexp
from dml_kernels.ops import masked_logsumexp as lse
from dml_kernels.ops.signatures import Spec
from tests.ops import test_opcheck as opcheck_promises
from tests.support.dtypes import BF16, FP16, FP32, FP64, MIXED
from tests.support.features import FEATURES
from tests.support.problems import Problem, check, randn
from tests.support.tolerance import assert_all_accurate, assert_same_bits

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "launched", "owned")
B = "triton"
PRODUCTS = (("cosine", False), ("dot", False))
# With labels as bank indices: the others bring bank labels.
KEPT = (
    "ignored_rows", "all_rows_ignored", "exclude_the_only_positive", "scale_tenth", "scale_hundred",
    "scale_ten_thousand", "scale_tensor_scalar", "scale_per_row", "scale_of_either_sign_per_row", "one_factor_zero",
    "column_bias", "all_columns_left_out_by_bias", "identical_rows", "antipodal_rows",
)  # fmt: skip


@pytest.fixture
def owned():
    with configs.take_form("owned"):
        yield


@pytest.fixture
def kept(monkeypatch):
    """Counts how often a backward used the kept mean."""
    calls = []
    original = logsumexp.Backward.from_mean
    monkeypatch.setattr(logsumexp.Backward, "from_mean", lambda *a: calls.append(1) or original(*a))
    return calls


def problem(n, m, d, metric, feature, seed):
    p = Problem.random(n, m, d, *metric, seed=n + m + d + seed)
    p.sums = False
    if feature:
        FEATURES[feature](p)
    return p


# One row, entry and column; tiles' edges and one beyond.
SHAPES = ((1, 1, 3), (1, 2, 64), (2, 1, 127), (32, 64, 65), (33, 65, 128), (3, 700, 17), (130, 3, 5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_accurate(shape, kept):
    which = SHAPES.index(shape)
    check(problem, (*shape, PRODUCTS[which % 2], None), (BF16, FP32, FP64)[which % 3], B)
    assert kept


@pytest.mark.parametrize("dtype", [FP32, BF16, MIXED, FP16, FP64], ids=lambda d: d.name)
@pytest.mark.parametrize("metric", PRODUCTS, ids=str)
def test_every_dtype_is_accurate(metric, dtype, kept):
    check(problem, (45, 150, 40, metric, None), dtype, B)
    assert kept


@pytest.mark.parametrize("feature", KEPT)
def test_every_option_is_accurate(feature, kept):
    which = KEPT.index(feature)
    dtype = (FP32, MIXED, FP64, BF16)[which % 4]
    check(problem, (34, 70, 20, PRODUCTS[which % 2], feature), dtype, B)
    assert kept


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=lambda d: d.name)
@pytest.mark.parametrize("splits", ["one", "many"])
def test_ranges_of_the_bank_add_up(splits, dtype, kept, monkeypatch):
    monkeypatch.setattr(configs, "splits", lambda tiles, walk, cores: 1 if splits == "one" else walk)
    check(problem, (34, 300, 20, PRODUCTS[0], "scale_hundred"), dtype, B)
    assert kept


@pytest.mark.parametrize("d", [64, 128])
def test_tiles_by_descriptors_are_accurate(d, kept):
    with configs.trial("kept", configs.Config(32, 64, d, 1, 1, tma=True)):
        check(problem, (45, 150, d, PRODUCTS[d == 64], None), BF16, B)
    assert kept


def test_small_weights_add_up_in_fp16(kept):
    # One entry takes half of the weight, 4,000 share the rest: each weighs less than fp16's smallest number would say.
    n, m, d = 2, 4001, 16
    x = torch.eye(1, d).repeat(n, 1)
    w = torch.eye(1, d).repeat(m, 1)
    w[1:] = torch.nn.functional.one_hot(torch.arange(m - 1) % (d - 1) + 1, d)
    truth = []
    for dtype, backend in ((torch.float16, B), (torch.float64, "torch")):
        leaf = x.to(dtype).requires_grad_()
        out = F.masked_logsumexp(leaf, w.to(dtype), torch.full((n,), 1), scale=math.log(3e7), backend=backend)
        truth.append(torch.autograd.grad(out.different.sum(), leaf)[0].double())
    assert kept
    ours, right = (g[:, 1:] for g in truth)
    assert right.abs().max() > 0
    torch.testing.assert_close(ours, right, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("reason", "options", "dtype"),
    [("bank labels", {"c": torch.arange(70)}, FP32), ("plain sums", {"sums": True}, FP32),
     ("a distance", {"metric": "sqeuclidean"}, FP32)],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_what_cannot_be_kept_is_worked_out_by_the_backward(reason, options, dtype, kept):
    p = problem(34, 70, 20, PRODUCTS[0], None, 0)
    leaves = p.leaves(dtype)
    out = F.masked_logsumexp(leaves["x"], leaves["w"], p.y, **{"metric": "cosine", **options}, backend=B)
    out.different.sum().backward()
    assert not kept
    assert leaves["x"].grad is not None


@pytest.mark.parametrize("needs", [("x",), ("w",), ("scale",), ("x", "w", "scale", "col_bias")], ids="-".join)
def test_only_what_is_asked_for_is_computed_and_is_the_same(needs, kept):
    p = problem(34, 70, 20, PRODUCTS[0], "scale_per_row", 0)
    FEATURES["column_bias"](p)
    everything = p.run(FP32, B)
    kept.clear()
    leaves = p.leaves(FP32)
    for k, t in leaves.items():
        t.requires_grad_(k in needs)
    out = p.ours(leaves, B)
    wanted = [leaves[k] for k in needs]
    grads = torch.autograd.grad(list(out.values()), wanted, [p.grads[k].to(v.dtype) for k, v in out.items()])
    assert len(kept) == ("x" in needs)
    # If x needs no gradient, the scale's gradient is summed over the walk, with other rounding.
    for k, grad in zip(needs, grads, strict=True):
        torch.testing.assert_close(grad, everything[f"grad {k}"], rtol=1e-5, atol=1e-6)


def test_the_bits_are_the_same_every_time_and_for_any_free_memory(kept):
    p = problem(34, 700, 20, PRODUCTS[0], "column_bias", 0)
    first = p.run(MIXED, B)
    torch.utils.deterministic.fill_uninitialized_memory = False
    assert_same_bits(first.values(), p.run(MIXED, B).values())
    assert len(kept) == 2


def test_rows_shorter_than_eps_and_rows_of_zeros(kept):
    p = problem(6, 9, 8, PRODUCTS[0], None, 0)
    p.tensors["x"][0] = 0
    p.tensors["x"][1] *= 1e-3
    p.tensors["w"][2] = 0
    p.options["eps"] = 1e-2
    assert_all_accurate(p.run(FP64, B), p.yardsticks(FP64))
    assert kept


def test_nan_stays_in_its_row(kept):
    p = problem(6, 9, 8, PRODUCTS[0], None, 0)
    p.tensors["x"][1, 2] = math.nan
    x = p.leaves(FP32)["x"]
    out = F.masked_logsumexp(x, p.tensors["w"].float(), p.y, metric="cosine", backend=B)
    (grad,) = torch.autograd.grad((out.different - out.same).sum(), x)
    assert kept
    assert grad.isnan().any(1).tolist() == [i == 1 for i in range(6)]


def test_nan_in_the_bank_does_not_reach_an_ignored_row(kept):
    p = problem(6, 9, 8, PRODUCTS[0], None, 0)
    p.tensors["w"][0] = math.nan
    p.y[2] = -100
    x = p.leaves(FP32)["x"]
    out = F.masked_logsumexp(x, p.tensors["w"].float(), p.y, metric="cosine", backend=B)
    (grad,) = torch.autograd.grad(out.different.clamp_min(-1).sum(), x)
    assert kept
    assert not grad[2].any()
    assert grad[torch.arange(6) != 2].isnan().all()


def test_logits_far_below_the_largest_possible_keep_their_gradient_in_fp16(kept):
    def opposite(seed):
        p = problem(34, 70, 3, PRODUCTS[0], None, seed)
        p.tensors["w"] = p.tensors["w"] * 0.1 - torch.eye(1, 3)  # all on one side, the rows on the other
        p.tensors["x"] = p.tensors["x"] * 0.1 + torch.eye(1, 3)
        p.options["scale"] = 39.0  # small enough for a fixed offset, from which exp(-78) is 0 in fp16
        return p

    check(opposite, (), FP16, B)
    assert kept


def test_first_and_second_derivatives_in_fp64(kept):
    x, w = (randn(n, 5, seed=s).requires_grad_() for n, s in ((3, 1), (6, 2)))
    scale, b = (t.requires_grad_() for t in (randn(3, seed=3).exp(), randn(6, seed=5)))

    def call(x, w, scale, b):
        return F.masked_logsumexp(x, w, torch.tensor([0, 4, -100]), metric="cosine", scale=scale,
                                  col_bias=b, same=(-1.5, 0.3), different=(2.0, -0.2), backend=B)[:2]  # fmt: skip

    for derivative in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        kept.clear()
        # The row of the ignored label has log-sum-exps of -inf, of which differences are NaN: the other rows'.
        assert derivative(lambda *t: [v[:2] for v in call(*t)], (x, w, scale, b), fast_mode=True)
        assert kept


def test_a_compiled_graph_and_torch_func_take_it_too(kept):
    p = problem(34, 70, 20, PRODUCTS[0], None, 0)
    x, w = (t.float() for t in p.tensors.values())

    def loss(x, w):
        out = F.masked_logsumexp(x, w, p.y, metric="cosine", scale=9.0, backend=B)
        return (out.different - out.same).mean()

    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    plain = torch.autograd.grad(loss(*leaves), leaves)
    assert len(kept) == 1
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same_bits(torch.autograd.grad(compiled(*leaves), leaves), plain)
    assert len(kept) == 2
    assert_same_bits(torch.func.grad(loss, (0, 1))(x, w), plain)
    assert len(kept) == 3


def test_opcheck_of_what_is_kept(kept):
    p = problem(5, 9, 8, PRODUCTS[0], "column_bias", 0)
    bank = (*(p.tensors[k].float() for k in ("x", "w")), p.y, None, None, None, p.tensors["col_bias"].float())
    spec = Spec(
        metric="dot", normalize=True, logit=[2.0, 0.1, -1.0, 0.3], eps=1e-12, ignore_index=-100, dtype=torch.float32,
        backend=B, keep=True,
    )  # fmt: skip
    opcheck_promises.check(lse.fwd, (*bank, *spec))
    same, different, *_, mean = lse.fwd(*bank, *spec)
    assert mean.shape == (5, 8)
    empty = mean.new_empty(0)
    needs = [True, True, False, True]
    opcheck_promises.check(lse.bwd, (same, different, empty, empty, same, different, mean, needs, *bank, *spec))
    assert kept


def test_no_gradient_in_the_rows_keeps_nothing():
    p = problem(34, 70, 20, PRODUCTS[0], None, 0)
    for needs, grad_mode in (("w", True), ("x", False)):
        leaves = {k: t.requires_grad_(k == needs) for k, t in p.leaves(FP32).items()}
        with torch.set_grad_enabled(grad_mode):
            out = F.masked_logsumexp(leaves["x"], leaves["w"], p.y, metric="cosine", backend=B)
        if grad_mode:
            saved = out.different.grad_fn.saved_tensors
            assert not any(t is not None and t.numel() and t.shape == (34, 20) and t is not leaves["x"] for t in saved)
        else:
            assert out.different.grad_fn is None

"""``first_class``: a bank that holds a part of the classes, against the whole bank, and pair by pair."""

from __future__ import annotations

import itertools
import math
from functools import reduce

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from dml_kernels import functional as F
from dml_kernels.logspace import logaddexp
from dml_kernels.losses.proxy_nca import proxy_nca_reference
from dml_kernels.ops import choice
from dml_kernels.ops import masked_argmax as argmax_op
from dml_kernels.ops import masked_hinge_sum as hinge_op
from dml_kernels.ops import proxy_nca as proxy_op
from dml_kernels.ops.signatures import ArgmaxSpec, HingeSpec, ProxySpec, Spec
from tests.ops.test_opcheck import check, check_logsumexp
from tests.support.problems import METRIC_IDS, METRICS, randint, randn

N, M, D, IGNORED = 14, 12, 5, 7
PARTS = (0, 5, 9, M)
FAR = (1 << 33) + 5
on_all = pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("cpu", marks=pytest.mark.cpp)])
on_metrics = pytest.mark.parametrize(("metric", "normalize"), METRICS, ids=METRIC_IDS)


def problem(first=0):
    """Rows, a bank of M classes from ``first`` on, labels of which one is ignored, and excluded entries."""
    x, w = randn(N, D, seed=1).double(), randn(M, D, seed=2).double()
    y, exclude = randint(0, M, N, seed=3), randint(-1, M, N, seed=4)
    y[2], exclude[0] = IGNORED, int(y[0])
    return x, w, y + first, exclude


def lse(x, w, y, **options):
    return F.masked_logsumexp(x, w, y, same=(-1.5, 0.2), different=(2.0, -0.1), scale=0.7, **options)[:2]


def hinge(x, w, y, **options):
    return F.masked_hinge_sum(x, w, y, same=(-1.0, 0.6), different=(1.0, 0.7), **options)


def together(u, v):
    return logaddexp(u, v, empty=-math.inf)


def over_parts(call, x, w, y, exclude, first, **options):
    """What ``call`` returns of each part of the bank, with the part's own ``exclude``."""
    for a, b in itertools.pairwise(PARTS):
        here = torch.where((exclude >= a) & (exclude < b), exclude - a, -1)
        yield call(x, w[a:b], y, exclude=here, first_class=first + a, ignore_index=first + IGNORED, **options)


@on_all
@on_metrics
@pytest.mark.parametrize("first", [0, FAR])
def test_the_parts_of_a_bank_are_the_whole(backend, metric, normalize, first):
    x, w, y, exclude = problem(first)
    options = {"metric": metric, "normalize": normalize}
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    found = [reduce(together, part) for part in
             zip(*over_parts(lse, *leaves, y, exclude, first, backend=backend, **options), strict=True)]  # fmt: skip
    whole = [t.clone().requires_grad_() for t in (x, w)]
    expected = lse(*whole, y - first, exclude=exclude, ignore_index=IGNORED, backend="reference", **options)
    assert (expected[0] == -math.inf).tolist() == ((y - first == IGNORED) | (exclude == y - first)).tolist()
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth)
    for out in (found, expected):
        sum(torch.where(t == -math.inf, 0, t).square().sum() for t in out).backward()
    for ours, truth in zip(leaves, whole, strict=True):
        torch.testing.assert_close(ours.grad, truth.grad)
    sums = [sum(part) for part in zip(*over_parts(hinge, x, w, y, exclude, first, backend=backend, **options))]
    whole_sums = hinge(x, w, y - first, exclude=exclude, ignore_index=IGNORED, backend="reference", **options)
    for ours, truth in zip(sums, whole_sums, strict=True):
        torch.testing.assert_close(ours, truth)


@on_all
def test_the_best_of_the_parts_is_the_best_of_the_whole(backend):
    x, w, y, exclude = problem()
    found = list(over_parts(F.masked_argmax, x, w, y, exclude, 0, backend=backend))
    expected = F.masked_argmax(x, w, y, exclude=exclude, ignore_index=IGNORED, backend="reference")
    for name, best in (("same", torch.argmin), ("different", torch.argmax)):
        choices = [getattr(part, name) for part in found]
        score, count = (torch.stack([getattr(c, field) for c in choices]) for field in ("score", "count"))
        at = best(score, 0)
        index = torch.stack([torch.where(c.index < 0, -1, c.index + a) for c, a in zip(choices, PARTS)])
        index = index.gather(0, at[None])[0]
        truth = getattr(expected, name)
        assert torch.equal(index, truth.index)
        assert torch.equal(count.sum(0), truth.count)


@on_all
def test_every_pair_by_hand(backend):
    """Labels below, in and beyond the classes, the ignored one among them; one number that 32 bits do not hold."""
    first = FAR
    x, w = randn(6, D, seed=1).double(), randn(3, D, seed=2).double()
    y = torch.tensor([first, first + 1, first + 2, first - 1, first + 3, 0])
    exclude = torch.tensor([-1, 0, -1, 2, -1, -1])
    out = F.masked_logsumexp(
        x, w, y, metric="dot", exclude=exclude, ignore_index=first + 2, first_class=first, sums=True, backend=backend
    )
    s = (x @ w.T).tolist()
    members = [([0], [1, 2]), ([1], [2]), ([], []), ([], [0, 1]), ([], [0, 1, 2]), ([], [0, 1, 2])]
    for i, sets in enumerate(members):
        for logsum, total, columns in zip((out.same, out.different), (out.sum_same, out.sum_different), sets):
            total_exp = sum(math.exp(s[i][j]) for j in columns)
            assert logsum[i].item() == pytest.approx(math.log(total_exp) if columns else -math.inf)
            assert total[i].item() == pytest.approx(sum(s[i][j] for j in columns))
    extreme = torch.tensor([torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max])
    for at in (0, first, torch.iinfo(torch.int64).max - 3):
        none = F.masked_logsumexp(x[:2], w, extreme, metric="dot", first_class=at, backend=backend)
        assert none.same.tolist() == [-math.inf] * 2
        torch.testing.assert_close(none.different, torch.logsumexp(x[:2] @ w.T, 1))


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=pytest.mark.cpp)])
@pytest.mark.parametrize(("policy", "params"), [("quadratic", (0.25,)), ("max_pool", (2,)), ("softmax_pool", (2, 0.3))])
def test_a_policy_has_classes_from_there_on(policy, params, backend):
    x, w, y, _ = problem()
    options = {"policy": policy, "policy_params": params, "first_class": 3, "ignore_index": IGNORED}
    found = lse(x, w, y, backend=backend, **options)
    for ours, truth in zip(found, lse(x, w, y, backend="reference", **options), strict=True):
        torch.testing.assert_close(ours, truth)
    columns = M if policy == "quadratic" else M // 2
    here = (y >= 3) & (y < 3 + columns) & (y != IGNORED)
    assert torch.equal(found[0] > -math.inf, here)


@on_all
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_derivatives(metric, backend):
    x, w, *_ = problem()
    leaves = [t[:k].clone().requires_grad_() for t, k in ((x, 6), (w, 5))]
    # Rows without a positive among them: -inf has no finite difference.
    y = torch.tensor([4, 8, 6, 30, 5, 2])
    options = {"metric": metric, "exclude": torch.tensor([-1, 0, -1, 1, -1, -1]), "first_class": 4, "ignore_index": 6,
               "backend": backend}  # fmt: skip

    def of_lse(x, w):
        same, different = lse(x, w, y, **options)
        assert (same[3], same[5]) == (-math.inf, -math.inf)
        return torch.where(same == -math.inf, 0, same), different[[0, 1, 3, 4, 5]]

    def of_hinge(x, w):
        return hinge(x, w, y, normalize=True, **options)[:2]

    for function in (of_lse, of_hinge):
        assert gradcheck(function, leaves)
        assert gradgradcheck(function, leaves)


PROXY_OPTIONS = ({}, {"exclude_positive": True}, {"label_smoothing": 0.2}, {"metric": "cosine", "label_smoothing": 0.2})


@on_all
@pytest.mark.parametrize("options", PROXY_OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_proxy_nca(options, reduction, backend):
    x, w, y, _ = problem()
    x, w, first = x[:8].clone().requires_grad_(), w[:4].clone().requires_grad_(), 5
    y = torch.tensor([5, 8, 6, 30, 7, 2, 1 << 40, 4])
    call = {**options, "softmax_scale": 3.0, "first_class": first, "ignore_index": 6, "reduction": reduction}

    def function(x, w):
        return F.proxy_nca_loss(x, w, y, backend=backend, **call)

    found = function(x, w)
    torch.testing.assert_close(found, proxy_nca_reference(x, w, y, **call))
    if reduction == "none":
        u, p = (t / t.norm(dim=1, keepdim=True) for t in (x, w))
        z = 3 * (u @ p.T) if "metric" in options else -3 * torch.cdist(u, p).square()
        lost = torch.logsumexp(z, 1) - options.get("label_smoothing", 0) * z.mean(1)
        torch.testing.assert_close(found[[3, 5, 6, 7]], lost[[3, 5, 6, 7]])
    truth = torch.autograd.grad(proxy_nca_reference(x, w, y, **call).sum(), (x, w))
    torch.testing.assert_close(torch.autograd.grad(found.sum(), (x, w)), truth)
    if backend != "reference":
        assert gradcheck(function, (x, w))
        assert gradgradcheck(function, (x, w))


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=pytest.mark.cpp)])
def test_opcheck(backend):
    x, w, y, exclude = (t if t.dtype == torch.int64 else t.float() for t in problem(2))
    numbers = {"eps": 1e-12, "ignore_index": 3, "dtype": torch.float32, "backend": backend, "first_class": 2}
    part = {"metric": "dot", "normalize": True, **numbers}
    check_logsumexp((x, w, y, None, exclude, None, None), Spec(**part, logit=[1.0, 0.0, 2.0, 0.1]))
    spec = HingeSpec(**part, hinge=[-1.0, 0.5, 1.0, 0.5], relative=False)
    check(hinge_op.fwd, (x, w, y, None, exclude, None, None, *spec))
    search = ArgmaxSpec(**part, wanted=[True, True], largest=[False, True], noise=False, seed=0, cutoffs=[0.5, 1.4])
    check(argmax_op.fwd, (x, w, y, None, exclude, None, None, *search))
    proxies = ProxySpec(**numbers, factor=2.0, exclude_positive=False, label_smoothing=0.1, reduction="mean")
    check(proxy_op.fwd, (x, w, y, None, None, *proxies))


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=pytest.mark.cpp)])
def test_compiled(backend):
    x, w, y, _ = problem()

    def function(x, w, y):
        same, different = lse(x, w, y, first_class=3, backend=backend)
        return different.sum() + torch.where(same == -math.inf, 0, same).sum()

    leaves, plain = ([t.clone().requires_grad_() for t in (x, w)] for _ in range(2))
    torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves, y).backward()
    function(*plain, y).backward()
    for ours, truth in zip(leaves, plain, strict=True):
        torch.testing.assert_close(ours.grad, truth.grad)


CALLS = {"masked_logsumexp": lse, "masked_hinge_sum": hinge, "masked_argmax": F.masked_argmax,
         "proxy_nca": F.proxy_nca_loss}  # fmt: skip


@pytest.mark.parametrize("op", CALLS)
def test_refusals(op):
    x, w, y, _ = problem()
    call = CALLS[op]
    for bad, error, match in (
        (-1, ValueError, "first_class must be an integer of at least 0; got -1"),
        (1.5, TypeError, "first_class must be an integer of at least 0"),
        (torch.iinfo(torch.int64).max, ValueError, r"first_class must be at most 2\^63 - 1 - 12"),
    ):
        with pytest.raises(error, match=match):
            call(x, w, y, first_class=bad)
    y[1] = M
    with pytest.raises(ValueError, match="labels must be in"):
        call(x, w, y)
    call(x, w, y, first_class=0)
    if op == "proxy_nca":
        with pytest.raises(ValueError, match=r"first_class .* label_to_proxy"):
            call(x, w, y, first_class=0, label_to_proxy=torch.arange(M))
        with pytest.raises(ValueError, match=r"class_weight .* first_class"):
            call(x, w, y, first_class=0, class_weight=torch.ones(M))
        return
    for first in (0, 3):
        with pytest.raises(ValueError, match=r"first_class .* c, or y .* says it already"):
            call(x, w, y, c=torch.arange(M), first_class=first)
    with pytest.raises(ValueError, match=r"y where w is None, says it already"):
        call(x, None, y, first_class=0)
    if op == "masked_hinge_sum":
        with pytest.raises(ValueError, match=r"relative=True .* needs first_class=None"):
            call(x, w, y, relative=True, first_class=0)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backends_without_it_say_so(op, backend):
    why = choice.refusal(backend, op, torch.device("cuda"), torch.float32, {"first_class": 0})
    assert why in ("first_class 0 is not implemented here", f"{op} is not implemented here")
    assert ("first_class" in why) == (op in choice.BACKENDS[backend].OPS)
    x, w, y, _ = problem()
    with pytest.raises(RuntimeError, match=rf"first_class 2.*{backend}: "):
        CALLS[op](x, w, y, first_class=2, backend=backend)


@pytest.mark.cpp
def test_the_compiled_op_checks_it_again():
    x, w, y, _ = problem()
    c, kind = torch.arange(M), torch.empty(0, dtype=torch.float64)
    call = torch.ops.dml_kernels_cpu.mlse_fwd
    numbers = (0, False, 1.0, 0.0, 1.0, 0.0, 1e-12, -100, 0, 1, 0.0)
    for labels, first in ((None, -1), (None, torch.iinfo(torch.int64).max - M + 1), (c, 1)):
        with pytest.raises(RuntimeError, match="first_class"):
            call(kind, x, w, y, labels, None, None, None, *numbers, first, False)

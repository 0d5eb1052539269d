"""w=None: the batch is its own bank, on every backend, with gradients of both orders."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from dml_kernels import functional as F
from dml_kernels import losses, miners, regularizers
from dml_kernels.losses import family
from dml_kernels.ops import choice
from dml_kernels.ops import masked_logsumexp as ops
from dml_kernels.ops.signatures import Spec
from tests.support.backends import MARKS, on_backends
from tests.support.problems import leaf, randn
from tests.support.tolerance import assert_same_bits

N, D = 9, 4
Y = torch.tensor([0, 1, 1, 2, 0, -100, 2, 1, 5])
T, BIAS, U, V = (randn(N, seed=seed) for seed in range(4))
ALL = slice(None)


# Each op with everything that goes by row or by bank entry; ``rows`` and ``kept`` say which are there.
def logsumexp(x, w=None, y=None, c=None, rows=ALL, kept=ALL, **call):
    numbers = {"scale": (T + 3)[rows], "col_bias": BIAS[kept], "metric": "euclidean", "same": (-1.5, 0.1)}
    return F.masked_logsumexp(x, w, y, c, **numbers, sums=True, **call)


def circle(x, w=None, y=None, c=None, rows=ALL, kept=ALL, **call):
    return F.masked_logsumexp(x, w, y, c, scale=2.0, policy="quadratic", policy_params=(0.2,), **call)[:2]


def hinge(x, w=None, y=None, c=None, rows=ALL, kept=ALL, **call):
    return F.masked_hinge_sum(x, w, y, c, same=(-1, 0.1), different=(1, 1.2), threshold=T[rows], **call)


def softplus(x, w=None, y=None, c=None, rows=ALL, kept=ALL, **call):
    return F.positive_pair_sum(x, w, y, c, U[rows], kind="softplus", metric="sqeuclidean", **call)


def lifted(x, w=None, y=None, c=None, rows=ALL, kept=ALL, **call):
    return F.positive_pair_sum(x, w, y, c, U[rows], V[kept], kind="lifted", params=(1.0, 0.2), **call)


def triplets(x, w=None, y=None, c=None, rows=ALL, kept=ALL, **call):
    return F.triplet_sum(x, w, y, c, margin=0.3, **call)


def smooth_triplets(x, w=None, y=None, c=None, rows=ALL, kept=ALL, **call):
    return F.triplet_sum(x, w, y, c, margin=0.3, smooth=True, swap=True, **call)


def argmax(x, w=None, y=None, c=None, rows=ALL, kept=ALL, **call):
    found = F.masked_argmax(x, w, y, c, bounds=(None, T[rows]), **call)
    at = torch.arange(N)[kept]
    return [t for c in found for t in (torch.where(c.index < 0, -1, at[c.index.clamp_min(0)]), c.score, c.count)]


OPS = (logsumexp, circle, hinge, softplus, lifted, triplets, smooth_triplets, argmax)
BY_CLASS = (softplus, lifted, triplets, smooth_triplets)
EXCLUDED = {
    "the own copy": {},
    "nothing": {"own": True},
    "one and the own copy": {"exclude": torch.tensor([4, 1, -1, 0, 0, 2, 3, 2, 7])},
    "one": {"own": True, "exclude": torch.tensor([4, 1, -1, 0, 0, 2, 3, 2, 7])},
}


def runs(op, backend, excluded=""):
    if op in BY_CLASS:
        return backend in ("torch", "reference")
    return excluded != "one and the own copy" or backend in ("torch", "reference", "cpu")


def cases(ops=OPS):
    return pytest.mark.parametrize(
        ("op", "excluded", "backend"),
        [pytest.param(op, excluded, name, marks=marks, id=f"{op.__name__}-{excluded}-{name}") for op in ops
         for excluded in EXCLUDED for name, marks in {**MARKS, "reference": ()}.items() if runs(op, name, excluded)],
    )  # fmt: skip


def by_hand(op, x, own=False, exclude=None):
    """Row by row, with a bank that holds what is not left out."""
    found = []
    for i in range(N):
        out = {-1 if exclude is None else int(exclude[i]), -1 if own else i}
        kept = [j for j in range(N) if j not in out]
        row = slice(i, i + 1)
        found.append(op(x[row], x[kept], Y[row], Y[kept], rows=row, kept=kept, backend="reference"))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def derivatives(outputs, x):
    """The finite outputs' gradient, along weights that differ, and that gradient's own."""
    value = sum(torch.where(t.isfinite(), t, 0).sin() @ (T + 2) for t in outputs if t.requires_grad)
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    return first.detach(), torch.autograd.grad(first.sin().sum(), x)[0]


@cases()
def test_equals_what_is_left_out_by_hand(op, excluded, backend):
    x = leaf(N, D, seed=5, dtype=torch.float64)
    found, truth = op(x, y=Y, backend=backend, **EXCLUDED[excluded]), by_hand(op, x, **EXCLUDED[excluded])
    torch.testing.assert_close(list(found), truth, rtol=1e-9, atol=1e-9)
    if op is not argmax:
        value = sum(torch.where(t.isfinite(), t, 0).sum() for t in op(x, y=Y, backend=backend, **EXCLUDED[excluded])
                    if t.requires_grad)  # fmt: skip
        expected = sum(torch.where(t.isfinite(), t, 0).sum() for t in truth if t.requires_grad)
        for a, b in zip(torch.autograd.grad(value, x), torch.autograd.grad(expected, x, retain_graph=True)):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(derivatives(found, x), derivatives(truth, x), rtol=1e-7, atol=1e-7)


def own_and_given(op, dtype, backend, **excluded):
    """Outputs and the gradients of x: with w=None, and with w given as a copy."""
    results = []
    for given in (False, True):
        x, w = leaf(N, D, seed=5, dtype=dtype), leaf(N, D, seed=5, dtype=dtype)
        bank = (w, Y, Y) if given else (None, Y, None)
        out = op(x, *bank, backend=backend, **(excluded if not given else {"exclude": torch.arange(N)}))
        value = sum(torch.where(t.isfinite(), t, 0).sum() for t in out if t.requires_grad)
        grads = torch.autograd.grad(value, (x, w) if given else x)
        results.append([*out, sum(grads[1:], grads[0])])
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@on_backends
@pytest.mark.parametrize("op", [logsumexp, circle, hinge, triplets], ids=lambda op: op.__name__)
def test_both_gradients_are_added_in_the_dtype_of_x(op, backend, dtype):
    if not runs(op, backend):
        return
    found, expected = own_and_given(op, dtype, backend)
    assert found[-1].dtype == dtype
    assert_same_bits(found, expected)
    assert_same_bits(found, own_and_given(op, dtype, backend)[0])


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@on_backends
def test_any_subset_of_gradients(backend, needs):
    x, scale, bias = (t.detach().clone().requires_grad_(need) for t, need in zip((randn(N, D, seed=5), T, BIAS), needs))

    def lse(x, scale, bias):
        out = F.masked_logsumexp(x, y=Y, scale=scale, col_bias=bias, metric="sqeuclidean", sums=True, backend=backend)
        return [torch.where(t.isfinite(), t, 0) for t in out]

    def hinges(x, scale, bias):
        call = {"metric": "sqeuclidean", "same": (-1, 0.1), "different": (1, 1.2), "threshold": (scale, bias)}
        return F.masked_hinge_sum(x, y=Y, backend=backend, **call)[:2]

    for function in (lse, hinges):
        assert gradcheck(function, (x, scale, bias))
        assert gradgradcheck(function, (x, scale, bias))


@on_backends
@pytest.mark.parametrize("op", [logsumexp, hinge], ids=lambda op: op.__name__)
def test_derivatives_of_both_orders(op, backend):
    x = leaf(N, D, seed=5, dtype=torch.float64)
    assert gradcheck(lambda x: [torch.where(t.isfinite(), t, 0) for t in op(x, y=Y, backend=backend)[:2]], x)
    assert gradgradcheck(lambda x: [torch.where(t.isfinite(), t, 0) for t in op(x, y=Y, backend=backend)[:2]], x)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("backend", [*MARKS, "reference"])
def test_an_empty_batch_and_one_row(n, backend):
    x, y = leaf(n, D, seed=1), torch.zeros(n, dtype=torch.int64)
    lse = F.masked_logsumexp(x, y=y, sums=True, backend=backend)
    hinges = F.masked_hinge_sum(x, y=y, same=(1, 5), different=(1, 5), backend=backend)
    for out, nothing in (*((t, -math.inf) for t in lse[:2]), *((t, 0) for t in (*lse[2:], *hinges))):
        assert torch.equal(out, torch.full((n,), nothing).to(out))
        if out.requires_grad:
            assert torch.equal(torch.autograd.grad(out.sum(), x, retain_graph=True)[0], torch.zeros(n, D))
    for found in F.masked_argmax(x, y=y, backend=backend):
        assert found.index.tolist() == [-1] * n
    terms = (F.triplet_sum(x, y=y, margin=1.0), F.positive_pair_sum(x, None, y, None, torch.zeros(n), kind="softplus"))
    for out in terms:
        assert torch.equal(out.total, torch.zeros(n))
        assert torch.equal(torch.autograd.grad(out.total.sum(), x)[0], torch.zeros(n, D))
    kept = F.masked_logsumexp(x, y=y, own=True, backend=backend)
    torch.testing.assert_close(kept.same, torch.ones(n))  # the cosine with itself


@on_backends
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_of_grad_equals_a_loop(backend):
    x = randn(3, N, D, seed=5)
    for op in (logsumexp, hinge):
        grad = torch.func.grad(lambda x, op=op: op(x, y=Y, backend=backend).different.nan_to_num(neginf=0).sum())
        torch.testing.assert_close(torch.func.vmap(grad)(x), torch.stack([grad(t) for t in x]))


def every_op(x, y):
    found = [F.masked_logsumexp(x, y=y).different, F.masked_hinge_sum(x, y=y, same=(-1, 0.5)).same,
             F.triplet_sum(x, y=y, margin=0.5).total,
             F.positive_pair_sum(x, None, y, None, x[:, 0], kind="softplus").total]  # fmt: skip
    return torch.stack(found), F.masked_argmax(x, y=y).different.index


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_whole_equals_eager(compiler, fresh_dynamo):
    x = leaf(N, D, seed=5)
    compiled = torch.compile(every_op, fullgraph=True, backend=compiler)
    for (found, at), (expected, place) in [(compiled(x, Y), every_op(x, Y))]:
        torch.testing.assert_close(found, expected)
        assert torch.equal(at, place)
        grads = (torch.autograd.grad(t.sin().sum(), x)[0] for t in (found, expected))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"c": Y}, ValueError, "c holds the labels of w"),
        ({"y": None}, TypeError, "y is missing"),
        ({"w": randn(5, D, seed=1).float(), "c": Y[:5], "own": True}, ValueError, "own=True .* needs w=None"),
        ({"own": "no"}, TypeError, "own"),
        ({"policy": "max_pool", "policy_params": (3,)}, ValueError, "'max_pool' needs w"),
        ({"col_bias": torch.zeros(N + 1)}, ValueError, "col_bias"),
        ({"exclude": torch.full((N,), N)}, ValueError, "exclude must be a bank index"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        F.masked_logsumexp(**{"x": randn(N, D, seed=5).float(), "y": Y, **call})


@on_backends
def test_the_registered_op_refuses_labels_of_a_bank_that_is_not_there(backend):
    spec = Spec(
        metric="dot", normalize=True, logit=[1.0, 0.0, 1.0, 0.0], eps=1e-12, ignore_index=-100, dtype=torch.float32,
        backend=backend,
    )  # fmt: skip
    with pytest.raises(ValueError, match="c holds the labels of w"):
        ops.fwd(randn(N, D, seed=5).float(), None, Y, Y, None, None, None, *spec)


def test_relative_needs_a_bank():
    with pytest.raises(ValueError, match="it needs c=None, and w"):
        F.masked_hinge_sum(randn(N, D, seed=5), y=Y, different=(1, 0), relative=True)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_leaves_out_one_entry_says_so(backend):
    call = {"exclude": torch.zeros(N, dtype=torch.int64), "backend": backend}
    with pytest.raises(RuntimeError, match=f"{backend}: exclude 'in addition to the own copy' is not implemented here"):
        F.masked_logsumexp(randn(N, D, seed=5), y=Y, **call)
    asked = choice.explain("masked_logsumexp", "cuda", torch.float32, exclude="in addition to the own copy")
    assert [v.backend for v in asked if v.ok] == ["torch"]


class Calls(TorchDispatchMode):
    """The (x, w) of each comparison with a bank."""

    def __init__(self):
        super().__init__()
        self.pairs = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        names = [a.name for a in op._schema.arguments] if op.namespace == "dml_kernels" else []
        if "own" in names and "fwd" in str(op):
            self.pairs.append((args[names.index("x")], args[names.index("w")]))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [n for n in family("pairs") if n not in ("NPairsLoss", "NCALoss")])
def test_losses_pass_a_batch_once(name):
    with Calls() as calls:
        getattr(losses, name)()(leaf(N, D, seed=5), Y)
    assert calls.pairs
    assert all(w is None for _, w in calls.pairs)


def test_a_miner_and_a_regularizer_pass_a_batch_once():
    x = leaf(N, D, seed=5)
    with Calls() as calls:
        miners.BatchHardMiner()(x, Y)
        regularizers.RegularFaceRegularizer()(x)
    assert len(calls.pairs) > 1
    assert all(w is None for _, w in calls.pairs)

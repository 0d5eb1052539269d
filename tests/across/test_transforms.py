"""torch.compile, torch.func, autocast, checkpointing, threads and copies must not change the numbers."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dml_kernels import functional as F
from dml_kernels import losses, use_backend
from dml_kernels.ops import masked_logsumexp as lse_ops
from tests.support.backends import on_backends
from tests.support.problems import METRIC_IDS, METRICS, randint, randn
from tests.support.transforms import (
    assert_compiles_whole,
    assert_equal,
    assert_grad_of_grad_is_double_backward,
    assert_vmap_of_grad_is_a_loop,
    value_and_grads,
)

Y = torch.tensor([0, 1, 2, -100, 6])


def everything(x, w, scale, col_bias, metric="sqeuclidean", normalize=True, backend=None):
    """A scalar made of all outputs of masked_logsumexp with all its options."""
    n, m = x.size(0), w.size(0)
    y, c = torch.arange(n) % 3, torch.arange(m) % 3
    out = F.masked_logsumexp(
        x, w, y, c, metric=metric, normalize=normalize, scale=scale, same=(-1.5, 0.1), different=(2.0, -0.3),
        col_bias=col_bias, exclude=torch.arange(n), sums=True, backend=backend,
    )  # fmt: skip
    return sum((v * (i + 1)).sum() for i, v in enumerate(out))


def inputs(n=5, m=7, d=3):
    shapes = ((n, d), (m, d), (n,), (m,))
    return [randn(*s, seed=i).float().requires_grad_() for i, s in enumerate(shapes)]


# --- torch.compile


@on_backends
@pytest.mark.parametrize(("metric", "normalize"), METRICS[::2], ids=METRIC_IDS[::2])
def test_compiled_whole_equals_eager(metric, normalize, backend, fresh_dynamo):
    def function(*args):
        return everything(*args, metric, normalize, backend)

    assert_compiles_whole(function, inputs())


@on_backends
def test_compiled_with_the_batch_as_its_own_bank(backend, fresh_dynamo):
    def function(x, y):
        own = torch.arange(x.size(0))
        out = F.masked_logsumexp(x, x, y, y, scale=3.0, exclude=own, backend=backend)
        return (out.different - torch.where(out.same > -torch.inf, out.same, 0)).sum()

    assert_compiles_whole(function, (randn(6, 3, seed=1).requires_grad_(), torch.arange(6) % 3))


@on_backends
def test_compiled_by_inductor_equals_eager(backend, fresh_dynamo):
    loss = losses.ProxyNCALoss(7, 3, softmax_scale=3, label_smoothing=0.1)

    def step(x, y):
        with use_backend(backend):
            return loss(torch.nn.functional.relu(x * 2 + 1), y)

    found, expected = [], []
    for function, out in ((torch.compile(step, fullgraph=True), found), (step, expected)):
        x = randn(5, 3, seed=1).float().requires_grad_()
        value = function(x, Y)
        out.extend((value.detach(), *torch.autograd.grad(value, (x, loss.proxies))))
    assert_equal(found, expected)


@on_backends
def test_one_compilation_serves_every_shape(backend, fresh_dynamo):
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph

    def function(x, w):
        return F.masked_logsumexp(x, w, torch.arange(x.size(0)), scale=3.0, backend=backend).different

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
    for n, m in ((5, 7), (6, 9), (11, 300)):
        x, w = randn(n, 3, seed=1), randn(m, 3, seed=2)
        assert_equal([compiled(x, w)], [function(x, w)])
    assert len(graphs) == 1


@on_backends
@pytest.mark.parametrize("function", [F.normalize, lambda x, backend: F.normalized_distance(x, x + 1, backend=backend)])
def test_the_smaller_ops_compile_whole(function, backend, fresh_dynamo):
    calls = ([randn(n, 3, seed=1).requires_grad_()] for n in (4, 9))
    assert_compiles_whole(lambda x: function(x, backend=backend), *calls, dynamic=True)


@on_backends
def test_values_are_checked_in_a_compiled_graph_too(backend, fresh_dynamo):
    compiled = torch.compile(
        lambda x, w, y: F.proxy_nca_loss(x, w, y, backend=backend), fullgraph=True, backend="aot_eager"
    )
    x, w, *_ = inputs()
    compiled(x, w, Y)
    with pytest.raises((ValueError, RuntimeError), match="labels must be in"):
        compiled(x, w, Y + 5)


# --- torch.func


@on_backends
def test_grad_of_grad_equals_double_backward(backend):
    x, *rest = (t.detach().double() for t in inputs())
    assert_grad_of_grad_is_double_backward(lambda x: everything(x, *rest, backend=backend), x)


@on_backends
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_of_grad_equals_a_loop(backend):
    x, *rest = (t.detach().double() for t in inputs())
    assert_vmap_of_grad_is_a_loop(lambda x: everything(x, *rest, backend=backend), x)


@on_backends
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_jacrev_equals_rows_of_gradients(backend):
    x, w = randn(4, 3, seed=1), randn(6, 3, seed=2)

    def function(x):
        return F.masked_logsumexp(x, w, torch.arange(4), scale=2.0, backend=backend).different

    expected = torch.stack([torch.func.grad(lambda x, i=i: function(x)[i])(x) for i in range(4)])
    torch.testing.assert_close(torch.func.jacrev(function)(x), expected)


@on_backends
@pytest.mark.parametrize(
    "function",
    [
        lambda x, b: F.normalize(x, backend=b),
        lambda x, b: F.normalized_distance(x, x.detach() + 1, backend=b),
        lambda x, b: F.masked_logsumexp(x, x.detach() + 1, torch.arange(3), backend=b).different,
    ],
    ids=["normalize", "normalized_distance", "masked_logsumexp"],
)
def test_forward_mode_is_refused_not_silently_zero(function, backend):
    x = randn(3, 4, seed=1)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: function(x, backend), (x,), (torch.ones_like(x),))


# --- autocast


@on_backends
@pytest.mark.parametrize("proxies_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_multiplies_in_bf16_and_returns_fp32(proxies_dtype, backend):
    loss = losses.ProxyNCALoss(50, 16, softmax_scale=4, dtype=proxies_dtype)
    x = randn(9, 16, seed=1).float().requires_grad_()
    y = randint(0, 50, 9, seed=2)
    with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(x, y)
    value.backward()
    assert value.dtype == torch.float32
    assert loss.proxies.dtype == loss.proxies.grad.dtype == proxies_dtype
    assert x.grad.dtype == torch.float32
    expected = F.proxy_nca_loss(x.double(), loss.proxies.double(), y, softmax_scale=4)
    assert 0 < (value - expected).abs() < 0.05  # bf16 products differ, but not by much


@on_backends
def test_autocast_outputs(backend):
    x, w = randn(9, 16, seed=1).float(), randn(50, 16, seed=2).float()
    call = {"backend": backend}
    low = F.masked_logsumexp(x.bfloat16(), w.bfloat16(), torch.arange(9), sums=True, **call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(v.dtype == torch.float32 for v in F.masked_logsumexp(x, w, torch.arange(9), sums=True, **call))
        assert F.normalized_distance(x, w, **call).dtype == torch.bfloat16
        assert F.normalize(x, **call).dtype == torch.float32
        # fp64 is never lowered.
        assert F.masked_logsumexp(x.double(), w.double(), torch.arange(9), **call).same.dtype == torch.float64
        assert F.normalized_distance(x.double(), w.double(), **call).dtype == torch.float64
        dot = F.masked_logsumexp(x, w, torch.arange(9), metric="dot", sums=True, **call)
    torch.testing.assert_close(
        low.different, F.masked_logsumexp(x, w, torch.arange(9), **call).different, rtol=0.02, atol=0.02
    )
    expected = (x.bfloat16().double() @ w.bfloat16().double().T).logsumexp(1)
    torch.testing.assert_close(torch.logaddexp(dot.same, dot.different).double(), expected, rtol=2e-3, atol=2e-3)


@on_backends
def test_a_backward_outside_autocast_uses_the_forwards_products(backend):
    x, w, *_ = inputs(9, 50, 16)
    grads = []
    for inside in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = F.masked_logsumexp(x, w, torch.arange(9), scale=8.0, backend=backend).different.sum()
            if inside:
                grads.append(torch.autograd.grad(out, (x, w)))
        if not inside:
            grads.append(torch.autograd.grad(out, (x, w)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


# --- checkpointing, threads, copies


@on_backends
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant, backend):
    args = inputs()
    function = lambda *a: everything(*a, backend=backend)  # noqa: E731
    wrapped = lambda *a: checkpoint(function, *a, use_reentrant=reentrant)  # noqa: E731
    plain, kept = value_and_grads(function, args), []
    out = wrapped(*args)
    out.backward()
    kept = (out.detach(), *(a.grad for a in args))
    for a, b in zip(plain, kept, strict=True):
        assert torch.equal(a, b)


@on_backends
def test_the_backward_runs_on_any_thread_with_the_forwards_backend(backend, monkeypatch):
    x, w, *_ = inputs()
    with use_backend(backend):
        out = F.masked_logsumexp(x, w, torch.arange(5)).different.sum()
    used = []
    chosen = lse_ops.choice.BACKENDS[backend]
    original = chosen.masked_logsumexp_bwd
    monkeypatch.setattr(
        chosen, "masked_logsumexp_bwd", lambda *a: used.append(threading.current_thread()) or original(*a)
    )
    other = next(b for b in ("torch", "cpu") if b != backend)

    def backward():
        with use_backend(other):
            out.backward()

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert used == [thread]
    assert x.grad is not None


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict", "torch.save"])
def test_the_module_survives_copies(how):
    def make(seed):
        torch.manual_seed(seed)
        return losses.ProxyNCALoss(
            6, 4, softmax_scale=5, exclude_positive=True, label_to_proxy=torch.tensor([0, 1, 2, 0, 1, 2]),
            class_weight=torch.arange(6) + 1.0, ignore_index=-7, reduction="sum",
        )  # fmt: skip

    loss = make(0)
    if how == "deepcopy":
        other = copy.deepcopy(loss)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(loss))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(loss, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = make(1)
        assert not torch.equal(other.proxies, loss.proxies)
        other.load_state_dict(loss.state_dict())
    x, y = randn(5, 4, seed=1).float(), torch.tensor([0, 1, -7, 5, 3])
    assert other.proxies is not loss.proxies
    assert torch.equal(loss(x, y), other(x, y))


def test_a_class_weight_follows_the_module_and_not_the_checkpoint():
    loss = losses.ProxyNCALoss(6, 4, class_weight=torch.ones(6), label_to_proxy=torch.arange(6))
    assert set(loss.state_dict()) == {"proxies", "label_to_proxy"}
    assert loss.double().class_weight.dtype == torch.float64

"""Every loss on proxies against its own dense reference, and what must hold of any of them.

A loss compares embeddings (N, D) with one row of `proxies` (M, D) per class; a new file in losses/ is tested here
without a change. Of losses of every family, the registry's entries are looked at.
"""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from helpers import (
    BF16,
    FP32,
    FP64,
    MIXED,
    Yardstick,
    assert_all_accurate,
    on_backends,
    on_backends_and,
    randint,
    randn,
    worst,
)

from dml_kernels import functional, losses
from dml_kernels.losses import REGISTRY, family

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

CASES = [(name, i) for name, entry in family("proxies").items() for i in range(len(entry.options))]
on_losses = pytest.mark.parametrize(
    ("name", "which"), CASES, ids=[f"{name}-{REGISTRY[name].options[i] or 'defaults'}" for name, i in CASES]
)
on_names = pytest.mark.parametrize("name", family("proxies"))


def evaluate(function, x, proxies, y, **options):
    x, proxies = x.clone().requires_grad_(), proxies.clone().requires_grad_()
    value = function(x, proxies, y, **options)
    grads = torch.autograd.grad(value.sum(), (x, proxies))
    return {"value": value.detach(), "grad x": grads[0], "grad w": grads[1]}


def problem(n, m, d, seed=0):
    y = randint(0, m, n, seed=seed + 2)
    y[1::5] = -100
    return randn(n, d, seed=seed), randn(m, d, seed=seed + 1), y


def yardsticks(entry, options, x, w, y, dtype):
    truth = evaluate(entry.reference, x.to(dtype.x).double(), w.to(dtype.w).double(), y, **options)
    if dtype == FP64:
        return {k: s.in_fp64(truth[k]) for k, s in yardsticks(entry, options, x, w, y, FP32).items()}
    dense = evaluate(
        lambda x, w, y, **o: entry.reference(x.to(dtype.product), w.to(dtype.product), y, **o),
        x.to(dtype.x), w.to(dtype.w), y, **options,
    )  # fmt: skip
    return {k: Yardstick.of(dense[k], t) for k, t in truth.items()}


@functools.lru_cache(maxsize=1)
def drawn(name, which, shape, dtype):
    problems = [problem(*shape, seed=seed) for seed in range(0, 1000, 100)]
    entry = REGISTRY[name]
    return problems[0], worst([yardsticks(entry, entry.options[which], *p, dtype) for p in problems])


@on_backends_and((FP32, FP64, BF16, MIXED))
@pytest.mark.parametrize("shape", [(31, 127, 24), (12, 3, 64)], ids=str)
@on_losses
def test_value_and_gradient_are_accurate(name, which, shape, dtype, backend):
    (x, w, y), sticks = drawn(name, which, shape, dtype)
    entry = REGISTRY[name]
    out = evaluate(entry.function, x.to(dtype.x), w.to(dtype.w), y, **entry.options[which], backend=backend)
    assert [t.dtype for t in out.values()] == [torch.float64 if dtype == FP64 else torch.float32, dtype.x, dtype.w]
    assert_all_accurate(out, sticks)


@on_backends
@on_losses
def test_reductions_agree(name, which, backend):
    x, w, y = problem(11, 9, 4)
    call = functools.partial(REGISTRY[name].function, x, w, y, backend=backend)
    options = {k: v for k, v in REGISTRY[name].options[which].items() if k != "reduction"}
    rows, total, mean = (call(**options, reduction=r) for r in ("none", "sum", "mean"))
    assert rows.shape == (11,)
    assert (rows[y == -100] == 0).all()
    torch.testing.assert_close(rows.sum(), total)
    torch.testing.assert_close(rows.sum() / (y != -100).sum(), mean)


@on_backends
@on_losses
def test_the_order_of_rows_and_of_classes_does_not_matter(name, which, backend):
    x, w, y = problem(11, 60, 4)
    rows, classes = torch.randperm(11), torch.randperm(60)
    function = functools.partial(REGISTRY[name].function, **REGISTRY[name].options[which], backend=backend)
    place = torch.empty(60, dtype=torch.int64)
    place[classes] = torch.arange(60)
    renamed = torch.where(y == -100, -100, place[y.clamp_min(0)])
    expected = function(x, w, y)
    torch.testing.assert_close(function(x[rows], w, y[rows]), expected)
    torch.testing.assert_close(function(x, w[classes], renamed), expected)


@on_backends
@on_losses
def test_rotating_the_space_changes_nothing(name, which, backend):
    x, w, y = problem(11, 60, 5)
    turn, _ = torch.linalg.qr(randn(5, 5, seed=9))
    function = functools.partial(REGISTRY[name].function, **REGISTRY[name].options[which], backend=backend)
    torch.testing.assert_close(function(x @ turn, w @ turn, y), function(x, w, y))


@on_backends
@on_losses
def test_the_lengths_of_embeddings_and_proxies_do_not_matter(name, which, backend):
    x, w, y = problem(11, 60, 5)
    function = functools.partial(REGISTRY[name].function, **REGISTRY[name].options[which], backend=backend)
    longer = function(x * randn(11, 1, seed=8).exp(), w * randn(60, 1, seed=9).exp(), y)
    torch.testing.assert_close(longer, function(x, w, y))


@on_backends
@on_losses
def test_all_rows_ignored_gives_0_and_zero_gradients(name, which, backend):
    x, w, y = problem(5, 9, 4)
    out = evaluate(
        REGISTRY[name].function, x, w, torch.full_like(y, -100), **REGISTRY[name].options[which], backend=backend
    )
    assert out["value"] == 0
    assert out["grad x"].count_nonzero() == 0
    assert out["grad w"].count_nonzero() == 0


@on_backends
@on_losses
def test_an_ignored_row_is_as_if_it_were_not_there(name, which, backend):
    x, w, y = problem(11, 9, 4)
    x[1] = 1e6
    function, options = REGISTRY[name].function, REGISTRY[name].options[which]
    every = evaluate(function, x, w, y, **options, backend=backend)
    kept = evaluate(function, x[y != -100], w, y[y != -100], **options, backend=backend)
    torch.testing.assert_close(every["value"], kept["value"])
    torch.testing.assert_close(every["grad w"], kept["grad w"])
    torch.testing.assert_close(every["grad x"][y != -100], kept["grad x"])
    assert every["grad x"][y == -100].count_nonzero() == 0


@on_backends
@on_losses
def test_an_empty_batch_gives_0(name, which, backend):
    x, w, y = problem(0, 9, 4)
    out = evaluate(REGISTRY[name].function, x, w, y, **REGISTRY[name].options[which], backend=backend)
    assert out["value"] == 0
    assert out["grad x"].shape == (0, 4)
    assert out["grad w"].count_nonzero() == 0


EXTREMES = {
    "one row": lambda x, w, y: (x[:1], w, y[:1]),
    "one class": lambda x, w, y: (x, w[:1], y * 0),
    "two classes": lambda x, w, y: (x, w[:2], y % 2),
    "all embeddings equal": lambda x, w, y: (x[:1].expand_as(x).clone(), w, y),
    "all proxies equal": lambda x, w, y: (x, w[:1].expand_as(w).clone(), y),
    "everything equal": lambda x, w, y: (x[:1].expand_as(x).clone(), x[:1].expand_as(w).clone(), y),
    "antipodal to its proxy": lambda x, w, y: (-w[y], w, y),
    "on its proxy": lambda x, w, y: (w[y], w, y),
    "zero embedding": lambda x, w, y: (torch.cat((x[:1] * 0, x[1:])), w, y),
    "zero proxy": lambda x, w, y: (x, torch.cat((w[:1] * 0, w[1:])), y),
}


@on_backends
@pytest.mark.parametrize("scale", [0.1, 1e4])
@pytest.mark.parametrize("kind", EXTREMES)
@on_names
def test_extreme_inputs_match_the_reference(name, kind, scale, backend):
    x, w, y = EXTREMES[kind](randn(9, 5, seed=1), randn(30, 5, seed=2), torch.arange(9))
    for options in REGISTRY[name].options:
        options = {**options, "softmax_scale": scale}
        found = evaluate(REGISTRY[name].function, x, w, y, **options, backend=backend)
        expected = evaluate(REGISTRY[name].reference, x, w, y, **options)
        for key, value in found.items():
            # The reference takes norms of zero rows from a square root, whose gradient there is NaN or 0.
            if not (kind.startswith("zero") and key.startswith("grad")):
                unit = max(1.0, expected[key].abs().max().item())
                torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-9 * scale * unit)
            assert value.isfinite().all()


@on_backends
@on_losses
def test_nan_is_never_hidden(name, which, backend):
    function, options = REGISTRY[name].function, {**REGISTRY[name].options[which], "reduction": "none"}
    x, w, y = problem(6, 40, 4)
    x[2, 1] = float("nan")
    rows = function(x, w, y, **options, backend=backend)
    assert rows[2].isnan()
    assert rows[[0, 1, 3, 4, 5]].isfinite().all()
    x, w, y = problem(6, 40, 4)
    w[y[2], 1] = float("nan")
    assert function(x, w, y, **options, backend=backend)[y != -100].isnan().all()


@on_names
def test_the_module_is_the_function(name):
    entry = REGISTRY[name]
    x, w, y = (t.float() if t.is_floating_point() else t for t in problem(11, 9, 4))
    for options in entry.options:
        loss = entry.loss(9, 4, **options, proxies=w)
        assert torch.equal(loss(x, y), entry.function(x, loss.proxies, y, **options))


@pytest.mark.parametrize("name", REGISTRY)
def test_a_registry_entry_is_complete(name):
    entry = REGISTRY[name]
    assert getattr(losses, name) is entry.loss
    assert issubclass(entry.loss, torch.nn.Module)
    assert entry.paper
    for documented in (entry.loss, entry.function, entry.reference):
        assert inspect.getdoc(documented)
    if entry.family == "pairs":  # the Module is the loss: its function builds one, for the tests and benchmarks
        return
    assert hasattr(functional, entry.function.__name__)
    ours, theirs = (inspect.signature(f).parameters for f in (entry.function, entry.reference))
    assert set(ours) - set(theirs) == {"backend"}
    shared = [p for p in theirs if p in ours]
    assert all(ours[p].default == theirs[p].default for p in shared)

"""Every loss on proxies compared with its dense reference, and properties that all of them must have.

A loss compares embeddings (N, D) with one row of `proxies` (M, D) for each class, or with `centres` rows. A new file in
losses/ is tested here without a change. Its registry entry states which properties a loss does not have. The entries of
losses of every family are checked.
"""

from __future__ import annotations

import functools
import inspect

import pytest
import torch

from dml_kernels import distances, functional, losses
from dml_kernels.losses import REGISTRY, family, proxy_loss, softmax
from dml_kernels.ops import choice as backends
from tests.support.backends import on_losses
from tests.support.dtypes import BF16, FP16, FP32, FP64, MIXED, MIXES
from tests.support.problems import randint, randn
from tests.support.tolerance import Yardstick, assert_all_accurate, worst

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

PROXIES = family("proxies")
on_all = on_losses(PROXIES)
on_rows = on_losses(PROXIES, by_row=True)


def evaluate(function, x, proxies, y, **options):
    x, proxies = x.clone().requires_grad_(), proxies.clone().requires_grad_()
    value = function(x, proxies, y, **options)
    grads = torch.autograd.grad(value.sum(), (x, proxies))
    return {"value": value.detach(), "grad x": grads[0], "grad w": grads[1]}


def problem(n, m, d, seed=0, centres=1):
    y = randint(0, m, n, seed=seed + 2)
    y[1::5] = -100
    return randn(n, d, seed=seed), randn(m * centres, d, seed=seed + 1), y


def problem_of(name, n, m, d):
    return problem(n, m, d, centres=REGISTRY[name].centres)


def by_class(name, w, change):
    """Applies a change to (M, centres x D) rows, one for each class."""
    k = REGISTRY[name].centres
    return change(w.view(w.size(0) // k, -1)).reshape(-1, w.size(1))


def yardsticks(entry, options, x, w, y, dtype):
    truth = evaluate(entry.reference, x.to(dtype.x).double(), w.to(dtype.w).double(), y, **options)
    if dtype.product == torch.float64:
        return {k: s.in_fp64(truth[k]) for k, s in yardsticks(entry, options, x, w, y, FP32).items()}
    dense = evaluate(
        lambda x, w, y, **o: entry.reference(x.to(dtype.product), w.to(dtype.product), y, **o),
        x.to(dtype.x), w.to(dtype.w), y, **options,
    )  # fmt: skip
    return {k: Yardstick.of(dense[k], t) for k, t in truth.items()}


@functools.lru_cache(maxsize=1)
def drawn(name, which, shape, dtype):
    entry = REGISTRY[name]
    problems = [problem(*shape, seed=seed, centres=entry.centres) for seed in range(0, 1000, 100)]
    return problems[0], worst([yardsticks(entry, entry.options[which], *p, dtype) for p in problems])


@on_all
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, MIXED, FP16, MIXES[0]], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("shape", [(31, 127, 24), (12, 3, 64)], ids=str)
def test_value_and_gradient_are_accurate(name, which, shape, dtype, backend):
    (x, w, y), sticks = drawn(name, which, shape, dtype)
    entry = REGISTRY[name]
    out = evaluate(entry.function, x.to(dtype.x), w.to(dtype.w), y, **entry.options[which], backend=backend)
    assert [t.dtype for t in out.values()] == [dtype.accumulated, dtype.x, dtype.w]
    assert_all_accurate(out, sticks)


@on_rows
def test_reductions_agree(name, which, backend):
    x, w, y = problem_of(name, 11, 9, 4)
    call = functools.partial(REGISTRY[name].function, x, w, y, backend=backend)
    options = {k: v for k, v in REGISTRY[name].options[which].items() if k != "reduction"}
    rows, total, mean = (call(**options, reduction=r) for r in ("none", "sum", "mean"))
    assert rows.shape == (11,)
    assert (rows[y == -100] == 0).all()
    torch.testing.assert_close(rows.sum(), total)
    torch.testing.assert_close(rows.sum() / (y != -100).sum(), mean)


@on_all
def test_the_order_of_rows_and_of_classes_does_not_matter(name, which, backend):
    x, w, y = problem_of(name, 11, 60, 4)
    rows, classes = torch.randperm(11), torch.randperm(60)
    function = functools.partial(REGISTRY[name].function, **REGISTRY[name].options[which], backend=backend)
    place = torch.empty(60, dtype=torch.int64)
    place[classes] = torch.arange(60)
    renamed = torch.where(y == -100, -100, place[y.clamp_min(0)])
    expected = function(x, w, y)
    torch.testing.assert_close(function(x[rows], w, y[rows]), expected)
    torch.testing.assert_close(function(x, by_class(name, w, lambda w: w[classes]), renamed), expected)


@on_all
def test_rotating_the_space_changes_nothing(name, which, backend):
    x, w, y = problem_of(name, 11, 60, 5)
    turn, _ = torch.linalg.qr(randn(5, 5, seed=9))
    function = functools.partial(REGISTRY[name].function, **REGISTRY[name].options[which], backend=backend)
    torch.testing.assert_close(function(x @ turn, w @ turn, y), function(x, w, y))


@on_losses(PROXIES, lengths_matter=False)
def test_the_lengths_of_embeddings_and_proxies_do_not_matter(name, which, backend):
    x, w, y = problem_of(name, 11, 60, 5)
    function = functools.partial(REGISTRY[name].function, **REGISTRY[name].options[which], backend=backend)
    longer = function(x * randn(11, 1, seed=8).exp(), w * randn(w.size(0), 1, seed=9).exp(), y)
    torch.testing.assert_close(longer, function(x, w, y))


@on_all
def test_all_rows_ignored_gives_0_and_zero_gradients(name, which, backend):
    x, w, y = problem_of(name, 5, 9, 4)
    out = evaluate(
        REGISTRY[name].function, x, w, torch.full_like(y, -100), **REGISTRY[name].options[which], backend=backend
    )
    assert out["value"] == 0
    assert out["grad x"].count_nonzero() == 0
    assert out["grad w"].count_nonzero() == 0


@on_all
def test_an_ignored_row_is_as_if_it_were_not_there(name, which, backend):
    x, w, y = problem_of(name, 11, 9, 4)
    x[1] = 1e6
    function, options = REGISTRY[name].function, REGISTRY[name].options[which]
    every = evaluate(function, x, w, y, **options, backend=backend)
    kept = evaluate(function, x[y != -100], w, y[y != -100], **options, backend=backend)
    torch.testing.assert_close(every["value"], kept["value"])
    torch.testing.assert_close(every["grad w"], kept["grad w"])
    torch.testing.assert_close(every["grad x"][y != -100], kept["grad x"])
    assert every["grad x"][y == -100].count_nonzero() == 0


@on_all
def test_an_empty_batch_gives_0(name, which, backend):
    x, w, y = problem_of(name, 0, 9, 4)
    out = evaluate(REGISTRY[name].function, x, w, y, **REGISTRY[name].options[which], backend=backend)
    assert out["value"] == 0
    assert out["grad x"].shape == (0, 4)
    assert out["grad w"].count_nonzero() == 0


# Of (embeddings, proxies of each class (M, K, D), labels).
EXTREMES = {
    "one row": lambda x, w, y: (x[:1], w, y[:1]),
    "one class": lambda x, w, y: (x, w[:1], y * 0),
    "two classes": lambda x, w, y: (x, w[:2], y % 2),
    "all embeddings equal": lambda x, w, y: (x[:1].expand_as(x).clone(), w, y),
    "all proxies equal": lambda x, w, y: (x, w[:1, :1].expand_as(w).clone(), y),
    "everything equal": lambda x, w, y: (x[:1].expand_as(x).clone(), x[:1, None].expand_as(w).clone(), y),
    "antipodal to its proxy": lambda x, w, y: (-w[y, 0], w, y),
    "on its proxy": lambda x, w, y: (w[y, 0], w, y),
    "zero embedding": lambda x, w, y: (torch.cat((x[:1] * 0, x[1:])), w, y),
    "zero proxy": lambda x, w, y: (x, torch.cat((w[:1] * 0, w[1:])), y),
}
# Angles of 0 or 180 degrees, where the derivative of an arc cosine is infinite.
ALIGNED = ("everything equal", "antipodal to its proxy", "on its proxy")


@on_losses(PROXIES, options=False)
@pytest.mark.parametrize("scale", [0.1, 1e4])
@pytest.mark.parametrize("kind", EXTREMES)
def test_extreme_inputs_match_the_reference(name, kind, scale, backend):
    entry = REGISTRY[name]
    x, w, y = EXTREMES[kind](randn(9, 5, seed=1), randn(30, entry.centres, 5, seed=2), torch.arange(9))
    w = w.flatten(0, 1)
    for options in entry.options:
        options = {**options, **entry.at_scale(scale)}
        found = evaluate(entry.function, x, w, y, **options, backend=backend)
        expected = evaluate(entry.reference, x, w, y, **options)
        angular = entry.angular and kind in ALIGNED
        for key, value in found.items():
            assert value.isfinite().all()
            gradient = key.startswith("grad")
            # The reference takes norms of zero rows from a square root, whose gradient there is NaN or 0; equal
            # centres share a gradient as they like.
            tied = entry.centres > 1 and key == "grad w" and "equal" in kind
            if gradient and (kind.startswith("zero") or angular or tied):
                continue
            unit = max(1.0, expected[key].abs().max().item())
            close = 1e-6 if angular else 1e-9
            torch.testing.assert_close(value, expected[key], rtol=0, atol=close * scale * unit)


@on_rows
def test_nan_is_never_hidden(name, which, backend):
    function, options = REGISTRY[name].function, {**REGISTRY[name].options[which], "reduction": "none"}
    x, w, y = problem_of(name, 6, 40, 4)
    x[2, 1] = float("nan")
    rows = function(x, w, y, **options, backend=backend)
    assert rows[2].isnan()
    assert rows[[0, 1, 3, 4, 5]].isfinite().all()
    x, w, y = problem_of(name, 6, 40, 4)
    w[y[2] * REGISTRY[name].centres, 1] = float("nan")
    assert function(x, w, y, **options, backend=backend)[y != -100].isnan().all()


@pytest.mark.parametrize("name", PROXIES)
def test_the_module_is_the_function(name):
    entry = REGISTRY[name]
    x, w, y = (t.float() if t.is_floating_point() else t for t in problem_of(name, 11, 9, 4))
    for options in entry.options:
        # The names of a metric are those of distances for a Module.
        kinds = {"cosine": distances.CosineSimilarity(), "sqeuclidean": distances.LpDistance(power=2)}
        given = {k: v for k, v in options.items() if k != "metric"}
        if "metric" in options:
            given["distance"] = kinds[options["metric"]]
        loss = entry.loss(9, 4, **given, proxies=w)
        assert torch.equal(loss(x, y), entry.function(x, loss.bank, y, **options))
        assert torch.equal(loss.bank, w)


def arguments(function, shared):
    """The parameters of a function; its ``**options`` are the keyword arguments of `shared`."""
    own = dict(inspect.signature(function).parameters)
    if own.pop("options", None) is None:
        return own
    more = inspect.signature(shared).parameters
    return {**own, **{name: p for name, p in more.items() if p.kind is p.KEYWORD_ONLY}}


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
    ours = arguments(entry.function, softmax.softmax_loss)
    theirs = arguments(entry.reference, softmax.dense_cross_entropy)
    assert set(ours) == {*theirs, "backend"}
    assert all(ours[p].default == theirs[p].default for p in theirs)


SOFTMAX = [name for name, entry in PROXIES.items() if issubclass(entry.loss, proxy_loss.SoftmaxLoss)]
# Each changes the value.
SHARED = {
    "class_weight": torch.arange(9) + 1.0, "label_smoothing": 0.3, "ignore_index": 3, "reduction": "sum", "eps": 1.5
}  # fmt: skip


def test_the_options_of_softmax_losses_are_documented_and_tested():
    assert set(arguments(lambda **options: None, softmax.softmax_loss)) == {*SHARED, "backend"}
    assert set(softmax.SoftmaxOptions.__annotations__) == {*SHARED, "backend"}
    assert all(option in softmax.SoftmaxOptions.__doc__ for option in SHARED)


@pytest.mark.parametrize(
    ("name", "option"),
    # eps guards a division by lengths, which not every loss that keeps them makes.
    [(name, o) for name in SOFTMAX for o in SHARED if o != "eps" or not REGISTRY[name].lengths_matter],
)
def test_an_option_of_all_softmax_losses_reaches_function_reference_and_module(name, option):
    entry, (x, w, y) = REGISTRY[name], problem_of(name, 11, 9, 4)
    y, given = y.clamp_min(0), {**entry.options[0], option: SHARED[option]}
    value = entry.function(x, w, y, **given)
    assert not torch.allclose(value, entry.function(x, w, y, **entry.options[0]))
    torch.testing.assert_close(value, entry.reference(x, w, y, **given))
    if option != "eps":  # a Module's is the default
        assert torch.equal(value, entry.loss(9, 4, **given, proxies=w)(x, y))


@pytest.mark.parametrize("name", SOFTMAX)
def test_an_option_that_no_softmax_loss_has_is_named(name):
    entry, arrays = REGISTRY[name], problem_of(name, 11, 9, 4)
    for call, args in ((entry.function, arrays), (entry.reference, arrays), (entry.loss, (9, 4))):
        with pytest.raises(TypeError, match="'smoothing'"):
            call(*args, smoothing=0.1)


@pytest.mark.parametrize("name", REGISTRY)
def test_the_entry_names_the_op_and_policy_that_the_loss_runs_on(name, monkeypatch):
    entry, asked, choose = REGISTRY[name], [], backends.choose

    def choose_and_tell(op, device, dtype, *rest, policy="linear", **more):
        asked.append((op, policy))
        return choose(op, device, dtype, *rest, **({} if policy == "linear" else {"policy": policy}), **more)

    monkeypatch.setattr(backends, "choose", choose_and_tell)
    x, y = randn(12, 4, seed=1), torch.arange(12) % 3
    inputs = {
        "proxies": lambda: (x, randn(4 * entry.centres, 4, seed=2), y),
        "clusters": lambda: (x, torch.arange(12) % 4, torch.tensor([0, 0, 1, 1])),
        "pairs": lambda: (x, y),
    }[entry.family]()
    for options in entry.options:
        asked.clear()
        entry.function(*inputs, **options)
        assert (entry.op, entry.policy) in asked, options


def test_arcface_at_scales_whose_square_is_no_number():
    """The loss over the scale, for a row whose class is the farthest: s (s_other - s_y) / s for large s."""
    x, w, y = torch.eye(2, 3).double(), torch.eye(3).double().flip(0), torch.tensor([0, 0])
    for scale in (1e60, 1e200):
        found = REGISTRY["ArcFaceLoss"].function(x, w, y, margin=30.0, scale=scale) / scale
        # Own cosine 0: cos(90 + 30 degrees) = -1/2; the best other is 1.
        torch.testing.assert_close(found, torch.tensor(1.5).double())

"""Every loss on the pairs of a batch compared with its dense reference, and properties that all of them must have.

A loss compares embeddings (N, D) with each other, or with references (M, D), by their labels; a new file in losses/ of
the family ``pairs`` is tested here without a change.
"""

from __future__ import annotations

import functools
import json

import pytest
import torch

from dml_kernels import use_backend
from dml_kernels.losses import REGISTRY, family
from dml_kernels.profiling import run_in_child
from tests.support.dtypes import FP32, FP64
from tests.support.problems import randint, randn
from tests.support.tolerance import Yardstick, assert_all_accurate, assert_same_bits, dense_forms, scores_by, worst

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

NAMES = list(family("pairs"))
CASES = [(name, i) for name in NAMES for i in range(len(REGISTRY[name].options))]
on_losses = pytest.mark.parametrize(("name", "which"), CASES, ids=[f"{name}-{i}" for name, i in CASES])
on_names = pytest.mark.parametrize("name", NAMES)
on_both = pytest.mark.parametrize("with_refs", [False, True], ids=["batch", "ref_emb"])

WITHIN_THE_BATCH = {"NPairsLoss"}  # takes no ref_emb; its pairs depend on which row of a class is first
DETACHED = {"CircleLoss"}  # its gradient takes weights as constants, so it is not the gradient of the value


def evaluate(function, x, y, refs=None, **options):
    """The value and the gradients; ``refs`` is (embeddings, labels)."""
    leaves = [x.clone().requires_grad_()] + ([] if refs is None else [refs[0].clone().requires_grad_()])
    call = {} if refs is None else {"ref_emb": leaves[1], "ref_labels": refs[1]}
    value = function(leaves[0], y, **call, **options)
    assert value.shape == ()
    grads = torch.autograd.grad(value, leaves)
    return {"value": value.detach(), **dict(zip(("grad x", "grad w"), grads))}


def problem(n=26, m=0, d=6, classes=5, seed=0):
    """x, y, refs: classes of several sizes, one of them with one row, and an ignored row."""
    x, y = randn(n, d, seed=seed), randint(0, classes, n, seed=seed + 1)
    y[:1], y[1:2] = classes, -100
    return x, y, (randn(m, d, seed=seed + 2), randint(0, classes + 1, m, seed=seed + 3)) if m else None


def cast(x, refs, dtype):
    return x.to(dtype), None if refs is None else (refs[0].to(dtype), refs[1])


@functools.cache
def sticks_of(name, which, with_refs, seed, dtype):
    entry, options = REGISTRY[name], REGISTRY[name].options[which]
    x, y, refs = problem(m=31 if with_refs else 0, d=16, seed=seed)
    truth = evaluate_at(entry.reference, *cast(*cast(x, refs, dtype), torch.float64), y, options)
    if dtype == torch.float64:
        return {k: s.in_fp64(truth[k]) for k, s in sticks_of(name, which, with_refs, seed, torch.float32).items()}
    sticks = []
    for form in dense_forms(options["distance"].metric if "distance" in options else "euclidean"):
        with scores_by(form):
            dense = evaluate_at(entry.reference, *cast(x, refs, dtype), y, options)
        sticks.append({k: Yardstick.of(dense[k], t) for k, t in truth.items()})
    return worst(sticks)


def evaluate_at(function, x, refs, y, options):
    return evaluate(function, x, y, refs, **options)


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=lambda d: d.name)
@on_both
@on_losses
def test_value_and_gradient_are_accurate(name, which, with_refs, dtype):
    if with_refs and name in WITHIN_THE_BATCH:
        return
    entry, options = REGISTRY[name], REGISTRY[name].options[which]
    sticks = worst([sticks_of(name, which, with_refs, seed, dtype.x) for seed in range(0, 800, 100)])
    x, y, refs = problem(m=31 if with_refs else 0, d=16)
    found = evaluate_at(entry.function, *cast(x, refs, dtype.x), y, options)
    assert {t.dtype for t in found.values()} == {dtype.x}
    assert_all_accurate(found, sticks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_both
@on_names
def test_half_precision_is_near(name, with_refs, dtype):
    """Scores are rounded to 1 part in 256, so other terms are active, and the tolerance rule does not hold."""
    if with_refs and name in WITHIN_THE_BATCH:
        return
    x, y, refs = problem(m=31 if with_refs else 0, d=16)
    options = {"gamma": 4.0} if name == "CircleLoss" else {}
    truth = evaluate(REGISTRY[name].reference, x, y, refs, **options)
    found = evaluate_at(REGISTRY[name].function, *cast(x, refs, dtype), y, options)
    assert found["value"].dtype == torch.float32
    assert found["grad x"].dtype == dtype
    torch.testing.assert_close(found["value"].double(), truth["value"], rtol=0.03, atol=0.01)
    for key in list(truth)[1:]:
        scale = truth[key].abs().max().item()
        torch.testing.assert_close(found[key].double(), truth[key], rtol=0.1, atol=0.1 * scale)


@on_both
@on_losses
def test_gradcheck(name, which, with_refs):
    if (with_refs and name in WITHIN_THE_BATCH) or name in DETACHED:
        return
    x, y, refs = problem(8, 5 if with_refs else 0, 3, classes=2, seed=7)
    function = functools.partial(REGISTRY[name].function, **REGISTRY[name].options[which])

    def call(*leaves):
        return function(leaves[0], y, **({"ref_emb": leaves[1], "ref_labels": refs[1]} if refs else {}))

    leaves = [t.requires_grad_() for t in (x, *(refs[:1] if refs else ()))]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, atol=1e-4, fast_mode=True)


@on_both
@on_names
def test_the_order_of_rows_does_not_matter(name, with_refs):
    if name in WITHIN_THE_BATCH:
        return
    x, y, refs = problem(m=31 if with_refs else 0)
    expected = evaluate(REGISTRY[name].function, x, y, refs)
    rows, back = torch.randperm(26), torch.randperm(31)
    found = evaluate(REGISTRY[name].function, x[rows], y[rows], refs and (refs[0][back], refs[1][back]))
    torch.testing.assert_close(found["value"], expected["value"])
    torch.testing.assert_close(found["grad x"], expected["grad x"][rows])
    if with_refs:
        torch.testing.assert_close(found["grad w"], expected["grad w"][back])


@on_names
def test_labels_are_only_names(name):
    x, y, _ = problem()
    call = REGISTRY[name].function
    torch.testing.assert_close(call(x, torch.where(y == -100, -100, 1_000_000_007 * y - 5)), call(x, y))
    torch.testing.assert_close(call(x, y.to(torch.int32)), call(x, y))


@on_names
def test_an_ignored_row_is_as_if_it_were_not_there(name):
    x, y, _ = problem()
    x[y == -100] = 1e3
    keep = y != -100
    every, kept = (evaluate(REGISTRY[name].function, *xy) for xy in ((x, y), (x[keep], y[keep])))
    torch.testing.assert_close(every["value"], kept["value"])
    torch.testing.assert_close(every["grad x"][keep], kept["grad x"])
    assert every["grad x"][~keep].count_nonzero() == 0


def all_pairs(y, c=None):
    own = torch.eye(len(y), dtype=torch.bool) if c is None else False
    match, c = y[:, None] == (y if c is None else c), y if c is None else c
    used = (y != -100)[:, None] & (c != -100) & ~own if c is y else (y != -100)[:, None] & (c != -100)
    return (*(match & used).nonzero(as_tuple=True), *(~match & used).nonzero(as_tuple=True))


@on_both
@on_losses
def test_a_list_of_all_pairs_gives_what_the_stream_gives(name, which, with_refs):
    """The order of the list does not matter. A list ignores no row, so no label is -100 here."""
    if with_refs and name in WITHIN_THE_BATCH:
        return
    x, y, refs = problem(m=31 if with_refs else 0)
    y[1] = 2
    pairs = all_pairs(y, refs and refs[1])
    if name not in WITHIN_THE_BATCH:
        i, j = torch.randperm(len(pairs[0])), torch.randperm(len(pairs[2]))
        pairs = (pairs[0][i], pairs[1][i], pairs[2][j], pairs[3][j])
    loss = REGISTRY[name].loss(**REGISTRY[name].options[which]).double()
    if name == "NCALoss":  # where a tuple weighs rows
        pairs = (torch.arange(26), torch.arange(26), torch.arange(26), torch.arange(26))

    def listed(x, y, **refs):
        return loss(x, y, pairs, **refs)

    expected, found = (evaluate(f, x, y, refs) for f in (loss, listed))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize("listed", [False, True], ids=["streamed", "listed"])
@on_names
def test_compiles_as_one_graph(name, listed):
    x, y, _ = problem()
    loss = REGISTRY[name].loss()
    tuples = tuple(t[::2].contiguous() for t in all_pairs(y)) if listed else None
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)

    def run(function):
        return evaluate(lambda x, y: function(x, y, tuples), x, y)

    found = run(compiled)
    for key, value in run(loss).items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("listed", [False, True], ids=["streamed", "listed"])
@on_names
def test_torch_func_transforms_it(name, listed):
    x, y, _ = problem(10, classes=2)
    loss, tuples = REGISTRY[name].loss(), all_pairs(y) if listed else None

    def call(x):
        return loss(x, y, tuples)

    def norm(x):
        return torch.func.grad(call)(x).square().sum()

    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(call(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(call)(x), first)
    torch.testing.assert_close(torch.func.grad(norm)(x), second)
    torch.testing.assert_close(torch.vmap(torch.func.grad(call))(torch.stack((-x, x)))[1], first)


@pytest.mark.parametrize("listed", [False, True], ids=["streamed", "listed"])
@on_names
def test_the_same_bits_again(name, listed, any_threads):
    x, y, _ = problem(200, classes=20)
    tuples = all_pairs(y) if listed else None
    loss = REGISTRY[name].loss()
    runs = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        runs.append(evaluate(lambda x, y: loss(x, y, tuples), x.float(), y).values())
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


EXTREMES = {
    "one row": lambda x, y: (x[:1], y[:1]),
    "two rows of a class": lambda x, y: (x[:2], y[:2] * 0),
    "one class": lambda x, y: (x, y * 0),
    "all classes distinct": lambda x, y: (x, torch.arange(len(y))),
    "all embeddings equal": lambda x, y: (x[:1].expand_as(x).clone(), y),
    "classes equal": lambda x, y: (x[:3][y], y),
    "antipodal": lambda x, y: (torch.where(y[:, None] == 0, x[:1], -x[:1]), y),
    "positives antipodal": lambda x, y: (torch.where((torch.arange(9) < 5)[:, None], x[:1], -x[:1]), y),
    "a zero embedding": lambda x, y: (torch.cat((x[:1] * 0, x[1:])), y),
    "all rows ignored": lambda x, y: (x, torch.full_like(y, -100)),
}
NUMBERS = {
    "CircleLoss": ("gamma",), "ContrastiveLoss": ("pos_margin", "neg_margin"),
    "GeneralizedLiftedStructureLoss": ("neg_margin", "pos_margin"), "MarginLoss": ("margin",),
    "MultiSimilarityLoss": ("alpha", "beta"), "NCALoss": ("softmax_scale",),
}  # fmt: skip


def extreme_options(name):
    if "temperature" in REGISTRY[name].loss().__dict__:
        return {"temperature": 1e-4}
    return dict.fromkeys(NUMBERS.get(name, ()), 1e4)


@on_names
def test_listed_pairs_do_not_overflow(name):
    x, y = randn(9, 5, seed=1), torch.arange(9) % 3
    options = extreme_options(name)
    loss, listed = REGISTRY[name].loss(**options), None if name == "NCALoss" else all_pairs(y)
    found = evaluate(lambda x, y: loss(x, y, listed), x, y)
    for key, value in evaluate(REGISTRY[name].reference, x, y, **options).items():
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("large", [False, True], ids=["defaults", "1e4"])
@pytest.mark.parametrize("kind", EXTREMES)
@on_names
def test_extreme_inputs_match_the_reference(name, kind, large):
    options = extreme_options(name) if large else {}
    if kind == "a zero embedding" and name == "ContrastiveLoss" and not large:
        options = {"neg_margin": 1.1}  # zero is at distance 1 of every unit vector: at the default, on the hinge
    x, y = EXTREMES[kind](randn(9, 5, seed=1), torch.arange(9) % 3)
    found, expected = (evaluate(f, x, y, **options) for f in (REGISTRY[name].function, REGISTRY[name].reference))
    for key, value in found.items():
        assert value.isfinite().all(), f"{key} of {name}"
        # The reference takes the norm of a zero row, or a distance of 0, from a square root: 0 times infinity.
        if expected[key].isfinite().all():
            scale = max(1.0, expected[key].abs().max().item())
            torch.testing.assert_close(
                value, expected[key], rtol=0, atol=1e-9 * scale, msg=lambda m, k=key: f"{k}: {m}"
            )


@on_names
def test_an_empty_batch_gives_0(name):
    for with_refs in (False, True)[: 1 if name in WITHIN_THE_BATCH else 2]:
        x, y, refs = problem(0, 9 if with_refs else 0)
        found = evaluate(REGISTRY[name].function, x, y, refs)
        assert found["value"] == 0
        assert found["grad x"].shape == (0, 6)
        assert not with_refs or found["grad w"].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [0, 1, 2])
@on_names
def test_few_rows_in_half_precision_give_fp32(name, n, dtype):
    x = randn(n, 6, seed=0).to(dtype)
    for y in (torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.full((n,), -100)):
        value = REGISTRY[name].function(x, y)
        assert value.dtype == torch.float32
        assert value.isfinite()


@on_names
def test_an_empty_list_gives_0(name):
    x, y, _ = problem()
    none = torch.empty(0, dtype=torch.int64)
    loss = REGISTRY[name].loss()
    for tuples in ((none,) * 3, (none,) * 4):
        found = evaluate(lambda x, y, t=tuples: loss(x, y, t), x, y)
        assert found["value"].isfinite()
        assert name == "NCALoss" or (found["value"] == 0 and found["grad x"].count_nonzero() == 0)


@on_names
def test_runs_on_the_torch_backend_alone(name):
    x, y, _ = problem()
    expected = evaluate(REGISTRY[name].function, x, y)
    with use_backend("torch"):
        found = evaluate(REGISTRY[name].function, x, y)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


@on_names
def test_autocast_changes_no_dtype(name):
    x, y, _ = problem()
    x = x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evaluate(REGISTRY[name].function, x, y)
    assert {t.dtype for t in found.values()} == {torch.float32}
    torch.testing.assert_close(found["value"], REGISTRY[name].function(x, y), rtol=0.05, atol=0.02)


@on_names
def test_cpu_labels_of_any_kind_of_regulariser_join(name):
    x, y, _ = problem()
    plain = REGISTRY[name].loss()
    loss = REGISTRY[name].loss(embedding_regularizer=lambda e: e.square().mean(), embedding_reg_weight=3)
    torch.testing.assert_close(loss(x, y), plain(x, y) + 3 * x.square().mean())


BAD = [
    ("no labels", ValueError, "labels are needed|needs labels", {"labels": None}),
    ("labels of another length", ValueError, "labels must have shape", {"labels": torch.arange(3)}),
    ("floating labels", TypeError, r"labels must be integers.*labels\.long", {"labels": torch.ones(4)}),
    ("a tuple of two", ValueError, "indices_tuple must be triplets", {"indices_tuple": (torch.arange(2),) * 2}),
    (
        "unequal lengths",
        ValueError,
        "one length",
        {"indices_tuple": (torch.arange(2), torch.arange(3), torch.arange(2))},
    ),
    ("ref_emb alone", ValueError, "ref_labels is missing", {"ref_emb": torch.ones(2, 3)}),
    ("another width", ValueError, "same embedding size", {"ref_emb": torch.ones(2, 5), "ref_labels": torch.arange(2)}),
]


@pytest.mark.parametrize(("error", "message", "change"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
@on_names
def test_bad_input_is_refused(name, error, message, change):
    call = {"embeddings": torch.ones(4, 3), "labels": torch.arange(4), **change}
    with pytest.raises(error, match=message):
        REGISTRY[name].loss()(**call)


@on_names
def test_bad_options_are_refused(name):
    with pytest.raises(TypeError, match="distance must be"):
        REGISTRY[name].loss(distance="cosine")
    with pytest.raises(TypeError, match="reducer must be"):
        REGISTRY[name].loss(reducer="mean")


@pytest.mark.slow
@on_names
def test_memory_at_8192_rows_is_gradients_and_64_mb(name):
    found = json.loads(
        run_in_child("tests.support.memory_probe", "pair_loss", name, "8192", "128", "8").splitlines()[-1]
    )
    assert found["peak"] <= found["gradients"] + (64 << 20), f"{found['peak'] / 2**20:.0f} MiB"

"""The ops on the Triton backend against fp64 truth, by the tolerance rule; every launch under the sanitizer.

An interpreted call takes a second, so this is a covering set: every metric, dtype and option occurs once or twice.
"""

from __future__ import annotations

import pytest
import torch

from dml_kernels import functional as F
from dml_kernels.backends.triton import collect, configs, logsumexp
from tests.ops import test_masked_logsumexp as lse_promises
from tests.ops import test_normalize as normalize_promises
from tests.ops import test_normalized_distance as distance_promises
from tests.support.dtypes import BF16, FP16, FP32, FP64, MIXED, MIXES
from tests.support.features import FEATURES
from tests.support.problems import METRIC_IDS, METRICS, OUTPUTS, Problem, check, randn
from tests.support.tolerance import assert_all_accurate, assert_same_bits

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "launched")
B = "triton"
ALL_DTYPES = (FP32, BF16, MIXED, FP16, FP64)


@pytest.fixture(params=["chunk", "owned"])
def form(request):
    """Runs the test with each form of the backward in turn, in place of the table's."""
    with configs.take_form(request.param):
        yield request.param


in_both_forms = pytest.mark.usefixtures("form")


def shaped(n, m, d, metric, normalize, seed):
    return Problem.random(n, m, d, metric, normalize, seed=n + m + d + seed)


# ---------------------------------------------------------------------------------------------------------------------
# masked_logsumexp


@in_both_forms
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=lambda d: d.name)
@pytest.mark.parametrize(("metric", "normalize"), METRICS, ids=METRIC_IDS)
def test_every_metric_is_accurate(metric, normalize, dtype):
    check(shaped, (45, 150, 40, metric, normalize), dtype, B)


@in_both_forms
@pytest.mark.parametrize("dtype", [MIXED, FP16, FP64], ids=lambda d: d.name)
@pytest.mark.parametrize("which", range(3))
def test_the_rarer_dtypes_are_accurate(which, dtype):
    check(shaped, (33, 70, 20, *METRICS[(2 * which + ALL_DTYPES.index(dtype)) % 6]), dtype, B)


@in_both_forms
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "unit"])
def test_rows_of_zeros_on_both_sides_take_no_gradient_from_the_others_in_fp16(normalize):
    problem = Problem.random(33, 70, 20, "euclidean", normalize)
    problem.tensors["x"][3] = problem.tensors["w"][5] = 0
    found, truth = problem.run(FP16, B), problem.run(FP64, "torch")
    for name, zero in (("grad x", 3), ("grad w", 5)):
        others = torch.arange(len(truth[name])) != zero
        size = truth[name][others].abs().max().item()
        torch.testing.assert_close(found[name][others].double(), truth[name][others], rtol=0, atol=0.01 * size)


@in_both_forms
@pytest.mark.parametrize("dtype", MIXES, ids=lambda d: d.name)
def test_two_dtypes_are_accurate(dtype):
    check(shaped, (33, 70, 20, *METRICS[MIXES.index(dtype) % 6]), dtype, B)


# One row, one entry, one column; tiles' edges and one beyond; several blocks of columns; long and thin both ways.
SHAPES = ((1, 1, 3), (1, 2, 64), (2, 1, 127), (32, 64, 65), (33, 65, 130), (3, 700, 17), (130, 3, 5), (5, 61, 1030))


@in_both_forms
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_accurate(shape):
    which = SHAPES.index(shape)
    check(shaped, (*shape, *METRICS[which % 6]), (BF16, FP32, FP64)[which % 3], B)


def with_feature(name, metric, normalize, seed):
    problem = Problem.random(34, 70, 20, metric, normalize, seed=sum(map(ord, name)) + seed)
    FEATURES[name](problem)
    return problem


# Pairs so near that their distance and its gradient come from the difference: shown by distances alone.
NEAR_PAIRS = ("nearly_identical_rows", "far_from_the_origin")


@in_both_forms
@pytest.mark.parametrize("metric", METRICS[2:], ids=METRIC_IDS[2:])
def test_near_pairs_are_accurate(metric):
    which = METRICS.index(metric)
    check(with_feature, (NEAR_PAIRS[which % 2], *metric), (FP32, BF16)[which // 2 % 2], B)


@in_both_forms
@pytest.mark.parametrize("name", FEATURES)
def test_every_option_is_accurate(name):
    which = list(FEATURES).index(name)
    check(with_feature, (name, *METRICS[which % 6]), (FP32, MIXED, FP64)[(which + which // 6) % 3], B)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=lambda d: d.name)
@pytest.mark.parametrize("metric", [("cosine", False), ("euclidean", True), ("sqeuclidean", False)], ids=str)
@pytest.mark.parametrize("name", ["everything_at_once", "nearly_identical_rows"])
def test_chunks_and_blocks_of_rows_add_up(name, metric, dtype, monkeypatch):
    monkeypatch.setattr(collect, "BUFFER_BYTES", 1)  # one tile of the bank at a time
    monkeypatch.setattr(collect, "ROWS_AT_ONCE", 32)
    with configs.take_form("chunk"):
        check(with_feature, (name, *metric), dtype, B)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=lambda d: d.name)
@pytest.mark.parametrize("metric", [("cosine", False), ("euclidean", True), ("sqeuclidean", False)], ids=str)
@pytest.mark.parametrize("splits", ["one", "many"])
def test_an_owner_finishes_its_gradient_or_leaves_parts_that_add_up(splits, metric, dtype, monkeypatch):
    monkeypatch.setattr(configs, "splits", lambda tiles, walk, cores: 1 if splits == "one" else walk)
    name = "nearly_identical_rows" if (dtype == FP32) == (splits == "one") else "everything_at_once"
    with configs.take_form("owned"):
        check(with_feature, (name, *metric), dtype, B)


@in_both_forms
def test_the_bits_are_the_same_every_time_and_for_any_free_memory():
    problem = with_feature("everything_at_once", "euclidean", True, 0)
    first = problem.run(MIXED, B)
    torch.utils.deterministic.fill_uninitialized_memory = False
    assert_same_bits(first.values(), problem.run(MIXED, B).values())


@in_both_forms
@pytest.mark.parametrize(
    "needs", [("x",), ("w",), ("scale",), ("col_bias",), ("x", "col_bias")], ids=lambda n: "-".join(n)
)
def test_only_what_is_asked_for_is_computed_and_is_the_same(needs):
    problem = with_feature("everything_at_once", "sqeuclidean", True, 0)
    everything = problem.run(FP32, B)
    leaves = problem.leaves(FP32)
    wanted = [leaves[k] for k in needs]
    for k, t in leaves.items():
        t.requires_grad_(k in needs)
    out = problem.ours(leaves, B)
    grads = torch.autograd.grad(list(out.values()), wanted, [problem.grads[k].to(v.dtype) for k, v in out.items()])
    assert_same_bits(grads, [everything[f"grad {k}"] for k in needs])


# ---------------------------------------------------------------------------------------------------------------------
# A fixed offset in place of the running maximum


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean", "euclidean"])
def test_a_fixed_offset_is_taken_up_to_its_limit_and_is_accurate_there(metric):
    span = {"cosine": 2, "sqeuclidean": 4, "euclidean": 2}[metric]

    def make(scale, seed):
        problem = Problem.random(40, 70, 3, metric, True, seed=seed)  # D = 3: scores from one end to the other
        problem.tensors["w"][:40] = -problem.tensors["x"]
        problem.options["scale"] = scale
        return problem

    taken = []
    original = logsumexp.fixed_peak
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logsumexp, "fixed_peak", lambda *a: taken.append(original(*a)) or taken[-1])
        for scale in (79.9 / span, 80.1 / span, -79.9 / span):
            check(make, (scale,), FP32, B)
    assert [peak is not None for peak in taken] == [True, False, True]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=lambda d: d.name)
@pytest.mark.parametrize(("d", "taken"), [(64, True), (136, True), (41, False)])
def test_tiles_by_descriptors_are_accurate_and_left_alone_where_rows_are_not_aligned(d, taken, dtype):
    seen = []
    original = logsumexp.by_descriptors
    metric = METRICS[(d // 8 + (dtype == FP32)) % 6]
    with (
        pytest.MonkeyPatch.context() as patch,
        configs.trial("forward", configs.Config(32, 64, 64, 1, 1, tma=True, specialize=True)),
    ):
        patch.setattr(logsumexp, "by_descriptors", lambda *a: seen.append(original(*a)) or seen[-1])
        check(shaped, (45, 150, d, *metric), dtype, B)
    assert set(seen) == {taken}


# ---------------------------------------------------------------------------------------------------------------------
# The promises of the shared tests, on this backend

UNIT, RAW = {"metric": "sqeuclidean", "normalize": True}, {"metric": "euclidean", "normalize": False}
COSINE = {"metric": "cosine", "normalize": False}
PROMISES = [
    (lse_promises.test_identical_points_are_at_distance_0_with_zero_gradient, [
        {**UNIT, "dtype": FP32}, {**UNIT, "dtype": BF16}, {**RAW, "dtype": FP64},
        {**UNIT, "metric": "euclidean", "dtype": MIXED}]),
    (lse_promises.test_an_empty_batch_gives_empty_results_and_zero_gradients, [{"dtype": FP32}]),
    (lse_promises.test_empty_sets_are_minus_infinity_with_zero_gradient, [COSINE, UNIT, RAW]),
    (lse_promises.test_ignored_rows_and_columns_get_no_gradient, [COSINE, RAW]),
    (lse_promises.test_a_single_positive_is_its_own_sum_and_log_sum_exp, [COSINE, UNIT, RAW]),
    (lse_promises.test_sums_are_an_extra_that_changes_nothing_else, [{"dtype": BF16}]),
    (lse_promises.test_nan_stays_in_its_row, [COSINE]),
    (lse_promises.test_nan_in_the_bank_reaches_every_row, [COSINE, RAW]),
    (lse_promises.test_extreme_norms_are_taken_out_by_normalisation, [
        {"metric": "cosine", "norm": 1e-20, "dtype": torch.float32},
        {"metric": "sqeuclidean", "norm": 1e15, "dtype": torch.bfloat16},
        {"metric": "euclidean", "norm": 1e-6, "dtype": torch.float32}]),
    (lse_promises.test_rows_shorter_than_eps_are_divided_by_eps, [
        {"metric": "cosine", "dtype": FP32}, {"metric": "sqeuclidean", "dtype": BF16},
        {"metric": "euclidean", "dtype": FP64}]),
    (lse_promises.test_zero_rows_are_harmless, [{}]),
    (lse_promises.test_ignore_index_without_bank_labels_leaves_every_column_in, [{}]),
    (lse_promises.test_a_number_and_a_tensor_scale_agree, [{}]),
    (lse_promises.test_adding_to_every_bias_shifts_the_log_sum_exps, [{}]),
    (lse_promises.test_the_offset_of_a_set_moves_that_set_alone, [{}]),
    (distance_promises.test_identical_rows_are_at_distance_0_with_zero_gradient, [
        {**UNIT, "dtype": BF16}, {**RAW, "dtype": FP32}]),
    (distance_promises.test_small_distances_do_not_cancel, [{"metric": "euclidean", "dtype": FP32}]),
    (distance_promises.test_antipodal_rows_are_at_distance_2, [{}]),
    (distance_promises.test_nan_stays_in_its_row, [UNIT]),
    (distance_promises.test_nan_in_the_bank_stays_in_its_column, [COSINE]),
    (normalize_promises.test_one_dimension_leaves_only_the_sign, [{"dtype": FP32}]),
    (normalize_promises.test_rows_shorter_than_eps_are_divided_by_eps, [{"dtype": FP32}, {"dtype": FP64}]),
    (normalize_promises.test_the_result_is_a_new_contiguous_tensor, [{}]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("promise", "arguments"),
    [
        pytest.param(p, a, id=f"{p.__module__.rpartition('.')[2]}-{p.__name__}-{i}")
        for p, calls in PROMISES
        for i, a in enumerate(calls)
    ],
)
def test_the_promise_holds(promise, arguments, request):
    if arguments.get("dtype") == FP32 and promise.__name__.startswith("test_an_empty_batch"):
        request.getfixturevalue("checked").accesses = 1  # nothing to launch
    promise(**arguments, backend=B)


# ---------------------------------------------------------------------------------------------------------------------
# normalize and normalized_distance


def test_identical_rows_behind_other_strides_are_at_distance_0(monkeypatch):
    layouts = {"contiguous": lambda t: t, "transposed": distance_promises.LAYOUTS["transposed"]}
    monkeypatch.setattr(distance_promises, "EVERY_LAYOUT", layouts)
    distance_promises.test_identical_rows_behind_any_strides_are_at_distance_0("euclidean", True, (5, 3, 67), MIXED, B)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("which", range(3))
def test_distances_and_their_gradients_are_accurate(which, dtype):
    metric = METRICS[(which * 2 + ALL_DTYPES.index(dtype)) % 6]
    layout = list(distance_promises.LAYOUTS)[(which + ALL_DTYPES.index(dtype)) % 4]
    kind = ("sum", *distance_promises.LAYOUTS)[(which * 2 + ALL_DTYPES.index(dtype)) % 5]
    distance_promises.check((35, 70, (24, 127, 3)[which]), metric, dtype, B, kind, layout)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=lambda d: d.name)
@pytest.mark.parametrize(
    ("shape", "layout", "eps"),
    [((19, 252), "contiguous", 1e-12), ((3, 4, 2, 5), "transposed", 1e-12), ((17, 65), "with a gap", 8.0),
     ((7,), "strided", 1e-12)],
    ids=str,
)  # fmt: skip
def test_unit_vectors_and_their_gradients_are_accurate(shape, layout, eps, dtype):
    normalize_promises.test_values_and_gradients_are_accurate(shape, layout, eps, dtype, B)


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives


@in_both_forms
@pytest.mark.parametrize(("metric", "normalize"), METRICS, ids=METRIC_IDS)
def test_gradcheck_in_fp64(metric, normalize):
    x, w = (randn(n, 5, seed=s).requires_grad_() for n, s in ((3, 1), (6, 2)))
    scale, b = (t.requires_grad_() for t in (randn(3, seed=3).exp(), randn(6, seed=5)))
    y, c = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2, 0, 1, 2])

    def call(x, w, scale, b):
        return F.masked_logsumexp(x, w, y, c, metric=metric, normalize=normalize, scale=scale, col_bias=b,
                                  same=(-1.5, 0.3), different=(2.0, -0.2), sums=True, backend=B)[:]  # fmt: skip

    assert torch.autograd.gradcheck(call, (x, w, scale, b), fast_mode=True)


def test_gradgradcheck_and_the_distance_gradcheck_in_fp64():
    x, w = (randn(n, 5, seed=s).requires_grad_() for n, s in ((3, 1), (6, 2)))
    call = lambda x, w: F.masked_logsumexp(x, w, torch.arange(3), metric="cosine", scale=3.0, backend=B)[:2]  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (x, w), fast_mode=True)
    for metric, normalize in METRICS:
        distance = lambda x, w, m=metric, n=normalize: F.normalized_distance(x, w, m, normalize=n, backend=B)  # noqa: E731
        assert torch.autograd.gradcheck(distance, (x, w), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: F.normalize(x, backend=B), (x,), fast_mode=True)


# ---------------------------------------------------------------------------------------------------------------------
# fp16, precision, integration


@in_both_forms
def test_fp16_gradients_survive_a_tiny_upstream_gradient():
    # 1e-6 / 4096 x the softmax weight is 0 in fp16: staged dS carries a power of two.
    problem = Problem.random(33, 300, 16, "cosine", seed=3)
    problem.grads = {k: g * 1e-6 / 4096 for k, g in problem.grads.items()}
    leaves = problem.leaves(FP16)
    leaves = {k: t.detach().float().half().float().requires_grad_() for k, t in leaves.items()}
    with torch.autocast("cpu", dtype=torch.float16):
        out = problem.ours(leaves, B)
    grads = torch.autograd.grad(list(out.values()), list(leaves.values()), [problem.grads[k].float() for k in OUTPUTS])
    wide = {k: t.detach().double().requires_grad_() for k, t in leaves.items()}
    truth = problem.with_gradients(problem.dense(wide, torch.float64), wide, FP64)
    for grad, name in zip(grads, leaves, strict=True):
        assert grad.dtype == torch.float32
        expected = truth[f"grad {name}"]
        assert (grad - expected).abs().max() < 2e-3 * expected.abs().max()


@in_both_forms
def test_a_zero_row_in_the_bank_does_not_cost_the_others_their_fp16_gradients():
    problem = Problem.random(33, 70, 16, "cosine", seed=3)
    problem.tensors["w"][3] = 0
    out, sticks = problem.run(FP16, B), problem.yardsticks(FP16)
    for name in ("grad x", "same", "different"):
        assert_all_accurate({name: out[name]}, {name: sticks[name]})


def test_fp32_products_obey_the_precision_settings():
    problem = Problem.random(33, 70, 64, "dot", seed=3)
    before = torch.get_float32_matmul_precision()
    errors = {}
    try:
        for setting in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(setting)
            leaves = problem.leaves(FP32)
            found = problem.ours(leaves, B)["different"]
            truth = problem.dense({k: t.double() for k, t in leaves.items()}, torch.float64)["different"]
            errors[setting] = ((found - truth).abs().max() / truth.abs().max()).item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 5e-7 < errors["medium"] < 1e-3
    assert errors["high"] < 5e-7


def test_a_compiled_graph_holds_forward_and_backward():
    problem = with_feature("exclude", "cosine", False, 0)

    def step(x, w):
        out = F.masked_logsumexp(x, w, problem.y, **problem.options, scale=9.0, backend=B)
        return (out.different - out.same.clamp_min(-5)).mean()

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = problem.leaves(FP32)
        found.append(torch.autograd.grad(function(leaves["x"], leaves["w"]), list(leaves.values())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)

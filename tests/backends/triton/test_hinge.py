"""masked_hinge_sum on the Triton backend against fp64 truth; every launch under the sanitizer. A covering set."""

from __future__ import annotations

import pytest
import torch

from dml_kernels.backends.triton import collect, configs
from tests.ops import test_masked_hinge_sum as promises
from tests.support.dtypes import BF16, FP16, FP32, FP64, MIXED
from tests.support.hinges import HingeProblem
from tests.support.problems import METRIC_IDS, METRICS, check, on_metrics, randn
from tests.support.tolerance import assert_same_bits

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "checked")
B = "triton"
ALL_DTYPES = (FP32, BF16, MIXED, FP16, FP64)


@pytest.mark.parametrize("relative", [False, True])
@on_metrics
def test_every_metric_is_accurate(metric, normalize, relative):
    dtype = (FP32, BF16)[(METRICS.index((metric, normalize)) + relative) % 2]
    check(promises.shaped, (41, 131, 24, metric, normalize, relative), dtype, B)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("which", range(2))
def test_every_dtype_is_accurate(which, dtype):
    metric = METRICS[(3 * which + ALL_DTYPES.index(dtype)) % 6]
    check(promises.shaped, (33, 70, 20, *metric, which == 0), dtype, B)


# One row, one entry, one column; tiles' edges and one beyond; several blocks of columns; long and thin both ways.
SHAPES = ((1, 1, 3), (1, 2, 64), (32, 64, 65), (33, 65, 130), (3, 700, 17), (130, 3, 5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_accurate(shape):
    which = SHAPES.index(shape)
    check(promises.shaped, (*shape, *METRICS[which % 6], which % 2 == 1), (BF16, FP32, FP64)[which % 3], B)


@pytest.mark.parametrize("name", promises.NAMES)
def test_every_option_is_accurate(name):
    which = promises.NAMES.index(name)
    dtype = (FP32, MIXED, FP64)[(which + which // 6) % 3]
    check(promises.with_feature, (name, (34, 70, 20), *METRICS[which % 6]), dtype, B)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=lambda d: d.name)
@pytest.mark.parametrize("metric", [("cosine", False), ("euclidean", True)], ids=str)
def test_chunks_blocks_of_rows_and_ranges_add_up(metric, dtype, monkeypatch):
    monkeypatch.setattr(collect, "BUFFER_BYTES", 1)  # one tile of the bank at a time
    monkeypatch.setattr(collect, "ROWS_AT_ONCE", 32)
    monkeypatch.setattr(configs, "splits", lambda tiles, walk, cores: walk)
    check(promises.shaped, (40, 150, 12, *metric, dtype == FP32), dtype, B)


def test_the_bits_are_the_same_every_time_and_for_any_free_memory():
    problem = HingeProblem.random(40, 150, 12, "euclidean", True, 3)
    first = problem.run(MIXED, B)
    torch.utils.deterministic.fill_uninitialized_memory = False
    assert_same_bits(first.values(), problem.run(MIXED, B).values())


COSINE, RAW = {"metric": "cosine", "normalize": False}, {"metric": "euclidean", "normalize": False}
UNIT = {"metric": "sqeuclidean", "normalize": True}
PROMISES = [
    (promises.test_what_is_left_out_is_zero, [{"what": what} for what in promises.LEFT_OUT[:2]]),
    (promises.test_counts_are_those_of_positive_terms, [
        {**COSINE, "relative": True, "dtype": BF16}, {**UNIT, "relative": False, "dtype": FP32}]),
    (promises.test_the_slope_at_exactly_zero_is_zero, [{}]),
    (promises.test_identical_points_are_at_distance_0_with_zero_gradient, [
        {"normalize": True, "dtype": BF16}, {"normalize": False, "dtype": FP32}]),
    (promises.test_ignored_rows_and_columns_get_no_gradient, [
        {**COSINE, "relative": True}, {**RAW, "relative": False}]),
    (promises.test_an_empty_batch_gives_empty_results_and_zero_gradients, [{"dtype": FP32}]),
    (promises.test_nan_stays_in_its_row, [COSINE, RAW]),
    (promises.test_one_threshold_serves_both_sets_and_a_scalar_all_rows, [{}]),
    (promises.test_relative_equals_a_threshold_of_the_positives_own_score, [COSINE, UNIT]),
    (promises.test_contrastive_loss_from_its_paper, [COSINE, RAW]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("promise", "arguments"),
    [pytest.param(p, a, id=f"{p.__name__}-{i}") for p, calls in PROMISES for i, a in enumerate(calls)],
)
def test_the_promise_holds(promise, arguments):
    promise(**arguments, backend=B)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("metric", "normalize"), METRICS, ids=METRIC_IDS)
def test_gradcheck_in_fp64(metric, normalize, relative):
    y, c = (torch.tensor([0, 1, 5, -100]), None) if relative else (promises.Y, promises.C)
    inputs = [
        t.requires_grad_() for t in (randn(4, 2, seed=1), randn(6, 2, seed=2), *(randn(4, seed=s) for s in (3, 4)))
    ]

    def call(x, w, *threshold):
        return promises.call(x, w, y, c, metric=metric, normalize=normalize, threshold=threshold, relative=relative,
                             exclude=promises.EXCLUDE, backend=B)[:2]  # fmt: skip

    assert any(v.count_nonzero() > 1 for v in call(*inputs))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)

"""Logit policies of masked_logsumexp on the Triton backend, by the rule of helpers.py; every launch under the sanitizer."""

from __future__ import annotations

import pytest
import test_policies as promises
import torch
from helpers import BF16, FP16, FP32, FP64, METRIC_IDS, METRICS, MIXED
from sanitizer import sanitized

from dml_kernels.triton_backend import collect, configs

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "checked")
B = "triton"
QUADRATIC = "quadratic"
POLICIES = (QUADRATIC,)
ALL_DTYPES = (FP32, BF16, MIXED, FP16, FP64)
on_policies = pytest.mark.parametrize("policy", POLICIES)


@pytest.fixture
def checked():
    """No access outside a tensor and no race between programs, in any launch of the test."""
    with sanitized() as accesses:
        yield accesses


def check(policy, sizes, metric, dtype):
    """sizes: centres, rows, classes, width."""
    promises.check(promises.problem, (policy, *sizes, *metric), dtype, B, clear=dtype not in (FP32, FP64))


@on_policies
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=lambda d: d.name)
@pytest.mark.parametrize("metric", METRICS, ids=METRIC_IDS)
def test_every_metric_is_accurate(metric, dtype, policy):
    check(policy, (3, 37, 75, 24), metric, dtype)


@on_policies
@pytest.mark.parametrize("dtype", [MIXED, FP16, FP64], ids=lambda d: d.name)
@pytest.mark.parametrize("which", range(2))
def test_the_rarer_dtypes_are_accurate(which, dtype, policy):
    check(policy, (5, 33, 40, 20), METRICS[(3 * which + ALL_DTYPES.index(dtype)) % 6], dtype)


NAMES = [n for n in promises.NAMES if n != "scale_ten_thousand"]


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_accurate(name):
    which = NAMES.index(name)
    policy, dtype = POLICIES[which % len(POLICIES)], (FP32, FP64)[which // 3 % 2]
    promises.check(promises.with_feature, (name, policy, (3, 34, 43, 12), *METRICS[which % 6]), dtype, B)


@on_policies
@pytest.mark.parametrize("metric", [("cosine", False), ("sqeuclidean", True)], ids=str)
def test_chunks_blocks_of_rows_and_ranges_add_up(metric, policy, monkeypatch):
    monkeypatch.setattr(collect, "BUFFER_BYTES", 1)  # one tile of the bank at a time
    monkeypatch.setattr(collect, "ROWS_AT_ONCE", 32)
    monkeypatch.setattr(configs, "splits", lambda tiles, walk, cores: walk)
    promises.check(promises.with_feature, ("everything_at_once", policy, (3, 34, 70, 12), *metric), FP32, B)


PROMISES = [
    (promises.test_columns_that_all_rows_leave_out_get_no_gradient, [{"policy": p} for p in POLICIES]),
    (promises.test_the_weights_of_circle_loss_are_constants_in_both_derivatives, [
        {"metric": "cosine", "normalize": False}, {"metric": "euclidean", "normalize": True}]),
    (promises.test_circle_loss_of_pytorch_metric_learning, [{}]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("promise", "arguments"),
    [pytest.param(p, a, id=f"{p.__name__}-{i}") for p, calls in PROMISES for i, a in enumerate(calls)],
)
def test_the_promise_holds(promise, arguments):
    promise(**arguments, backend=B)


def test_other_ops_have_no_policy():
    with pytest.raises(RuntimeError, match="normalized_distance has no logit policy"):
        promises.backends.choose("normalized_distance", torch.device("cpu"), torch.float32, QUADRATIC, B)

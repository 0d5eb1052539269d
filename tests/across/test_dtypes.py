"""fp16 over its whole range, and tensors of two dtypes in one call, in every op and loss.

fp16 is only a storage dtype: results are those of fp32 on the rounded inputs, and a gradient in fp16 is rounded once.
Two dtypes meet in the wider of fp64 and fp32, and each gradient has the dtype of its input.
"""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from dml_kernels import distances, evaluation, losses, miners, regularizers, use_backend
from dml_kernels import functional as F
from dml_kernels.losses import REGISTRY
from tests.support.backends import on_backends
from tests.support.problems import METRIC_IDS, METRICS, randint, randn

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PAIRS = [pair for pair in itertools.product(FLOATS, repeat=2) if pair[0] != pair[1]]
N, M, D = 22, 31, 16
Y, C = randint(0, 6, N, seed=1), randint(0, 6, M, seed=2)

# The backend that is chosen for each op, the C++ kernels where there are any, or plain PyTorch alone.
on_choices = pytest.mark.parametrize("backend", [pytest.param(None, marks=pytest.mark.cpp, id="chosen"), "torch"])


def choice(backend):
    return contextlib.nullcontext() if backend is None else use_backend(backend)


def hostile(rows, seed, *, zeros=True):
    """fp16 rows of norms from 1e-6 to 1e4, rows of zeros, duplicates, and one row of the largest numbers."""
    x = randn(rows, D, seed=seed)
    x *= (torch.logspace(-6, 4, rows, dtype=x.dtype) / x.norm(dim=1))[:, None]
    x[7], x[8] = x[6], 65504 * x[8].sign()
    if zeros:
        x[3] = x[-1] = 0
    return x.half()


def with_gradients(call, *leaves):
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    out = call(*leaves)
    incoming = randint(-64, 65, out.numel(), seed=9).view_as(out).to(out.dtype) / 2048  # the same in every dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, incoming)]


def near(ours, true, tolerance):
    off, size = (ours.double() - true).norm().item(), true.norm().item()
    under = 2**-24 * ours.numel() ** 0.5 if ours.dtype == torch.float16 else 1e-15  # what fp16 has no numbers for
    assert off <= tolerance * size + under, f"off by {off:.3g} of {size:.3g}"


def assert_rounded_once(call, *leaves):
    """The result has the bits that fp32 gives on the widened inputs, rounded at the end, and is near that of fp64."""
    found, in_fp32, truth = (with_gradients(call, *kind) for kind in (
        leaves, [t.float() for t in leaves], [t.double() for t in leaves]
    ))  # fmt: skip
    for ours, wide, true in zip(found, in_fp32, truth, strict=True):
        assert torch.equal(ours, wide.to(ours.dtype))
        held = true.abs() <= torch.finfo(ours.dtype).max
        assert torch.equal(ours.isfinite(), held)
        near(ours[held], true[held], 2e-3)


def lse(metric, normalize, policy=("linear", ())):
    # Logits are at most some tens, because fp32 leaves no digits after the point of larger ones.
    largest = {"dot": 1.0 if normalize else 2e11, "euclidean": 2.0 if normalize else 8e5}
    scale = 10 / largest.get(metric, 4.0 if normalize else 6e11)
    k = int(policy[1][0]) if policy[0].endswith("_pool") else 1

    def call(x, w):
        out = F.masked_logsumexp(
            x, w[: M // k * k], Y % (M // k), metric=metric, normalize=normalize, scale=scale, policy=policy[0],
            policy_params=policy[1],
        )  # fmt: skip
        return torch.cat((out.same, out.different))

    return call


POLICIES = [("linear", ()), ("max_pool", (3,)), ("softmax_pool", (3, 0.5)), ("quadratic", (0.25,))]


@on_backends
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p[0])
@pytest.mark.parametrize(("metric", "normalize"), METRICS, ids=METRIC_IDS)
def test_fp16_log_sum_exps_of_hostile_rows(metric, normalize, policy, backend):
    metric, normalize = ("dot", True) if metric == "cosine" else (metric, normalize)
    if not normalize and policy[0] in ("quadratic", "softmax_pool"):
        pytest.skip("both are of scores near 1")
    zeros = policy[0] != "max_pool"  # as far from any unit vector as from another: its nearest is arbitrary
    x, w = hostile(N, 3, zeros=zeros), hostile(M, 4, zeros=zeros)
    w[5] = x[9]
    with use_backend(backend):
        assert_rounded_once(lse(metric, normalize, policy), x, w)


@on_backends
@pytest.mark.parametrize(("metric", "normalize"), METRICS, ids=METRIC_IDS)
def test_fp16_hinges_and_choices_of_hostile_rows(metric, normalize, backend):
    x, w = hostile(N, 3), hostile(M, 4)
    w[5] = x[9]
    call = {"metric": metric, "normalize": normalize or metric == "cosine"}

    def hinge(x, w):
        out = F.masked_hinge_sum(x, w, Y, C, same=(-1e-6, 1.0), different=(1e-6, 2.0), **call)
        return torch.cat((out.same, out.different))

    with use_backend(backend):
        assert_rounded_once(hinge, x, w)
        found, truth = (F.masked_argmax(*t, Y, C, **call) for t in ((x, w), (x.double(), w.double())))
    for ours, true in zip(found, truth, strict=True):
        scale = true.score.abs().max().item()
        torch.testing.assert_close(ours.score.double(), true.score, rtol=1e-5, atol=1e-6 * scale)
        assert torch.equal(ours.count, true.count)


@on_backends
def test_fp16_matrices_and_unit_vectors_of_hostile_rows(backend):
    x, w = hostile(N, 3), hostile(M, 4)
    with use_backend(backend):
        for metric in ("cosine", "euclidean", "sqeuclidean"):
            assert_rounded_once(lambda x, w, metric=metric: F.normalized_distance(x, w, metric), x, w)
        assert_rounded_once(F.normalize, x)
        assert_rounded_once(lambda x, w: F.normalized_distance(x, w, "dot", normalize=False), x[9:15], w)


@on_choices
def test_fp16_whole_losses_of_hostile_rows(backend):
    x, w = hostile(N, 3), hostile(M, 4)
    clusters, classes = randint(0, 7, N, seed=5), torch.arange(7) // 2
    with choice(backend):
        assert_rounded_once(lambda x, w: F.proxy_nca_loss(x, w, Y, softmax_scale=4.0, reduction="none"), x, w)
        for normalize in (True, False):
            options = {"normalize": normalize, "reduction": "none", "variance": 1.0 if normalize else 1e11}
            assert_rounded_once(
                lambda x, w, o=options: F.magnet_loss(x, clusters, classes, centers=w, **o), x, w[:7].float()
            )
            assert_rounded_once(lambda x, o=options: F.magnet_loss(x, clusters, classes, **o), x)


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "sqeuclidean"])
def test_fp16_sums_by_class_and_listed_pairs_of_hostile_rows(metric):
    x, w = hostile(N, 3), hostile(M, 4)
    call = {"metric": metric, "normalize": True}
    u, rows, cols = randn(N, seed=6), randint(0, N, 60, seed=7), randint(0, M, 60, seed=8)
    assert_rounded_once(lambda x, w: F.triplet_sum(x, w, Y, C, margin=5.0, **call).total, x, w)
    assert_rounded_once(lambda x, w: F.triplet_sum(x, w, Y, C, margin=0.1, smooth=True, **call).total, x, w)
    assert_rounded_once(lambda x, w: F.positive_pair_sum(x, w, Y, C, u, kind="softplus", **call).total, x, w)
    assert_rounded_once(lambda x, w: F.pair_scores(x, w, rows, cols, **call), x, w)


@on_choices
def test_under_fp16_autocast_fp32_inputs_keep_their_range(backend):
    x, w = (1e-6 * randn(N, D, seed=1)).float(), (1e6 * randn(M, D, seed=2)).float()
    call = lambda x, w: F.masked_logsumexp(x, w, Y).different  # noqa: E731
    with choice(backend):
        truth = with_gradients(call, x.double(), w.double())
        with torch.autocast("cpu", dtype=torch.float16):
            found = with_gradients(call, x, w)
    for ours, true in zip(found, truth, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5 * true.abs().max().item())


@on_choices
def test_an_empty_fp16_batch_has_a_backward(backend):
    x, w, none = torch.zeros(0, D, dtype=torch.float16), hostile(M, 4), Y[:0]
    with choice(backend):
        for call in (
            lambda x, w: F.masked_logsumexp(x, w, none, C).different,
            lambda x, w: F.masked_hinge_sum(x, w, none, C, different=(1.0, 1.0)).different,
            lambda x, w: F.normalized_distance(x, w),
            lambda x, w: F.proxy_nca_loss(x, w, none),
            lambda x, w: F.triplet_sum(x, w, none, C, margin=1.0).total,
        ):
            _, grad_x, grad_w = with_gradients(call, x, w)
            assert grad_x.shape == x.shape
            assert grad_x.dtype == grad_w.dtype == torch.float16
            assert not grad_w.any()


@pytest.mark.cpp
def test_every_fp16_number_is_read_and_rounded_to():
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[~every.isnan()]
    one = torch.ones(1, 1, dtype=torch.float16)
    call = {"metric": "dot", "normalize": False, "backend": "cpu"}
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            assert torch.equal(F.normalized_distance(every[:, None], one, **call)[:, 0], every)
        finally:
            torch.set_flush_denormal(False)
    # fp32 numbers between fp16's, halfway too, and beyond the largest.
    finite = every[every.isfinite()].sort().values.float().unique()
    between = (finite[1:] + finite[:-1]) / 2
    given = torch.cat((between, between * (1 + 2**-20), between * (1 - 2**-20), finite * 1.5, finite * 2.0**-20))
    found = F.normalized_distance(one, given[:, None], **call)[0]
    assert found.dtype == torch.float16
    assert torch.equal(found, given.half())
    assert F.normalized_distance(torch.full((1, 1), torch.nan).half(), one, **call).isnan().all()


# --- two dtypes in one call


def accumulated(*dtypes):
    return torch.float64 if torch.float64 in dtypes else torch.float32


def allowed(*dtypes):
    """The relative error that is allowed: that of a bf16 product, of fp32 sums, or of fp64."""
    if accumulated(*dtypes) == torch.float64:
        return 1e-9
    return 0.05 if set(dtypes) == {torch.bfloat16, torch.float32} else 1e-4


def assert_mixes(call, x, w, dtypes, second=True):
    """Value, gradients and a second derivative have the right dtypes, and are near those of fp64 on rounded inputs."""
    given = x.to(dtypes[0]), w.to(dtypes[1])
    results = []
    for leaves in (given, tuple(t.double() for t in given)):
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        value = call(*leaves).sum()
        grads = torch.autograd.grad(value, leaves, create_graph=second)
        along = ((torch.arange(g.numel()).view_as(g) % 17 - 8).to(value.dtype) / 8 for g in grads)  # exact in all
        moved = sum((g.to(value.dtype) * v).sum() for g, v in zip(grads, along))
        again = torch.autograd.grad(moved, leaves, allow_unused=True) if second else ()
        results.append((value, grads, again))
    (value, grads, again), (true_value, true_grads, true_again) = results
    assert value.dtype == accumulated(*dtypes)
    near(value, true_value, allowed(*dtypes))
    for ours, true in (*zip(grads, true_grads), *zip(again, true_again)):
        if true is not None:  # a half's second derivative is a sum of rounded parts
            near(ours, true, max(4 * allowed(*dtypes), 8 * torch.finfo(ours.dtype).eps))
    for found in (grads, again):
        assert [t.dtype for t in found if t is not None] == [
            d for d, t in zip(dtypes, found, strict=False) if t is not None
        ]


# Losses whose gradient is not that of their value, or that have no second derivative near a choice or a hinge.
FIRST_ALONE = {"CircleLoss"}


def mixed_call(name):
    """(function of two tensors, second tensor)."""
    entry = REGISTRY[name]
    if entry.family == "proxies":
        return lambda x, w: entry.function(x, w, Y, **entry.options[0]), randn(6 * entry.centres, D, seed=4)
    if entry.family == "clusters":
        clusters, classes = randint(0, 7, N, seed=5), torch.arange(7) // 2
        return lambda x, w: entry.function(x, clusters, classes, centers=w), randn(7, D, seed=4)
    options = {"gamma": 4.0} if name == "CircleLoss" else {}
    return lambda x, w: entry.function(x, Y, ref_emb=w, ref_labels=C, **options), randn(M, D, seed=4)


@on_choices
@pytest.mark.parametrize("name", [name for name in REGISTRY if name != "NPairsLoss"])
def test_a_loss_of_two_dtypes(name, backend):
    call, w = mixed_call(name)
    x = randn(N, D, seed=3)
    with choice(backend):
        for dtypes in PAIRS:
            rounds = set(dtypes) == {torch.bfloat16, torch.float32}
            assert_mixes(call, x / 2, w / 2, dtypes, second=name not in FIRST_ALONE and not rounds)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_a_miner_of_two_dtypes(dtypes):
    x, w = (randn(n, D, seed=n).bfloat16().half().to(dtype) for n, dtype in zip((N, M), dtypes))
    same = torch.float64 if torch.float64 in dtypes else torch.float32
    for miner in (
        miners.BatchHardMiner(), miners.BatchEasyHardMiner(allowed_neg_range=(0.5, 1.4)), miners.MultiSimilarityMiner(),
        miners.PairMarginMiner(), miners.TripletMarginMiner(type_of_triplets="semihard"),
    ):  # fmt: skip
        if not isinstance(miner, (miners.BatchHardMiner, miners.BatchEasyHardMiner)):  # those search in bf16
            found, expected = miner(x, Y, w, C), miner(x.to(same), Y, w.to(same), C)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        else:
            assert miner(x, Y, w, C)[0].numel()


def test_fp16_miners_see_distances_beyond_fp16():
    x = (300 * randn(N, D, seed=1)).half()
    distance = distances.LpDistance(normalize_embeddings=False, power=2)
    for miner in (
        miners.TripletMarginMiner(1e5, distance=distance),
        miners.PairMarginMiner(1e5, 3e6, distance=distance),
    ):
        found, expected = miner(x, Y), miner(x.double(), Y)
        assert found[0].numel()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("parameters", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.items() if entry.family == "proxies"])
def test_a_module_beside_embeddings_of_another_dtype(name, parameters):
    """This includes everything that uses the bank: a regulariser, a miner's weights, the logits."""
    x = randn(N, D, seed=3).to({torch.float32: torch.float64, torch.float64: torch.float32}[parameters])
    torch.manual_seed(0)
    make = REGISTRY[name].loss
    loss = make(6, D, weight_regularizer=regularizers.LpRegularizer(), weight_reg_weight=0.1).to(parameters)
    tuples = miners.BatchHardMiner()(x, Y)
    bank = loss.bank.detach().clone()
    exact = make(6, D, weight_regularizer=regularizers.LpRegularizer(), weight_reg_weight=0.1).double()
    exact.load_state_dict(loss.state_dict())
    for more in ((), (tuples,)):
        leaf = x.clone().requires_grad_()
        value = loss(leaf, Y, *more)
        assert value.dtype == torch.float64
        assert torch.autograd.grad(value, (leaf, loss.bank))[1].dtype == parameters
        torch.testing.assert_close(value, exact(x.double(), Y, *more), rtol=1e-7, atol=1e-7)  # the regulariser's own
    assert loss.get_logits(x).dtype == torch.float64
    assert torch.equal(loss.bank, bank)
    assert loss.bank.dtype == parameters


def test_outliers_are_found_in_the_wider_dtype():
    loss = losses.SubCenterArcFaceLoss(6, D)
    x = randn(N, D, seed=3)
    found, centers = loss.get_outliers(x, Y)
    expected, _ = loss.double().get_outliers(x, Y)
    assert torch.equal(found, expected)
    assert centers.dtype == torch.float32


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_evaluation_of_two_dtypes(dtypes):
    x, w = (randn(n, D, seed=n).bfloat16().half().to(dtype) for n, dtype in zip((N, M), dtypes))
    found, expected = (evaluation.evaluate_retrieval(a, Y, b, C) for a, b in ((x, w), (x.double(), w.double())))
    assert found == expected

"""The cases of pytorch-metric-learning's tests, restated: its inputs, settings and dtypes, run on both libraries.

Its tests are in no package on the index. They compare embeddings on an ellipse in the plane, (2 cos a, sin a / 2) for
angles a in degrees, in float32 and float64, with parameters in float32; with several labels, one, or one for each row;
with indices from miners or without; and with references. docs/switching.md says where its suite ends differently here.
"""

from __future__ import annotations

import math

import pytest
import torch

from dml_kernels import distances, losses, miners, reducers, regularizers, samplers
from tests.support.problems import randint, randn

C = 10
on_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def on_ellipse(angles, dtype):
    a = torch.as_tensor(angles, dtype=torch.float64) * math.pi / 180
    return torch.stack((2 * a.cos(), a.sin() / 2), 1).to(dtype)


def batches(dtype):
    """By name: embeddings, labels, and references with their labels, if any."""
    five, many = [0, 20, 40, 60, 80], torch.arange(0, 180, 8)
    few = on_ellipse(five, dtype)
    several = randint(0, C - 1, 23, seed=1)
    return {
        "two classes and a single": (few, torch.tensor([0, 0, 1, 1, 2])),
        "no positives": (few, torch.arange(5)),
        "no negatives": (few, torch.zeros(5, dtype=torch.int64)),
        "many": (on_ellipse(many, dtype), several),
        "references": (few, torch.tensor([0, 0, 1, 1, 2]), on_ellipse([5, 25, 50], dtype), torch.tensor([0, 1, 3])),
        "many references": (on_ellipse(many, dtype), several, on_ellipse(many + 0.5, dtype), several.flip(0)),
        "one row": (few[:1], torch.tensor([0])),
    }  # fmt: skip


# A loss and its settings, made from the given package.
PAIRS = [
    ("CircleLoss", lambda p: {"m": 0.4, "gamma": 80}),
    ("ContrastiveLoss", lambda p: {"pos_margin": 0.25, "neg_margin": 1.5, "reducer": p.reducers.AvgNonZeroReducer()}),
    ("ContrastiveLoss", lambda p: {"pos_margin": 0.25, "neg_margin": 1.5, "reducer": p.reducers.MeanReducer()}),
    ("ContrastiveLoss", lambda p: {"pos_margin": 1.5, "neg_margin": 0.6, "distance": p.distances.CosineSimilarity()}),
    ("ContrastiveLoss", lambda p: {"pos_margin": 0.25, "neg_margin": 1.5, "distance": p.distances.LpDistance(power=2)}),
    ("LiftedStructureLoss", lambda p: {"neg_margin": 0.5}),
    ("GeneralizedLiftedStructureLoss", lambda p: {"neg_margin": 0.5}),
    ("MarginLoss", lambda p: {"margin": 0.15, "nu": 0.1, "beta": 1}),
    ("MarginLoss", lambda p: {"margin": 0.15, "nu": 0.1, "beta": 1, "learn_beta": True}),
    ("MarginLoss", lambda p: {"margin": 0.15, "nu": 0.1, "beta": 1, "learn_beta": True, "num_classes": C}),
    ("MultiSimilarityLoss", lambda p: {"alpha": 0.1, "beta": 40, "base": 0.5}),
    ("NCALoss", lambda p: {"softmax_scale": 10}),
    ("NPairsLoss", lambda p: {}),
    ("NPairsLoss", lambda p: {"embedding_regularizer": p.regularizers.LpRegularizer(power=2)}),
    ("NTXentLoss", lambda p: {"temperature": 0.1}),
    ("NTXentLoss", lambda p: {"temperature": 0.1, "distance": p.distances.LpDistance()}),
    ("SupConLoss", lambda p: {"temperature": 0.1}),
    ("SupConLoss", lambda p: {"temperature": 0.1, "distance": p.distances.LpDistance()}),
    ("TripletMarginLoss", lambda p: {"margin": 0.2}),
    ("TripletMarginLoss", lambda p: {"margin": 0.2, "reducer": p.reducers.MeanReducer()}),
    ("TripletMarginLoss", lambda p: {"margin": 0.2, "distance": p.distances.CosineSimilarity()}),
    ("TripletMarginLoss", lambda p: {"margin": 0.2, "reducer": p.reducers.MeanReducer(),
                                     "distance": p.distances.CosineSimilarity()}),
    ("TripletMarginLoss", lambda p: {"margin": 0.2, "smooth_loss": True}),
]  # fmt: skip
PROXIES = [
    ("ArcFaceLoss", lambda p: {"margin": 30, "scale": 64}),
    ("CosFaceLoss", lambda p: {"margin": 0.5, "scale": 64}),
    ("LargeMarginSoftmaxLoss", lambda p: {"margin": 10, "scale": 2}),
    ("SphereFaceLoss", lambda p: {"margin": 10, "scale": 2}),
    ("NormalizedSoftmaxLoss", lambda p: {"temperature": 0.1}),
    ("ProxyAnchorLoss", lambda p: {"margin": 0.5, "alpha": 32}),
    ("ProxyNCALoss", lambda p: {"softmax_scale": 1}),
    ("ProxyNCALoss", lambda p: {"softmax_scale": 10, "weight_regularizer": p.regularizers.LpRegularizer()}),
    ("SoftTripleLoss", lambda p: {"centers_per_class": 3, "la": 20, "gamma": 0.1, "margin": 0.1}),
    ("SubCenterArcFaceLoss", lambda p: {"margin": 30, "scale": 64, "sub_centers": 3}),
    ("CosFaceLoss", lambda p: {"weight_regularizer": p.regularizers.RegularFaceRegularizer()}),
    ("ArcFaceLoss", lambda p: {"weight_regularizer": p.regularizers.CenterInvariantRegularizer()}),
]  # fmt: skip
IDS = [f"{name} {i}" for i, (name, _) in enumerate([*PAIRS, *PROXIES])]


class Ours:
    losses, distances, reducers, regularizers, miners = losses, distances, reducers, regularizers, miners


# Cases where pytorch-metric-learning's value is wrong (docs/switching.md), or where both refuse the call.
APART = {
    "LiftedStructureLoss": ("references", "many references"),
    "NPairsLoss": ("references", "many references"),
}


def outcome(package, name, settings, batch, tuples=None, sizes=None):
    """The loss and the gradients of the embeddings, references and parameters, as one tuple.

    Parameters start in float32; in pytorch-metric-learning the first call casts them to the embeddings' dtype.
    """
    torch.manual_seed(5)
    loss = getattr(package.losses, name)(**(sizes or {}), **settings(package))
    x, y, *references = batch
    leaves = [t.clone().requires_grad_() for t in (x, *references[:1])]
    value = loss(leaves[0], y, tuples, *leaves[1:], *references[1:])
    value.sum().backward()
    leaves += [p for p in loss.parameters() if not sizes]
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
    return value.detach().sum(), *(g.to(x.dtype) for g in grads)


def assert_alike(found, expected):
    """Compares float32 as its tests do, by values; in float64 also the gradients, those of parameters in float32."""
    single = expected[0].dtype == torch.float32
    for one, other in zip(found[: 1 if single else None], expected[: 1 if single else None], strict=True):
        if other.isnan().any():  # 0 / 0 there: no anchor has a positive
            assert (one == 0).all()
        else:
            torch.testing.assert_close(one, other, rtol=1e-5 if single else 1e-6, atol=1e-6 if single else 1e-7)
    assert all(t.isfinite().all() for t in found)


@on_dtypes
@pytest.mark.parametrize(("name", "settings"), PAIRS, ids=IDS[: len(PAIRS)])
def test_pair_losses(name, settings, dtype, pml):
    """Each runs without a miner, with its miners' pairs and triplets, and with these without labels."""
    for which, batch in batches(dtype).items():
        if which in APART.get(name, ()):
            continue
        for miner in (None, pml.miners.MultiSimilarityMiner(), pml.miners.TripletMarginMiner()):
            tuples = None if miner is None else miner(*batch)
            expected = outcome(pml, name, settings, batch, tuples)
            assert_alike(outcome(Ours, name, settings, batch, tuples), expected)
            if tuples is not None and name not in ("NCALoss", "NPairsLoss") and "num_classes" not in settings(Ours):
                nameless = (batch[0], None, *batch[2:3], *[None] * (len(batch) - 3))
                assert_alike(outcome(Ours, name, settings, nameless, tuples), expected)


@on_dtypes
@pytest.mark.parametrize(("name", "settings"), PROXIES, ids=IDS[len(PAIRS) :])
def test_proxy_losses(name, settings, dtype, pml):
    """Each runs with labels of all classes and of some, and with rows weighted by a miner's tuples."""
    sizes = {"num_classes": C, "embedding_size": 2}
    for which in ("many", "two classes and a single", "no positives", "one row"):
        batch = batches(dtype)[which]
        for tuples in (None, pml.miners.MultiSimilarityMiner()(*batch)):
            call = (name, settings, batch, tuples, sizes)
            assert_alike(outcome(Ours, *call), outcome(pml, *call))


DISTANCES = [
    ("LpDistance", {"normalize_embeddings": False}), ("LpDistance", {}), ("LpDistance", {"power": 2}),
    ("CosineSimilarity", {}),
]  # fmt: skip
RANGES = [(None, None), ((0.2, 0.5), None), (None, (0.2, 0.5))]
STRATEGIES = [
    (pos, neg) for pos in ("easy", "semihard", "hard", "all") for neg in ("easy", "semihard", "hard", "all")
    if (pos, neg) not in (("semihard", "semihard"), ("semihard", "all"), ("all", "semihard"))
]  # fmt: skip
MINERS = [
    *[("BatchEasyHardMiner", {"pos_strategy": p, "neg_strategy": n, "allowed_pos_range": a, "allowed_neg_range": b})
      for p, n in STRATEGIES for a, b in RANGES],
    *[("TripletMarginMiner", {"margin": margin, "type_of_triplets": kind})
      for margin in (-0.5, -0.1, 0, 0.1, 0.5) for kind in ("all", "easy", "hard", "semihard")],
    *[("PairMarginMiner", {"pos_margin": p, "neg_margin": n}) for p in (-0.5, 0, 0.3) for n in (0, 0.4, 0.9)],
    *[("MultiSimilarityMiner", {"epsilon": e}) for e in (-0.2, 0, 0.1, 0.5)],
    ("BatchHardMiner", {}),
]  # fmt: skip


@on_dtypes
@pytest.mark.parametrize(("kind", "options"), DISTANCES, ids=str)
def test_miners(kind, options, dtype, pml):
    """Inputs are random, because on the ellipse and on its line of integers many distances are equal to rounding."""
    x, w = randn(24, 3, seed=1).to(dtype), randn(20, 3, seed=2).to(dtype)
    y, c = randint(0, 4, 24, seed=3), randint(0, 5, 20, seed=4)
    for name, settings in MINERS:
        mined = [getattr(lib.miners, name)(distance=getattr(lib.distances, kind)(**options), **settings)
                 for lib in (Ours, pml)]  # fmt: skip
        for batch in ((x, y), (x, y, w, c), (x, torch.arange(24)), (x, torch.zeros_like(y))):
            found, expected = (in_order(miner(*batch)) for miner in mined)
            assert found == expected, (name, settings)


def in_order(tuples):
    groups = [tuples] if len(tuples) == 3 else [tuples[:2], tuples[2:]]
    return [sorted(zip(*(t.tolist() for t in group))) for group in groups]


@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [None, 20])
def test_classes_in_a_sampler_s_batches(m, batch_size):
    labels = torch.arange(3000) % 100
    found = list(samplers.MPerClassSampler(labels, m, batch_size, length_before_new_iter=2000))
    step = batch_size or m
    assert len(found) == (2000 // step * step if batch_size else 2000 // (m * 100) * m * 100)
    for start in range(0, len(found), step):
        numbers = labels[found[start : start + step]].unique(return_counts=True)[1]
        assert numbers.tolist() == [m] * (step // m)


@on_dtypes
@pytest.mark.parametrize("name", ["LpRegularizer", "ZeroMeanRegularizer", "CenterInvariantRegularizer",
                                  "RegularFaceRegularizer"])  # fmt: skip
def test_regularizers(name, dtype, pml):
    w = randn(C, 32, seed=1).to(dtype)
    found, expected = (getattr(lib.regularizers, name)()(w) for lib in (Ours, pml))
    torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=1e-8)

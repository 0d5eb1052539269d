"""Settings as attributes, compared with pytorch-metric-learning's: their values, and the effect of assigning to them.

An attribute of the same name holds the same value in the same unit. An assignment has the same effect or is refused.
"""

from __future__ import annotations

import copy
import importlib
import math

import pytest
import torch

from dml_kernels import distances, losses, miners, reducers, regularizers
from tests.support.problems import randint, randn

pml = pytest.importorskip("pytorch_metric_learning")
for part in ("distances", "losses", "miners", "reducers", "regularizers"):
    importlib.import_module(f"pytorch_metric_learning.{part}")
N, C, D = 20, 4, 5
SIZES = {"num_classes": C, "embedding_size": D}
PROXIES = ["ProxyNCALoss", "ProxyAnchorLoss", "NormalizedSoftmaxLoss", "CosFaceLoss", "ArcFaceLoss", "SphereFaceLoss",
           "LargeMarginSoftmaxLoss", "SubCenterArcFaceLoss", "SoftTripleLoss"]  # fmt: skip
PAIRS = ["ContrastiveLoss", "TripletMarginLoss", "MultiSimilarityLoss", "NTXentLoss", "SupConLoss", "CircleLoss",
         "NCALoss", "MarginLoss", "LiftedStructureLoss", "GeneralizedLiftedStructureLoss", "NPairsLoss"]  # fmt: skip
MINERS = ["TripletMarginMiner", "BatchHardMiner", "BatchEasyHardMiner", "MultiSimilarityMiner", "PairMarginMiner"]
REGULARIZERS = {
    "LpRegularizer": {},
    "ZeroMeanRegularizer": {},
    "CenterInvariantRegularizer": {},
    "RegularFaceRegularizer": {},
    "SparseCentersRegularizer": {"num_classes": 5, "centers_per_class": 4},
}
CLASSES = [
    *((losses, pml.losses, name, SIZES) for name in PROXIES),
    *((losses, pml.losses, name, {}) for name in PAIRS),
    *((miners, pml.miners, name, {}) for name in (*MINERS, "DistanceWeightedMiner")),
    *((regularizers, pml.regularizers, name, given) for name, given in REGULARIZERS.items()),
    *((distances, pml.distances, name, {}) for name in ("LpDistance", "CosineSimilarity", "DotProductSimilarity")),
    (reducers, pml.reducers, "ThresholdReducer", {"low": 0.3, "high": 2.0}),
    (reducers, pml.reducers, "AvgNonZeroReducer", {}),
]
on_classes = pytest.mark.parametrize(
    ("ours", "theirs", "name", "given"), CLASSES, ids=[name for _, _, name, _ in CLASSES]
)
# Numbers that pytorch-metric-learning names to its record keepers but never sets, so that they are 0.
NEVER_SET = {
    ("NormalizedSoftmaxLoss", "num_classes"),
    ("NormalizedSoftmaxLoss", "embedding_size"),
    ("ProxyNCALoss", "num_classes"),
    ("SoftTripleLoss", "embedding_size"),
    ("SparseCentersRegularizer", "num_classes"),
    ("SparseCentersRegularizer", "centers_per_class"),
}
# Refused, because the bank's shape depends on them; pytorch-metric-learning ignores them, or mixes them with tables
# made for the first value.
REFUSED = {"num_classes", "embedding_size", "sub_centers", "centers_per_class", "max_n"} | {
    *(("CircleLoss", key) for key in ("m", "op", "on", "delta_p", "delta_n")),
    *((name, "margin") for name in ("LargeMarginSoftmaxLoss", "SphereFaceLoss")),
    # No kernel streams these.
    *(("LpDistance", key) for key in ("p", "power", "is_inverted")),
    *(("DotProductSimilarity", key) for key in ("p", "power", "is_inverted")),
    *(("CosineSimilarity", key) for key in ("p", "power", "is_inverted", "normalize_embeddings")),
}
# Not compared: another stream of random numbers, and a beta that may or may not be a parameter.
NOT_COMPARED = {"triplets_per_anchor", "learn_beta", "collect_stats", "training"}
CHOICES = {
    "type_of_triplets": ("all", "hard", "semihard", "easy"),
    "pos_strategy": ("easy", "hard"),
    "neg_strategy": ("semihard", "hard", "easy"),
    "allowed_pos_range": ((0.2, 1.3), None),
    "allowed_neg_range": ((0.5, 1.5),),
    "high": (1.5, None),
}


def batch():
    return randn(N, D, seed=1).double(), randint(0, C, N, seed=2)


def made(ours, theirs, name, given):
    built = []
    for source in (ours, theirs):
        torch.manual_seed(3)
        built.append(getattr(source, name)(**given).double())
    return built


def settings(theirs):
    """The plain values among the attributes of a pytorch-metric-learning object."""
    kinds = (int, float, str, tuple, type(None))
    return {k: v for k, v in vars(theirs).items()
            if isinstance(v, kinds) and not k.startswith("_") and k not in NOT_COMPARED}  # fmt: skip


def others(name, value):
    """Further values for a setting."""
    if name in CHOICES:
        return CHOICES[name]
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int) and name in ("p", "power"):
        return (3 - value, 3)
    return (value * 1.3 + 0.01, 1) if isinstance(value, (int, float)) else ()


def outcome(module):
    """The results of a call, for comparison."""
    x, y = batch()
    if isinstance(module, (reducers.Reducer, pml.reducers.BaseReducer)):
        source = losses if isinstance(module, reducers.Reducer) else pml.losses
        return source.MultiSimilarityLoss(reducer=module)(x, y)
    if "losses" in type(module).__module__:
        return module(x, y)
    found = module(x, y) if "miners" in type(module).__module__ else module(x)
    if isinstance(found, tuple):
        parts = [found] if len(found) == 3 else [found[:2], found[2:]]
        return [sorted(zip(*(t.tolist() for t in part), strict=True)) for part in parts]
    return found


def same(a, b):
    torch.testing.assert_close(a, b) if isinstance(a, torch.Tensor) else None
    return isinstance(a, torch.Tensor) or a == b


@on_classes
def test_attributes_hold_the_same_values(ours, theirs, name, given):
    mine, their = made(ours, theirs, name, given)
    for key, value in settings(their).items():
        if (name, key) in NEVER_SET:
            assert value == 0
        elif key == "max_n":
            with pytest.raises(ValueError, match="computes with no max_n"):
                mine.max_n = 2
        else:
            assert getattr(mine, key) == value, key


@on_classes
def test_assigned_they_have_the_same_effect_or_are_refused(ours, theirs, name, given):
    plain, their_plain = made(ours, theirs, name, given)
    compared = 0
    for key, value in settings(their_plain).items():
        for new in others(key, value):
            mine, their = copy.deepcopy(plain), copy.deepcopy(their_plain)
            try:
                setattr(mine, key, new)
            except ValueError:
                assert key in REFUSED or (name, key) in REFUSED, (key, new)
                assert same(outcome(mine), outcome(plain))  # nothing was changed
                continue
            setattr(their, key, new)
            if name != "DistanceWeightedMiner":  # another stream of random numbers
                assert same(outcome(mine), outcome(their)), (key, new)
            compared += 1
    assert compared or all(key in REFUSED or (name, key) in REFUSED for key in settings(their_plain))


@pytest.mark.parametrize("name", [*PROXIES, *PAIRS])
def test_an_assigned_reducer_is_used(name):
    given = SIZES if name in PROXIES else {}
    x, y = batch()
    for kind in ("SumReducer", "MeanReducer", "AvgNonZeroReducer"):
        for source in (reducers, pml.reducers):
            mine, _ = made(losses, pml.losses, name, given)
            before = mine(x, y)
            torch.manual_seed(3)
            expected = getattr(losses, name)(**given, reducer=getattr(source, kind)()).double()(x, y)
            mine.reducer = getattr(source, kind)()
            torch.testing.assert_close(mine(x, y), expected)
            assert isinstance(mine.reducer, getattr(reducers, kind))
            mine.reducer = None
            torch.testing.assert_close(mine(x, y), before)


@pytest.mark.parametrize("name", [*PAIRS, "ProxyNCALoss", "ProxyAnchorLoss", "NormalizedSoftmaxLoss"])
def test_an_assigned_distance_is_used(name):
    if name == "CircleLoss":  # the cosine alone
        with pytest.raises(ValueError, match="CircleLoss is defined on CosineSimilarity"):
            losses.CircleLoss().distance = pml.distances.LpDistance()
        return
    given = SIZES if name not in PAIRS else {}
    mine, their = made(losses, pml.losses, name, given)
    x, y = batch()
    for distance in (pml.distances.LpDistance(power=2), pml.distances.CosineSimilarity()):
        mine.distance = their.distance = distance
        torch.testing.assert_close(mine(x, y), their(x, y))


def test_what_has_two_meanings_at_once_is_refused():
    x, y = batch()
    loss = losses.CosFaceLoss(**SIZES, reduction="sum").double()
    loss.reducer = reducers.MeanReducer()
    with pytest.raises(ValueError, match="both say how to reduce"):
        loss(x, y)
    loss.reduction = "mean"
    assert loss(x, y).isfinite()
    miner = miners.DistanceWeightedMiner()
    miner.distance = distances.CosineSimilarity()
    with pytest.raises(ValueError, match="DistanceWeightedMiner weighs"):
        miner(x, y)
    loss = losses.NormalizedSoftmaxLoss(**SIZES, distance=distances.LpDistance()).double()
    loss.distance.normalize_embeddings = False
    with pytest.raises(ValueError, match="unit weights"):
        loss(x, y)


def test_angles_are_in_radians_once_the_loss_is_made():
    x, y = batch()
    for name in ("ArcFaceLoss", "SubCenterArcFaceLoss"):
        loss, given = (
            made(losses, pml.losses, name, SIZES)[0],
            made(losses, pml.losses, name, SIZES | {"margin": 40})[0],
        )
        loss.margin = math.radians(40)
        torch.testing.assert_close(loss(x, y), given(x, y))
        loss.margin = 28.6
        with pytest.raises(ValueError, match=r"angle in radians, 0 to pi; got 28\.6"):
            loss(x, y)
    loss, given = (made(losses, pml.losses, "SoftTripleLoss", SIZES | {"gamma": g})[0] for g in (0.1, 0.5))
    loss.gamma = 2
    torch.testing.assert_close(loss(x, y), given(x, y))
    loss.gamma = 0
    with pytest.raises(ValueError, match="gamma multiplies similarities"):
        loss(x, y)


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (lambda: losses.ArcFaceLoss(**SIZES), "cross_entropy", torch.nn.CrossEntropyLoss(label_smoothing=0.1)),
        (lambda: losses.ProxyNCALoss(**SIZES), "proxy_labels", torch.arange(C)),
        (losses.NPairsLoss, "cross_entropy", torch.nn.CrossEntropyLoss()),
        (losses.CircleLoss, "soft_plus", torch.nn.ReLU()),
        (reducers.PerAnchorReducer, "aggregation_func", torch.sum),
        (regularizers.RegularFaceRegularizer, "distance", distances.LpDistance()),
        (lambda: regularizers.SparseCentersRegularizer(2, 2), "same_class_mask", torch.ones(4, 4)),
        (lambda: losses.SphereFaceLoss(**SIZES), "margin_choose_n", torch.ones(3)),
    ],
)  # fmt: skip
def test_what_theirs_computes_with_and_ours_does_not_is_refused(make, name, value):
    with pytest.raises(ValueError, match=f"computes with no {name}"):
        setattr(make(), name, value)

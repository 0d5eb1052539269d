"""Our distances, reducers and miners inside pytorch-metric-learning's losses, miners, search and trainers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dml_kernels import distances, losses, miners, reducers
from tests.support.problems import randint, randn

C, D = 6, 5
PROXIES = {"num_classes": C, "embedding_size": D}
# Losses that take any distance, with their arguments.
LOSSES = {
    "ContrastiveLoss": {}, "GeneralizedLiftedStructureLoss": {}, "IntraPairVarianceLoss": {}, "LiftedStructureLoss": {},
    "MarginLoss": {"beta": 0.7}, "MultiSimilarityLoss": {"beta": 5}, "NCALoss": {}, "NTXentLoss": {}, "SupConLoss": {},
    "TripletMarginLoss": {"smooth_loss": True}, "ProxyAnchorLoss": PROXIES, "ProxyNCALoss": PROXIES,
    "NormalizedSoftmaxLoss": PROXIES,
}  # fmt: skip
# Classes that require a distance of one class of pytorch-metric-learning, as docs/switching.md says.
BY_CLASS = {
    "losses": {
        **dict.fromkeys(("ArcFaceLoss", "CosFaceLoss", "LargeMarginSoftmaxLoss", "SphereFaceLoss",
                         "SubCenterArcFaceLoss"), PROXIES),
        "AngularLoss": {}, "CircleLoss": {}, "DynamicSoftMarginLoss": {}, "FastAPLoss": {}, "InstanceLoss": {},
        "PNPLoss": {}, "SignalToNoiseRatioContrastiveLoss": {}, "SmoothAPLoss": {},
        "ThresholdConsistentMarginLoss": {}, "TupletMarginLoss": {},
    },
    "miners": {"AngularMiner": {}, "DistanceWeightedMiner": {}},
    "regularizers": {
        "CenterInvariantRegularizer": {}, "SparseCentersRegularizer": {"num_classes": C, "centers_per_class": 2},
    },
}  # fmt: skip
DISTANCES = [
    ("LpDistance", {}), ("LpDistance", {"power": 2}), ("LpDistance", {"normalize_embeddings": False}),
    ("CosineSimilarity", {"p": 2, "power": 1}), ("DotProductSimilarity", {}),
    ("DotProductSimilarity", {"normalize_embeddings": False}),
]  # fmt: skip
on_distances = pytest.mark.parametrize(("kind", "settings"), DISTANCES, ids=str)


def batch(dtype=torch.float64):
    return randn(24, D, seed=1).to(dtype), randint(0, C - 1, 24, seed=2)


def outcome(loss, x, y):
    torch.manual_seed(3)
    x, loss = x.clone().requires_grad_(), loss().double()
    value = loss(x, y)
    value.sum().backward()
    return value.detach(), x.grad


@pytest.mark.parametrize("name", LOSSES)
@on_distances
def test_our_distances_serve_their_losses(kind, settings, name, pml):
    expected, found = (
        outcome(lambda lib=lib: getattr(pml.losses, name)(distance=getattr(lib, kind)(**settings), **LOSSES[name]),
                *batch())
        for lib in (pml.distances, distances)
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["BatchHardMiner", "BatchEasyHardMiner", "MultiSimilarityMiner", "PairMarginMiner",
                                  "TripletMarginMiner", "UniformHistogramMiner"])  # fmt: skip
@on_distances
def test_our_distances_serve_their_miners(kind, settings, name, pml):
    if name == "UniformHistogramMiner" and kind != "LpDistance":
        return  # takes no similarity
    found, expected = [], []
    for lib, into in ((distances, found), (pml.distances, expected)):
        torch.manual_seed(3)
        into.extend(getattr(pml.miners, name)(distance=getattr(lib, kind)(**settings))(*batch()))
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))


def test_our_distances_serve_their_search_and_regularizer(pml):
    from pytorch_metric_learning.utils.inference import CustomKNN, MatchFinder

    x, _ = batch()
    for kind, settings in DISTANCES:
        ours, theirs = (getattr(lib, kind)(**settings) for lib in (distances, pml.distances))
        for found, expected in zip(*(CustomKNN(d, batch_size=7)(x[:9], 3, x) for d in (ours, theirs))):
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
        found, expected = (MatchFinder(distance=d, threshold=0.5).is_match(x[:5], x[5:10]) for d in (ours, theirs))
        assert (found == expected).all()
        if ours.is_inverted:
            found, expected = (pml.regularizers.RegularFaceRegularizer(distance=d)(x) for d in (ours, theirs))
            torch.testing.assert_close(found, expected)


@on_distances
def test_distances_have_their_methods(kind, settings, pml):
    ours, theirs = (getattr(lib, kind)(collect_stats=False, **settings) for lib in (distances, pml.distances))
    x, w = randn(6, D, seed=1), randn(6, D, seed=2)
    for method, arguments in {
        "pairwise_distance": (x, w), "smallest_dist": (x, w), "largest_dist": (x, w), "margin": (x, w),
        "normalize": (x, 0), "maybe_normalize": (x,), "get_norm": (x,), "forward": (x, w),
    }.items():  # fmt: skip
        expected = getattr(theirs, method)(*arguments)
        torch.testing.assert_close(getattr(ours, method)(*arguments), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["CosineSimilarity", "DotProductSimilarity"])
def test_cosines_are_normalised_then_multiplied(kind):
    x, w = randn(300, 2, seed=1).float(), randn(200, 2, seed=2).float()
    unit = torch.nn.functional.normalize
    assert torch.equal(getattr(distances, kind)()(x, w), unit(x) @ unit(w).t())
    pieces, distances.UNIT_ELEMENTS = distances.UNIT_ELEMENTS, 20
    try:
        torch.testing.assert_close(getattr(distances, kind)()(x, w), unit(x) @ unit(w).t(), rtol=1e-5, atol=1e-7)
    finally:
        distances.UNIT_ELEMENTS = pieces


def test_what_is_held_to_a_class_says_so(pml):
    """docs/switching.md states this limit: each asserts that it gets a class of pytorch-metric-learning."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "switching.md").read_text()
    listed = page.split("These classes are:")[1].split("\n- ")[0]
    for part, names in BY_CLASS.items():
        for name, options in names.items():
            assert name in listed, name
            for distance in (distances.LpDistance(), distances.CosineSimilarity(),
                             distances.LpDistance(normalize_embeddings=False)):  # fmt: skip
                with pytest.raises(AssertionError, match="requires the distance metric"):
                    getattr(getattr(pml, part), name)(distance=distance, **options)


# --- reducers

REDUCERS = {
    "MeanReducer": lambda r: r.MeanReducer(),
    "SumReducer": lambda r: r.SumReducer(),
    "AvgNonZeroReducer": lambda r: r.AvgNonZeroReducer(),
    "ThresholdReducer": lambda r: r.ThresholdReducer(low=0.1, high=0.7),
    "DivisorReducer": lambda r: r.DivisorReducer(),
    "ClassWeightedReducer": lambda r: r.ClassWeightedReducer(torch.linspace(1, 2, C).double()),
    "PerAnchorReducer": lambda r: r.PerAnchorReducer(r.AvgNonZeroReducer()),
    "PerAnchorReducer of class weights": lambda r: r.PerAnchorReducer(
        r.ClassWeightedReducer(torch.linspace(1, 2, C).double())),
    "MultipleReducers": lambda r: r.MultipleReducers({"pos_loss": r.PerAnchorReducer(r.SumReducer())}, r.SumReducer()),
}  # fmt: skip
# A regulariser's value is a part that no reducer touches.
REDUCED = {
    "ContrastiveLoss": {}, "TripletMarginLoss": {}, "MarginLoss": {"learn_beta": True, "nu": 0.1}, "SupConLoss": {},
    "ProxyAnchorLoss": {**PROXIES, "num_classes": 24}, "NormalizedSoftmaxLoss": PROXIES, "IntraPairVarianceLoss": {},
}  # fmt: skip


@pytest.mark.parametrize("name", REDUCED)
@pytest.mark.parametrize("which", REDUCERS)
def test_our_reducers_serve_their_losses(which, name, pml):
    options = {**REDUCED[name], "embedding_regularizer": pml.regularizers.LpRegularizer()}

    def reduced(lib):
        return outcome(lambda: getattr(pml.losses, name)(reducer=REDUCERS[which](lib), **options), *batch())

    try:
        expected = reduced(pml.reducers)
    except (NotImplementedError, KeyError):  # triplets of an anchor have no mean there; no divisor is stated
        with pytest.raises(ValueError, match=r"have no mean per anchor|states no divisor"):
            reduced(reducers)
        return
    torch.testing.assert_close(reduced(reducers), expected, rtol=1e-9, atol=1e-10)


def test_nothing_to_compare_is_0_connected(pml):
    x, nothing = randn(4, D, seed=1).requires_grad_(), torch.zeros(0, dtype=torch.int64)
    loss = pml.losses.ContrastiveLoss(reducer=reducers.PerAnchorReducer())(x, torch.arange(4), (nothing,) * 4)
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()


def test_what_is_no_part_is_refused():
    with pytest.raises(TypeError, match="loss must be Terms"):
        reducers.MeanReducer()({"loss": torch.ones(3)})


# --- trainers


@pytest.mark.parametrize("name", ["MultiSimilarityLoss", "CosFaceLoss"])
def test_their_trainer_trains_alike(name, pml):
    from pytorch_metric_learning.samplers import MPerClassSampler
    from pytorch_metric_learning.trainers import MetricLossOnly

    x, y = randn(48, D, seed=5).float(), randint(0, C - 1, 48, seed=6)
    options = PROXIES if name == "CosFaceLoss" else {}
    found = []
    for lib in (losses, pml.losses):
        torch.manual_seed(7)
        trunk, loss = torch.nn.Linear(D, D), getattr(lib, name)(**options)
        miner = (miners if lib is losses else pml.miners).MultiSimilarityMiner()
        models, used = {"trunk": trunk}, {"metric_loss": loss}
        optimizers = {"trunk_optimizer": torch.optim.SGD(trunk.parameters(), lr=0.1)}
        if options:
            optimizers["metric_loss_optimizer"] = torch.optim.SGD(loss.parameters(), lr=0.1)
        np.random.seed(8)
        MetricLossOnly(
            models, optimizers, 12, used, list(zip(x, y)), mining_funcs={"tuple_miner": miner},
            dataloader_num_workers=0, sampler=MPerClassSampler(y, 3, batch_size=12, length_before_new_iter=48),
        ).train(num_epochs=2)  # fmt: skip
        found.append(trunk.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)

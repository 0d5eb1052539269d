"""The values that users and record keepers of pytorch-metric-learning read after a call: counts, settings, stats."""

from __future__ import annotations

import pytest
import torch

from dml_kernels import distances, losses, miners, reducers, regularizers

pml = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances as pml_distances  # noqa: E402
from pytorch_metric_learning import losses as pml_losses  # noqa: E402
from pytorch_metric_learning import miners as pml_miners  # noqa: E402
from pytorch_metric_learning import reducers as pml_reducers  # noqa: E402
from pytorch_metric_learning import regularizers as pml_regularizers  # noqa: E402
from pytorch_metric_learning.utils.common_functions import list_of_recordable_attributes_list_names  # noqa: E402

COUNTS = ("num_pos_pairs", "num_neg_pairs", "num_triplets")
MINERS = {
    "TripletMarginMiner": {"margin": 0.3},
    "BatchHardMiner": {},
    "BatchEasyHardMiner": {},
    "MultiSimilarityMiner": {"epsilon": 0.2},
    "PairMarginMiner": {"pos_margin": 0.5, "neg_margin": 1.0},
}
DRAWING = ("UniformMiner", "DistanceWeightedMiner")
SIZES = {"num_classes": 6, "embedding_size": 4}
OTHERS = [
    *((losses, pml_losses, name, {}) for name in (
        "ContrastiveLoss", "TripletMarginLoss", "MultiSimilarityLoss", "NTXentLoss", "SupConLoss", "CircleLoss",
        "NCALoss", "MarginLoss", "LiftedStructureLoss", "GeneralizedLiftedStructureLoss", "NPairsLoss")),
    *((losses, pml_losses, name, SIZES) for name in (
        "ProxyNCALoss", "ProxyAnchorLoss", "NormalizedSoftmaxLoss", "CosFaceLoss", "ArcFaceLoss", "SphereFaceLoss",
        "LargeMarginSoftmaxLoss", "SubCenterArcFaceLoss", "SoftTripleLoss")),
    *((reducers, pml_reducers, name, settings) for name, settings in {
        "MeanReducer": {}, "SumReducer": {}, "AvgNonZeroReducer": {}, "DivisorReducer": {}, "PerAnchorReducer": {},
        "ThresholdReducer": {"low": 0.25}, "ClassWeightedReducer": {"weights": torch.ones(3)}}.items()),
    *((distances, pml_distances, name, {}) for name in ("LpDistance", "CosineSimilarity", "DotProductSimilarity")),
    *((regularizers, pml_regularizers, name, {}) for name in (
        "LpRegularizer", "ZeroMeanRegularizer", "CenterInvariantRegularizer", "RegularFaceRegularizer")),
    (regularizers, pml_regularizers, "SparseCentersRegularizer", {"num_classes": 3, "centers_per_class": 2}),
]  # fmt: skip


def batch(classes=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 4, generator=generator), torch.arange(16) % classes


def recorded(module):
    """The attributes that a record keeper takes: those in lists whose names pytorch-metric-learning gives it."""
    names = [name for key in list_of_recordable_attributes_list_names() for name in getattr(module, key, [])]
    return {name: getattr(module, name) for name in names}


@pytest.mark.parametrize("name", MINERS)
def test_a_miner_counts_what_it_gave_as_theirs_does(name):
    ours, theirs = (getattr(lib, name)(collect_stats=True, **MINERS[name]) for lib in (miners, pml_miners))
    assert [getattr(ours, count) for count in COUNTS] == [0, 0, 0]
    for labels in (batch()[1], torch.arange(16), torch.zeros(16).long()):
        ours(batch()[0], labels)
        theirs(batch()[0], labels)
        assert [getattr(ours, count) for count in COUNTS] == [getattr(theirs, count) for count in COUNTS]
        shown = recorded(ours)
        assert {key: recorded(theirs)[key] for key in shown} == shown
        assert shown.keys() >= {*COUNTS, *MINERS[name]}


@pytest.mark.parametrize("name", [*MINERS, *DRAWING])
def test_without_collect_stats_the_counts_are_there_and_no_keeper_is_told(name):
    miner = getattr(miners, name)()
    found = miner(*batch())
    lengths = [0, 0, len(found[0])] if len(found) == 3 else [len(found[0]), len(found[2]), 0]
    assert [getattr(miner, count) for count in COUNTS] == lengths
    assert not recorded(miner).keys() & {*COUNTS}
    assert all(type(getattr(miner, count)) is int for count in COUNTS)


@pytest.mark.parametrize(("lib", "theirs", "name", "settings"), OTHERS, ids=[name for _, _, name, _ in OTHERS])
@pytest.mark.parametrize("collect", [True, False, None])
def test_collect_stats_is_taken_and_settings_are_found(lib, theirs, name, settings, collect):
    ours, their = (getattr(library, name)(**settings, collect_stats=collect) for library in (lib, theirs))
    assert ours.collect_stats is bool(collect)
    expected = recorded(their)
    for key, value in recorded(ours).items():
        # Its ProxyNCALoss reports 0 classes, because the number is named to the keeper but never set.
        if expected.get(key):
            assert value == expected[key]
    assert {key for key, value in settings.items() if type(value) in (int, float)} <= recorded(ours).keys()


def test_a_memory_takes_it_too():
    assert losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, collect_stats=True).collect_stats


def test_n_pairs_counts_its_pairs_where_asked():
    for labels in (batch()[1], torch.arange(16), torch.arange(16) // 3):
        ours, theirs = (lib.NPairsLoss(collect_stats=True) for lib in (losses, pml_losses))
        ours(batch()[0], labels)
        theirs(batch()[0], labels)
        assert recorded(ours)["num_pairs"] == theirs.num_pairs
    assert losses.NPairsLoss().num_pairs == 0


def test_a_keeper_walks_through_a_loss_as_the_trainers_do():
    """It finds the modules within a module by their attributes, and each has its own settings."""
    loss = losses.TripletMarginLoss(margin=0.3, reducer=reducers.ThresholdReducer(low=0))
    found = {name: recorded(module) for name, module in loss.named_modules()}
    assert found[""]["margin"] == 0.3
    assert found["distance"] == {"p": 2, "power": 1}
    assert found["reducer"] == {"low": 0}

"""Objects of foreign classes are taken for what they are or refused by name, and never replaced by a namesake."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dml_kernels import distances, losses, miners, reducers, regularizers
from tests.support.problems import randint, randn

C, D = 5, 4


def batch():
    return randn(16, D, seed=1).double(), randint(0, C, 16, seed=2)


def homonym(base, name, **members):
    """A class that the user wrote and that has the name of a known class."""
    return type(name, (base,), {"__module__": "users_code", **members})


class Twice(torch.nn.Module):
    """A user's reducer or distance that has nothing to do with any package."""

    low, high, power, p, normalize_embeddings, is_inverted = 0, None, 1, 2, True, False

    def forward(self, *arguments):
        return 2 * torch.ones(())


REDUCERS = ["MeanReducer", "SumReducer", "AvgNonZeroReducer", "DivisorReducer", "DoNothingReducer", "ThresholdReducer",
            "PerAnchorReducer", "ClassWeightedReducer", "MultipleReducers"]  # fmt: skip
DISTANCES = ["LpDistance", "CosineSimilarity", "DotProductSimilarity"]


def made(kind):
    for arguments in ({}, {"low": 0.1}, {"weights": torch.ones(C)}, {"reducers": {}}):
        try:
            return kind(**arguments)
        except (TypeError, AssertionError):
            continue
    raise AssertionError(kind)


USES = {
    "a pair loss": lambda reducer: losses.ContrastiveLoss(reducer=reducer),
    "a loss on proxies": lambda reducer: losses.CosFaceLoss(C, D, reducer=reducer),
    "inside PerAnchorReducer": reducers.PerAnchorReducer,
    "inside MultipleReducers": lambda reducer: reducers.MultipleReducers({"pos_loss": reducer}),
    "as default of MultipleReducers": lambda reducer: reducers.MultipleReducers({}, reducer),
    "a regulariser": lambda reducer: regularizers.LpRegularizer(reducer=reducer),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", REDUCERS)
def test_a_users_reducer_is_refused_by_name(name, use, pml):
    for base in (getattr(pml.reducers, name), Twice):
        with pytest.raises(TypeError, match=rf"users_code\.{name}.*defines reduce"):
            USES[use](made(homonym(base, name)))


@pytest.mark.parametrize("name", DISTANCES)
def test_a_users_distance_is_refused_by_name(name, pml):
    def compute_mat(self, query_emb, ref_emb):
        return query_emb @ ref_emb.t() * 3

    for kind in (homonym(getattr(pml.distances, name), name, compute_mat=compute_mat), homonym(Twice, name)):
        for use in (losses.ContrastiveLoss, miners.PairMarginMiner, lambda **k: losses.ProxyNCALoss(C, D, **k)):
            with pytest.raises(TypeError, match=rf"users_code\.{name}"):
                use(distance=kind())


@pytest.mark.parametrize("name", ["LpRegularizer", "ZeroMeanRegularizer", "RegularFaceRegularizer"])
def test_a_users_regulariser_is_called_as_it_is(name, pml):
    def compute_loss(self, x):
        return {"loss": {"losses": 7 * x.sum(1), "indices": torch.arange(len(x)), "reduction_type": "element"}}

    loss = losses.CosFaceLoss(C, D).double()
    x, y = batch()
    plain = loss(x, y)
    mine = homonym(getattr(pml.regularizers, name), name, compute_loss=compute_loss)()
    loss.weight_regularizer = regularizers.accept(mine)
    torch.testing.assert_close(loss(x, y), plain + 7 * loss.weight.sum(1).mean())


def test_an_aggregation_of_that_name_is_not_the_mean(pml):
    def aggregation_func(x, num_per_row):
        return x.max(1).values

    with pytest.raises(ValueError, match="another aggregation_func"):
        losses.ContrastiveLoss(reducer=pml.reducers.PerAnchorReducer(aggregation_func=aggregation_func))


def test_our_own_reducers_may_be_derived_from():
    class Largest(reducers.MeanReducer):
        def reduce(self, name, part):
            return part.total.max()

    x, y = batch()
    loss = losses.MultiSimilarityLoss(reducer=Largest())
    rows = losses.MultiSimilarityLoss(reducer=reducers.DoNothingReducer())(x, y)["loss"].total
    assert loss(x, y) == rows.max()


def test_a_distance_that_computes_something_else_is_refused():
    class Mine(distances.LpDistance):
        def forward(self, query_emb, ref_emb=None):
            return super().forward(query_emb, ref_emb) * 2

    with pytest.raises(TypeError, match="Mine defines a forward of its own"):
        losses.ContrastiveLoss(distance=Mine())

    class Plain(distances.LpDistance):
        """Adds nothing but a name."""

    x, y = batch()
    assert losses.ContrastiveLoss(distance=Plain())(x, y) == losses.ContrastiveLoss()(x, y)


def test_settings_of_known_objects_are_taken_as_they_are_now(pml):
    x, y = batch()
    reducer = pml.reducers.AvgNonZeroReducer()
    reducer.low = 0.7
    ours, theirs = losses.MultiSimilarityLoss(reducer=reducer), pml.losses.MultiSimilarityLoss(reducer=reducer)
    torch.testing.assert_close(ours(x, y), theirs(x, y))
    distance = pml.distances.LpDistance()
    distance.power, distance.normalize_embeddings = 2, False
    ours, theirs = losses.ContrastiveLoss(distance=distance), pml.losses.ContrastiveLoss(distance=distance)
    torch.testing.assert_close(ours(x, y), theirs(x, y))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d.CosineSimilarity(p=1), "p=1"),
        (lambda d: d.DotProductSimilarity(p=3), "p=3"),
        (lambda d: d.DotProductSimilarity(power=2), "power=2"),
        (lambda d: d.LpDistance(p=1), "p=1"),
        (lambda d: d.LpDistance(power=3), "power=3"),
    ],
)
def test_settings_that_no_kernel_streams_are_refused(make, message, pml):
    with pytest.raises(ValueError, match=message):
        losses.ContrastiveLoss(distance=make(pml.distances))


def test_a_regularisers_own_norm_is_not_dropped(pml):
    theirs = pml.regularizers.CenterInvariantRegularizer(
        distance=pml.distances.LpDistance(p=1, normalize_embeddings=False)
    )
    with pytest.raises(ValueError, match="p=1"):
        regularizers.accept(theirs)


def test_no_other_package_is_imported():
    code = ("import sys, torch; from dml_kernels import losses\n"
            "class SumReducer(torch.nn.Module): pass\n"
            "try: losses.ContrastiveLoss(reducer=SumReducer())\n"
            "except TypeError: print('pytorch_metric_learning' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"

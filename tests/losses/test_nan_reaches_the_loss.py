"""A NaN or infinite embedding reaches the value of every loss, whatever the reducer leaves out."""

from __future__ import annotations

import re

import pytest
import torch

from dml_kernels import distances, losses, reducers
from dml_kernels import functional as F
from dml_kernels.losses import REGISTRY
from tests.support.problems import randn

N, C, D = 24, 4, 5
REDUCERS = {
    "the default": lambda: None,
    "mean": reducers.MeanReducer,
    "sum": reducers.SumReducer,
    "average of non-zero": reducers.AvgNonZeroReducer,
    "threshold": lambda: reducers.ThresholdReducer(low=0),
    "two thresholds": lambda: reducers.ThresholdReducer(low=0.1, high=100.0),
    "divisor": reducers.DivisorReducer,
    "per anchor": reducers.PerAnchorReducer,
    "per anchor, non-zero": lambda: reducers.PerAnchorReducer(reducers.AvgNonZeroReducer()),
    "class weights": lambda: reducers.ClassWeightedReducer(torch.arange(1, C + 1)),
    "several": lambda: reducers.MultipleReducers({"pos_loss": reducers.AvgNonZeroReducer()}, reducers.SumReducer()),
}
TUPLES = {
    "all": None,
    # Row 0 is an anchor, a positive or a negative.
    "triplets": ((0, 8, 12, 1), (4, 12, 8, 9), (3, 3, 2, 0)),
    "pairs": ((0, 8, 12, 1), (4, 12, 8, 9), (0, 8, 1, 5), (3, 3, 0, 2)),
}


def made(name, **options):
    kind = REGISTRY[name].loss
    return kind(num_classes=C, embedding_size=D, **options) if REGISTRY[name].family == "proxies" else kind(**options)


def batch():
    x, y = randn(N, D, seed=1).double(), torch.arange(N) % C
    return x, y


def refused(loss, *call):
    """Whether the reducer refuses the kind of terms that the loss has, for any values."""
    try:
        loss(*call)
    except ValueError as error:
        return re.search("not kept|states no divisor|no mean per anchor", str(error))
    return False


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("name", [n for n, e in REGISTRY.items() if e.family != "clusters"])
def test_no_reducer_drops_it(name, reducer):
    loss = made(name, reducer=REDUCERS[reducer]()).double()
    for kind, chosen in TUPLES.items():
        tuples = None if chosen is None else tuple(torch.tensor(t) for t in chosen)
        x, y = batch()
        if refused(loss, x, y, tuples):
            continue
        assert loss(x, y, tuples).isfinite(), kind
        for bad in (torch.nan, torch.inf, -torch.inf):
            for entry in (slice(None), 2):
                x, _ = batch()
                x[0, entry] = bad
                assert not loss(x, y, tuples).isfinite(), (kind, bad)


@pytest.mark.parametrize("name", [n for n, e in REGISTRY.items() if e.family != "clusters"])
def test_no_option_drops_it(name):
    for options in REGISTRY[name].options:
        given = dict(options)
        if REGISTRY[name].family == "proxies":
            given.pop("metric", None)
        loss = made(name, **given).double()
        x, y = batch()
        for reference in ({}, {"ref_emb": randn(N, D, seed=5).double(), "ref_labels": y}):
            if reference and not loss.takes_references:
                continue
            assert loss(x, y, **reference).isfinite()
            bad = x.clone()
            bad[0] = torch.nan
            assert loss(bad, y, **reference).isnan()


def test_a_nan_reference_reaches_the_loss():
    x, y = batch()
    w = randn(N, D, seed=5).double()
    w[3, 1] = torch.nan
    for name, entry in REGISTRY.items():
        if entry.family == "pairs" and entry.loss.takes_references:
            assert not entry.loss()(x, y, ref_emb=w, ref_labels=y).isfinite(), name


def test_an_ignored_row_that_is_nan_changes_nothing():
    x, y = batch()
    y[0] = -100
    bad = x.clone()
    bad[0] = torch.nan
    for name, entry in REGISTRY.items():
        if entry.family != "clusters":
            loss = made(name).double()
            torch.testing.assert_close(loss(bad, y), loss(x, y), msg=name)


@pytest.mark.cpp
@pytest.mark.parametrize(
    "policy", [("linear", ()), ("quadratic", (0.4,)), ("max_pool", (2,)), ("softmax_pool", (2, 0.3))]
)
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_an_ignored_bank_entry_that_is_nan_is_in_no_set(backend, policy):
    centres = 2 if policy[0].endswith("pool") else 1
    x, w, y, c = (
        randn(N, D, seed=1).double(),
        randn(N * centres, D, seed=2).double(),
        torch.arange(N) % C,
        torch.arange(N) % C,
    )
    c[[2, 7]] = -100
    spoilt = w.view(N, centres, D).clone()
    spoilt[2], spoilt[7, 0] = torch.nan, torch.inf
    options = {"normalize": True, "same": (-2, 0.1), "sums": True, "backend": backend}
    options |= {"policy": policy[0], "policy_params": policy[1]}
    clean, found = (F.masked_logsumexp(x, t, y, c, **options) for t in (w, spoilt.view_as(w)))
    torch.testing.assert_close(tuple(found), tuple(clean))


def test_a_listed_pair_that_is_nan_reaches_every_reduction_of_the_list():
    x, y = batch()
    x[0] = torch.nan
    tuples = tuple(torch.tensor(t) for t in TUPLES["pairs"])
    for distance in (distances.LpDistance(normalize_embeddings=False), distances.CosineSimilarity()):
        for name in ("GeneralizedLiftedStructureLoss", "MultiSimilarityLoss", "ContrastiveLoss", "NTXentLoss"):
            assert getattr(losses, name)(distance=distance)(x, y, tuples).isnan(), name


@pytest.mark.parametrize(
    "name", ["MultiSimilarityLoss", "ContrastiveLoss", "TripletMarginLoss", "ProxyAnchorLoss", "CosFaceLoss"]
)
def test_labels_beyond_the_class_weights_are_refused(name):
    loss = made(name, reducer=reducers.ClassWeightedReducer(torch.ones(C - 1))).double()
    x, y = batch()
    with pytest.raises(ValueError, match=rf"labels must be in \[0, {C - 1}\).*got {C - 1}"):
        loss(x, y)
    if name != "ProxyAnchorLoss":  # one term a proxy
        y = y.clamp_max(C - 2)
        y[1] = -100  # takes no part, needs no weight
        torch.testing.assert_close(loss(x, y), made_with_mean(name, loss)(x, y))


def made_with_mean(name, like):
    loss = made(name, reducer=reducers.MeanReducer()).double()
    loss.load_state_dict(like.state_dict())
    return loss


def test_where_labels_are_not_read_one_without_a_weight_gives_nan():
    loss = losses.MultiSimilarityLoss(reducer=reducers.ClassWeightedReducer(torch.ones(C - 1)))
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    x, y = batch()
    assert compiled(x, y).isnan()
    torch.testing.assert_close(compiled(x, y.clamp_max(C - 2)), loss(x, y.clamp_max(C - 2)))

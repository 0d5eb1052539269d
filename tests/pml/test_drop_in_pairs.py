"""Pair losses compared with pytorch-metric-learning 2.9.0: the same numbers where it is right, else the truth.

Every loss runs without a tuple, with pairs and with triplets (some listed twice), in the batch and with references, and
with every reducer that either library takes.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from dml_kernels import distances, losses, reducers
from dml_kernels.losses.circle import circle_reference
from dml_kernels.losses.nca import nca_reference
from tests.support.problems import randint, randn

CLASSES = 6
NAMES = (
    "CircleLoss", "ContrastiveLoss", "GeneralizedLiftedStructureLoss", "MarginLoss", "MultiSimilarityLoss", "NCALoss",
    "NPairsLoss", "SupConLoss",
)  # fmt: skip
OPTIONS = {
    "ContrastiveLoss": {"pos_margin": 0.3, "neg_margin": 1.2},
    "MarginLoss": {"nu": 0.3, "learn_beta": True, "num_classes": CLASSES},
    "MultiSimilarityLoss": {"beta": 5},
    "CircleLoss": {"gamma": 8},
}
# Both libraries refuse references.
WITHIN_THE_BATCH = ("NPairsLoss",)
# pytorch-metric-learning returns (N, 1) terms, whose product with (N,) class weights is an N x N matrix.
COLUMNS = ("CircleLoss", "GeneralizedLiftedStructureLoss", "MultiSimilarityLoss")
REDUCERS = {
    "default": None, "mean": "MeanReducer", "sum": "SumReducer", "non-zero": "AvgNonZeroReducer",
    "per anchor": "PerAnchorReducer", "class weights": "ClassWeightedReducer",
}  # fmt: skip
on_names = pytest.mark.parametrize("name", NAMES)
on_tuples = pytest.mark.parametrize("kind", [None, "pairs", "triplets"])
on_both = pytest.mark.parametrize("with_refs", [False, True], ids=["batch", "ref_emb"])


def problem(seed=0):
    y, c = randint(0, CLASSES - 1, 24, seed=seed + 1), randint(0, CLASSES, 17, seed=seed + 2)
    return randn(24, 7, seed=seed), y, randn(17, 7, seed=seed + 3), c


def tuples(kind, y, c, repeats=True):
    """A miner's tuple; some pairs are listed more than once."""
    same = y[:, None] == c
    different = ~same
    if c is y:
        same = same & ~torch.eye(len(y), dtype=torch.bool)
    if kind == "pairs":
        sets = [s.nonzero(as_tuple=True) for s in (same, different)]
        picks = [torch.randint(0, len(s[0]), (40,)) if repeats else torch.randperm(len(s[0]))[:40] for s in sets]
        return tuple(t[i] for s, i in zip(sets, picks) for t in s)
    every = (same[:, :, None] & different[:, None]).nonzero(as_tuple=True)
    pick = torch.randint(0, len(every[0]), (60,))
    return None if kind is None else tuple(t[pick] for t in every)


def value_and_grads(loss, x, y, tuples=None, refs=None):
    leaves = [t.clone().requires_grad_() for t in (x, *(refs[:1] if refs else ()))]
    value = loss(leaves[0], y, tuples, *((leaves[1], refs[1]) if refs else ()))
    parameters = [p for p in loss.parameters() if p.requires_grad]
    value.sum().backward()
    return {
        "value": value.detach().sum(),
        **{f"grad {i}": t.grad for i, t in enumerate(leaves)},
        **{f"grad of parameter {i}": p.grad for i, p in enumerate(parameters)},
    }


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=lambda m, key=key: f"{key}: {m}", **tolerance)


def reducer(pml, which):
    name = REDUCERS[which]
    if name == "ClassWeightedReducer":
        return pml.reducers.ClassWeightedReducer(torch.linspace(1, 2, CLASSES).double())
    return None if name is None else getattr(pml.reducers, name)()


@pytest.mark.parametrize("which", REDUCERS)
@on_both
@on_tuples
@on_names
def test_value_and_gradients_are_theirs(name, kind, with_refs, which, pml):
    if with_refs and name in WITHIN_THE_BATCH:
        return
    if which == "class weights" and name in COLUMNS:
        return  # see test_class_weights_meet_their_own_anchors
    if which == "per anchor" and (name == "MarginLoss" or (with_refs and name == "ContrastiveLoss")):
        return  # pytorch-metric-learning has no mean of triplets, and assumes as many references as rows
    x, y, w, c = problem()
    refs = (w, c) if with_refs else None
    listed = None
    if kind:
        listed = tuples(kind, y, c if with_refs else y)
        if which == "per anchor" and name == "ContrastiveLoss":  # pytorch-metric-learning keeps one of a repeated pair
            listed = tuples("pairs", y, y, repeats=False)
    found, expected = (
        value_and_grads(getattr(lib, name)(reducer=reducer(pml, which), **OPTIONS.get(name, {})).double(),
                        x, y, listed, refs)
        for lib in (losses, pml.losses)
    )  # fmt: skip
    assert_same(found, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", [None, "triplets"])
@pytest.mark.parametrize(
    "distance",
    [
        ("LpDistance", {}),
        ("LpDistance", {"power": 2}),
        ("LpDistance", {"normalize_embeddings": False}),
        ("CosineSimilarity", {}),
        ("DotProductSimilarity", {"normalize_embeddings": False}),
    ],
    ids=str,
)
@on_names
def test_their_distances_mean_the_same(name, distance, kind, pml):
    if name == "CircleLoss" and distance[0] != "CosineSimilarity":
        return  # the cosine alone
    x, y, _, _ = problem()
    kind_of, options = distance
    listed = tuples(kind, y, y)
    given = getattr(pml.distances, kind_of)(**options)
    own = {"MarginLoss": {"beta": 0.7}}.get(name, OPTIONS.get(name, {}))
    expected = value_and_grads(getattr(pml.losses, name)(distance=given, **own).double(), x, y, listed)
    for one in (given, getattr(distances, kind_of)(**options)):
        found = value_and_grads(getattr(losses, name)(distance=one, **own).double(), x, y, listed)
        assert_same(found, expected, rtol=1e-6, atol=1e-7)


@on_names
def test_defaults_and_attributes_are_theirs(name, pml):
    theirs, ours = getattr(pml.losses, name)(), getattr(losses, name)()
    assert (
        type(ours.reducer).__name__ == type(theirs.reducer).__name__
        or type(theirs.reducer).__name__ == "MultipleReducers"
    )
    assert ours.distance.is_inverted == theirs.distance.is_inverted
    assert ours.distance.normalize_embeddings == theirs.distance.normalize_embeddings
    for attribute in getattr(theirs, "_record_these", ()):
        if attribute != "num_pairs":
            assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    x, y, _, _ = problem()
    torch.testing.assert_close(ours.double()(x, y), theirs.double()(x, y), rtol=1e-7, atol=1e-8)


def test_parts_have_their_names(pml):
    for name in ("ContrastiveLoss", "MarginLoss"):
        parts = getattr(losses, name)(reducer=reducers.DoNothingReducer(), **OPTIONS[name])(*problem()[:2])
        assert list(parts) == getattr(pml.losses, name)()._sub_loss_names()
    chosen = {"pos_loss": "MeanReducer", "neg_loss": "SumReducer"}
    x, y, _, _ = problem()
    found, expected = (
        value_and_grads(
            loss(reducer=multiple({k: getattr(pml.reducers, r)() for k, r in chosen.items()})).double(), x, y
        )
        for loss, multiple in (
            (losses.ContrastiveLoss, pml.reducers.MultipleReducers),
            (pml.losses.ContrastiveLoss, pml.reducers.MultipleReducers),
        )
    )
    assert_same(found, expected)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "NPairsLoss"])
def test_their_miners_tuples_are_taken(name, pml):
    from pytorch_metric_learning import miners

    x, y, _, _ = problem()
    for miner in (miners.MultiSimilarityMiner(), miners.TripletMarginMiner(), miners.BatchHardMiner()):
        listed = miner(x, y)
        found, expected = (
            value_and_grads(getattr(lib, name)(**OPTIONS.get(name, {})).double(), x, y, listed)
            for lib in (losses, pml.losses)
        )
        assert_same(found, expected, rtol=1e-7, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# Where pytorch-metric-learning is wrong


@pytest.mark.parametrize("name", COLUMNS)
def test_class_weights_meet_their_own_anchors(name, pml):
    x, y, _, _ = problem()
    weights = torch.linspace(1, 2, CLASSES).double()
    call = {lib: getattr(module, name) for lib, module in (("ours", losses), ("theirs", pml.losses))}
    terms = call["ours"](reducer=reducers.DoNothingReducer())(x, y)["loss"].total
    truth = (terms * weights[y]).mean()
    ours = call["ours"](reducer=reducers.ClassWeightedReducer(weights))(x, y)
    torch.testing.assert_close(ours, truth)
    theirs = call["theirs"](reducer=pml.reducers.ClassWeightedReducer(weights))(x, y)
    assert (
        theirs - terms.mean() * weights[y].mean()
    ).abs() < 1e-6  # every anchor with every weight: the reason to differ


def test_an_underflowed_anchor_counts_in_nca(pml):
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.01], [1.0, 0.01], [1.0, 0.02]])
    y = torch.tensor([0, 0, 1, 1])
    truth = nca_reference(x.double(), y, softmax_scale=100.0)
    found = value_and_grads(losses.NCALoss(softmax_scale=100), x, y)
    torch.testing.assert_close(found["value"].double(), truth, rtol=1e-5, atol=0.0)
    assert found["grad 0"].isfinite().all()
    assert found["grad 0"][0].count_nonzero() > 0
    theirs = pml.losses.NCALoss(softmax_scale=100)(x, y)
    assert theirs < truth / 2


def test_one_listed_pair_counts(pml):
    x, y, _, _ = problem()
    pair = tuple(t[:1] for t in tuples("pairs", y, y))
    loss = losses.ContrastiveLoss(neg_margin=2)
    d = torch.cdist(*[torch.nn.functional.normalize(x)] * 2)
    torch.testing.assert_close(loss(x, y, pair), d[pair[0], pair[1]].sum() + 2 - d[pair[2], pair[3]].sum())
    assert pml.losses.ContrastiveLoss(neg_margin=2)(x, y, pair) == 0


def test_repeated_pairs_have_the_gradient_of_their_mean_per_anchor(pml):
    """pytorch-metric-learning overwrites repeats with each other and then gives each the whole gradient."""
    x = randn(3, 4, seed=1)
    y, a, p = torch.tensor([0, 0, 1]), torch.tensor([0, 0]), torch.tensor([1, 1])
    once, twice = (
        value_and_grads(losses.ContrastiveLoss(reducer=reducers.PerAnchorReducer()), x, y, (a[:k], p[:k], a[:2], p + 1))
        for k in (1, 2)
    )
    assert_same(twice, once)
    theirs = pml.losses.ContrastiveLoss(reducer=pml.reducers.PerAnchorReducer())
    assert (value_and_grads(theirs, x, y, (a, p, a, p + 1))["grad 0"] - once["grad 0"]).abs().max() > 0.01


def test_circle_in_half_precision_is_finite(pml):
    x, y, _, _ = problem()
    truth = circle_reference(x.half().double(), y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = value_and_grads(losses.CircleLoss(), x.half(), y)
    torch.testing.assert_close(found["value"].double(), truth, rtol=2e-3, atol=0.0)
    assert found["grad 0"].isfinite().all()


def test_the_loss_is_a_scalar_where_theirs_has_a_dimension():
    x, y, _, _ = problem()
    assert losses.MarginLoss(learn_beta=True, nu=1)(x, y).shape == ()

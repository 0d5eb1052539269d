"""TripletMarginLoss, NTXentLoss and LiftedStructureLoss compared with pytorch-metric-learning's of the same name.

The tests compare value and gradients in the batch, for a miner's tuples, with references, and with its reducers and
distances. Where pytorch-metric-learning is wrong, the test says so and shows by fp64 which is right.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from dml_kernels import losses
from dml_kernels.losses import REGISTRY
from tests.support.backends import require
from tests.support.problems import randint, randn

NAMES = ("TripletMarginLoss", "NTXentLoss", "LiftedStructureLoss")
on_names = pytest.mark.parametrize("name", NAMES)

SETTINGS = [
    ("TripletMarginLoss", {}),
    ("TripletMarginLoss", {"margin": 0.4}),
    ("TripletMarginLoss", {"margin": 0.2, "swap": True}),
    ("TripletMarginLoss", {"margin": 0.2, "smooth_loss": True}),
    ("TripletMarginLoss", {"margin": 0.2, "swap": True, "smooth_loss": True}),
    ("NTXentLoss", {}),
    ("NTXentLoss", {"temperature": 0.5}),
    ("LiftedStructureLoss", {}),
    ("LiftedStructureLoss", {"neg_margin": 0.5, "pos_margin": 0.3}),
]
on_settings = pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=[f"{n}-{s}" for n, s in SETTINGS])


def evaluate(loss, x, y, tuples=None, refs=None):
    leaves = [x.clone().requires_grad_()] + ([refs[0].clone().requires_grad_()] if refs else [])
    extra = {"ref_emb": leaves[1], "ref_labels": refs[1]} if refs else {}
    value = loss(leaves[0], y, tuples, **extra)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves))


def assert_same(ours, theirs, *args, **kwargs):
    for found, expected in zip(evaluate(ours, *args, **kwargs), evaluate(theirs, *args, **kwargs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def batch(n=20, d=6, classes=4, seed=0):
    return randn(n, d, seed=seed), randint(0, classes, n, seed=seed + 1)


@on_names
def test_arguments_and_defaults_are_theirs(name, pml):
    ours, theirs = (inspect.signature(m.__init__).parameters for m in (REGISTRY[name].loss, getattr(pml.losses, name)))
    names = [p for p in theirs if p not in ("self", "kwargs")]
    assert [p for p in ours if p not in ("self", "options")] == names
    assert all(ours[p].default == theirs[p].default for p in names)
    a, b = REGISTRY[name].loss(), getattr(pml.losses, name)()
    for part in ("distance", "reducer"):
        assert type(getattr(a, part)).__name__ == type(getattr(b, part)).__name__


@on_settings
def test_the_batch(name, settings, pml):
    pair = getattr(losses, name)(**settings), getattr(pml.losses, name)(**settings)
    assert_same(*pair, *batch())
    assert_same(*pair, *batch(classes=1))  # no negative
    assert_same(*pair, batch()[0], torch.arange(20))  # no positive


def all_pairs(y):
    same = (y[:, None] == y) & ~torch.eye(len(y), dtype=torch.bool)
    return (*same.nonzero(as_tuple=True), *(y[:, None] != y).nonzero(as_tuple=True))


@on_settings
def test_a_miners_tuples(name, settings, pml):
    x, y = batch()
    pair = getattr(losses, name)(**settings), getattr(pml.losses, name)(**settings)
    miners = pml.miners.TripletMarginMiner(0.1), pml.miners.MultiSimilarityMiner(0.05), pml.miners.BatchHardMiner()
    for miner in miners:
        assert_same(*pair, x, y, miner(x, y))
    i, j = (torch.randperm(len(t))[::2] for t in all_pairs(y)[::2])
    a1, p, a2, n = all_pairs(y)
    some = (a1[i], p[i], a2[j], n[j])
    assert_same(*pair, x, y, some)
    twice = tuple(torch.cat((t, t[:3])) for t in some)  # what is listed twice counts twice
    assert_same(*pair, x, y, twice)


RIGHT_WITH_REFERENCES = [
    (n, s) for n, s in SETTINGS if n == "NTXentLoss" or (n == "TripletMarginLoss" and not s.get("swap"))
]


@pytest.mark.parametrize(("name", "settings"), RIGHT_WITH_REFERENCES, ids=str)
def test_references(name, settings, pml):
    x, y = batch()
    refs = randn(27, 6, seed=5), randint(0, 5, 27, seed=6)
    pair = getattr(losses, name)(**settings), getattr(pml.losses, name)(**settings)
    assert_same(*pair, x, y, refs=refs)
    a = torch.randint(0, 20, (30,))
    assert_same(*pair, x, y, (a, torch.randint(0, 27, (30,)), torch.randint(0, 27, (30,))), refs=refs)


DISTANCES = [
    ("LpDistance", {}),
    ("LpDistance", {"power": 2}),
    ("LpDistance", {"normalize_embeddings": False}),
    ("CosineSimilarity", {}),
    ("DotProductSimilarity", {"normalize_embeddings": False}),
]


@pytest.mark.parametrize(("kind", "settings"), DISTANCES, ids=str)
@on_names
def test_their_distances(name, kind, settings, pml):
    distance = getattr(pml.distances, kind)(**settings)
    options = {"margin": 0.3, "swap": True} if name == "TripletMarginLoss" else {}
    options = {"temperature": 0.7} if name == "NTXentLoss" else options
    pair = getattr(losses, name)(distance=distance, **options), getattr(pml.losses, name)(distance=distance, **options)
    assert_same(*pair, *batch())


@pytest.mark.parametrize("reducer", ["MeanReducer", "SumReducer", "AvgNonZeroReducer", "ClassWeightedReducer"])
@on_names
def test_their_reducers(name, reducer, pml):
    weights = [torch.tensor([1.0, 0.5, 2.0, 3.0])] if reducer == "ClassWeightedReducer" else []
    kind = getattr(pml.losses, name)
    theirs = getattr(pml.reducers, reducer)(*weights)
    if weights and name == "LiftedStructureLoss":
        return  # the test below
    assert_same(getattr(losses, name)(reducer=theirs), kind(reducer=theirs), *batch())


def test_the_mean_per_anchor(pml):
    theirs = pml.reducers.PerAnchorReducer()
    assert_same(losses.NTXentLoss(reducer=theirs), pml.losses.NTXentLoss(reducer=theirs), *batch())


def test_lifted_terms_reduce_by_anchor_where_theirs_have_an_axis_too_many(pml):
    """In pytorch-metric-learning the terms are (P, 1), so that the mean per anchor raises, and class weights (P,) make
    P x P terms.
    """
    x, y = batch()
    weights = torch.tensor([1.0, 0.5, 2.0, 3.0])
    u = torch.nn.functional.normalize(x)
    d = (u[:, None] - u).norm(dim=2)
    same, different = (y[:, None] == y) & ~torch.eye(20, dtype=torch.bool), y[:, None] != y
    lse = torch.where(different, 1 - d, -torch.inf).logsumexp(1)
    terms = torch.where(same, (torch.logaddexp(lse[:, None], lse) + d).relu().square() / 2, 0)
    expected = {
        pml.reducers.ClassWeightedReducer(weights): (terms * weights[y][:, None]).sum() / same.sum(),
        pml.reducers.PerAnchorReducer(): (terms.sum(1) / same.sum(1)).mean(),
    }
    for reducer, truth in expected.items():
        torch.testing.assert_close(losses.LiftedStructureLoss(reducer=reducer)(x, y), truth)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        pml.losses.LiftedStructureLoss(reducer=pml.reducers.PerAnchorReducer())(x, y)
    theirs = pml.losses.LiftedStructureLoss(reducer=pml.reducers.ClassWeightedReducer(weights))(x, y)
    assert (theirs - next(iter(expected.values()))).abs() > 1e-3


def test_random_triplets_are_of_the_batch_and_seeded():
    x, y = batch(40, classes=5)
    loss = losses.TripletMarginLoss(margin=5, triplets_per_anchor=3, reducer=None)
    every = losses.TripletMarginLoss(margin=5)  # so large a margin that every term is over 0
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(loss(x, y))
    assert values[0] == values[1]
    assert values[0] != values[2]
    many = losses.TripletMarginLoss(margin=5, triplets_per_anchor=4000)(x, y)
    # The mean over the triplets of each anchor; anchors of small classes have fewer of them in the exact mean.
    weigh = torch.bincount(y)[y].double()
    same = weigh - 1
    d = torch.nn.functional.normalize(x)
    d = (d[:, None] - d).norm(dim=2)
    match = (y[:, None] == y) & ~torch.eye(40, dtype=torch.bool)
    per_anchor = 5 + torch.where(match, d, 0).sum(1) / same - torch.where(y[:, None] != y, d, 0).sum(1) / (40 - weigh)
    torch.testing.assert_close(many, per_anchor[same > 0].mean(), rtol=2e-3, atol=0)
    assert every(x, y) != many


def test_swap_with_references_compares_references_where_theirs_takes_a_row():
    """pytorch-metric-learning takes mat[p, n] as d_pn, which is row p of the batch although p counts references. No
    error shows this unless some p exceeds the batch.
    """
    theirs = require("pytorch_metric_learning").losses.TripletMarginLoss(margin=0.3, swap=True)
    ours = losses.TripletMarginLoss(margin=0.3, swap=True)
    x, y = batch()
    refs = randn(20, 6, seed=5), randint(0, 4, 20, seed=6)
    u, r = (torch.nn.functional.normalize(t) for t in (x, refs[0]))
    values = []
    for a in range(20):
        for p in (refs[1] == y[a]).nonzero().flatten():
            n = refs[1] != y[a]
            d_n = torch.minimum((u[a] - r[n]).norm(dim=1), (r[p] - r[n]).norm(dim=1))
            values.append(((u[a] - r[p]).norm() - d_n + 0.3).relu())
    truth = torch.cat(values)
    truth = truth[truth > 0].mean()
    torch.testing.assert_close(evaluate(ours, x, y, refs=refs)[0], truth)
    assert (evaluate(theirs, x, y, refs=refs)[0] - truth).abs() > 1e-3


def test_lifted_references_have_their_own_negatives_where_theirs_are_another_rows():
    theirs, ours = require("pytorch_metric_learning").losses.LiftedStructureLoss(), losses.LiftedStructureLoss()
    x, y = batch()
    refs = randn(20, 6, seed=5), randint(0, 4, 20, seed=6)
    truth = REGISTRY["LiftedStructureLoss"].reference(x, y, ref_emb=refs[0], ref_labels=refs[1])
    torch.testing.assert_close(evaluate(ours, x, y, refs=refs)[0], truth)
    assert (evaluate(theirs, x, y, refs=refs)[0] - truth).abs() > 1e-3


def test_a_pair_of_probability_0_keeps_its_loss_where_theirs_is_cut_off():
    """At temperature 0.001 with opposite positives -log p is 4,000; pytorch-metric-learning takes the logarithm of 0
    plus a small number.
    """
    x = torch.tensor([[1.0, 0], [-1, 0], [1, 0]])
    y = torch.tensor([0, 0, 1])
    ours, theirs = losses.NTXentLoss(0.001), require("pytorch_metric_learning").losses.NTXentLoss(0.001)
    truth = torch.tensor((2000.0 + 0.6931472) / 2)  # row 0: exp(1000) beside exp(-1000); row 1: as likely as not
    torch.testing.assert_close(evaluate(ours, x, y)[0], truth)
    assert (evaluate(theirs, x, y)[0] - truth).abs() > 100


def test_a_list_of_one_pair_is_a_loss_where_theirs_is_0():
    x, y = batch()
    one = tuple(torch.tensor([i]) for i in (0, 1, 2))
    ours, theirs = losses.NTXentLoss(), require("pytorch_metric_learning").losses.NTXentLoss()
    s = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T / 0.07
    truth = torch.nn.functional.softplus(s[0, 2] - s[0, 1])
    torch.testing.assert_close(evaluate(ours, x, y, one)[0], truth)
    assert evaluate(theirs, x, y, one)[0] == 0

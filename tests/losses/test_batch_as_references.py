"""The batch given as its own references: every row leaves its own copy out, as without references."""

from __future__ import annotations

import pytest
import torch

from dml_kernels import losses, miners
from dml_kernels.losses import REGISTRY, family
from tests.support.problems import randint, randn

PAIRS = [name for name, entry in family("pairs").items() if entry.loss.takes_references]
MINERS = ["BatchEasyHardMiner", "BatchHardMiner", "MultiSimilarityMiner", "PairMarginMiner", "TripletMarginMiner",
          "UniformMiner", "DistanceWeightedMiner"]  # fmt: skip
on_pairs = pytest.mark.parametrize("name", PAIRS)


def batch(n=14):
    return randn(n, 4, seed=3).double().requires_grad_(), randint(0, 4, n, seed=4)


def outcome(loss, x, y, **references):
    value = loss(x, y, **references)
    return value.detach(), torch.autograd.grad(value, x)[0]


def test_nt_xent_by_hand():
    x, y = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]], dtype=torch.float64), torch.tensor([0, 1, 0])
    # Positive pairs (0, 2) and (2, 0), cosine 0.6; the negative's cosines are 0 and 0.8.
    truth = torch.log1p(torch.exp(torch.tensor([0 - 0.6, 0.8 - 0.6], dtype=torch.float64) / 0.07)).mean()
    assert abs(truth - 1.4566) < 1e-4
    torch.testing.assert_close(losses.NTXentLoss()(x, y, ref_emb=x, ref_labels=y), truth)


@pytest.mark.parametrize("labels", ["the same", "equal"])
@on_pairs
def test_own_copies_are_left_out(name, labels, pml):
    ours, (x, y) = REGISTRY[name].loss(), batch()
    plain = outcome(ours, x, y)
    found = outcome(ours, x, y, ref_emb=x, ref_labels=y if labels == "the same" else y.clone())
    torch.testing.assert_close(found, plain)
    if labels == "the same" and name != "LiftedStructureLoss":
        torch.testing.assert_close(found[0], outcome(getattr(pml.losses, name)(), x, y, ref_emb=x, ref_labels=y)[0])


@on_pairs
def test_other_labels_of_the_same_rows_are_taken(name):
    """A row's own copy is then neither its positive nor its negative."""
    loss, (x, y) = REGISTRY[name].loss(), batch()
    c = y.roll(1)
    value = loss(x, y, ref_emb=x, ref_labels=c)
    apart = loss.batch(x, y, None, x.clone(), c, exclude=torch.arange(len(y)))
    if name != "LiftedStructureLoss":  # whose references leave their own copies out, too
        torch.testing.assert_close(value, loss.reduced(apart))
    torch.testing.assert_close(value, loss(*listed(x, y, c)))


def listed(x, y, c):
    other = ~torch.eye(len(y), dtype=torch.bool)
    same = y[:, None] == c
    return x, y, (*(same & other).nonzero(as_tuple=True), *(~same & other).nonzero(as_tuple=True)), x, c


@pytest.mark.parametrize("name", MINERS)
def test_miners_leave_own_copies_out(name, pml):
    miner, (x, y) = getattr(miners, name)(), batch(30)
    torch.manual_seed(0)
    plain = miner(x, y)
    torch.manual_seed(0)
    found = miner(x, y, x, y)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(miner(x, y, x, y.clone()), plain, strict=True))
    if name not in MINERS[-2:]:
        theirs = getattr(pml.miners, name)()(x, y, x, y)
        for group in ((0, 3),) if len(found) == 3 else ((0, 2), (2, 4)):
            a, b = (sorted(zip(*(t.tolist() for t in f[slice(*group)]), strict=True)) for f in (found, theirs))
            assert a == b


def test_two_views_with_one_labels_object_keep_the_pair_of_views(pml):
    """Row i and reference i are two views of one example, so they are a positive pair; pytorch-metric-learning takes
    them for copies.
    """
    x, y = batch()
    view = randn(14, 4, seed=9).double()
    loss = losses.NTXentLoss()
    value = loss(x, y, ref_emb=view, ref_labels=y)
    torch.testing.assert_close(value, loss(x, y, ref_emb=view, ref_labels=y.clone()))
    theirs = pml.losses.NTXentLoss()
    torch.testing.assert_close(value, theirs(x, y, ref_emb=view, ref_labels=y.clone()))
    assert (value - theirs(x, y, ref_emb=view, ref_labels=y)).abs() > 1e-3  # the reason to differ


@pytest.mark.parametrize("name", ["ProxyNCALoss", "ArcFaceLoss"])
def test_losses_on_proxies_take_the_batch_for_what_it_is(name, pml):
    x, y = batch()
    loss = getattr(losses, name)(4, 4).double()
    assert torch.equal(loss(x, y, ref_emb=x, ref_labels=y), loss(x, y))
    with pytest.raises(ValueError, match="does not take ref_emb"):
        loss(x, y, ref_emb=x.clone(), ref_labels=y)


def test_n_pairs_takes_the_batch_for_what_it_is(pml):
    x, y = batch()
    loss = losses.NPairsLoss()
    assert torch.equal(loss(x, y, ref_emb=x, ref_labels=y), loss(x, y))
    with pytest.raises(ValueError, match="takes no ref_emb"):
        loss(x, y, ref_emb=x, ref_labels=y.roll(1))


def test_a_compiled_loss_knows_the_batch_too():
    x, y = batch()
    loss = losses.ContrastiveLoss()
    compiled = torch.compile(lambda x, y, w, c: loss(x, y, ref_emb=w, ref_labels=c), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y, x, y), loss(x, y))
    torch.testing.assert_close(compiled(x, y, x.clone(), y), loss(x, y, ref_emb=x.clone(), ref_labels=y))

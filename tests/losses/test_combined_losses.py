"""MultipleLosses, SelfSupervisedLoss and triplets packaged in the batch, compared with pytorch-metric-learning's."""

from __future__ import annotations

import pytest
import torch

from dml_kernels import losses, miners
from tests.support.problems import randint, randn

C, D = 6, 5


def batch(n=24):
    return randn(n, D, seed=1), randint(0, C - 1, n, seed=2)


def outcome(loss, *arguments):
    x = arguments[0].clone().requires_grad_()
    value = loss(x, *arguments[1:])
    value.backward()
    return value.detach(), x.grad


def multiple(lib, mining, keyed, **options):
    """A contrastive, a triplet and a softmax loss; the second with a miner if ``mining``."""
    torch.manual_seed(3)
    several = [lib.ContrastiveLoss(), lib.TripletMarginLoss(0.1), lib.CosFaceLoss(C, D)]
    given = [None, mining.MultiSimilarityMiner(), None] if mining else None
    weights = [1, 0.23, 2.0]
    if keyed:
        several, weights = dict(zip("abc", several)), dict(zip("abc", weights))
        given = {"b": given[1]} if given else None
    return lib.MultipleLosses(several, miners=given, **({"weights": weights} | options)).double()


@pytest.mark.parametrize("keyed", [True, False], ids=["dict", "list"])
@pytest.mark.parametrize("weights", [{}, {"weights": None}], ids=["weights", "no weights"])
def test_the_weighted_sum_is_theirs(keyed, weights, pml):
    x, y = batch()
    for mined in (True, False):
        tuples = None if mined else miners.MultiSimilarityMiner()(x, y)
        found, expected = (
            outcome(multiple(lib, mining if mined else None, keyed, **weights), x, y, tuples)
            for lib, mining in ((losses, miners), (pml.losses, pml.miners))
        )
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_their_losses_and_miners_have_a_place_in_the_sum(pml):
    x, y = batch()
    sums = losses.MultipleLosses([pml.losses.AngularLoss(), losses.NTXentLoss()],
                                 miners=[pml.miners.AngularMiner(), None])  # fmt: skip
    expected = pml.losses.AngularLoss()(x, y, pml.miners.AngularMiner()(x, y)) + losses.NTXentLoss()(x, y)
    torch.testing.assert_close(sums(x, y), expected)


def test_parameters_state_and_attributes_are_those_of_the_parts():
    loss = multiple(losses, miners, keyed=True)
    assert set(loss.state_dict()) == {"losses.c.weight"}
    assert loss.weights == {"a": 1, "b": 0.23, "c": 2.0}
    assert list(loss.miners) == ["b"]
    assert losses.MultipleLosses([losses.NCALoss()]).weights == [1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": [1]}, ValueError, r"weights must be for the losses \[0, 1\]; got \[0\]"),
        ({"miners": [None]}, ValueError, "miners must be for the losses"),
        ({"weights": {"a": 1, "b": 2}}, TypeError, "weights must be a list"),
        ({"losses": [], "weights": None}, ValueError, "at least one loss"),
        ({"losses": losses.NCALoss()}, TypeError, "losses must be a dict or a list"),
        ({"losses": {"a": losses.NCALoss()}, "weights": {"b": 1}}, ValueError, r"\['a'\]; got \['b'\]"),
        ({"losses": {"a": losses.NCALoss()}, "miners": {"b": None}}, ValueError, "miners must be for the losses"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        losses.MultipleLosses(**({"losses": [losses.NCALoss(), losses.ContrastiveLoss()]} | arguments))


def test_tuples_and_miners_exclude_each_other():
    x, y = batch()
    with pytest.raises(ValueError, match="indices_tuple and miners"):
        multiple(losses, miners, keyed=True)(x, y, miners.MultiSimilarityMiner()(x, y))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss", "ContrastiveLoss", "TripletMarginLoss", "CircleLoss"])
def test_two_views_are_theirs(name, symmetric, pml):
    x, other = randn(12, D, seed=1), randn(12, D, seed=2)
    found, expected = (
        outcome(lib.SelfSupervisedLoss(getattr(lib, name)(), symmetric=symmetric).double(), x, other)
        for lib in (losses, pml.losses)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_views_of_two_shapes_or_around_proxies_are_refused():
    with pytest.raises(ValueError, match=r"one shape; got \(4, 5\) and \(3, 5\)"):
        losses.SelfSupervisedLoss(losses.NTXentLoss())(randn(4, D, seed=1), randn(3, D, seed=1))
    with pytest.raises(TypeError, match="pair loss of dml_kernels"):
        losses.SelfSupervisedLoss(losses.ProxyNCALoss(C, D))


def test_packaged_triplets_are_theirs(pml):
    x, y = batch()
    for found, expected in zip(
        *(lib.EmbeddingsAlreadyPackagedAsTriplets()(x, y) for lib in (miners, pml.miners)), strict=True
    ):
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="a multiple of 3; got 23 rows"):
        miners.EmbeddingsAlreadyPackagedAsTriplets()(x[:23], y[:23])

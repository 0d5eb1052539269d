"""Options of the losses on proxies that pytorch-metric-learning lacks; Modules: copies, autocast, compilation."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from dml_kernels import functional as F
from dml_kernels import losses, reducers, regularizers
from tests.support.pml_proxies import CASES, C, D, batch, outcome, triplets
from tests.support.problems import randint, randn


@pytest.mark.parametrize("name", ["NormalizedSoftmaxLoss", "CosFaceLoss", "ArcFaceLoss", "SphereFaceLoss",
                                  "SubCenterArcFaceLoss", "SoftTripleLoss"])  # fmt: skip
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_several_labels_a_row_are_the_mean_over_them(name, reduction):
    """This includes class weights and label smoothing, and compares with the dense reference."""
    entry = losses.REGISTRY[name]
    x, w = randn(6, D, seed=1), randn(C * entry.centres, D, seed=2)
    y = torch.tensor([[0, 3, -100], [1, -100, -100], [-100, -100, -100], [6, 5, 4], [-100, 2, 2], [3, 0, -100]])
    for more in ({}, {"label_smoothing": 0.2}, {"class_weight": torch.arange(C).double() + 1}):
        options = {**entry.options[0], **more, "reduction": reduction}
        found = entry.function(x, w, y, **options)
        torch.testing.assert_close(found, entry.reference(x, w, y, **options))
    # By hand: each label on its own.
    rows = entry.function(x, w, y, **entry.options[0], reduction="none")
    each = torch.stack([entry.function(x, w, y[:, i], **entry.options[0], reduction="none") for i in range(3)], 1)
    torch.testing.assert_close(rows, each.sum(1) / (y != -100).sum(1).clamp_min(1))
    loss = entry.loss(C, D, **entry.options[0], proxies=w)
    assert torch.equal(loss(x, y), entry.function(x, w, y, **entry.options[0]))
    weights = torch.tensor([1, 0, 0, 0.5, 0, 0.5]).double()
    tuples = (torch.tensor([0]), torch.tensor([3]), torch.tensor([0]), torch.tensor([5]))
    torch.testing.assert_close(loss(x, y, tuples), (rows * weights).sum() / 5)


@pytest.mark.parametrize("name", ["ProxyNCALoss", "ProxyAnchorLoss", "ProxyRankingLoss"])
def test_several_labels_a_row_are_refused_elsewhere(name):
    with pytest.raises(ValueError, match=r"labels must have shape \(6,\)"):
        getattr(losses, name)(C, D)(torch.ones(6, D), torch.zeros(6, 2, dtype=torch.int64))


@pytest.mark.parametrize("name", ["ProxyRankingLoss", "CosFaceLoss", "NormalizedSoftmaxLoss", "ProxyNCALoss"])
def test_class_weights_with_a_reducer_and_without(name):
    weight = torch.arange(C).double() + 1
    x, y = batch()
    y[4] = -100
    torch.manual_seed(0)
    plain = getattr(losses, name)(C, D, class_weight=weight, dtype=torch.float64)
    rows = getattr(losses, name)(C, D, reduction="none", proxies=plain.bank)(x, y)
    own = torch.where(y == -100, 0, weight[y.clamp_min(0)])
    expected = (rows * own).sum() / own.sum()
    torch.testing.assert_close(plain(x, y), expected)
    reduced = getattr(losses, name)(C, D, class_weight=weight, reducer=reducers.MeanReducer(), proxies=plain.bank)
    torch.testing.assert_close(reduced(x, y), expected)


def test_proxy_anchor_weighs_classes_through_its_reducer():
    with pytest.raises(ValueError, match="ClassWeightedReducer"):
        losses.ProxyAnchorLoss(C, D, class_weight=torch.ones(C))
    weight = torch.arange(C).double() + 1
    x, y = batch()
    loss = losses.ProxyAnchorLoss(C, D, reducer=reducers.ClassWeightedReducer(weight), dtype=torch.float64)
    parts = losses.ProxyAnchorLoss(C, D, reducer=reducers.DoNothingReducer(), proxies=loss.bank)(x, y)
    assert set(parts) == {"pos_loss", "neg_loss"}
    expected = sum((part.total * weight).mean() for part in parts.values())
    torch.testing.assert_close(loss(x, y), expected)
    assert parts["pos_loss"].divisor == len(y.unique())


@pytest.mark.parametrize("name", [*CASES, "ProxyRankingLoss"])
def test_copies_are_the_loss(name):
    loss = getattr(losses, name)(num_classes=C, embedding_size=D, weight_regularizer=regularizers.LpRegularizer())
    x, y = batch(dtype=torch.float32)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert other.bank.data_ptr() != loss.bank.data_ptr()
        assert torch.equal(other(x, y), loss(x, y))


@pytest.mark.parametrize("name", [*CASES, "ProxyRankingLoss"])
def test_autocast_multiplies_in_bf16_and_leaves_the_rest_in_fp32(name):
    loss = getattr(losses, name)(num_classes=C, embedding_size=D)
    x, y = batch(dtype=torch.float32)
    expected = loss(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(x, y)
    assert found.dtype == torch.float32
    assert found != expected
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    found.backward()
    assert loss.bank.grad.dtype == torch.float32


def test_a_learned_scale_gets_its_gradient():
    for name, scale in (("CosFaceLoss", "scale"), ("ArcFaceLoss", "scale"), ("SphereFaceLoss", "scale"),
                        ("NormalizedSoftmaxLoss", "temperature"), ("SoftTripleLoss", "la")):  # fmt: skip
        loss = getattr(losses, name)(C, D, dtype=torch.float64)
        x, y = batch()
        value = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        setattr(loss, scale, value)
        (grad,) = torch.autograd.grad(loss(x, y), value)
        h = 1e-6
        ends = []
        for sign in (1, -1):
            setattr(loss, scale, torch.nn.Parameter(torch.tensor(2.0 + sign * h, dtype=torch.float64)))
            ends.append(loss(x, y).item())
        torch.testing.assert_close(grad.item(), (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [*CASES, "ProxyRankingLoss"])
def test_a_module_with_everything_compiles_whole(name):
    torch._dynamo.reset()
    loss = getattr(losses, name)(
        num_classes=C, embedding_size=D, weight_regularizer=regularizers.LpRegularizer(), reducer=reducers.MeanReducer()
    )
    x, y = batch(dtype=torch.float32)
    tuples = triplets(y)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (outcome(f, lambda loss: loss.bank.grad, x, y, tuples) for f in (compiled, loss))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [*CASES, "ProxyRankingLoss"])
def test_a_few_steps_find_the_classes(name):
    """Every pull has the right sign: embeddings learned freely end nearest to a bank row of their class."""
    loss = getattr(losses, name)(num_classes=C, embedding_size=D)
    x = torch.nn.Parameter(randn(40, D, seed=3).float())
    y = torch.arange(40) % C
    optimiser = torch.optim.Adam([x, *loss.parameters()], lr=0.1)
    for _ in range(80):
        optimiser.zero_grad()
        loss(x, y).backward()
        optimiser.step()
    nearest = (torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(loss.bank).T).argmax(1)
    assert (nearest // (loss.bank_rows // C) == y).float().mean() > 0.95


def outliers_problem():
    x, y = randn(60, D, seed=1).float(), randint(0, C - 1, 60, seed=2)  # the last class has no examples
    return losses.SubCenterArcFaceLoss(num_classes=C, embedding_size=D), x, y


@pytest.mark.parametrize("threshold", [40, 75, 100])
def test_outliers_are_theirs(threshold, pml):
    ours, x, y = outliers_problem()
    theirs = pml.losses.SubCenterArcFaceLoss(num_classes=C, embedding_size=D)
    theirs.load_state_dict(ours.pml_state_dict())
    expected, centers = theirs.get_outliers(x, y, threshold=threshold)
    found, dominant = ours.get_outliers(x, y, threshold=threshold)
    assert len(found) > 0
    assert found.tolist() == expected.tolist()
    assert dominant.shape == (D, C)
    torch.testing.assert_close(dominant[:, : C - 1], centers[:, : C - 1].detach())
    assert dominant[:, C - 1].count_nonzero() == 0
    assert torch.equal(ours.get_outliers(x, y, threshold, return_dominant_centers=False), found)


def test_outliers_of_nothing_and_of_ignored_rows():
    ours, x, y = outliers_problem()
    assert ours.get_outliers(x[:0], y[:0])[0].numel() == 0
    kept, _ = ours.get_outliers(x[5:], y[5:])
    y[:5] = -100
    assert torch.equal(ours.get_outliers(x, y)[0], kept + 5)
    assert math.isfinite(ours(x, y).item())


@pytest.mark.parametrize("length", [0.0, 1e-20, 1e-3, 1.0])
@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_normalized_softmax_of_products_is_linear_in_embeddings_of_any_length(length, eps):
    """x . w^ needs no norm of x, so its gradient in a row shorter than eps, or of zeros, is that in any other row."""
    x, y = batch()
    x = torch.nn.functional.normalize(x.detach()) * length
    w = randn(C, D, seed=5)

    def ours(x):
        return F.normalized_softmax_loss(x, w, y, temperature=0.3, metric="dot", eps=eps)

    def dense(x):
        return torch.nn.functional.cross_entropy(x @ (w / w.norm(dim=1, keepdim=True).clamp_min(eps)).T / 0.3, y)

    x.requires_grad_()
    torch.testing.assert_close(ours(x), dense(x))
    torch.testing.assert_close(torch.autograd.grad(ours(x), x), torch.autograd.grad(dense(x), x))

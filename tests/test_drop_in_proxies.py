"""The losses with a learned bank beside pytorch-metric-learning 2.9.0: one import changed, and nothing else.

Where theirs is right, value and gradients are theirs; where it is not, fp64 says whose are right.
"""

from __future__ import annotations

import contextlib
import copy
import math
import pickle

import pytest
import torch
from helpers import randint, randn, require

from dml_kernels import distances, losses, reducers, regularizers

N, C, D = 12, 7, 5


@pytest.fixture(scope="module")
def pml():
    package = require("pytorch_metric_learning")
    for part in ("losses", "distances", "reducers", "regularizers", "miners"):
        require(f"pytorch_metric_learning.{part}")
    assert package.__version__ == "2.9.0"
    return package


# Their name; settings beyond the defaults; how many rows of the bank a class has.
CASES = {
    "ProxyNCALoss": ({}, {"softmax_scale": 9}),
    "ProxyAnchorLoss": ({}, {"margin": 0.3, "alpha": 5}),
    "NormalizedSoftmaxLoss": ({}, {"temperature": 0.3}),
    "CosFaceLoss": ({}, {"margin": 0.1, "scale": 5}),
    "ArcFaceLoss": ({}, {"margin": 50, "scale": 5}),
    "SphereFaceLoss": ({}, {"margin": 3, "scale": 2}),
    "LargeMarginSoftmaxLoss": ({}, {"margin": 3, "scale": 0.5}),
    "SubCenterArcFaceLoss": ({}, {"sub_centers": 2, "scale": 7}),
    "SoftTripleLoss": ({}, {"centers_per_class": 3, "la": 5, "gamma": 0.5, "margin": 0.2}),
}
on_cases = pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name, several in CASES.items() for options in several],
    ids=lambda value: value if isinstance(value, str) else str(value or "defaults"),
)
on_names = pytest.mark.parametrize("name", CASES)


def both(pml, name, options=None, dtype=torch.float64, **more):
    """Theirs and ours with the same start, from the same seed."""
    built = []
    for source in (pml.losses, losses):
        torch.manual_seed(5)
        given = {k: v(source) if callable(v) else v for k, v in more.items()}
        built.append(getattr(source, name)(num_classes=C, embedding_size=D, **(options or {}), **given).to(dtype))
    return built


def theirs_as_ours(theirs, ours):
    """Their parameter as (M, D) rows."""
    ((name, parameter),) = theirs.named_parameters()
    return parameter if name == ours.bank_name else parameter.t()


def batch(n=N, dtype=torch.float64):
    return randn(n, D, seed=1).to(dtype) * 2, randint(0, C, n, seed=2)


def outcome(loss, bank_grad, x, y, *rest):
    x = x.clone().requires_grad_()
    loss.zero_grad()
    value = loss(x, y, *rest)
    value.backward()
    return value.detach(), x.grad, bank_grad(loss)


def assert_theirs(theirs, ours, x, y, *rest):
    a = outcome(ours, lambda loss: loss.bank.grad, x, y, *rest)
    b = outcome(theirs, lambda loss: loss.get_parameter(next(iter(dict(loss.named_parameters())))).grad, x, y, *rest)
    if ours.transposed_name is not None:
        b = (*b[:2], b[2].t())
    for what, found, expected in zip(("value", "grad of embeddings", "grad of bank"), a, b, strict=True):
        torch.testing.assert_close(found, expected, msg=lambda m, what=what: f"{what}: {m}")


def triplets(y):
    """A miner's triplets, each row in a different number of them, some in none."""
    a, p, n = [], [], []
    for i in range(len(y) - 2):
        for j in range(len(y)):
            for k in range(i):
                if i != j and y[i] == y[j] and y[k] != y[i]:
                    a, p, n = [*a, i], [*p, j], [*n, k]
    assert len(a) > 3
    return tuple(torch.tensor(t) for t in (a, p, n))


TUPLES = {
    "none": lambda y: None,
    "triplets": triplets,
    "pairs": lambda y: (torch.tensor([0, 0, 3]), torch.tensor([1, 2, 4]), torch.tensor([5, 0]), torch.tensor([6, 0])),
    "empty": lambda y: (torch.zeros(0, dtype=torch.int64),) * 3,
}


@pytest.mark.parametrize("tuples", TUPLES)
@on_cases
def test_value_and_gradients_are_theirs(name, options, tuples, pml):
    theirs, ours = both(pml, name, options)
    x, y = batch()
    assert_theirs(theirs, ours, x, y, TUPLES[tuples](y))


@on_names
def test_the_seeded_start_is_theirs(name, pml):
    theirs, ours = both(pml, name)
    torch.testing.assert_close(ours.bank, theirs_as_ours(theirs, ours), rtol=0, atol=0)
    assert ours.bank.is_contiguous()


@on_names
def test_a_weight_init_func_of_theirs_gives_their_start(name, pml):
    from pytorch_metric_learning.utils.common_functions import TorchInitWrapper

    init = TorchInitWrapper(torch.nn.init.kaiming_uniform_, a=2)
    theirs, ours = both(pml, name, weight_init_func=lambda source: init)
    torch.testing.assert_close(ours.bank, theirs_as_ours(theirs, ours), rtol=0, atol=0)


def test_a_miners_own_tuple_serves(pml):
    theirs, ours = both(pml, "ArcFaceLoss")
    x, y = batch(40)
    tuples = pml.miners.TripletMarginMiner(margin=0.2)(x, y)
    assert len(tuples[0]) > 10
    assert_theirs(theirs, ours, x, y, tuples)


@pytest.mark.parametrize("regularizer", ["LpRegularizer", "ZeroMeanRegularizer", "CenterInvariantRegularizer",
                                         "RegularFaceRegularizer"])  # fmt: skip
@pytest.mark.parametrize("ours_given", [True, False], ids=["ours", "theirs"])
@pytest.mark.parametrize("name", ["ProxyNCALoss", "ProxyAnchorLoss", "CosFaceLoss", "SoftTripleLoss"])
def test_regularised_losses_are_theirs(name, ours_given, regularizer, pml):
    def make(source):
        module = regularizers if ours_given and source is losses else pml.regularizers
        return getattr(module, regularizer)()

    more = {"weight_regularizer": make, "weight_reg_weight": 0.3}
    if regularizer == "LpRegularizer":
        more |= {"embedding_regularizer": make, "embedding_reg_weight": 0.7}
    theirs, ours = both(pml, name, **more)
    assert isinstance(ours.weight_regularizer, getattr(regularizers, regularizer))
    x, y = batch()
    assert_theirs(theirs, ours, x, y)
    assert_theirs(theirs, ours, x, y, TUPLES["triplets"](y))


def test_soft_triple_with_its_papers_regulariser(pml):
    def make(source):
        return pml.regularizers.SparseCentersRegularizer(C, 10)

    theirs, ours = both(pml, "SoftTripleLoss", weight_regularizer=make, weight_reg_weight=0.2)
    assert isinstance(ours.weight_regularizer, regularizers.SparseCentersRegularizer)
    assert (ours.weight_regularizer.num_classes, ours.weight_regularizer.centers_per_class) == (C, 10)
    assert_theirs(theirs, ours, *batch())


REDUCERS = {
    "mean": lambda m: m.MeanReducer(),
    "sum": lambda m: m.SumReducer(),
    "avg non-zero": lambda m: m.AvgNonZeroReducer(),
    "threshold": lambda m: m.ThresholdReducer(low=0.5, high=40.0),
    "class weighted": lambda m: m.ClassWeightedReducer(torch.arange(C).double() + 0.5),
}


@pytest.mark.parametrize("tuples", ["none", "triplets"])
@pytest.mark.parametrize("ours_given", [True, False], ids=["ours", "theirs"])
@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("name", ["ProxyNCALoss", "CosFaceLoss"])
def test_reducers_are_theirs(name, reducer, ours_given, tuples, pml):
    def make(source):
        return REDUCERS[reducer](reducers if ours_given and source is losses else pml.reducers)

    theirs, ours = both(pml, name, reducer=make)
    x, y = batch()
    assert_theirs(theirs, ours, x, y, TUPLES[tuples](y))


@pytest.mark.parametrize(
    ("name", "distance"),
    [
        ("ProxyNCALoss", lambda m: m.LpDistance()),
        ("ProxyNCALoss", lambda m: m.LpDistance(power=2, normalize_embeddings=False)),
        ("ProxyNCALoss", lambda m: m.CosineSimilarity()),
        ("ProxyNCALoss", lambda m: m.DotProductSimilarity(normalize_embeddings=False)),
        ("ProxyAnchorLoss", lambda m: m.DotProductSimilarity(normalize_embeddings=False)),
        ("ProxyAnchorLoss", lambda m: m.LpDistance()),
        ("NormalizedSoftmaxLoss", lambda m: m.DotProductSimilarity(normalize_embeddings=False)),
        ("NormalizedSoftmaxLoss", lambda m: m.LpDistance(power=2)),
        ("NormalizedSoftmaxLoss", lambda m: m.LpDistance()),
    ],
)
@pytest.mark.parametrize("ours_given", [True, False], ids=["ours", "theirs"])
def test_distances_are_theirs(name, distance, ours_given, pml):
    def make(source):
        return distance(distances if ours_given and source is losses else pml.distances)

    theirs, ours = both(pml, name, distance=make)
    x, y = batch()
    assert_theirs(theirs, ours, x, y)
    torch.testing.assert_close(ours.get_logits(x), theirs.get_logits(x))


@pytest.mark.parametrize("name", ["CosFaceLoss", "ArcFaceLoss", "SphereFaceLoss", "SubCenterArcFaceLoss",
                                  "SoftTripleLoss"])  # fmt: skip
def test_a_distance_that_makes_no_sense_is_refused(name, pml):
    for distance in (distances.LpDistance(), pml.distances.LpDistance(), distances.DotProductSimilarity()):
        with pytest.raises(ValueError, match=f"{name} is defined on CosineSimilarity"):
            getattr(losses, name)(C, D, distance=distance)


@on_cases
def test_logits_are_theirs(name, options, pml):
    theirs, ours = both(pml, name, options)
    x, _ = batch()
    torch.testing.assert_close(ours.get_logits(x), theirs.get_logits(x))


# --- checkpoints


@on_names
def test_checkpoints_go_both_ways(name, pml):
    theirs, ours = both(pml, name)
    with torch.no_grad():
        ours.bank.mul_(2).add_(1)
    theirs.load_state_dict(ours.pml_state_dict())
    torch.testing.assert_close(theirs_as_ours(theirs, ours), ours.bank, rtol=0, atol=0)
    _, fresh = both(pml, name)
    fresh.load_state_dict(theirs.state_dict())
    assert torch.equal(fresh.bank, ours.bank)
    fresh.load_state_dict(both(pml, name)[1].state_dict())
    assert not torch.equal(fresh.bank, ours.bank)
    fresh.load_state_dict({"weight": ours.bank.detach()})  # as 3.x: rows are classes, whatever the loss
    assert torch.equal(fresh.bank, ours.bank)


@on_names
def test_a_checkpoint_inside_a_model_keeps_its_prefix_and_its_dtype(name, pml):
    theirs, ours = both(pml, name)
    model = torch.nn.ModuleDict({"head": copy.deepcopy(ours).float()})
    model.load_state_dict(torch.nn.ModuleDict({"head": theirs}).state_dict())
    assert model["head"].bank.dtype == torch.float32
    assert torch.equal(model["head"].bank, ours.bank.float())


@pytest.mark.parametrize(("name", "key"), [("CosFaceLoss", "W"), ("SoftTripleLoss", "fc")])
def test_a_checkpoint_of_another_shape_is_refused(name, key):
    loss = getattr(losses, name)(C, D)
    before = loss.bank.detach().clone()
    with pytest.raises(
        RuntimeError, match=rf"{key} must have shape \({D}, {len(before)}\).*got \({len(before)}, {D}\)"
    ):
        loss.load_state_dict({key: loss.bank.detach()})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        loss.load_state_dict({"weight": loss.bank.detach().t()})
    assert torch.equal(loss.bank, before)


@pytest.mark.parametrize(("name", "key"), [("ArcFaceLoss", "W"), ("SoftTripleLoss", "fc")])
def test_the_transpose_can_be_read_and_assigned(name, key):
    loss = getattr(losses, name)(C, D)
    assert torch.equal(getattr(loss, key), loss.weight.t())
    assert getattr(loss, key).data_ptr() == loss.weight.data_ptr()
    new = torch.randn(D, loss.weight.size(0))
    for value in (new, torch.nn.Parameter(new * 2)):
        setattr(loss, key, value)
        assert torch.equal(loss.weight.t(), value)
        assert loss.weight.is_leaf
        assert set(dict(loss.named_parameters())) == {"weight"}
    with pytest.raises(ValueError, match=f"{key} must be a tensor of shape"):
        setattr(loss, key, new.t())


# --- dtypes, devices, labels


@on_names
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_leaves_the_bank_in_fp32(name, dtype, pml):
    """Theirs casts the parameter to the embeddings' dtype, for good. Ours is as near to fp64 as fp32 proxies allow."""
    theirs, ours = both(pml, name, dtype=torch.float32)
    x, y = batch(dtype=dtype)
    before = ours.bank.detach().clone()
    value, grad, bank_grad = outcome(ours, lambda loss: loss.bank.grad, x, y)
    assert (value.dtype, grad.dtype, bank_grad.dtype) == (torch.float32, dtype, torch.float32)
    assert torch.equal(ours.bank, before)
    truth = copy.deepcopy(ours).double()(x.double(), y)
    assert abs(value.double() - truth) <= 0.02 * truth
    # Their distance has no bf16 on the CPU; the cast is done all the same.
    refused = pytest.raises(NotImplementedError, match="cdist")
    with refused if (name, dtype) == ("ProxyNCALoss", torch.bfloat16) else contextlib.nullcontext():
        theirs(x, y)
    assert theirs_as_ours(theirs, ours).dtype == dtype  # the reason to differ


@on_names
def test_minus_1_is_refused_or_ignored(name, pml):
    theirs, ours = both(pml, name)
    x, y = batch()
    y[3] = -1
    with pytest.raises(ValueError, match="labels"):
        ours(x, y)
    with pytest.raises(ValueError, match="labels"):
        ours(x, torch.full_like(y, C))
    ours.ignore_index = -1
    keep = y != -1
    torch.testing.assert_close(ours(x, y), theirs(x[keep], y[keep]))


@on_names
def test_what_means_nothing_here_is_refused(name):
    loss = getattr(losses, name)(num_classes=C, embedding_size=D)
    x, y = batch(dtype=torch.float32)
    for extra in ({"ref_emb": x}, {"ref_labels": y}):
        with pytest.raises(ValueError, match=next(iter(extra))):
            loss(x, y, **extra)
    with pytest.raises(ValueError, match="needs labels"):
        loss(x)
    with pytest.raises(ValueError, match=r"indices_tuple must hold rows in \[0, 12\)"):
        loss(x, y, (torch.tensor([0]), torch.tensor([12]), torch.tensor([3])))
    with pytest.raises(ValueError, match="both say how to reduce"):
        getattr(losses, name)(num_classes=C, embedding_size=D, reduction="sum", reducer=reducers.MeanReducer())
    assert torch.equal(loss(x, y), loss(x, y.int()))


def test_arcface_on_and_opposite_its_proxy_has_finite_gradients_where_theirs_are_not(pml):
    theirs, ours = both(pml, "ArcFaceLoss", dtype=torch.float32)
    with torch.no_grad():
        ours.W = torch.eye(C)[:D]
        theirs.W.copy_(ours.W)
    for sign in (1, -1):
        x, y = sign * torch.eye(C)[:D, :D].contiguous(), torch.arange(D)
        value, grad, bank_grad = outcome(ours, lambda loss: loss.bank.grad, x, y)
        assert grad.isfinite().all()
        assert bank_grad.isfinite().all()
        torch.testing.assert_close(value, theirs(x, y).detach())
    found = outcome(theirs, lambda loss: loss.W.grad, x, y)
    assert not (found[1].isfinite().all() and found[2].isfinite().all())  # the reason to differ


# --- beyond theirs


@pytest.mark.parametrize("name", ["NormalizedSoftmaxLoss", "CosFaceLoss", "ArcFaceLoss", "SphereFaceLoss",
                                  "SubCenterArcFaceLoss", "SoftTripleLoss"])  # fmt: skip
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_several_labels_a_row_are_the_mean_over_them(name, reduction):
    """And class weights, label smoothing with it, against the dense reference."""
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
    """The sign of every pull: embeddings learned freely end nearest to a bank row of their own class."""
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

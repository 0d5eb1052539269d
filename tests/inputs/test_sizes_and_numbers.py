"""Sizes and numbers are also taken as numpy scalars and () tensors; a meaningless value is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dml_kernels import clustering, evaluation, losses, miners, regularizers, samplers
from dml_kernels import functional as F

X, Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
AS_SIZES = [np.int64, np.int32, np.uint8, torch.tensor, np.array]
AS_NUMBERS = [np.float32, np.float64, np.int64, torch.tensor, lambda v: np.array(v), lambda v: torch.tensor(float(v))]


@pytest.mark.parametrize("kind", AS_SIZES)
def test_sizes_of_every_kind_are_integers(kind):
    four, three, two = kind(4), kind(3), kind(2)
    for name, entry in losses.family("proxies").items():
        more = {"centers_per_class": two} if name == "SoftTripleLoss" else {}
        more |= {"sub_centers": two} if name == "SubCenterArcFaceLoss" else {}
        loss = entry.loss(four, three, **more)
        assert type(loss.num_classes) is int
        assert type(loss.embedding_size) is int
        assert loss(X, Y).isfinite()
    memory = losses.CrossBatchMemory(losses.ContrastiveLoss(), three, kind(16))
    assert memory(X, Y).isfinite()
    assert losses.MarginLoss(num_classes=four, learn_beta=True)(X, Y).isfinite()
    assert losses.TripletMarginLoss(triplets_per_anchor=two)(X, Y).isfinite()
    assert miners.UniformMiner(two)(X, Y)[0].numel() == 16
    assert regularizers.SparseCentersRegularizer(four, two)(X).isfinite()
    assert len(samplers.MPerClassSampler(Y, two, four, kind(8), seed=three)) == 8
    index = clustering.ClusterIndex(Y, clusters_per_class=two, iterations=three, seed=kind(1))
    index.refresh(X)
    assert len(index) == 8
    assert len(next(iter(samplers.MagnetBatchSampler(index, two, two)))) == 4
    assert evaluation.recall_at_k(X, Y, [kind(1), two]).keys() == {1, 2}
    assert evaluation.nearest(X, three)[0].shape == (8, 3)
    assert evaluation.k_nearest_neighbours(X, X, Y, k=three, top=two).classes.shape == (8, 2)
    found = F.masked_argmax(X, X, Y, Y, noise_seed=three, ignore_index=kind(0))
    assert found.same is not None


def test_the_number_of_classes_from_labels():
    assert losses.ProxyNCALoss(Y.max() + 1, 3).num_classes == 4
    assert losses.ProxyNCALoss(Y.numpy().max() + 1, 3).num_classes == 4


@pytest.mark.parametrize("kind", AS_NUMBERS)
def test_numbers_of_every_kind_are_numbers(kind):
    wanted = losses.ContrastiveLoss(0, 2)(X, Y)
    torch.testing.assert_close(losses.ContrastiveLoss(kind(0), kind(2))(X, Y), wanted)
    wanted = F.masked_hinge_sum(X, X, Y, Y, different=(1.0, 2.0)).different
    torch.testing.assert_close(F.masked_hinge_sum(X, X, Y, Y, different=(kind(1), kind(2))).different, wanted)
    wanted = F.magnet_loss(X, Y, torch.arange(4), alpha=2.0)
    torch.testing.assert_close(F.magnet_loss(X, Y, torch.arange(4), alpha=kind(2)), wanted)


@pytest.mark.parametrize("loss", [losses.SphereFaceLoss, losses.LargeMarginSoftmaxLoss])
def test_a_margin_that_means_nothing_is_refused_at_once(loss):
    for margin in (10**9, 181, 10**400):
        with pytest.raises(ValueError, match="margin"):
            loss(4, 3, margin=margin)
    assert loss(4, 3, margin=180)(X, Y).isfinite()


PAIRS = torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([0, 2]), torch.tensor([2, 0])
EVERY_PAIR_LOSS = sorted({**losses.family("pairs"), **losses.family("proxies")})


@pytest.mark.parametrize("name", EVERY_PAIR_LOSS)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([True, False]), "indices_tuple must hold indices, not masks"),
        (torch.tensor([0.0, 1.0]), "indices_tuple must be integers"),
        (torch.tensor([0, 8]), r"\[0, 8\)"),
        (torch.tensor([0, -1]), r"\[0, 8\)"),
    ],
)
@pytest.mark.parametrize("place", range(4))
def test_a_tuple_of_no_indices_is_refused(name, bad, message, place):
    entry = losses.REGISTRY[name]
    loss = entry.loss(4, 3) if entry.family == "proxies" else entry.loss()
    place = place % 2 if name == "NPairsLoss" else place  # which takes the positive pairs alone
    pairs = [*PAIRS[:place], bad, *PAIRS[place + 1 :]]
    with pytest.raises((TypeError, ValueError), match=message):
        loss(X, Y, pairs)


# Proxy-Anchor takes no class weights.
@pytest.mark.parametrize("loss", sorted({*losses.family("proxies")} - {"ProxyAnchorLoss"}))
def test_class_weights_are_real_and_floating(loss):
    for bad in (torch.ones(4, dtype=torch.complex64), torch.ones(4).bool(), torch.ones(4).long()):
        with pytest.raises(TypeError, match="class_weight must be a floating dtype"):
            losses.REGISTRY[loss].loss(4, 3, class_weight=bad)


def test_a_view_with_its_sign_pending_is_read_with_its_sign():
    lazy = torch.complex(X, X).conj().imag
    assert lazy.is_neg()
    torch.testing.assert_close(F.normalize(lazy), -F.normalize(X))
    torch.testing.assert_close(F.normalized_distance(lazy, X), F.normalized_distance(-X, X))


def test_a_temperature_whose_inverse_overflows_is_refused():
    with pytest.raises(ValueError, match="scale must be finite; got inf"):
        losses.NormalizedSoftmaxLoss(4, 3, temperature=1e-309)(torch.ones(2, 3), torch.arange(2))

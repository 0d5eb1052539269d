"""Magnet's batches: their shape, the shares of the seed clusters, loss tracking, unusual classes, epochs, refreshes."""

from __future__ import annotations

import math

import pytest
import torch

from dml_kernels.clustering import ClusterIndex
from dml_kernels.samplers import MagnetBatchSampler
from tests.support.clusters import make_index


def clusters_of(index, batch):
    """The clusters of a batch, in the order of their examples."""
    return torch.unique_consecutive(index.clusters[batch]).tolist()


def rig(index, sizes):
    """Gives the index these cluster sizes and keeps the examples in clusters of their classes."""
    assert index.sizes.sum() == sum(sizes)
    index.clusters = index.clusters.clone()
    start = 0
    for cluster, size in enumerate(sizes):
        index.clusters[index._order[start : start + size]] = cluster
        start += size
    index.sizes = torch.tensor(sizes)
    return index


def test_a_batch_is_a_seed_its_nearest_impostors_and_examples_of_each():
    index = make_index([40] * 10, clusters_per_class=3)
    sampler = MagnetBatchSampler(index, 5, 4, batches=50)
    seen = set()
    for batch in sampler:
        assert len(batch) == 20
        assert all(type(i) is int for i in batch)
        seed, *impostors = clusters_of(index, batch)
        assert impostors == index.nearest_impostors(seed, 4).tolist()
        assert index.clusters[batch].tolist() == [c for c in (seed, *impostors) for _ in range(4)]
        for start in range(0, 20, 4):
            if index.sizes[index.clusters[batch[start]]] >= 4:
                assert len(set(batch[start : start + 4])) == 4
        seen |= set(batch)
    assert len(seen) > 200


def test_every_example_of_a_cluster_is_drawn_alike():
    index = make_index([7], clusters_per_class=1)
    sampler = MagnetBatchSampler(index, 1, 3, batches=1400)
    drawn = torch.tensor(list(sampler))
    assert drawn.shape == (1400, 3)
    assert all(len(set(batch)) == 3 for batch in drawn.tolist())
    # 600 expected of each, with a standard deviation of 19; of each of the 35 sets of three 40, with 6.
    assert (torch.bincount(drawn.flatten()) - 600).abs().max() < 80
    sets = torch.bincount((1 << drawn).sum(1))
    assert (sets > 0).sum() == 35
    assert (sets[sets > 0] - 40).abs().max() < 26


def seed_shares(sampler, draws=2000):
    sampler._batches = draws
    seeds = torch.tensor([int(sampler.index.clusters[batch[0]]) for batch in sampler])
    return torch.bincount(seeds, minlength=len(sampler.index)).double() / draws


def test_seeds_are_drawn_in_proportion_to_the_tracked_loss():
    index = make_index([30] * 3)
    sampler = MagnetBatchSampler(index, 2, 2)
    losses = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0, 4.0])
    sampler.update(torch.arange(6), losses)
    assert torch.allclose(sampler.probabilities(), losses.double() / 10)
    shares = seed_shares(sampler)
    assert shares[losses == 0].sum() == 0
    assert (shares - losses / 10).abs().max() < 0.04


def test_unseen_is_the_mean_of_the_seen_and_zero_is_zero():
    index = make_index([30] * 3)
    sampler = MagnetBatchSampler(index, 2, 2)
    assert torch.allclose(sampler.probabilities(), torch.full((6,), 1 / 6, dtype=torch.float64))
    assert sampler.losses.isnan().all()
    sampler.update(torch.tensor([1, 2, 4]), torch.tensor([0.0, 6.0, 3.0]))
    expected = torch.tensor([3.0, 0, 6, 3, 3, 3]).double()
    assert torch.allclose(sampler.probabilities(), expected / 18)
    assert (seed_shares(sampler) - expected / 18).abs().max() < 0.04
    assert sampler.losses[1] == 0
    assert sampler.losses[[0, 3, 5]].isnan().all()


@pytest.mark.parametrize("known", [[0], [0, 1, 2, 3, 4, 5]])
def test_where_all_tracked_losses_are_zero_the_draw_is_uniform(known):
    sampler = MagnetBatchSampler(make_index([30] * 3), 2, 2)
    sampler.update(torch.tensor(known), torch.zeros(len(known)))
    assert torch.allclose(sampler.probabilities(), torch.full((6,), 1 / 6, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_tiny_and_huge_losses_keep_their_proportions(scale):
    sampler = MagnetBatchSampler(make_index([30] * 3), 2, 2)
    sampler.update(torch.arange(5), scale * torch.tensor([0, 1e8, 1, 1e7, 1e8], dtype=torch.float64))
    assert sampler.probabilities().isfinite().all()
    assert sampler.probabilities()[1] / sampler.probabilities()[3] == pytest.approx(10)
    assert 0 < sampler.probabilities()[2] < 1e-8


def test_running_means():
    ids = torch.tensor([3, 3, 0, 3, -1])
    running = MagnetBatchSampler(make_index([30] * 3), momentum=0.1)
    running.update(ids, torch.tensor([1.0, 2.0, 0.25, 6.0, torch.nan]))
    assert running.losses[[0, 3]].tolist() == [0.25, 3.0]  # the first counts whole
    running.update(torch.tensor([3, 3], dtype=torch.int32), torch.tensor([0.0, 2.0], dtype=torch.float16))
    assert running.losses[[0, 3]].tolist() == pytest.approx([0.25, 0.9 * 3 + 0.1 * 1], rel=1e-14)
    plain = MagnetBatchSampler(running.index, momentum=None)
    plain.update(ids, torch.tensor([1.0, 2.0, 0.25, 6.0, 1.0]))
    plain.update(torch.tensor([3]), torch.tensor([11.0], requires_grad=True))
    assert plain.losses[[0, 3]].tolist() == [0.25, 5.0]
    plain.update(torch.tensor([], dtype=torch.int64), torch.tensor([]))
    plain.update(torch.tensor([-1]), torch.tensor([1.0]))
    assert plain.losses[[0, 3]].tolist() == [0.25, 5.0]


@pytest.mark.parametrize(
    ("clusters", "losses", "error", "match"),
    [
        ([0, 1], [1.0, torch.nan], ValueError, "NaN"),
        ([0, 1], [1.0, torch.inf], ValueError, "infinity"),
        ([0, 1], [1.0, -0.1], ValueError, "negative"),
        ([0, 6], [1.0, 1.0], ValueError, "under 6"),
        ([0, -2], [1.0, 1.0], ValueError, "under 6"),
        ([0, 1], [1.0], ValueError, "reduction='none'"),
        ([0, 1], 1.0, ValueError, "reduction='none'"),
        ([[0, 1]], [[1.0, 1.0]], ValueError, "shape"),
        ([0.0, 1.0], [1.0, 1.0], TypeError, "integer"),
        ([0, 1], [1, 1], TypeError, "floating"),
    ],
)
def test_bad_losses_are_refused_and_nothing_changes(clusters, losses, error, match):
    sampler = MagnetBatchSampler(make_index([30] * 3))
    sampler.update(torch.tensor([0]), torch.tensor([2.0]))
    before = sampler.losses
    with pytest.raises(error, match=match):
        sampler.update(torch.tensor(clusters), torch.tensor(losses))
    assert torch.equal(sampler.losses.nan_to_num(-1), before.nan_to_num(-1))


# Odd clusters


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_small_cluster_gives_all_it_has_and_then_some_again(size):
    index = make_index([size, 30], clusters_per_class=1)
    sampler = MagnetBatchSampler(index, 2, 4, batches=200)
    repeats = set()
    for batch in sampler:
        assert len(batch) == 8
        mine = [i for i in batch if index.clusters[i] == 0]
        assert len(mine) == 4
        assert set(mine) == set(index.members(0).tolist())
        assert len(set(batch) - set(mine)) == 4
        repeats.add(tuple(sorted(mine)))
    assert len(repeats) == {1: 1, 2: 3, 3: 3}[size]


def test_empty_clusters_are_never_drawn_and_weigh_nothing():
    index = rig(make_index([10, 10, 10]), [10, 0, 4, 6, 0, 10])
    sampler = MagnetBatchSampler(index, 6, 3, batches=300)
    sampler.update(torch.arange(6), torch.tensor([0.0, 100.0, 2.0, 0.0, 100.0, 2.0]))
    assert sampler.probabilities().tolist() == [0, 0, 0.5, 0, 0, 0.5]
    seeds = set()
    for batch in sampler:
        seed, *impostors = clusters_of(index, batch)
        seeds.add(seed)
        assert sorted(impostors) == {2: [0, 5], 5: [0, 2, 3]}[seed]
    assert seeds == {2, 5}
    # No cluster with a loss above 0 has examples, so draws are uniform over the others, without a division by 0.
    sampler.momentum = 1.0
    sampler.update(torch.tensor([2, 5]), torch.zeros(2))
    assert sampler.probabilities().tolist() == [0.25, 0, 0.25, 0.25, 0, 0.25]


def test_the_losses_of_empty_clusters_are_no_part_of_the_mean():
    index = rig(make_index([10, 10, 10]), [10, 0, 4, 6, 0, 10])
    sampler = MagnetBatchSampler(index)
    sampler.update(torch.tensor([0, 1]), torch.tensor([2.0, 100.0]))
    assert sampler.probabilities().tolist() == [0.25, 0, 0.25, 0.25, 0, 0.25]


def test_fewer_clusters_than_asked_for_make_a_smaller_batch():
    index = make_index([20, 20, 20])
    batches = list(MagnetBatchSampler(index, 12, 2))
    assert len(batches) == math.ceil(60 / 24)
    assert [len(batch) for batch in batches] == [(1 + 4) * 2] * 3


@pytest.mark.parametrize("count", [1, 20])
def test_a_single_class_gives_the_seed_alone(count):
    index = make_index([count], clusters_per_class=3)
    for batch in MagnetBatchSampler(index, 4, 2, batches=20):
        assert len(batch) == 2
        assert len(clusters_of(index, batch)) == 1


def test_ignored_examples_are_never_drawn():
    labels = torch.arange(60) % 3
    labels[::4] = -100
    index = ClusterIndex(labels)
    index.refresh(torch.randn(60, 3))
    drawn = {i for batch in MagnetBatchSampler(index, 3, 3, batches=300) for i in batch}
    assert drawn == set((labels != -100).nonzero().squeeze(1).tolist())
    assert len(MagnetBatchSampler(index, 3, 3)) == 5  # 45 / 9


def test_one_cluster_a_batch_has_no_impostors():
    index = make_index([9, 9])
    assert all(len(clusters_of(index, batch)) == 1 for batch in MagnetBatchSampler(index, 1, 4, batches=30))


# Epochs and refreshes


def test_seeded_and_each_epoch_draws_anew():
    index = make_index([30] * 8)
    first, same, other = (MagnetBatchSampler(index, 4, 3, seed=seed) for seed in (1, 1, 2))
    epochs = [list(first), list(first)]
    assert len(first) == len(epochs[0]) == len(epochs[1]) == 20
    assert epochs == [list(same), list(same)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(other)


def test_an_epoch_broken_off_is_not_continued():
    sampler = MagnetBatchSampler(make_index([30] * 8), 4, 3)
    next(iter(sampler))
    assert len(list(sampler)) == 20


def test_an_iterator_never_used_begins_no_epoch():
    """A DataLoader makes such an iterator."""
    sampler = MagnetBatchSampler(make_index([30] * 8), 4, 3)
    batches = iter(sampler)
    for _ in range(3):
        next(batches)
    iter(sampler)
    assert len(list(batches)) == 17


def test_the_global_generators_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(MagnetBatchSampler(make_index([30] * 4), 4, 3))
    assert torch.equal(torch.rand(3), expected)


def test_a_refresh_in_mid_epoch_is_taken_up_by_the_next_batch():
    labels = torch.arange(40) % 4
    index = ClusterIndex(labels, clusters_per_class=2)
    index.refresh(torch.randn(40, 3))
    batches = iter(MagnetBatchSampler(index, 4, 2, batches=40))
    for turn in range(40):
        if turn % 10 == 5:
            index.refresh(10 * torch.randn(40, 3))
        batch = next(batches)
        seed, *impostors = clusters_of(index, batch)
        assert impostors == index.nearest_impostors(seed, 3).tolist()
        assert index.clusters[batch].tolist() == [c for c in (seed, *impostors) for _ in range(2)]


def test_before_the_first_refresh_there_is_nothing_to_draw():
    sampler = MagnetBatchSampler(ClusterIndex(torch.arange(10)))
    with pytest.raises(RuntimeError, match="refresh"):
        next(iter(sampler))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"clusters_per_batch": 0}, "clusters_per_batch"),
        ({"examples_per_cluster": 0}, "examples_per_cluster"),
        ({"batches": 0}, "batches"),
        ({"momentum": 0.0}, "momentum"),
        ({"momentum": 1.5}, "momentum"),
        ({"momentum": float("nan")}, "momentum"),
    ],
)
def test_bad_construction_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        MagnetBatchSampler(make_index([4, 4]), **options)
    with pytest.raises(TypeError, match=r"examples_per_cluster must be a positive integer; got 1\.5"):
        MagnetBatchSampler(make_index([4, 4]), examples_per_cluster=1.5)
    with pytest.raises(TypeError, match="ClusterIndex"):
        MagnetBatchSampler(torch.arange(4))

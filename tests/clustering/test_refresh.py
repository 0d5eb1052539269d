"""The cluster index in use: slices and schedule, bad input, impostors, checkpoints, memory."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from dml_kernels.clustering import ClusterIndex
from dml_kernels.profiling import run_in_child
from tests.support.clusters import assert_consistent, blobs, saved, without_change


def test_slices_go_round_the_classes_and_give_what_a_whole_refresh_gives():
    embeddings, labels, _ = blobs([20, 5, 5, 5, 5, 20], spread=2.0)
    later = embeddings + torch.randn_like(embeddings)
    index, whole = ClusterIndex(labels, slices=3), ClusterIndex(labels)
    assert index.refresh(embeddings).classes == 6  # the first is whole
    whole.refresh(embeddings)
    whole.refresh(later)
    done = []
    for _ in range(3):
        before = index.clusters, index.centers
        report = index.refresh(later)
        done.append((report.examples, report.classes))
        changed = index.cluster_classes[(index.centers != before[1]).any(dim=1)].unique()
        assert len(changed) == report.classes
        others = ~torch.isin(labels, changed)
        assert torch.equal(index.clusters[others], before[0][others])
    assert done == [(20, 1), (20, 4), (20, 1)]
    assert torch.equal(index.clusters, whole.clusters)
    assert torch.equal(index.centers, whole.centers)
    assert index.variance == whole.variance
    assert_consistent(index, labels, later)
    assert index.refresh(later).examples == 20  # round again
    assert index.refresh(later, whole=True).examples == 60
    huge = ClusterIndex(torch.tensor([0] * 98 + [1, 2]), slices=10)
    assert huge._slices == [(0, 1), (1, 3)]  # nothing of a slice without a class


def test_it_is_due_first_and_then_every_so_often():
    embeddings, labels, _ = blobs([6, 6])
    index = ClusterIndex(labels, every=10)
    assert index.due(3)
    index.refresh(embeddings)
    assert [step for step in range(3, 50) if index.due(step) and index.refresh(embeddings)] == [13, 23, 33, 43]
    assert index.due(60)  # late is still due
    once = ClusterIndex(labels)
    assert once.due(0)
    once.refresh(embeddings)
    assert not once.due(10**9)
    assert index.refreshes == 5
    assert index.seconds > 0


def test_progress_counts_every_example(capfd):
    embeddings, labels, _ = blobs([300, 5, 7])
    index, seen = ClusterIndex(labels, block_examples=50), []
    index.refresh(embeddings, progress=seen.append)
    assert sum(seen) == 312
    assert len(seen) == 7
    index.refresh(embeddings, progress=True)
    assert "312/312" in capfd.readouterr().err


BAD = {
    "integers": (torch.zeros(24, 8, dtype=torch.int64), TypeError, "floating point"),
    "complex": (torch.zeros(24, 8, dtype=torch.complex64), TypeError, "floating point"),
    "a list": ([[0.0]] * 24, TypeError, "tensor or a function"),
    "rows": (torch.zeros(23, 8), ValueError, "24 labels"),
    "one dimension": (torch.zeros(24), ValueError, r"\(count, dimensions\)"),
    "no width": (torch.zeros(24, 0), ValueError, r"\(count, dimensions\)"),
    "a short answer": (lambda rows: torch.zeros(len(rows) - 1, 8), ValueError, "a row for each"),
    "no answer": (lambda rows: None, TypeError, "floating point"),
    "changing width": (lambda rows: torch.zeros(len(rows), 8 + int(rows[0])), ValueError, "dimensions"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("refreshed", [False, True])
def test_bad_embeddings_are_refused_and_nothing_changes(name, refreshed):
    embeddings, labels, _ = blobs([12, 12], shuffled=False)
    index = ClusterIndex(labels, block_examples=12)
    if refreshed:
        index.refresh(embeddings)
    given, error, match = BAD[name]
    without_change(index, error, match, lambda: index.refresh(given))
    index.refresh(embeddings)
    assert_consistent(index, labels, embeddings)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e16, -1e30])
@pytest.mark.parametrize("normalize", [False, True])
def test_bad_values_name_the_example_and_nothing_changes(value, normalize):
    embeddings, labels, _ = blobs([12, 12])
    index = ClusterIndex(labels, normalize=normalize, block_examples=12)
    index.refresh(embeddings)
    row = int((labels == 1).nonzero()[4])  # in the last block
    bad = embeddings.clone()
    bad[row, 3] = value
    without_change(index, ValueError, f"example {row} holds NaN", lambda: index.refresh(bad))


def test_an_error_or_interrupt_in_the_function_changes_nothing():
    embeddings, labels, _ = blobs([12, 12])
    index = ClusterIndex(labels, block_examples=12)
    index.refresh(embeddings)

    def fails(rows):
        if (labels[rows] == 1).any():
            raise KeyboardInterrupt
        return embeddings[rows] + 1

    without_change(index, KeyboardInterrupt, None, lambda: index.refresh(fails))


def test_a_slice_must_have_the_width_of_the_rest():
    embeddings, labels, _ = blobs([12, 12])
    index = ClusterIndex(labels, slices=2)
    index.refresh(embeddings)
    without_change(index, ValueError, "4 dimensions, the other clusters 8", lambda: index.refresh(embeddings[:, :4]))
    index.refresh(embeddings[:, :4], whole=True)
    assert_consistent(index, labels, embeddings[:, :4])


@pytest.mark.parametrize(
    ("labels", "options", "error", "match"),
    [
        (torch.zeros(3), {}, TypeError, "labels must be integers"),
        ([0.0, 1.0], {}, TypeError, "labels must be integers"),
        (torch.zeros(3, dtype=torch.bool), {}, TypeError, "labels must be integers"),
        (torch.zeros(3, 1, dtype=torch.int64), {}, ValueError, r"shape \(n,\)"),
        (torch.zeros(0, dtype=torch.int64), {}, ValueError, "no example"),
        (torch.full((3,), -100), {}, ValueError, "ignore_index"),
        (torch.arange(3), {"clusters_per_class": 0}, ValueError, "clusters_per_class"),
        (torch.arange(3), {"examples_per_cluster": 2.5}, TypeError, "examples_per_cluster"),
        (torch.arange(3), {"iterations": 0}, ValueError, "iterations"),
        (torch.arange(3), {"slices": True}, TypeError, "slices"),
        (torch.arange(3), {"every": 0}, ValueError, "every"),
        (torch.arange(3), {"every": float("nan")}, ValueError, "every"),
        (torch.zeros(9, dtype=torch.int64), {"block_examples": 2}, ValueError, "block_examples=2"),
    ],
)
def test_bad_construction_is_refused(labels, options, error, match):
    with pytest.raises(error, match=match):
        ClusterIndex(labels, **options)


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install faiss-cpu \(.*-e '\.\[demo\]'"):
        ClusterIndex(torch.arange(4))


def test_without_tqdm_only_its_bar_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    index = ClusterIndex(torch.arange(4))
    without_change(index, ImportError, "pip install tqdm", lambda: index.refresh(torch.rand(4, 2), progress=True))
    index.refresh(torch.rand(4, 2), progress=False)


def test_before_the_first_refresh_there_are_no_clusters():
    index = ClusterIndex(torch.arange(4))
    assert (index.clusters == -1).all()
    assert (index.sizes == 0).all()
    for call in (lambda: index.centers, lambda: index.variance, lambda: index.nearest_impostors(0, 1)):
        with pytest.raises(RuntimeError, match="refresh"):
            call()


# Impostors


def brute_force_impostors(index, cluster, count):
    distance = (index.centers.double() - index.centers[cluster].double()).square().sum(1)
    ids = sorted(range(len(index)), key=lambda j: (distance[j].item(), j))
    own = index.cluster_classes[cluster]
    return [j for j in ids if index.cluster_classes[j] != own and index.sizes[j] > 0][:count]


def test_impostors_are_the_nearest_non_empty_clusters_of_other_classes():
    embeddings, labels, _ = blobs([20] * 15)
    embeddings[labels == 4] = embeddings[labels == 4][0]  # one cluster of it, two empty
    index = ClusterIndex(labels)
    index.refresh(embeddings)
    assert (index.sizes == 0).sum() == 2
    for cluster in range(len(index)):
        for count in (0, 1, 5, 42, 1000):
            found = index.nearest_impostors(cluster, count)
            assert found.dtype == torch.int64
            assert found.tolist() == brute_force_impostors(index, cluster, count)
    assert len(index.nearest_impostors(0, 1000)) == 45 - 3 - 2


def test_impostors_are_told_apart_far_from_the_origin():
    """Distances by way of products would drown in their rounding."""
    index = ClusterIndex(torch.arange(60), clusters_per_class=1)
    index.refresh(3000 + torch.randn(60, 8))
    for cluster in range(60):
        assert index.nearest_impostors(cluster, 10).tolist() == brute_force_impostors(index, cluster, 10)


def test_equal_distances_rank_by_lowest_id():
    index = ClusterIndex(torch.arange(400), clusters_per_class=1)
    index.refresh(torch.tensor([[0.1, 0.7], [5.0, 1.0]]).repeat_interleave(200, dim=0))
    assert index.nearest_impostors(7, 250).tolist() == [i for i in range(251) if i != 7]
    assert index.nearest_impostors(300, 3).tolist() == [200, 201, 202]


def test_one_class_has_no_impostors_and_bad_requests_are_refused():
    index = ClusterIndex(torch.zeros(9, dtype=torch.int64))
    index.refresh(torch.randn(9, 2))
    assert index.nearest_impostors(1, 4).tolist() == []
    for cluster in (-1, 3):
        with pytest.raises(ValueError, match="out of range"):
            index.nearest_impostors(cluster, 1)
        with pytest.raises(ValueError, match="out of range"):
            index.members(cluster)
    with pytest.raises(ValueError, match="count"):
        index.nearest_impostors(0, -1)


# Checkpoints


def test_a_restored_index_goes_on_as_the_saved_one_would_have():
    embeddings, labels, _ = blobs([20, 30, 25, 10], spread=2.0)
    options = {"slices": 3, "every": 5}
    first, second = ClusterIndex(labels, **options), ClusterIndex(labels, **options)
    first.due(0)
    first.refresh(embeddings)
    first.due(5)
    first.refresh(embeddings + 1)
    state = saved(first.state_dict())
    second.load_state_dict(state)
    for value in state.values():
        if isinstance(value, torch.Tensor):
            value.zero_()  # what was loaded is the index's own
    for step in (7, 10):
        assert first.due(step) == second.due(step) == (step == 10)
    assert second.seconds == first.seconds
    for shift in range(3):
        later = embeddings + shift * torch.randn_like(embeddings)
        assert first.refresh(later).examples == second.refresh(later).examples
        for name in ("clusters", "centers", "sizes", "cluster_classes"):
            assert torch.equal(getattr(first, name), getattr(second, name))
        assert first.variance == second.variance
    fresh = ClusterIndex(labels, **options)
    fresh.load_state_dict(saved(ClusterIndex(labels, **options).state_dict()))
    assert fresh.due(0)


def test_a_state_that_does_not_fit_is_refused_and_nothing_changes():
    embeddings, labels, _ = blobs([20, 30])
    index = ClusterIndex(labels)
    index.refresh(embeddings)
    good = saved(index.state_dict())
    damaged = [
        ({**good, "clusters": good["clusters"].roll(1)}, "do not belong together"),
        ({**good, "clusters": good["clusters"][1:]}, "do not belong together"),
        ({**good, "sizes": good["sizes"] + 1}, "do not belong together"),
        ({**good, "centers": good["centers"][1:]}, "do not belong together"),
        ({**good, "centers": None}, "do not belong together"),
        ({**good, "scatter": good["scatter"][1:]}, "do not belong together"),
        ({**good, "format": 99}, "format 99"),
        ({"format": 1}, "missing"),
        (ClusterIndex(labels.flip(0)).state_dict(), "other labels"),
        (ClusterIndex(labels, clusters_per_class=2).state_dict(), "4 clusters"),
        (ClusterIndex(labels, normalize=True).state_dict(), "normalize"),
    ]
    for state, match in damaged:
        without_change(index, ValueError, match, lambda state=state: index.load_state_dict(state))
    index.load_state_dict(good)


def test_a_later_refresh_does_not_reach_into_a_saved_state():
    embeddings, labels, _ = blobs([20, 30], spread=2.0)
    index = ClusterIndex(labels, slices=2)
    index.refresh(embeddings)
    state = index.state_dict()
    kept = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    index.refresh(torch.randn_like(embeddings))
    assert all(torch.equal(value, state[name]) for name, value in kept.items())


# Memory: a child process of its own, as tests/support/memory_probe.py's


def test_memory_of_a_refresh_is_bounded_whatever_the_number_of_examples():
    """200 thousand x 64 embeddings, 51 MB, half of them one class; ids, order and labels are some 40 bytes each."""
    found = json.loads(run_in_child("tests.support.clusters", environment={"OMP_NUM_THREADS": "1"}))
    assert found["whole"] == 200_000 * 64 * 4
    assert found["peak"] < found["whole"] / 3, f"{found['peak'] / 1e6:.1f} MB"
    assert found["examples"] == 200_000

"""The partition of the cluster index: modes found, ids that keep their meaning, degenerate classes, blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dml_kernels.clustering import ClusterIndex, kmeans
from tests.support.clusters import assert_consistent, blobs, same_partition


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_modes_of_each_class_are_found(dtype, normalize):
    embeddings, labels, mode = blobs([30, 60, 12, 45])
    embeddings = embeddings.to(dtype).requires_grad_()
    index = ClusterIndex(labels, normalize=normalize)
    report = index.refresh(embeddings)
    assert same_partition(index.clusters, mode)
    assert_consistent(index, labels, embeddings, normalize)
    assert (report.examples, report.classes, report.moved, report.empty) == (147, 4, 1.0, 0)
    assert report.variance == index.variance
    assert 0 < report.kmeans_seconds < report.seconds
    assert not index.centers.requires_grad


def test_ids_go_class_by_class_in_order_of_the_labels_whatever_they_are():
    embeddings, small, _ = blobs([9, 2, 20])
    labels = torch.tensor([2**40, -7, 0])[small]
    index = ClusterIndex(labels, clusters_per_class=3)
    assert index.cluster_classes.tolist() == [-7] * 2 + [0] * 3 + [2**40] * 3
    index.refresh(embeddings)
    assert_consistent(index, labels, embeddings)
    assert len(index) == 8
    assert index.count == 31


def test_ignored_examples_are_in_no_cluster_and_never_read():
    embeddings, labels, mode = blobs([12, 12])
    inside = torch.rand(24) < 0.7
    labels = torch.where(inside, labels, -100)
    seen = []
    embeddings[~inside] = torch.nan
    index = ClusterIndex(labels)
    index.refresh(lambda rows: (seen.append(rows), embeddings[rows])[1])
    assert (index.clusters[~inside] == -1).all()
    assert torch.equal(torch.cat(seen).sort().values, inside.nonzero().squeeze(1))
    assert_consistent(index, labels, embeddings.nan_to_num())
    assert same_partition(index.clusters[inside], mode[inside])
    kept = ClusterIndex(torch.tensor([-100, 3]), ignore_index=3)
    assert kept.cluster_classes.tolist() == [-100]


@pytest.mark.parametrize(("per", "expected"), [(1, [1, 2, 7]), (3, [1, 1, 3]), (4, [1, 1, 2]), (100, [1, 1, 1])])
def test_clusters_in_proportion_to_the_class(per, expected):
    embeddings, labels, _ = blobs([1, 2, 7])
    index = ClusterIndex(labels, examples_per_cluster=per)
    assert torch.bincount(index.cluster_classes).tolist() == expected
    index.refresh(embeddings)
    assert_consistent(index, labels, embeddings)


def test_never_more_clusters_than_examples_and_each_gets_one():
    embeddings, labels, _ = blobs([1, 2, 3, 4])
    index = ClusterIndex(labels, clusters_per_class=4)
    index.refresh(embeddings)
    assert (index.sizes == 1).all()
    assert_consistent(index, labels, embeddings)
    assert index.variance == 0


def test_far_from_the_origin_small_distances_still_count():
    embeddings, labels, mode = blobs([40, 40], spread=0.02, offset=3e4)
    index = ClusterIndex(labels)
    index.refresh(embeddings)
    assert same_partition(index.clusters, mode)
    assert_consistent(index, labels, embeddings, atol=4e-3)
    assert index.variance == pytest.approx(8 * 0.02**2, rel=0.2)


def test_as_good_as_scikit_learn():
    sklearn = pytest.importorskip("sklearn.cluster")
    x = torch.randn(600, 6)
    labels = torch.arange(600) % 2
    index = ClusterIndex(labels, clusters_per_class=8, iterations=25)
    index.refresh(x)
    theirs = sum(sklearn.KMeans(8, n_init=1, random_state=0).fit(x[labels == c].numpy()).inertia_ for c in (0, 1))
    assert index.variance * 599 < 1.05 * theirs


def test_more_iterations_are_no_worse_and_one_is_not_all():
    x, labels = torch.randn(400, 4), torch.zeros(400, dtype=torch.int64)
    spread = []
    for iterations in (1, 30):
        index = ClusterIndex(labels, clusters_per_class=10, iterations=iterations)
        index.refresh(x)
        spread.append(index.variance)
    assert spread[1] < 0.99 * spread[0]


@pytest.mark.parametrize("moved", ["still", "turned", "shifted", "mirrored"])
def test_an_id_keeps_its_meaning_through_a_refresh(moved):
    embeddings, labels, _ = blobs([30, 40, 3, 2, 1])
    first, index = (ClusterIndex(labels, seed=seed) for seed in (1, 2))
    first.refresh(embeddings)
    # Another seed would name them otherwise, if k-means++ began again.
    index.refresh(embeddings)
    assert not torch.equal(index.clusters, first.clusters)
    index.load_state_dict(first.state_dict())
    before, centers = index.clusters, index.centers
    turn = torch.linalg.qr(torch.randn(8, 8)).Q
    change = {"still": embeddings, "turned": embeddings @ turn, "shifted": embeddings + 100, "mirrored": -embeddings}
    later = change[moved] + 0.001 * torch.randn_like(embeddings)
    report = index.refresh(later)
    assert report.moved == 0
    assert torch.equal(index.clusters, before)
    assert index.clusters is not before
    assert index.centers is not centers
    assert_consistent(index, labels, later, atol=1e-5)


def test_an_empty_cluster_is_found_again_by_the_examples_that_leave_their_own():
    embeddings, labels, _ = blobs([40], modes=2)
    index = ClusterIndex(labels, clusters_per_class=2)
    together = torch.where((torch.arange(40) < 20)[:, None], embeddings, embeddings[0])
    index.refresh(together)
    index.refresh(torch.zeros_like(embeddings))
    index.refresh(embeddings)
    assert (index.sizes == 20).all()


def test_the_share_that_moved_is_counted():
    embeddings, labels, _ = blobs([30, 30], modes=2)
    index = ClusterIndex(labels, clusters_per_class=2)
    index.refresh(embeddings)
    # One example of the first class changes sides.
    clusters = index.clusters.clone()
    one = index.members(0)[0]
    embeddings[one] = embeddings[index.members(1)[0]]
    assert index.refresh(embeddings).moved == pytest.approx(1 / 60)
    assert (index.clusters != clusters).nonzero().tolist() == [[int(one)]]


@pytest.mark.parametrize("value", [0.0, 1.0, 1234.567])
def test_equal_embeddings_leave_clusters_empty_and_well_defined_until_they_differ(value):
    embeddings, labels, _ = blobs([12, 12])
    index = ClusterIndex(labels)
    report = index.refresh(torch.full((24, 8), value))
    assert (report.empty, report.filled) == (4, 0)
    assert index.sizes.sort(descending=True).values.tolist() == [12, 12, 0, 0, 0, 0]
    assert (index.centers == value).all()
    assert index.variance == 0
    assert len(index.members(int((index.sizes == 0).nonzero()[0]))) == 0
    report = index.refresh(embeddings)
    assert report.empty == 0
    assert_consistent(index, labels, embeddings)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_in_a_class_above_a_block_an_empty_cluster_has_the_mean_of_the_whole_class(offset):
    x = torch.full((400, 2), offset)
    x[::7] += torch.tensor([3.0, 1.0])
    labels = torch.zeros(400, dtype=torch.int64)
    index = ClusterIndex(labels, clusters_per_class=4, block_examples=64)
    assert index.refresh(x).empty == 2  # the sample of 64 has its own share of the two vectors
    assert_consistent(index, labels, x)


def test_two_different_vectors_fill_two_of_three_clusters():
    x = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7]).repeat(3)[:, None] * torch.ones(1, 5)
    index = ClusterIndex(torch.arange(3).repeat_interleave(5))
    report = index.refresh(x)
    assert report.empty == 3
    for c in range(3):
        assert sorted(index.sizes[3 * c : 3 * c + 3].tolist()) == [0, 2, 3]


def test_an_empty_cluster_gets_the_example_farthest_from_its_centre():
    x, nearest = np.float32([[0], [1], [10], [15], [16], [50]]), np.array([0, 0, 1, 1, 1, 2])
    centroids = np.float32([[0.5], [14], [50], [99], [98]])
    # 10 from the mean 13.67; what is left, 15 and 16, and 0 and 1, are equally far: the first. 50 is alone.
    assert kmeans._fill(x, centroids, nearest, noise=1e-6) == 2
    assert nearest.tolist() == [4, 0, 3, 1, 1, 2]
    assert centroids[3:].tolist() == [[10], [0]]
    # Equal vectors are not parted, wherever their centroid is.
    x, nearest = np.float32([[0], [5], [5], [8]]), np.array([0, 1, 1, 1])
    assert kmeans._fill(x, np.float32([[9], [4], [0], [0]]), nearest, noise=1e-6) == 1
    assert nearest.tolist() == [0, 1, 1, 2]


def test_a_filled_cluster_is_reported(monkeypatch):
    """faiss seldom leaves one empty: here its answer is replaced by one that does."""
    embeddings, labels, _ = blobs([30, 30])

    def all_in_one(self, x, seed, start, centroids, nearest, distance):
        nearest[:] = 0

    monkeypatch.setattr(kmeans.KMeans, "_train_one", all_in_one)
    index = ClusterIndex(labels)
    report = index.refresh(embeddings)
    assert (report.filled, report.empty) == (4, 0)
    assert sorted(index.sizes.tolist()) == [1, 1, 1, 1, 28, 28]
    assert_consistent(index, labels, embeddings)


@pytest.mark.parametrize("block", [7, 64, 10_000])
def test_a_function_is_asked_in_bounded_blocks_of_whole_classes(block):
    embeddings, labels, _ = blobs([3, 3, 5, 1, 7, 2, 6])
    calls = []

    def embed(rows):
        assert rows.dtype == torch.int64
        assert not torch.is_grad_enabled()
        calls.append(rows)
        return embeddings[rows]

    index = ClusterIndex(labels, block_examples=block)
    index.refresh(embed)
    assert max(map(len, calls)) <= block
    assert torch.equal(torch.cat(calls).sort().values, torch.arange(27))
    for rows in calls:
        for label in labels[rows].unique():
            assert set((labels == label).nonzero().squeeze(1).tolist()) <= set(rows.tolist())
    assert len(calls) == {7: 5, 64: 1, 10_000: 1}[block]
    whole = ClusterIndex(labels)
    whole.refresh(embeddings)
    assert torch.equal(index.clusters, whole.clusters)
    torch.testing.assert_close(index.centers, whole.centers)


def test_no_copy_of_all_embeddings_is_made():
    embeddings, labels, _ = blobs([50] * 12)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != embeddings.data_ptr():
                made.append(out.numel())
            return out

    index = ClusterIndex(labels, block_examples=64)
    with Watch():
        index.refresh(embeddings)
    assert max(made) == 600  # cluster ids; a block of embeddings is 50 x 8


def test_indices_given_to_the_function_are_its_own():
    embeddings, labels, _ = blobs([10, 10])

    def embed(rows):
        found = embeddings[rows]
        rows.zero_()
        return found

    index = ClusterIndex(labels)
    for _ in range(2):
        index.refresh(embed)
        assert_consistent(index, labels, embeddings)


def test_what_the_function_returned_is_not_written_to():
    embeddings, labels, _ = blobs([10, 10], shuffled=False)
    kept = embeddings.clone()
    ClusterIndex(labels).refresh(lambda rows: embeddings)
    ClusterIndex(labels).refresh(embeddings)
    assert torch.equal(embeddings, kept)


def test_a_class_larger_than_a_block_is_clustered_on_a_sample_and_counted_whole():
    embeddings, labels, mode = blobs([500, 10, 300])
    calls = []
    index = ClusterIndex(labels, block_examples=64)
    for _ in range(2):
        calls.clear()
        report = index.refresh(lambda rows: (calls.append(len(rows)), embeddings[rows])[1])
        assert max(calls) <= 64
        assert sum(calls) == 810 + 2 * 64
        assert same_partition(index.clusters, mode)
        assert_consistent(index, labels, embeddings)
    assert report.moved == 0
    assert report.examples == 810


def test_a_large_class_with_outliers_is_assigned_to_the_nearest_centre():
    x = torch.cat([torch.randn(300, 2), torch.randn(300, 2) + 30])
    x[17] = torch.tensor([1000.0, 1000.0])  # not in every sample
    index = ClusterIndex(torch.zeros(600, dtype=torch.int64), clusters_per_class=2, block_examples=50)
    index.refresh(x)
    assert_consistent(index, torch.zeros(600, dtype=torch.int64), x, atol=1e-4)


def test_numpy_memory_maps_are_read_like_tensors(tmp_path):
    embeddings, labels, _ = blobs([40, 30])
    np.save(tmp_path / "e.npy", embeddings.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "e.npy", mmap_mode="c"))
    a, b = ClusterIndex(labels), ClusterIndex(labels)
    a.refresh(mapped)
    b.refresh(embeddings)
    assert torch.equal(a.centers, b.centers)
    strided = torch.empty(70, 16)[:, ::2].copy_(embeddings)
    b.refresh(strided, whole=True)
    torch.testing.assert_close(a.centers, b.centers)


def test_the_same_bits_at_any_thread_count_and_twice(any_threads):
    import faiss

    x, labels = torch.randn(3000, 24), torch.randint(0, 30, (3000,))
    found = []
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
        index = ClusterIndex(labels, clusters_per_class=5)
        index.refresh(x)
        index.refresh(x + 1e-3 * x.flip(0))
        assert faiss.omp_get_max_threads() == threads  # put back
        found.append((index.clusters, index.centers, index._scatter))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_another_seed_starts_elsewhere():
    x, labels = torch.randn(500, 5), torch.zeros(500, dtype=torch.int64)
    index = [ClusterIndex(labels, clusters_per_class=9, seed=seed) for seed in (0, 0, 1)]
    for each in index:
        each.refresh(x)
    assert torch.equal(index[0].clusters, index[1].clusters)
    assert not torch.equal(index[0].clusters, index[2].clusters)


def test_faiss_is_silent(capfd):
    embeddings, labels, _ = blobs([1, 2, 3, 50])
    index = ClusterIndex(labels)
    index.refresh(embeddings)
    index.refresh(torch.ones_like(embeddings))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""

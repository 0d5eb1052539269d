"""NMI and AMI compared with entropies written out, and for partitions whose values are known."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from dml_kernels.clustering import kmeans
from dml_kernels.evaluation import cluster_agreement, clustering
from tests.support.evaluation import clustered

pytest.importorskip("faiss")
pytest.importorskip("sklearn")


def nmi_written_out(one, two):
    n = len(one)

    def entropy(values):
        return -sum(c / n * math.log(c / n) for c in Counter(values).values())

    mutual = sum(
        c / n * math.log(n * c / (one.count(a) * two.count(b)))
        for (a, b), c in Counter(zip(one, two, strict=True)).items()
    )
    return 2 * mutual / (entropy(one) + entropy(two))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_scores_are_those_of_the_partition(dtype, normalize):
    embeddings, labels = clustered(500, 12, 8, spread=0.8)
    found = cluster_agreement(embeddings.to(dtype), labels, normalize=normalize)
    assert found.clusters == len(found.assignments.unique()) == 12
    assert 0.2 < found.nmi < 0.98
    assert found.nmi == pytest.approx(nmi_written_out(labels.tolist(), found.assignments.tolist()), abs=1e-9)
    assert found.ami < found.nmi


def test_every_example_is_assigned_to_the_nearest_mean():
    """On blobs that are far apart Lloyd's iterations have converged: each example is nearest to its cluster's mean."""
    embeddings, labels = clustered(300, 5, 6, spread=0.02)
    found = cluster_agreement(embeddings, labels, normalize=False)
    means = torch.stack([embeddings[found.assignments == c].mean(0) for c in range(5)])
    assert torch.equal(torch.cdist(embeddings, means).argmin(1), found.assignments)
    assert found.nmi > 0.8


@pytest.mark.parametrize(("classes", "width", "spread"), [(5, 8, 0.05), (10, 16, 0.02), (40, 32, 0.02)])
def test_classes_far_apart_are_found_whatever_the_seed(classes, width, spread):
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(10 * classes) % classes
        centers = torch.nn.functional.normalize(torch.randn(classes, width, generator=generator), dim=1)
        embeddings = centers[labels] + spread * torch.randn(len(labels), width, generator=generator)
        assert bool((torch.cdist(embeddings, centers).argmin(1) == labels).all())
        found = cluster_agreement(embeddings, labels, normalize=False, seed=seed)
        assert (found.nmi, found.ami) == (pytest.approx(1, abs=1e-9), pytest.approx(1, abs=1e-9))


@pytest.mark.parametrize("greedy", [kmeans.GREEDY, 0])
def test_a_start_of_kmeans_holds_every_different_row_before_any_twice(monkeypatch, greedy):
    monkeypatch.setattr(kmeans, "GREEDY", greedy)
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [5.0, 5.0]])[torch.arange(40) % 4]
    for seed in range(20):
        assert len(rows[kmeans.far_apart(rows, 4, seed)].unique(dim=0)) == 4
    assert kmeans.far_apart(rows, 40, 0).shape == (40,)  # more than there are different rows


def test_far_from_the_origin_nothing_is_lost():
    embeddings, labels = clustered(300, 5, 6, spread=0.02)
    near = cluster_agreement(embeddings.double(), labels, normalize=False)
    far = cluster_agreement(embeddings.double() + 1e6, labels, normalize=False)
    assert far.nmi == pytest.approx(near.nmi, abs=1e-9)


def test_noise_has_no_ami():
    labels = torch.arange(400) % 40
    found = cluster_agreement(torch.randn(400, 8, generator=torch.Generator().manual_seed(0)), labels)
    assert found.nmi > 0.4  # by chance, because there are many clusters
    assert abs(found.ami) < 0.05


def test_blocks_and_samples_change_little(monkeypatch):
    embeddings, labels = clustered(900, 6, 4, spread=0.05)
    whole = cluster_agreement(embeddings, labels, clusters=12)
    monkeypatch.setattr(clustering, "BLOCK", 64)
    seen = []
    again = cluster_agreement(embeddings, labels, clusters=12, progress=seen.append)
    assert torch.equal(whole.assignments, again.assignments)
    assert sum(seen) == 900
    assert max(seen) == 16
    sampled = cluster_agreement(embeddings, labels, clusters=12, training_rows=200)
    assert not torch.equal(sampled.assignments, whole.assignments)
    assert sampled.nmi > 0.6


def test_degenerate_sets():
    one = cluster_agreement(torch.randn(6, 2), torch.zeros(6).long())
    assert (one.nmi, one.ami, one.clusters) == (1.0, 1.0, 1)
    distinct = cluster_agreement(torch.randn(6, 2), torch.arange(6), adjusted=False)
    assert distinct.nmi == pytest.approx(1.0)
    assert math.isnan(distinct.ami)
    assert cluster_agreement(torch.ones(1, 2), torch.zeros(1).long()).clusters == 1
    equal = cluster_agreement(torch.ones(50, 3), torch.arange(50) % 2)
    assert equal.nmi < 0.2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clusters": 0}, ValueError, "clusters must be"),
        ({"clusters": 9}, ValueError, r"\[1, 8\]"),
        ({"clusters": 4, "training_rows": 3}, ValueError, "fewer than the 4 clusters"),
        ({"embeddings": torch.full((8, 2), np.nan)}, ValueError, "NaN"),
        ({"embeddings": torch.empty(0, 2)}, ValueError, "non-empty"),
        ({"labels": torch.zeros(7).long()}, ValueError, "labels must have shape"),
        ({"labels": torch.zeros(8)}, TypeError, "labels must be integers"),
    ],
)
def test_bad_input_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        cluster_agreement(**({"embeddings": torch.randn(8, 2), "labels": torch.arange(8) % 2} | options))

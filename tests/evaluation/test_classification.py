"""Soft k-nearest-cluster and k-nearest-neighbour classification against dense versions and hand-made cases."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from dml_kernels.evaluation import k_nearest_clusters, k_nearest_neighbours
from tests.support.evaluation import LargestResult


def random_clusters(count=120, clusters=45, classes=9, width=6, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, width, generator=generator).to(dtype)
    centers = torch.randn(clusters, width, generator=generator).to(dtype)
    return embeddings, centers, torch.randint(3, 3 + classes, (clusters,), generator=generator)


def dense_knc(embeddings, centers, center_classes, variance, k, *, normalize=False):
    """The paper's formula, one embedding at a time, with its exponentials: for each, class -> probability."""
    x, mu, classes = embeddings.double().numpy(), centers.double().numpy(), center_classes.numpy()
    if normalize:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    result = []
    for r in x:
        squared = ((mu - r) ** 2).sum(axis=1)
        chosen = np.argsort(squared, kind="stable")[:k]
        weights = np.exp(-squared[chosen] / (2 * variance))
        scores = Counter()
        for weight, label in zip(weights, classes[chosen], strict=True):
            scores[int(label)] += weight / weights.sum()
        result.append(scores)
    return result


def assert_matches(result, expected):
    """Checks every kept class in order of probability, to fp32's precision."""
    for row, scores in enumerate(expected):
        best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[: result.classes.shape[1]]
        assert result.classes[row].tolist() == [label for label, _ in best] + [-100] * (
            result.classes.shape[1] - len(best)
        )
        found = result.log_probabilities[row, : len(best)].double()
        torch.testing.assert_close(found, torch.tensor([math.log(p) for _, p in best]).double(), rtol=1e-5, atol=1e-6)
        assert (result.log_probabilities[row, len(best) :] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("k", "normalize"), [(1, False), (7, False), (7, True), (45, False), (1000, True)])
def test_knc_matches_the_dense_formula(dtype, k, normalize):
    embeddings, centers, classes = random_clusters(dtype=dtype)
    result = k_nearest_clusters(
        embeddings, centers, classes, variance=1.7, k=k, top=4, normalize=normalize, tile=(50, 16)
    )
    assert_matches(result, dense_knc(embeddings, centers, classes, 1.7, k, normalize=normalize))


def test_knc_differs_from_the_nearest_cluster_and_from_another_variance():
    """Otherwise the tests above could not tell kNC from 1-NN. Here two clusters of class 1 at a medium distance outvote
    the nearest one, of class 0.
    """
    embeddings = torch.tensor([[0.0]])
    centers, classes = torch.tensor([[1.0], [1.1], [-1.1]]), torch.tensor([0, 1, 1])
    assert k_nearest_clusters(embeddings, centers, classes, variance=1.0).predictions.tolist() == [1]
    assert k_nearest_clusters(embeddings, centers, classes, variance=0.01).predictions.tolist() == [0]
    assert k_nearest_clusters(embeddings, centers, classes, variance=1.0, k=1).predictions.tolist() == [0]


def test_ties_go_to_the_lowest_class():
    embeddings = torch.zeros(1, 2)
    centers = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    result = k_nearest_clusters(embeddings, centers, torch.tensor([7, 4, 4, 7]), variance=0.3, top=2)
    assert result.classes.tolist() == [[4, 7]]
    assert torch.allclose(result.log_probabilities, torch.tensor(0.5).log())


@pytest.mark.parametrize("distance", [1e3, 1e6, 1e15, 1e30])
def test_a_point_far_from_everything_has_a_class_and_finite_log_probabilities(distance):
    """exp(-d^2 / 2 sigma^2) is 0 for every cluster, but one of them is still the nearest."""
    embeddings = torch.tensor([[distance, 0.0], [-distance, 0.0]], dtype=torch.float64)
    centers = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    result = k_nearest_clusters(embeddings, centers, torch.tensor([5, 6, 7]), variance=1e-4)
    assert torch.isfinite(result.log_probabilities).all()
    if distance <= 1e15:  # beyond, the three distances are one number even in fp64
        assert result.predictions.tolist() == [5, 6]


def test_a_tiny_variance_leaves_the_nearest_with_all_the_weight():
    embeddings, centers, classes = (100 * values for values in random_clusters())  # |r - mu|^2 / sigma^2 overflows
    result = k_nearest_clusters(embeddings, centers, classes, variance=1e-306, top=2)
    nearest = torch.cdist(embeddings, centers).argmin(dim=1)
    assert torch.equal(result.predictions, classes[nearest])
    assert (result.log_probabilities[:, 0] == 0).all()
    assert (result.log_probabilities[:, 1] == -math.inf).all()
    assert (result.classes[:, 1] != -100).all()


def test_distances_are_exact_far_from_the_origin():
    """|r - mu|^2 is 1 and |r|^2 is 1e12: expanded in fp32 the distance would be noise."""
    shift = torch.tensor([1e6, 0.0, 0.0])
    embeddings = shift + torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    centers = shift + torch.tensor([[0.0, 2.0, 0.0], [0.0, -2.0, 0.0]])
    result = k_nearest_clusters(embeddings, centers, torch.tensor([0, 1]), variance=2.0, top=2)
    assert result.classes.tolist() == [[0, 1], [1, 0]]
    expected = torch.log_softmax(torch.tensor([-1.0, -9.0]) / 4, dim=0)
    torch.testing.assert_close(result.log_probabilities, expected.expand(2, 2))


def test_one_cluster_takes_everything():
    embeddings, centers, _ = random_clusters()
    result = k_nearest_clusters(embeddings, centers[:1], torch.tensor([8]), variance=torch.tensor(0.5))
    assert (result.predictions == 8).all()
    assert (result.log_probabilities == 0).all()
    assert result.error(torch.full((120,), 8)) == 0.0
    assert result.error(torch.full((120,), 7)) == 1.0


def test_empty_and_ignored_clusters_take_no_part():
    embeddings, centers, classes = random_clusters()
    wanted = k_nearest_clusters(embeddings, centers[:40], classes[:40], variance=1.0, k=9, top=3)
    centers[40:43], centers[43:] = math.nan, 0.0
    empty = torch.zeros(45, dtype=torch.bool)
    empty[40:43] = True
    classes[43:] = -100
    result = k_nearest_clusters(embeddings, centers, classes, variance=1.0, k=9, top=3, empty=empty)
    assert torch.equal(result.classes, wanted.classes)
    assert torch.equal(result.log_probabilities, wanted.log_probabilities)


def test_results_are_the_same_at_any_tile_and_progress_counts_the_rows():
    embeddings, centers, classes = random_clusters()
    centers[20:40] = centers[:20]  # ties everywhere
    counted = []
    results = [
        (
            k_nearest_clusters(
                embeddings, centers, classes, variance=1.0, k=8, top=3, tile=tile, progress=counted.append
            ),
            k_nearest_neighbours(embeddings, centers, classes, k=8, top=3, tile=tile),
        )
        for tile in (None, (1, 45), (120, 1), (7, 13), (500, 500))
    ]
    assert sum(counted) == 5 * 120
    for knc, knn in results[1:]:
        assert torch.equal(knc.classes, results[0][0].classes)
        assert torch.equal(knc.log_probabilities, results[0][0].log_probabilities)
        assert torch.equal(knn.classes, results[0][1].classes)


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_knn_matches_a_count_of_votes(metric):
    embeddings, references, labels = random_clusters(count=80, clusters=70, classes=5)
    x, refs = embeddings.double(), references.double()
    score = -torch.cdist(x, refs) if metric == "euclidean" else x @ refs.T
    if metric == "cosine":
        score = score / refs.norm(dim=1)
    result = k_nearest_neighbours(embeddings, references, labels, k=9, top=2, metric=metric, tile=(30, 20))
    tied = 0
    for row in range(80):
        near = [int(labels[i]) for i in score[row].float().argsort(descending=True, stable=True)[:9]]
        votes = Counter(near)
        best = sorted(votes, key=lambda label: (-votes[label], near.index(label)))[:2]
        tied += len(best) == 2 and votes[best[0]] == votes[best[1]]
        assert result.classes[row, : len(best)].tolist() == best
        assert result.log_probabilities[row, 0] == pytest.approx(math.log(votes[best[0]] / 9))
    assert tied > 5  # the rule for ties has been tested


def test_a_tied_vote_goes_to_the_class_of_the_nearest():
    references, labels = torch.tensor([[4.0], [1.0], [2.0], [3.0]]), torch.tensor([0, 9, 0, 9])
    result = k_nearest_neighbours(torch.zeros(1, 1), references, labels, k=4, metric="euclidean")
    assert result.predictions.tolist() == [9]


def test_knn_leaves_out_its_own_copy():
    points, labels = torch.tensor([[0.0], [1.0], [1.5]]), torch.tensor([0, 1, 2])
    alone = k_nearest_neighbours(points, points, labels, exclude=torch.arange(3), metric="euclidean")
    assert alone.predictions.tolist() == [1, 2, 1]
    assert k_nearest_neighbours(points, points, labels, metric="euclidean").error(labels) == 0.0


def test_error_counts_labels_among_the_top_classes():
    centers, classes = torch.eye(3), torch.tensor([4, 5, 6])
    result = k_nearest_clusters(torch.eye(3), centers, classes, variance=1.0, k=2, top=3)
    assert result.error(torch.tensor([5, 5, 5])) == pytest.approx(2 / 3)
    assert result.error(torch.tensor([5, 5, 5]), top=2) == pytest.approx(1 / 3)  # behind class 6 stands 4, which ties
    # A place without a class answers nothing, not even the filler.
    assert result.classes[0].tolist() == [4, 5, -100]
    assert result.error(torch.tensor([-100, 5, 6]), top=3) == pytest.approx(1 / 3)


@pytest.mark.parametrize("k", [16, 600])
def test_nothing_larger_than_a_tile_is_formed(k):
    """N x M is 480,000 entries here, N x k x D 51,200 or more, a tile 64 x 128; N x D and M x D are 3,200 and 2,400."""
    embeddings, centers, classes = random_clusters(count=800, clusters=600, classes=100, width=4)
    with LargestResult() as largest:
        k_nearest_clusters(embeddings, centers, classes, variance=1.0, k=k, tile=(64, 128))
        k_nearest_neighbours(embeddings, centers, classes, k=k, tile=(64, 128))
    assert 3_200 < largest.entries <= 64 * 128


def test_strided_and_grad_inputs_are_taken():
    embeddings, centers, classes = random_clusters()
    wanted = k_nearest_clusters(embeddings, centers, classes, variance=1.0)
    wide = torch.zeros(120, 12)
    wide[:, ::2] = embeddings
    result = k_nearest_clusters(wide[:, ::2].requires_grad_(), centers, classes.int(), variance=1.0)
    assert torch.equal(result.classes, wanted.classes)
    assert not result.log_probabilities.requires_grad


EYE = torch.eye(4)
CLASSES = torch.tensor([0, 0, 1, 1])
BAD_KNC = {
    "variance of zero": ({"variance": 0.0}, ValueError, "variance must be positive"),
    "negative variance": ({"variance": -1.0}, ValueError, "variance must be positive"),
    "NaN variance": ({"variance": math.nan}, ValueError, "variance must be finite"),
    "variances": ({"variance": torch.ones(2)}, ValueError, "one number"),
    "k of zero": ({"k": 0}, ValueError, "k must be a positive integer"),
    "top of zero": ({"top": 0}, ValueError, "top must be"),
    "NaN centre": ({"centers": EYE / 0}, ValueError, "centers holds NaN"),
    "NaN embedding": ({"embeddings": EYE / 0}, ValueError, "embeddings holds NaN"),
    "huge embedding": ({"embeddings": 1e37 * EYE}, ValueError, "embeddings holds values beyond"),
    "flat centres": ({"centers": EYE[0]}, ValueError, "centers must be"),
    "integer centres": ({"centers": EYE.long()}, TypeError, "centers must be a floating"),
    "another width": ({"centers": torch.eye(4, 3)}, ValueError, r"centers \(4, 3\).* does not match"),
    "float classes": ({"center_classes": CLASSES.float()}, TypeError, "center_classes must be integers"),
    "too few classes": ({"center_classes": CLASSES[:3]}, ValueError, r"center_classes must have shape \(4,\)"),
    "integer mask": ({"empty": CLASSES}, TypeError, "empty must be a bool"),
    "short mask": ({"empty": CLASSES[:3].bool()}, ValueError, r"empty must have shape \(4,\)"),
    "all empty": ({"empty": torch.ones(4, dtype=torch.bool)}, ValueError, "no cluster is left"),
    "all ignored": ({"center_classes": CLASSES * 0 - 100}, ValueError, "no cluster is left"),
    "empty tile": ({"tile": (0, 4)}, ValueError, "tile"),
}


@pytest.mark.parametrize("case", BAD_KNC)
def test_bad_input_to_knc_is_refused(case):
    options, error, message = BAD_KNC[case]
    arguments = {"embeddings": EYE, "centers": EYE, "center_classes": CLASSES, "variance": 1.0} | options
    with pytest.raises(error, match=message):
        k_nearest_clusters(**arguments)


BAD_KNN = {
    "k of zero": ({"k": 0}, ValueError, "k must be a positive integer"),
    "half a neighbour": ({"k": 1.5}, TypeError, "k must be a positive integer"),
    "too few labels": ({"ref_labels": CLASSES[:3]}, ValueError, r"ref_labels must have shape \(4,\)"),
    "no references": ({"ref_embeddings": None}, TypeError, "ref_embeddings must be a floating"),
    "unknown metric": ({"metric": "manhattan"}, ValueError, "euclidean"),
    "exclude out of range": ({"exclude": torch.tensor([0, 1, 2, 4])}, ValueError, "index under 4"),
    "nothing left": (
        {"ref_embeddings": EYE[:1], "ref_labels": CLASSES[:1], "exclude": torch.zeros(4).long()},
        ValueError,
        "without any reference",
    ),
}


@pytest.mark.parametrize("case", BAD_KNN)
def test_bad_input_to_knn_is_refused(case):
    options, error, message = BAD_KNN[case]
    arguments = {"embeddings": EYE, "ref_embeddings": EYE, "ref_labels": CLASSES} | options
    with pytest.raises(error, match=message):
        k_nearest_neighbours(**arguments)


@pytest.mark.parametrize(
    ("labels", "top", "error"),
    [(CLASSES[:3], 1, ValueError), (CLASSES.float(), 1, TypeError), (CLASSES, 2, ValueError)],
)
def test_bad_input_to_error_is_refused(labels, top, error):
    with pytest.raises(error):
        k_nearest_clusters(EYE, EYE, CLASSES, variance=1.0).error(labels, top)

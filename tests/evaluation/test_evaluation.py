"""Retrieval metrics against a brute-force numpy version, hand-made cases and pytorch-metric-learning."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dml_kernels.evaluation import evaluate, map_at_r, nearest, recall_at_k, streaming
from tests.support.evaluation import LargestResult, clustered


def brute_force(queries, labels, gallery, gallery_labels, exclude, ks, metric="cosine"):
    """The definitions, one query at a time, in fp64; a stable sort breaks ties by lowest index."""
    queries, gallery = queries.double().numpy(), gallery.double().numpy()
    labels, gallery_labels = labels.numpy(), gallery_labels.numpy()
    recall, ap, rp = {k: [] for k in ks}, [], []
    skipped = 0
    for i, (query, label) in enumerate(zip(queries, labels, strict=True)):
        if metric == "cosine":
            score = (gallery / np.linalg.norm(gallery, axis=1, keepdims=True)) @ (query / np.linalg.norm(query))
        elif metric == "dot":
            score = gallery @ query
        else:
            score = -np.linalg.norm(gallery - query, axis=1)
        order = np.argsort(-score.astype(np.float32), kind="stable")
        order = order[order != exclude[i]]
        relevant = gallery_labels[order] == label
        total = int(relevant.sum())
        if total == 0:
            skipped += 1
            continue
        for k in ks:
            recall[k].append(float(relevant[:k].any()))
        top = relevant[:total]
        precision = np.cumsum(top) / np.arange(1, total + 1)
        ap.append(float((precision * top).sum() / total))
        rp.append(float(top.mean()))
    return {k: np.mean(v) for k, v in recall.items()}, np.mean(ap), np.mean(rp), len(ap), skipped


def assert_matches(result, expected):
    recall, ap, rp, queries, skipped = expected
    assert (result.queries, result.skipped) == (queries, skipped)
    assert result.recall == pytest.approx(recall, abs=1e-12)
    assert result.map_at_r == pytest.approx(ap, abs=1e-12)
    assert result.r_precision == pytest.approx(rp, abs=1e-12)


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_same_set_matches_brute_force(metric, dtype):
    embeddings, labels = clustered(257, 40, 12)
    embeddings = embeddings.to(dtype)
    labels[7] = 1000  # alone in its class: skipped
    result = evaluate(embeddings, labels, (1, 3, 10), metric=metric, tile=(50, 37))
    expected = brute_force(embeddings, labels, embeddings, labels, np.arange(257), (1, 3, 10), metric)
    assert expected[-1] >= 1
    assert 0.05 < expected[1] < 0.95
    assert_matches(result, expected)


@pytest.mark.parametrize("with_exclude", [False, True])
def test_separate_gallery_matches_brute_force(with_exclude):
    gallery, gallery_labels = clustered(300, 30, 8, seed=1)
    queries, labels = clustered(90, 36, 8, seed=1)  # some classes are not in the gallery
    exclude = torch.full((90,), -1)
    if with_exclude:
        exclude[::3] = torch.randint(0, 300, (30,), generator=torch.Generator().manual_seed(2))
    options = {"exclude": exclude} if with_exclude else {}
    result = evaluate(
        queries, labels, (1, 5), ref_embeddings=gallery, ref_labels=gallery_labels, tile=(17, 64), **options
    )
    assert_matches(result, brute_force(queries, labels, gallery, gallery_labels, exclude.numpy(), (1, 5)))


def test_result_is_the_same_at_any_tile():
    embeddings, labels = clustered(203, 25, 16)
    embeddings[100:200] = embeddings[0:100]  # ties everywhere
    wanted = evaluate(embeddings, labels, (1, 2, 50))
    for tile in ((1, 203), (203, 1), (64, 100), (7, 13), (1000, 1000)):
        assert evaluate(embeddings, labels, (1, 2, 50), tile=tile) == wanted


def test_one_huge_class_keeps_the_memory_bound():
    """R is the whole gallery here: the chunk of queries shrinks so that the running top-K stays in the
    tile.
    """
    embeddings, _ = clustered(500, 2, 4)
    labels = torch.zeros(500, dtype=torch.int64)
    labels[:3] = 1
    seen = []
    result = evaluate(embeddings, labels, (1,), tile=(100, 50), progress=seen.append)
    assert max(seen[1:]) <= 100 * 50 // (50 + 490)
    assert sum(seen) == 500
    assert_matches(result, brute_force(embeddings, labels, embeddings, labels, np.arange(500), (1,)))


def test_map_at_r_of_a_hand_made_ranking():
    """Three positives (R = 3) at ranks 1, 3 and 5: MAP@R = (1/1 + 2/3) / 3, R-precision 2/3."""
    queries = torch.tensor([[0.0]])
    gallery = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
    options = {"ref_embeddings": gallery, "ref_labels": torch.tensor([9, 0, 9, 0, 9]), "metric": "euclidean"}
    result = evaluate(queries, torch.tensor([9]), (1, 2), **options)
    assert result.map_at_r == pytest.approx((1 + 2 / 3) / 3)
    assert result.r_precision == pytest.approx(2 / 3)
    assert result.recall == {1: 1.0, 2: 1.0}
    assert map_at_r(queries, torch.tensor([9]), **options) == result.map_at_r
    # For the other class only ranks 2 and 4 count: no hit at 1, a hit at 2.
    assert recall_at_k(queries, torch.tensor([0]), (1, 2), **options) == {1: 0.0, 2: 1.0}


def test_a_query_leaves_out_itself_and_not_its_duplicates():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert recall_at_k(embeddings, torch.tensor([0, 0, 1, 1]), (1,)) == {1: 1.0}
    assert recall_at_k(embeddings, torch.tensor([0, 1, 0, 1]), (1,)) == {1: 0.0}
    _, indices = nearest(embeddings, 1)
    assert indices[:, 0].tolist() == [1, 0, 3, 2]


def test_ties_go_to_the_lowest_index_on_any_tile():
    """33 copies of one vector: without the index in the key, top-k would return them in an arbitrary order."""
    embeddings = torch.full((33, 5), 0.3)
    for tile in ((33, 33), (4, 5), (1, 2)):
        scores, indices = nearest(embeddings, 4, tile=tile)
        assert indices[0].tolist() == [1, 2, 3, 4]
        assert indices[20].tolist() == [0, 1, 2, 3]
        assert torch.equal(scores, torch.ones(33, 4))


def test_nearest_decodes_scores_of_both_signs():
    queries = torch.tensor([[1.0]])
    gallery = torch.tensor([[-2.0], [0.0], [3.5], [-0.0], [-1e-30]])
    scores, indices = nearest(queries, 5, ref_embeddings=gallery, metric="dot", tile=(1, 2))
    assert indices.tolist() == [[2, 1, 3, 4, 0]]
    assert torch.equal(scores, torch.tensor([[3.5, 0.0, 0.0, -1e-30, -2.0]]))


def test_both_zeros_tie():
    keys = streaming.key_of(torch.tensor([[-0.0, 0.0, -0.0]]), 0)
    assert (keys >> 32).tolist() == [[0, 0, 0]]
    assert keys.argsort(descending=True).tolist() == [[0, 1, 2]]


def test_close_scores_are_ranked_by_fp64():
    """The dot products of two gallery vectors differ by 1 part in 4e6: an fp32 sum over 4,096 terms may exchange
    them.
    """
    generator = torch.Generator().manual_seed(0)
    query = torch.rand(1, 4096, generator=generator)
    better = torch.rand(4096, generator=generator)
    worse = better[torch.randperm(4096, generator=generator)]
    worse = worse * ((query[0].double() @ better.double()) / (query[0].double() @ worse.double())).float()
    gallery = torch.stack([worse * (1 - 4e-7), better] * 50)
    truth = (gallery.double() @ query[0].double()).float()
    scores, _ = nearest(query, 100, ref_embeddings=gallery, metric="dot")
    assert torch.equal(scores[0], truth.sort(descending=True).values)


def test_agrees_with_pytorch_metric_learning():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    embeddings, labels = clustered(600, 50, 16)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r", "r_precision"),
        knn_func=CustomKNN(CosineSimilarity(), batch_size=64),  # its default needs faiss
        k="max_bin_count",
    )
    theirs = calculator.get_accuracy(embeddings, labels)
    ours = evaluate(embeddings, labels, (1,))
    assert ours.recall[1] == pytest.approx(theirs["precision_at_1"], abs=1e-6)
    assert ours.map_at_r == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)
    assert ours.r_precision == pytest.approx(theirs["r_precision"], abs=1e-6)


def test_nothing_larger_than_a_tile_is_formed():
    """N x M is 640,000 entries here, N x D 3,200, a tile with its running top-K 64 x 128."""
    embeddings, labels = clustered(800, 100, 4)
    with LargestResult() as largest:
        evaluate(embeddings, labels, tile=(64, 128))
    assert 3_200 < largest.entries <= 64 * 128


def test_strided_and_grad_inputs_are_taken():
    embeddings, labels = clustered(50, 5, 8)
    wide = torch.empty(50, 16)
    wide[:, ::2] = embeddings
    assert evaluate(wide[:, ::2].requires_grad_(), labels.int()) == evaluate(embeddings, labels)


ROWS = torch.eye(4)
TWO = torch.tensor([0, 0, 1, 1])
BAD_INPUT = {
    "k above the gallery": ({"k": (4,)}, ValueError, "each query has 3 gallery entries"),
    "k of zero": ({"k": (0,)}, ValueError, "k=0"),
    "no k": ({"k": ()}, ValueError, "k is empty"),
    "empty": ({"embeddings": torch.empty(0, 4), "labels": torch.empty(0).long()}, ValueError, "non-empty"),
    "one dimension": ({"embeddings": torch.ones(4)}, ValueError, "shape"),
    "integer embeddings": ({"embeddings": ROWS.long()}, TypeError, "floating point"),
    "numpy embeddings": ({"embeddings": ROWS.numpy()}, TypeError, "floating point"),
    "float labels": ({"labels": TWO.float()}, TypeError, "labels must be integers"),
    "too few labels": ({"labels": TWO[:3]}, ValueError, r"labels must have shape \(4,\)"),
    "NaN": ({"embeddings": ROWS / 0}, ValueError, "NaN"),
    "no positives": ({"labels": torch.arange(4)}, ValueError, "nothing to evaluate"),
    "gallery without labels": ({"ref_embeddings": ROWS}, ValueError, "both or neither"),
    "labels without gallery": ({"ref_labels": TWO}, ValueError, "both or neither"),
    "gallery of another width": (
        {"ref_embeddings": torch.eye(3), "ref_labels": TWO[:3]},
        ValueError,
        "does not match",
    ),
    "exclude out of range": ({"exclude": torch.tensor([0, 1, 2, 4])}, ValueError, "index under 4"),
    "exclude of another length": ({"exclude": torch.tensor([0])}, ValueError, "exclude must have shape"),
    "unknown metric": ({"metric": "manhattan"}, ValueError, "euclidean"),
    "empty tile": ({"tile": (0, 4)}, ValueError, "tile"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused(case):
    options, error, message = BAD_INPUT[case]
    arguments = {"embeddings": ROWS, "labels": TWO, "k": (1,)} | options
    with pytest.raises(error, match=message):
        evaluate(**arguments)

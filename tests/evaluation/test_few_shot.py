"""Few-shot episodes: results counted by hand, at chance and at certainty; seeds; even draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dml_kernels.evaluation import few_shot, few_shot_accuracy
from tests.support.evaluation import clustered


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("normalize", [True, False])
def test_episodes_match_the_nearest_mean_written_out(metric, normalize, monkeypatch):
    embeddings, labels = clustered(300, 12, 6)
    episodes = []
    judge = few_shot._episode_accuracy

    def spy(vectors, shots, metric):
        episodes.append((vectors.numpy(), judge(vectors, shots, metric)))
        return episodes[-1][1]

    monkeypatch.setattr(few_shot, "_episode_accuracy", spy)
    options = {"ways": 4, "shots": 3, "queries": 5, "episodes": 25, "metric": metric, "normalize": normalize}
    found = few_shot_accuracy(embeddings, labels, **options)
    own = embeddings.double() / embeddings.double().norm(dim=1, keepdim=True) if normalize else embeddings.double()
    class_of = {tuple(row.tolist()): int(label) for row, label in zip(own, labels, strict=True)}
    accuracies = []
    for vectors, said in episodes:
        assert vectors.shape == (4, 8, 6)
        drawn = [[class_of[tuple(v)] for v in way] for way in vectors]
        assert len({c for way in drawn for c in way}) == 4  # four classes, each way of one
        assert all(len(set(way)) == 1 for way in drawn)
        assert len({tuple(v) for way in vectors for v in way}) == 32  # all different
        right = 0
        for way, examples in enumerate(vectors):
            for query in examples[3:]:
                near = []
                for other in vectors:
                    mean = other[:3].mean(axis=0)
                    cosine = query @ mean / np.linalg.norm(query) / np.linalg.norm(mean)
                    near.append(cosine if metric == "cosine" else -np.linalg.norm(query - mean))
                right += int(np.argmax(near)) == way
        assert said == right / 20
        accuracies.append(right / 20)
    assert 0.3 < found.accuracy < 0.99
    assert found.accuracy == pytest.approx(np.mean(accuracies))
    assert found.confidence == pytest.approx(1.96 * np.std(accuracies, ddof=1) / math.sqrt(25))


def test_more_shots_help_and_seeds_repeat():
    embeddings, labels = clustered(2000, 20, 8, spread=2.0)
    one, five = (few_shot_accuracy(embeddings, labels, shots=shots, episodes=200) for shots in (1, 5))
    assert five.accuracy - five.confidence > one.accuracy + one.confidence
    assert few_shot_accuracy(embeddings, labels, shots=5, episodes=200) == five
    assert few_shot_accuracy(embeddings, labels, shots=5, episodes=200, seed=1) != five


def test_episodes_do_not_depend_on_the_order_of_the_classes_names():
    """Labels are names: any renaming that keeps their order draws the same episodes."""
    embeddings, labels = clustered(400, 8, 8)
    assert few_shot_accuracy(embeddings, labels, episodes=30) == few_shot_accuracy(
        embeddings, labels * 5 - 100, episodes=30
    )


def test_certainty_chance_and_collapse():
    labels = torch.arange(400) % 10
    apart = torch.eye(10)[labels] + 1e-3 * torch.randn(400, 10)
    sure = few_shot_accuracy(apart, labels, episodes=50)
    assert (sure.accuracy, sure.confidence) == (1.0, 0.0)
    noise = torch.randn(400, 10, generator=torch.Generator().manual_seed(0))
    chance = few_shot_accuracy(noise, labels, episodes=300)
    assert abs(chance.accuracy - 0.2) < 0.03
    # Equal embeddings: every query is given the first class, one query in five is of it.
    for metric in ("euclidean", "cosine"):
        collapsed = few_shot_accuracy(torch.full((400, 3), 0.1), labels, shots=3, episodes=20, metric=metric)
        assert (collapsed.accuracy, collapsed.confidence) == (pytest.approx(0.2), pytest.approx(0.0))


def test_small_classes_are_left_out_and_counted():
    labels = torch.tensor([0] * 16 + [1] * 16 + [2] * 15 + [3] * 40 + [4])
    embeddings = torch.eye(5)[labels]
    found = few_shot_accuracy(embeddings, labels, ways=3, episodes=5)
    assert (found.classes, found.skipped_classes, found.episodes) == (3, 2, 5)
    with pytest.raises(ValueError, match=r"4 ways need as many classes with 1 \+ 15 examples; 3 of 5 have them"):
        few_shot_accuracy(embeddings, labels, ways=4)


def test_one_episode_has_no_interval_and_low_precision_is_taken():
    embeddings, labels = clustered(200, 5, 8, spread=0.1)
    seen = []
    found = few_shot_accuracy(embeddings.bfloat16(), labels, ways=3, episodes=1, progress=seen.append)
    assert found.accuracy == 1.0
    assert math.isnan(found.confidence)
    assert seen == [1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ways": 1}, ValueError, "ways must be an integer of at least 2"),
        ({"shots": 0}, ValueError, "shots"),
        ({"queries": 0}, ValueError, "queries"),
        ({"episodes": 0}, ValueError, "episodes"),
        ({"metric": "dot"}, ValueError, "metric must be one of euclidean, cosine"),
        ({"labels": torch.zeros(40).long()}, ValueError, "1 of 1 have them|0 of 1 have them"),
        ({"labels": torch.arange(40)}, ValueError, "0 of 40 have them"),
        ({"labels": torch.zeros(40)}, TypeError, "integer"),
        ({"embeddings": torch.full((40, 2), math.nan)}, ValueError, "NaN"),
        ({"embeddings": torch.empty(0, 2)}, ValueError, "non-empty"),
    ],
)
def test_bad_input_is_refused(options, error, message):
    arguments = {"embeddings": torch.randn(40, 2), "labels": torch.arange(40) % 2, "ways": 2} | options
    with pytest.raises(error, match=message):
        few_shot_accuracy(**arguments)

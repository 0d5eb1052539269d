"""Verification compared with counts over every pair, with scikit-learn, and with ROC curves drawn by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from dml_kernels.evaluation import (
    fold_accuracy,
    pair_scores,
    sample_pairs,
    verification,
    verify,
    verify_pairs,
    verify_scores,
)
from tests.support.evaluation import all_scores, clustered

pytest.importorskip("sklearn")


def by_counting(scores, same, far):
    """AUC over every mated and other pair; TAR, EER and accuracy over every threshold, one at a time."""
    mated, other = scores[same], scores[~same]
    auc = np.mean([np.mean(m > other) + np.mean(m == other) / 2 for m in mated])
    cuts = [math.inf, *sorted(set(scores.tolist()), reverse=True)]
    curve = [(np.mean(other >= t), np.mean(mated >= t)) for t in cuts]
    tar = {f: max(b for a, b in curve if a <= f) for f in far}
    plain = max((b * len(mated) + (1 - a) * len(other)) / len(scores) for a, b in curve)
    balanced = max((b + 1 - a) / 2 for a, b in curve)
    for (a0, b0), (a1, b1) in itertools.pairwise(curve):
        if a1 >= 1 - b1:
            part = (1 - b0 - a0) / ((a1 - a0) + (b1 - b0))
            return auc, tar, plain, balanced, a0 + part * (a1 - a0)
    raise AssertionError("the curve ends at (1, 1)")


FAR = (0.01, 0.05, 0.2, 1.0)


@pytest.mark.parametrize("kind", ["smooth", "ties", "perfect", "reversed"])
def test_scores_match_the_counts(kind):
    generator = torch.Generator().manual_seed(0)
    same = torch.rand(400, generator=generator) < 0.3
    scores = torch.randn(400, generator=generator) + same
    if kind == "ties":
        scores = (scores * 2).round() / 2
    elif kind != "smooth":
        scores = (scores.abs() + 0.1) * (same.float() - 0.5) * (1 if kind == "perfect" else -1)
    found = verify_scores(scores, same, far=FAR)
    auc, tar, plain, balanced, eer = by_counting(scores.double().numpy(), same.numpy(), FAR)
    assert (found.mated, found.other) == (int(same.sum()), int((~same).sum()))
    assert found.roc_auc == pytest.approx(auc, abs=1e-12)
    assert found.tar_at_far == pytest.approx(tar, abs=1e-12)
    assert found.eer == pytest.approx(eer, abs=1e-12)
    assert found.accuracy == pytest.approx(plain, abs=1e-12)
    assert verify_scores(scores, same.int(), far=FAR, balanced=True).accuracy == pytest.approx(balanced, abs=1e-12)
    # The thresholds reach the stated rates.
    for rate, cut in found.threshold_at_far.items():
        assert (scores[~same] >= cut).double().mean() <= rate
        assert (scores[same] >= cut).double().mean() == pytest.approx(found.tar_at_far[rate])
    assert ((scores >= found.best_threshold) == same).double().mean() == pytest.approx(found.accuracy)
    assert (found.bin_width, found.roc_auc_error, found.eer_error) == (0.0, 0.0, 0.0)


def test_a_curve_drawn_by_hand():
    """Mated 0.9, 0.7, 0.4; other 0.8, 0.3, 0.2, 0.1: 10 of the 12 comparisons are won."""
    scores = torch.tensor([0.9, 0.7, 0.4, 0.8, 0.3, 0.2, 0.1], dtype=torch.float64)
    found = verify_scores(scores, torch.tensor([1, 1, 1, 0, 0, 0, 0]), far=(0.25, 0.5))
    assert found.roc_auc == pytest.approx(10 / 12)
    assert found.tar_at_far == {0.25: 1.0, 0.5: 1.0}
    assert found.threshold_at_far == {0.25: 0.4, 0.5: 0.3}
    assert found.accuracy == pytest.approx(6 / 7)
    assert found.best_threshold == pytest.approx((0.4 + 0.3) / 2)
    assert found.eer == pytest.approx(0.25)


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("separate", [False, True])
def test_all_pairs_exact_and_in_bins(metric, separate):
    embeddings, labels = clustered(90, 9, 5)
    gallery, gallery_labels = (embeddings, labels) if not separate else clustered(70, 12, 5)
    options = {"ref_embeddings": gallery, "ref_labels": gallery_labels} if separate else {}
    keep = np.ones((90, len(gallery)), dtype=bool) if separate else np.triu(np.ones((90, 90), dtype=bool), 1)
    same = (labels[:, None] == gallery_labels).numpy()[keep]
    truth = by_counting(all_scores(embeddings, gallery, metric)[keep].astype(np.float64), same, FAR)

    exact = verify(embeddings, labels, far=FAR, metric=metric, tile=(16, 23), **options)
    assert (exact.mated, exact.other) == (same.sum(), (~same).sum())
    auc, tar, _, balanced, eer = truth
    assert exact.roc_auc == pytest.approx(auc, abs=1e-12)
    assert exact.tar_at_far == pytest.approx(tar, abs=1e-12)
    assert exact.accuracy == pytest.approx(balanced, abs=1e-12)
    assert exact.eer == pytest.approx(eer, abs=1e-12)

    coarse = verify(embeddings, labels, far=FAR, metric=metric, bins=40, tile=(7, 100), **options)
    assert coarse.bin_width > 0.04
    assert 0 < abs(coarse.roc_auc - auc) <= coarse.roc_auc_error + 1e-12
    assert coarse.roc_auc_error < 0.05
    assert abs(coarse.eer - eer) <= coarse.eer_error + 1e-12
    for rate in FAR:
        assert coarse.tar_at_far[rate] - 1e-12 <= tar[rate] <= coarse.tar_at_far[rate] + coarse.tar_error[rate] + 1e-12
    assert coarse.accuracy <= balanced + 1e-12

    scores = all_scores(embeddings, gallery, metric)[keep]
    for rate, cut in coarse.threshold_at_far.items():
        assert np.mean(scores[~same] >= cut) <= rate
        assert np.mean(scores[same] >= cut) == pytest.approx(coarse.tar_at_far[rate], abs=1e-12)
    cut = coarse.best_threshold
    halves = np.mean(scores[same] >= cut), np.mean(scores[~same] < cut)
    assert np.mean(halves) == pytest.approx(coarse.accuracy, abs=1e-12)

    fine = verify(embeddings, labels, far=FAR, metric=metric, bins=1 << 20, **options)
    assert fine.roc_auc == pytest.approx(auc, abs=1e-5)
    assert fine.tar_at_far == pytest.approx(tar, abs=1e-3)


def test_the_result_is_the_same_at_any_tile():
    embeddings, labels = clustered(120, 9, 5)
    for bins in (None, 500):
        wanted = verify(embeddings, labels, bins=bins)
        for tile in ((1, 120), (120, 1), (50, 13), (13, 50)):
            assert verify(embeddings, labels, bins=bins, tile=tile) == wanted


def test_progress_counts_embeddings_and_pairs():
    embeddings, labels = clustered(100, 9, 5)
    seen = []
    verify(embeddings, labels, bins=64, tile=(16, 16), progress=seen.append)
    assert seen == [16] * 6 + [4]
    listed = []
    verify_pairs(embeddings, *sample_pairs(labels), progress=listed.append, far=(0.1,))
    assert sum(listed) == len(sample_pairs(labels)[0])


def test_many_pairs_go_to_bins(monkeypatch):
    embeddings, labels = clustered(100, 9, 5)
    assert verify(embeddings, labels).bin_width == 0
    monkeypatch.setattr(verification, "EXACT_PAIRS", 4949)
    found = verify(embeddings, labels)
    assert found.bin_width == 2 / 65536
    assert found.mated + found.other == 4950
    assert found.roc_auc_error < 1e-4


def test_a_far_that_the_pairs_cannot_tell_is_nan_with_a_warning():
    scores, same = torch.rand(150), torch.arange(150) < 50
    with pytest.warns(UserWarning, match=r"FAR 0.001 needs 1000 pairs of two classes; got 100") as caught:
        found = verify_scores(scores, same, far=(0.001, 0.01))
    assert caught[0].filename == __file__
    assert math.isnan(found.tar_at_far[0.001])
    assert math.isnan(found.threshold_at_far[0.001])
    assert not math.isnan(found.tar_at_far[0.01])


def test_equal_embeddings_tell_nothing():
    for bins in (None, 64):
        found = verify(torch.ones(20, 3), torch.arange(20) % 2, bins=bins, far=(0.1,))
        assert found.roc_auc == 0.5
        assert found.eer == 0.5
        assert found.accuracy == 0.5
        assert found.tar_at_far == {0.1: 0.0}


def test_sampled_pairs_are_all_the_mated_ones_and_as_many_others():
    labels = torch.tensor([3, 1, 3, 1, 3, 7])
    first, second, same = sample_pairs(labels)
    mated = {frozenset(p) for p in zip(first[same].tolist(), second[same].tolist(), strict=True)}
    assert mated == {frozenset(p) for p in [(0, 2), (0, 4), (2, 4), (1, 3)]}
    assert int((~same).sum()) == 4
    everything = sample_pairs(labels, negatives=1000)
    other = {frozenset(p) for p in zip(everything[0].tolist(), everything[1].tolist(), strict=True)} - mated
    assert len(other) == 15 - 4 == int((~everything[2]).sum())


@pytest.mark.parametrize("cap", [50, 700, 1100])
def test_sampled_pairs_are_drawn_evenly(cap):
    """Of 1,485 mated pairs in classes of 2 to 54, each class is drawn as often as it has pairs, and no pair twice."""
    labels = torch.repeat_interleave(torch.tensor([5, 2]), torch.tensor([54, 12]))
    total = 54 * 53 // 2 + 12 * 11 // 2
    small, draws = 0, 20
    for seed in range(draws):
        first, second, same = sample_pairs(labels, max_positives=cap, seed=seed)
        assert torch.equal(labels[first] == labels[second], same)
        assert int(same.sum()) == cap
        assert int((~same).sum()) == min(cap, 54 * 12)
        assert len({frozenset(p) for p in zip(first.tolist(), second.tolist(), strict=True)}) == len(first)
        assert bool((first != second).all())
        small += int((labels[first[same]] == 2).sum())
    expected = 66 / total
    assert abs(small / (draws * cap) - expected) < 4 * math.sqrt(expected / (draws * cap))
    again = sample_pairs(labels, max_positives=cap, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(again, sample_pairs(labels, max_positives=cap, seed=3), strict=True))
    assert not torch.equal(again[1], sample_pairs(labels, max_positives=cap, seed=4)[1])


def test_a_million_labels_are_sampled_without_listing_their_pairs():
    labels = torch.arange(1_000_000) % 3  # 1.7e11 mated pairs
    first, second, same = sample_pairs(labels, max_positives=1000)
    assert torch.equal(labels[first] == labels[second], same)
    assert int(same.sum()) == 1000 == int((~same).sum())
    assert first.float().std() > 1e5


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_listed_pairs_score_as_the_matrix_does(metric, dtype, monkeypatch):
    monkeypatch.setattr("dml_kernels.evaluation.pairs.BLOCK", 35)
    embeddings, labels = clustered(40, 5, 7)
    embeddings = embeddings.to(dtype)
    gallery = clustered(30, 5, 7, seed=1)[0].to(dtype)
    first, second = torch.randint(0, 40, (100,)), torch.randint(0, 30, (100,))
    found = pair_scores(embeddings, first, second, ref_embeddings=gallery, metric=metric)
    truth = all_scores(embeddings, gallery, metric)[first, second]
    assert torch.allclose(found, torch.from_numpy(truth), rtol=2e-7, atol=2e-7)
    first, second, same = sample_pairs(labels)
    listed = verify_pairs(embeddings, first, second, same, far=(0.1,), metric=metric)
    scores = pair_scores(embeddings, first, second, metric=metric)
    assert listed == verify_scores(scores, same, far=(0.1,))


def test_folds_are_judged_by_the_other_folds_threshold():
    """Two folds whose best thresholds lie at 0.5 and 5.5; each is wrong on all of one kind in the other."""
    scores = torch.tensor([0.0, 0.0, 1.0, 1.0, 5.0, 5.0, 6.0, 6.0])
    same = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    fold = torch.tensor([4, 4, 4, 4, 9, 9, 9, 9])
    found = fold_accuracy(scores, same, fold_of=fold)
    assert found.thresholds == (5.5, 0.5)
    assert found.accuracies == (0.5, 0.5)
    assert (found.mean, found.standard_error) == (0.5, 0.0)


def test_drawn_folds_hold_both_kinds_and_the_error_is_of_their_spread():
    generator = torch.Generator().manual_seed(0)
    same = torch.arange(600) < 300
    scores = torch.randn(600, generator=generator) + 2 * same
    found = fold_accuracy(scores, same)
    assert len(found.accuracies) == 10
    assert found.mean == pytest.approx(0.84, abs=0.04)
    assert found.mean < verify_scores(scores, same, far=()).accuracy
    assert found.standard_error == pytest.approx(np.std(found.accuracies, ddof=1) / math.sqrt(10))
    assert fold_accuracy(scores, same, seed=0) == found != fold_accuracy(scores, same, seed=1)
    # As many folds as pairs of the rarer kind: each holds one of it.
    few = fold_accuracy(torch.arange(20.0), torch.arange(20) >= 10, folds=10)
    assert few.accuracies.count(1.0) >= 8


TWO = torch.tensor([0, 0, 1, 1])
BAD = {
    "one class": (lambda: verify(torch.eye(4), TWO * 0), ValueError, "got 6 of one class and 0 of two"),
    "all distinct": (lambda: verify(torch.eye(4), torch.arange(4)), ValueError, "got 0 of one class"),
    "one example": (lambda: verify(torch.ones(1, 2), TWO[:1]), ValueError, "got 0 of one class and 0 of two"),
    "one example in bins": (lambda: verify(torch.ones(1, 2), TWO[:1], bins=9), ValueError, "0 of one class and 0"),
    "empty": (lambda: verify(torch.ones(0, 2), TWO[:0]), ValueError, "non-empty"),
    "FAR of zero": (lambda: verify(torch.eye(4), TWO, far=(0.0,)), ValueError, "far must hold"),
    "one bin": (lambda: verify(torch.eye(4), TWO, bins=1), ValueError, "bins"),
    "half a gallery": (lambda: verify(torch.eye(4), TWO, ref_labels=TWO), ValueError, "both or neither"),
    "NaN scores": (lambda: verify_scores(torch.tensor([math.nan, 1]), TWO[:2]), ValueError, "NaN"),
    "integer scores": (lambda: verify_scores(TWO, TWO), TypeError, "floating"),
    "no scores": (lambda: verify_scores(torch.ones(0), TWO[:0]), ValueError, "non-empty"),
    "labels for same": (lambda: verify_scores(torch.rand(4), TWO + 1), ValueError, "0 and 1"),
    "a short same": (lambda: verify_scores(torch.rand(4), TWO[:3]), ValueError, "same must have shape"),
    "index too large": (lambda: pair_scores(torch.eye(4), TWO, TWO + 3), ValueError, r"second must .* \[0, 4\)"),
    "index below zero": (lambda: pair_scores(torch.eye(4), TWO - 1, TWO), ValueError, r"first must .* \[0, 4\)"),
    "lists that differ": (lambda: pair_scores(torch.eye(4), TWO, TWO[:3]), ValueError, "second must have shape"),
    "no mated pair": (lambda: sample_pairs(torch.arange(4)), ValueError, "no pair of one class"),
    "no other pair": (lambda: sample_pairs(TWO * 0), ValueError, "no pair of two classes"),
    "no labels": (lambda: sample_pairs(TWO[:0]), ValueError, "no pair of one class"),
    "no positives wanted": (lambda: sample_pairs(TWO, max_positives=0), ValueError, "max_positives"),
    "one fold": (lambda: fold_accuracy(torch.rand(4), TWO, folds=1), ValueError, "folds"),
    "one named fold": (lambda: fold_accuracy(torch.rand(4), TWO, fold_of=TWO * 0), ValueError, "two folds"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()

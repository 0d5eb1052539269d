"""Identification compared with the definitions, one probe at a time, and cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dml_kernels.evaluation import Identification, evaluate_identification, identify
from tests.support.evaluation import all_scores, clustered


def identity_scores(probes, gallery, gallery_labels, template, metric):
    """(N, identities) fp32 scores and the identities, ascending."""
    names = sorted(set(gallery_labels.tolist()))
    columns = []
    for name in names:
        own = gallery[gallery_labels == name].double()
        if template == "mean":
            if metric == "cosine":
                own = own / own.norm(dim=1, keepdim=True)
            own = own.mean(0, keepdim=True)
        columns.append(all_scores(probes, own, metric).max(axis=1))
    return np.stack(columns, axis=1), np.array(names)


def by_counting(scores, names, labels, far, ranks):
    known = np.isin(labels, names)
    top = scores.max(axis=1)
    cuts = sorted({*top.tolist(), *scores.ravel().tolist()})
    cmc, detected, rank_of = {}, {}, {}
    for i in np.nonzero(known)[0]:
        own = int(np.searchsorted(names, labels[i]))
        rank_of[i] = 1 + int((scores[i] > scores[i, own]).sum())
    for rank in ranks:
        cmc[rank] = np.mean([r <= rank for r in rank_of.values()])
    for f in far:
        lowest = min([t for t in cuts if np.mean(top[~known] >= t) <= f], default=math.inf)
        for rank in ranks:
            hits = [r <= rank and scores[i, np.searchsorted(names, labels[i])] >= lowest for i, r in rank_of.items()]
            detected[f, rank] = np.mean(hits)
    return cmc, detected, int(known.sum())


@pytest.mark.parametrize("template", ["max", "mean"])
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_rates_match_the_definitions(template, metric):
    far, ranks = (0.05, 0.2, 0.5), (1, 3, 7)
    gallery, gallery_labels = clustered(160, 25, 6, seed=5, spread=0.7)
    probes, labels = clustered(120, 45, 6, seed=5, spread=0.7)  # other centres; below, half of them the gallery's
    probes[::2], labels[::2] = gallery[:60] + 0.7 * torch.randn(60, 6), gallery_labels[:60]
    gallery_labels, labels = gallery_labels * 3 + 7, labels * 3 + 7  # labels are names, not positions
    scores, names = identity_scores(probes, gallery, gallery_labels, template, metric)
    cmc, detected, known = by_counting(scores, names, labels.numpy(), far, ranks)
    for tile in ((16, 23), (200, 1), (1, 500)):
        found = evaluate_identification(
            probes, labels, gallery, gallery_labels, ranks=ranks, far=far, template=template, metric=metric, tile=tile
        )
        assert (found.known, found.unknown, found.identities) == (known, 120 - known, len(names))
        assert found.unknown > 20
        assert found.cmc == pytest.approx(cmc, abs=1e-12)
        assert found.rank_1 == found.cmc[1]
        assert found.dir_at_far == pytest.approx(detected, abs=1e-12)
        answers = identify(probes, gallery, gallery_labels, template=template, metric=metric, tile=tile)
        for rate, cut in found.threshold_at_far.items():
            accepted = answers.predictions(cut, unknown=-7) != -7
            unknown = ~torch.isin(labels, gallery_labels)
            assert accepted[unknown].double().mean() <= rate
            right = answers.predictions(cut) == labels
            assert right[~unknown].double().mean() == pytest.approx(found.dir_at_far[rate, 1])


def test_an_open_set_drawn_by_hand():
    """On a line identity 10 is at 0 and identity 20 at 100. Unknown probes are at distances 2 and 6 from the nearest
    identity; known probes of 10 are at 1 and 5, and one of 20 is near 10.
    """
    gallery, names = torch.tensor([[0.0], [100.0]]), torch.tensor([10, 20])
    probes = torch.tensor([[-2.0], [106.0], [1.0], [5.0], [3.0]])
    labels = torch.tensor([99, 98, 10, 10, 20])
    found = evaluate_identification(probes, labels, gallery, names, ranks=(1, 2), far=(0.5, 1.0), metric="euclidean")
    assert found.cmc == {1: pytest.approx(2 / 3), 2: 1.0}
    # One false alarm of two allowed: the threshold is above -6, so 5 is accepted, and 20's own score of -97 is not.
    assert -6 < found.threshold_at_far[0.5] < -5.9
    assert found.threshold_at_far[1.0] == -math.inf
    assert found.dir_at_far == {
        (0.5, 1): pytest.approx(2 / 3),
        (0.5, 2): pytest.approx(2 / 3),
        (1.0, 1): pytest.approx(2 / 3),
        (1.0, 2): 1.0,
    }
    answers = identify(probes, gallery, names, metric="euclidean")
    assert answers.predictions(-4.0).tolist() == [10, -1, 10, -1, 10]


@pytest.mark.parametrize("template", ["max", "mean"])
def test_nearest_identities_are_in_order_and_ties_go_to_the_lowest_label(template):
    gallery, gallery_labels = clustered(90, 12, 5)
    probes = torch.randn(20, 5)
    scores, names = identity_scores(probes, gallery, gallery_labels, template, "cosine")
    for tile in (None, (3, 7), (20, 1)):
        found = identify(probes, gallery, gallery_labels, len(names), template=template, tile=tile)
        order = np.argsort(-scores, axis=1, kind="stable")
        assert found.identities.tolist() == names[order].tolist()
        assert np.array_equal(found.scores.numpy(), np.take_along_axis(scores, order, axis=1))
    equal = identify(
        torch.ones(2, 3), torch.ones(6, 3), torch.tensor([5, 4, 5, 9, 4, 2]), 4, template=template, tile=(1, 2)
    )
    assert equal.identities.tolist() == [[2, 4, 5, 9]] * 2


def test_max_takes_the_nearest_vector_and_mean_the_middle():
    """Identity 1 lies on both sides of the probe; identity 2 close by on one side."""
    gallery = torch.tensor([[-5.0], [5.0], [2.0]])
    names = torch.tensor([1, 1, 2])
    for template, expected in (("max", 2), ("mean", 1)):
        found = identify(torch.zeros(1, 1), gallery, names, template=template, metric="euclidean")
        assert found.identities.item() == expected


def test_closed_set_has_no_open_set_figures():
    gallery, names = clustered(30, 5, 4)
    found = evaluate_identification(gallery, names, gallery, names, ranks=(1, 50))
    assert (found.rank_1, found.cmc[50], found.unknown) == (1.0, 1.0, 0)
    assert found.dir_at_far == {} == found.threshold_at_far


def test_without_known_probes_there_is_no_rank():
    found = evaluate_identification(torch.randn(20, 3), torch.full((20,), 9), torch.eye(3), torch.arange(3), far=(0.5,))
    assert math.isnan(found.rank_1)
    assert math.isnan(found.dir_at_far[0.5, 1])
    assert not math.isnan(found.threshold_at_far[0.5])


def test_too_few_unknown_probes_are_nan_with_a_warning():
    labels = torch.tensor([0, 1, 8, 9])
    with pytest.warns(UserWarning, match=r"FAR 0.1 needs 10 unknown probes; got 2"):
        found = evaluate_identification(torch.randn(4, 3), labels, torch.eye(3), torch.arange(3), far=(0.1, 0.5))
    assert math.isnan(found.dir_at_far[0.1, 1])
    assert math.isnan(found.threshold_at_far[0.1])
    assert not math.isnan(found.dir_at_far[0.5, 1])


def test_unknown_probes_that_tie_are_rejected_together():
    """Ten alarms have one score, and at most half of them may pass, so none does."""
    probes, labels = torch.ones(20, 2), torch.tensor([0] * 10 + [7] * 10)
    found = evaluate_identification(probes, labels, torch.ones(1, 2), torch.zeros(1).long(), far=(0.5,))
    assert found.dir_at_far[0.5, 1] == 0.0
    assert found.rank_1 == 1.0


def test_low_precision_and_progress():
    gallery, names = clustered(64, 6, 8, spread=0.1)
    seen = []
    found = identify(gallery.bfloat16(), gallery.bfloat16(), names, tile=(10, 16), progress=seen.append)
    assert found.identities[:, 0].tolist() == names.tolist()
    assert sum(seen) == 64
    assert len(seen) > 5


ROWS, NAMES = torch.eye(3), torch.arange(3)
BAD = {
    "k above the identities": (lambda: identify(ROWS, ROWS, NAMES // 2, 3), ValueError, "holds 2 identities"),
    "k of zero": (lambda: identify(ROWS, ROWS, NAMES, 0), ValueError, "k=0"),
    "template": (
        lambda: identify(ROWS, ROWS, NAMES, template="median"),
        ValueError,
        "must be one of max, mean",
    ),
    "metric": (lambda: identify(ROWS, ROWS, NAMES, metric="l1"), ValueError, "metric"),
    "no probes": (lambda: identify(ROWS[:0], ROWS, NAMES), ValueError, "probes must be a non-empty"),
    "no gallery": (lambda: identify(ROWS, ROWS[:0], NAMES[:0]), ValueError, "gallery must be a non-empty"),
    "widths": (lambda: identify(ROWS[:, :2], ROWS, NAMES), ValueError, "does not match"),
    "NaN": (lambda: identify(ROWS, ROWS / 0, NAMES), ValueError, "gallery holds NaN"),
    "short labels": (lambda: identify(ROWS, ROWS, NAMES[:2]), ValueError, "gallery_labels must have shape"),
    "probe labels": (lambda: evaluate_identification(ROWS, NAMES[:2], ROWS, NAMES), ValueError, "probe_labels must"),
    "float labels": (lambda: evaluate_identification(ROWS, ROWS[0], ROWS, NAMES), TypeError, "probe_labels must"),
    "rank": (lambda: evaluate_identification(ROWS, NAMES, ROWS, NAMES, ranks=(0,)), ValueError, "ranks"),
    "far": (lambda: evaluate_identification(ROWS, NAMES, ROWS, NAMES, far=(2,)), ValueError, "far"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_a_score_at_the_threshold_is_accepted():
    found = Identification(torch.tensor([[4]]), torch.tensor([[0.1]]))
    assert found.predictions(torch.tensor(0.1).item()).tolist() == [4]
    assert found.predictions(0.2).tolist() == [-1]

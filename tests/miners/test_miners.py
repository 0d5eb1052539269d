"""Miners list the tuples of a brute-force search of the matrix, in bounded memory; draws follow the seed."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from dml_kernels import distances, functional, miners
from dml_kernels.pairs import batch as batch_module
from dml_kernels.profiling import run_in_child
from tests.support.problems import randint, randn

METRICS = [distances.LpDistance(), distances.LpDistance(power=2), distances.CosineSimilarity(),
           distances.DotProductSimilarity(normalize_embeddings=False)]  # fmt: skip
on_distances = pytest.mark.parametrize("distance", METRICS, ids=lambda d: d.metric)
REFERENCES = pytest.mark.parametrize("references", [False, True], ids=["batch", "references"])


def problem(n=24, m=0, d=5, classes=5, seed=0):
    x, y = randn(n, d, seed=seed).double(), randint(0, classes, n, seed=seed + 1)
    return (x, y, None, None) if not m else (x, y, randn(m, d, seed=seed + 2).double(), randint(0, classes, m, seed=9))


def matrix(distance, x, y, w, c):
    """The scores (larger is closer), the positives and the negatives, as whole matrices."""
    scores = distance(x, w) if distance.is_inverted else -distance(x, x if w is None else w)
    same = y[:, None] == (y if c is None else c)
    different = ~same
    if w is None:
        same = same & ~torch.eye(len(y), dtype=torch.bool)
    return scores, same, different


def listed(*columns):
    return sorted(zip(*(c.tolist() for c in columns), strict=True))


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(batch_module, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(miners.triplets, "TILE_ELEMENTS", 64)


@REFERENCES
@on_distances
@pytest.mark.parametrize("kind", miners.triplets.TYPES)
def test_triplets_are_those_of_the_definition(kind, distance, references, small_tiles):
    data = problem(m=17 * references)
    scores, same, different = matrix(distance, *data)
    expected = []
    for a, p, n in itertools.product(range(scores.size(0)), range(scores.size(1)), range(scores.size(1))):
        if same[a, p] and different[a, n]:
            slack = scores[a, p] - scores[a, n]
            inside = {"all": slack <= 0.2, "easy": slack > 0.2, "hard": slack <= 0, "semihard": 0 < slack <= 0.2}
            expected += [(a, p, n)] if inside[kind] else []
    found = miners.TripletMarginMiner(0.2, kind, distance=distance)(*data)
    assert listed(*found) == sorted(expected)


@REFERENCES
@on_distances
def test_pairs_beyond_the_margins(distance, references, small_tiles):
    data = problem(m=17 * references)
    scores, same, different = matrix(distance, *data)
    values = scores if distance.is_inverted else -scores
    a1, p, a2, n = miners.PairMarginMiner(0.3, 0.9, distance=distance)(*data)
    further = values < 0.3 if distance.is_inverted else values > 0.3
    closer = values > 0.9 if distance.is_inverted else values < 0.9
    assert listed(a1, p) == listed(*(same & further).nonzero().unbind(1))
    assert listed(a2, n) == listed(*(different & closer).nonzero().unbind(1))


@REFERENCES
@on_distances
def test_multi_similarity_keeps_what_is_hard_beside_the_other_kind(distance, references, small_tiles):
    data = problem(m=17 * references)
    scores, same, different = matrix(distance, *data)
    a1, p, a2, n = miners.MultiSimilarityMiner(0.1, distance=distance)(*data)
    positives = [(i, j) for i, j in same.nonzero().tolist()
                 if different[i].any() and scores[i, j] - 0.1 < scores[i][different[i]].max()]  # fmt: skip
    negatives = [(i, j) for i, j in different.nonzero().tolist()
                 if same[i].any() and scores[i, j] + 0.1 > scores[i][same[i]].min()]  # fmt: skip
    assert listed(a1, p) == positives
    assert listed(a2, n) == negatives


def chosen(strategy, scores, members, kind, beyond=None):
    """The choice of one row among its members, or None."""
    left = [j for j in members.nonzero().squeeze(1).tolist()
            if beyond is None or (scores[j] < beyond if kind == "different" else scores[j] > beyond)]  # fmt: skip
    hardest = max if kind == "different" else min
    easiest = min if kind == "different" else max
    pick = easiest if strategy == "easy" else hardest
    return pick(left, key=lambda j: scores[j].item(), default=None)


@REFERENCES
@on_distances
@pytest.mark.parametrize("strategies", [("hard", "hard"), ("easy", "semihard"), ("semihard", "hard"),
                                        ("easy", "easy"), ("hard", "semihard")], ids="-".join)  # fmt: skip
def test_batch_easy_hard_chooses_by_strategy(strategies, distance, references):
    data = problem(m=17 * references)
    scores, same, different = matrix(distance, *data)
    expected = []
    for i in range(scores.size(0)):
        if strategies[0] == "semihard":
            n = chosen(strategies[1], scores[i], different[i], "different")
            p = None if n is None else chosen("hard", scores[i], same[i], "same", scores[i, n])
        else:
            p = chosen(strategies[0], scores[i], same[i], "same")
            beyond = scores[i, p] if strategies[1] == "semihard" and p is not None else None
            n = None if p is None else chosen(strategies[1], scores[i], different[i], "different", beyond)
        expected += [] if p is None or n is None else [(i, p, i, n)]
    found = miners.BatchEasyHardMiner(*strategies, distance=distance)(*data)
    assert listed(*found) == expected
    if strategies == ("hard", "hard"):
        a, p, n = miners.BatchHardMiner(distance=distance)(*data)
        assert listed(a, p, a, n) == expected


def test_batch_easy_hard_lists_all_of_a_set_and_keeps_within_a_range():
    data = problem()
    scores, same, different = matrix(METRICS[0], *data)
    a1, p, a2, n = miners.BatchEasyHardMiner("all", "hard", allowed_neg_range=(0.9, 1.3))(*data)
    assert listed(a1, p) == listed(*same.nonzero().unbind(1))
    inside = different & (-scores >= 0.9) & (-scores <= 1.3)
    rows = inside.any(1).nonzero().squeeze(1)
    best = torch.where(inside, scores, -torch.inf).argmax(1)
    assert listed(a2, n) == listed(rows, best[rows])


@pytest.mark.parametrize("strategies", [("semihard", "semihard"), ("all", "semihard"), ("semihard", "all")])
def test_strategies_that_name_no_pair_are_refused(strategies):
    with pytest.raises(ValueError, match="names no pair"):
        miners.BatchEasyHardMiner(*strategies)


MINERS = [miners.TripletMarginMiner(), miners.PairMarginMiner(), miners.MultiSimilarityMiner(), miners.BatchHardMiner(),
          miners.BatchEasyHardMiner(), miners.DistanceWeightedMiner(), miners.UniformMiner()]  # fmt: skip
on_miners = pytest.mark.parametrize("miner", MINERS, ids=lambda m: type(m).__name__)


@on_miners
def test_positives_share_the_label_and_negatives_do_not_and_nothing_meets_itself(miner):
    x, y, _, _ = problem(n=60, classes=12)
    y[3] = -100  # in no set
    found = miner(x, y)
    a1, p, a2, n = found if len(found) == 4 else (found[0], found[1], found[0], found[2])
    assert len(a1) > 0
    assert len(a2) > 0
    assert (y[a1] == y[p]).all()
    assert (a1 != p).all()
    assert (y[a2] != y[n]).all()
    assert all((t != 3).all() and t.dtype == torch.int64 for t in (a1, p, a2, n))


@on_miners
@pytest.mark.parametrize(
    "labels", [[0, 0, 0, 0], [0, 1, 2, 3], [5], []], ids=["one class", "all distinct", "one row", "no rows"]
)
def test_a_batch_without_triplets_gives_empty_tuples(miner, labels):
    found = miner(randn(len(labels), 4, seed=0), torch.tensor(labels, dtype=torch.int64))
    assert all(t.numel() == 0 for t in found) or isinstance(miner, miners.PairMarginMiner | miners.BatchEasyHardMiner)


@on_miners
def test_half_precision_and_labels_of_any_integer_type(miner):
    x, y, _, _ = problem(n=40)
    for dtype in (torch.bfloat16, torch.float16):
        assert len(miner(x.to(dtype), y.int())) in (3, 4)


@on_miners
def test_no_graph_is_kept(miner):
    x, y, _, _ = problem(n=40)
    assert not any(t.requires_grad for t in miner(x.requires_grad_(), y))


@on_miners
def test_missing_labels_and_half_given_references_are_refused(miner):
    x, y, _, _ = problem()
    with pytest.raises(ValueError, match="needs labels"):
        miner(x, None)
    with pytest.raises(ValueError, match="ref_labels is missing"):
        miner(x, y, x)


@pytest.mark.parametrize("miner", [miners.DistanceWeightedMiner(), miners.UniformMiner()], ids=["weighted", "uniform"])
@REFERENCES
def test_draws_follow_the_seed_alone(miner, references):
    data = problem(n=50, m=40 * references)
    torch.manual_seed(3)
    first = miner(*data)
    torch.manual_seed(3)
    again = miner(*data)
    other = miner(*data)
    assert all(torch.equal(s, t) for s, t in zip(first, again, strict=True))
    assert not all(torch.equal(s, t) for s, t in zip(first, other, strict=True))


def test_uniform_draws_cover_every_positive_and_negative_alike():
    x, y = randn(12, 4, seed=0), torch.arange(12) % 3
    torch.manual_seed(0)
    a, p, n = miners.UniformMiner(triplets_per_anchor=3000)(x, y)
    assert torch.bincount(a, minlength=12).tolist() == [3000] * 12
    for anchor in range(12):
        for drawn, wanted in ((p, (y == y[anchor]) & (torch.arange(12) != anchor)), (n, y != y[anchor])):
            count = torch.bincount(drawn[a == anchor], minlength=12)
            expected = wanted / wanted.sum() * 3000
            assert (count[~wanted] == 0).all()
            # A chi-square of at most 10 degrees of freedom passes 40 once in 60 thousand.
            assert ((count - expected).square() / expected.clamp_min(1)).sum() < 40


def test_distance_weighted_draws_in_proportion_to_the_inverse_density():
    d, draws = 6, 20000
    x = functional.normalize(randn(9, d, seed=4).double())
    y = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7])
    torch.manual_seed(1)
    a, _, n = miners.DistanceWeightedMiner(triplets_per_anchor=draws)(x, y)
    t = (x[0] - x[2:]).norm(dim=1).clamp_min(0.5)
    weight = torch.where(t < 1.4, t ** (2 - d) * (1 - t**2 / 4) ** ((3 - d) / 2), 0)
    expected = weight / weight.sum() * draws
    count = torch.bincount(n[a == 0], minlength=9)[2:]
    assert (count[weight == 0] == 0).all()
    assert ((count - expected).square() / expected.clamp_min(1)).sum() < 40


def test_an_anchor_whose_negatives_all_lie_beyond_the_cutoff_gives_no_triplet():
    x = torch.tensor([[1.0, 0, 0, 0], [1, 0.01, 0, 0], [-1, 0, 0, 0], [-1, 0.01, 0, 0]])
    assert miners.DistanceWeightedMiner()(x, torch.tensor([0, 0, 1, 1]))[0].numel() == 0


def test_only_unit_euclidean_distances_are_weighted():
    with pytest.raises(ValueError, match="LpDistance"):
        miners.DistanceWeightedMiner(distance=distances.CosineSimilarity())


def test_they_are_those_of_pytorch_metric_learning():
    theirs = pytest.importorskip("pytorch_metric_learning.miners", reason="pytorch-metric-learning is not installed")
    x, y, _, _ = problem(n=80, classes=9)
    for ours in (*(miners.TripletMarginMiner(type_of_triplets=kind) for kind in miners.triplets.TYPES), *MINERS[1:5]):
        options = {"type_of_triplets": ours.type_of_triplets} if isinstance(ours, miners.TripletMarginMiner) else {}
        expected = getattr(theirs, type(ours).__name__)(**options)(x, y)
        found = ours(x, y)
        assert len(found) == len(expected)
        groups = [(0, 3)] if len(found) == 3 else [(0, 2), (2, 4)]
        assert all(listed(*found[i:j]) == listed(*expected[i:j]) for i, j in groups), type(ours).__name__


def test_memory_stays_within_some_tiles():
    # One matrix of scores would be 256 MB.
    found = json.loads(run_in_child("tests.support.memory_probe", "mine", "8000"))
    assert set(found) == {type(miner).__name__ for miner in MINERS}
    for name, peak in found.items():
        assert peak < 200 << 20, f"{name}: {peak >> 20} MB"

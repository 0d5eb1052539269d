"""Scores that are equal, or too large or small for fp32: no ranking depends on the shape of a tile."""

from __future__ import annotations

import pytest
import torch

from dml_kernels.evaluation import (
    evaluate,
    few_shot_accuracy,
    k_nearest_neighbours,
    nearest,
    pair_scores,
    sample_pairs,
    verify,
)

METRICS = ("cosine", "dot", "euclidean")
TILES = [(64, 64), (5, 8), (7, 3), (64, 1), (1, 64), (2, 13)]


def small_integers(n=40, d=7, seed=0):
    """Vectors with many equal scores, many of which are 0; none is exact after a division by norms."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (n, d), generator=generator).double()
    x[x.abs().sum(1) == 0, 0] = 1
    return x, torch.arange(n) % 5


def by_hand(x, metric):
    """The indices of all others, nearest first and of equals the lowest first, by integer arithmetic."""
    products, squares = (x @ x.T).long(), x.square().sum(1).long()
    order = []
    for i in range(len(x)):

        def key(j, i=i):
            s = int(products[i, j])
            if metric == "dot":
                return -s, j
            if metric == "euclidean":
                return int(squares[i] + squares[j] - 2 * products[i, j]), j
            # sign(s) s^2 / |x_j|^2, over a common denominator of all |x_j|^2 up to 28
            return -(s * abs(s)) * (80313433200 // int(squares[j])), j

        order.append(sorted((j for j in range(len(x)) if j != i), key=key))
    return torch.tensor(order)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_equal_scores_rank_by_index_in_any_tile(metric, seed):
    x, _ = small_integers(seed=seed)
    if metric == "cosine":
        assert all(80313433200 % int(square) == 0 for square in x.square().sum(1))
    expected = by_hand(x, metric)
    for tile in TILES:
        assert torch.equal(nearest(x.float(), 39, metric=metric, tile=tile)[1], expected)


@pytest.mark.parametrize("metric", METRICS)
def test_measures_do_not_hang_on_the_tile(metric):
    x, y = small_integers(seed=4)
    pytest.importorskip("sklearn")
    whole = evaluate(x, y, (1, 5), metric=metric), verify(x, y, metric=metric, far=(0.1,))
    for tile in TILES:
        found = evaluate(x, y, (1, 5), metric=metric, tile=tile), verify(x, y, metric=metric, far=(0.1,), tile=tile)
        assert found == whole


def test_orthogonal_vectors_score_0():
    x, _ = small_integers(seed=5)
    products = x @ x.T
    first, second = (products == 0).nonzero().unbind(1)
    for metric in ("cosine", "dot"):
        assert (pair_scores(x, first, second, metric=metric) == 0).all()
        score, index = nearest(x, 39, metric=metric)
        assert torch.equal(score == 0, products.gather(1, index) == 0)
        assert torch.equal(score > 0, products.gather(1, index) > 0)


def test_copies_of_a_row_score_the_same_beside_any_row():
    generator = torch.Generator().manual_seed(0)
    base, query = torch.randn(9, 33, generator=generator).double(), torch.randn(12, 33, generator=generator).double()
    query -= query @ torch.linalg.pinv(base) @ base * (1 - 1e-9)  # nearly orthogonal to all: cosines of some 1e-9
    gallery = base.repeat(7, 1)
    for metric in ("cosine", "dot"):
        for tile in ((12, 63), (7, 4), (12, 1), (3, 10)):
            score, index = nearest(query, 63, ref_embeddings=gallery, metric=metric, tile=tile)
            found = torch.empty_like(score).scatter_(1, index, score).view(12, 7, 9)
            assert torch.equal(found, found[:, :1].expand_as(found))


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e-13, 1e30, 1e200])
def test_cosines_know_no_length(scale):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 5, generator=generator).double(), torch.arange(30) % 4
    scaled = x.clone()
    scaled[::2] *= scale
    assert torch.equal(nearest(scaled, 29)[1], nearest(x, 29)[1])
    assert evaluate(scaled, y) == evaluate(x, y)
    options = {"ways": 3, "queries": 2, "episodes": 20}
    assert few_shot_accuracy(scaled, y, **options) == few_shot_accuracy(x, y, **options)
    if 1e-30 <= scale <= 1e30:
        assert torch.equal(nearest(scaled.float(), 29)[1], nearest(x.float(), 29)[1])


@pytest.mark.parametrize(
    ("metric", "scale"), [("dot", 1e25), ("dot", 1e-25), ("euclidean", 1e38), ("euclidean", 1e-38)]
)
def test_scores_beyond_fp32_are_refused(metric, scale):
    x, y = small_integers()
    pytest.importorskip("sklearn")
    message = r"embeddings and ref_embeddings make scores of the size .*metric='cosine'"
    pairs = sample_pairs(y)[:2]
    for call in (
        lambda v: evaluate(v, y, metric=metric),
        lambda v: nearest(v, 1, metric=metric),
        lambda v: verify(v, y, metric=metric),
        lambda v: pair_scores(v, *pairs, metric=metric),
        lambda v: k_nearest_neighbours(v, v, y, metric=metric),
    ):
        with pytest.raises(ValueError, match=message):
            call(x * scale)
    assert (nearest(torch.zeros(4, 3), 3, metric=metric)[0] == 0).all()

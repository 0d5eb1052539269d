"""Options that only one pair loss has."""

from __future__ import annotations

import pytest
import torch

from dml_kernels.distances import CosineSimilarity, LpDistance
from dml_kernels.losses import REGISTRY
from dml_kernels.pairs.tuples import random_triplets
from tests.losses.test_pair_losses import all_pairs, problem
from tests.support.problems import randn


def test_circle_is_defined_on_cosines():
    with pytest.raises(ValueError, match="CircleLoss is defined on CosineSimilarity; got LpDistance"):
        REGISTRY["CircleLoss"].loss(distance=LpDistance())


def test_indices_out_of_range_are_refused():
    x, y = torch.ones(4, 3), torch.arange(4)
    a = torch.arange(2)
    for tuples in ((a, a + 3, a), (a - 1, a, a), (a, a, a + 7)):
        with pytest.raises(ValueError, match="must be rows of"):
            REGISTRY["ContrastiveLoss"].loss()(x, y, tuples)


def test_n_pairs_takes_the_first_two_of_each_class_and_no_references():
    x, y = randn(7, 3, seed=0), torch.tensor([4, 1, 4, 1, 9, 4, 1])
    z = torch.nn.functional.normalize(x)
    expected = torch.nn.functional.cross_entropy(z[[1, 0]] @ z[[3, 2]].T, torch.arange(2))
    loss = REGISTRY["NPairsLoss"].loss()
    torch.testing.assert_close(loss(x, y), expected)
    with pytest.raises(ValueError, match="takes no ref_emb"):
        loss(x, y, ref_emb=x.clone(), ref_labels=y)


def test_margin_learns_its_boundary_and_keeps_its_dtype():
    x, y, _ = problem()
    loss = REGISTRY["MarginLoss"].loss(learn_beta=True, nu=0.3, num_classes=6)
    loss(x.bfloat16(), y).backward()
    assert loss.beta.dtype == torch.float32
    assert loss.beta.grad.count_nonzero() > 2
    assert list(loss.state_dict()) == ["beta"]
    assert list(REGISTRY["MarginLoss"].loss().state_dict()) == []
    with pytest.raises(ValueError, match=r"labels must be in \[0, 6\)"):
        loss(x, y + 3)
    with pytest.raises(ValueError, match="triplets_per_anchor"):
        REGISTRY["MarginLoss"].loss(triplets_per_anchor="many")


def test_drawn_triplets_are_uniform_over_each_anchors():
    x, y, refs = problem(9, 12, classes=3)
    loss = REGISTRY["MarginLoss"].loss()
    for batch in (loss.batch(x, y, None, None, None), loss.batch(x, y, None, *refs)):
        c = batch.c
        a, p, n = random_triplets(batch, 2000)
        assert ((y[a] == c[p]) & (y[a] != c[n]) & (c[p] != -100) & (c[n] != -100)).all()
        assert batch.exclude is None or (a != p).all()
        same, different = all_pairs(y, None if c is batch.y else c)[::2]
        usable = [i for i in range(9) if (same == i).any() and (different == i).any()]
        assert a.unique().tolist() == usable
        for i in usable:
            for found, many in ((p, same), (n, different)):
                counts = found[a == i].bincount(minlength=len(c))
                expected = 2000 / (many == i).sum()
                assert (counts > 0).sum() == (many == i).sum()
                assert (counts[counts > 0] - expected).abs().max() < 5 * expected**0.5
    drawn = REGISTRY["MarginLoss"].loss(triplets_per_anchor=500, distance=CosineSimilarity(), beta=0.3)
    every = REGISTRY["MarginLoss"].loss(distance=CosineSimilarity(), beta=0.3)
    torch.testing.assert_close(drawn(x, y), every(x, y), rtol=0.1, atol=0.0)

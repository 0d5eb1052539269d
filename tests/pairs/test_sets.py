"""Which pairs are same and different: production's spelling and the references', by a loop over pairs."""

from __future__ import annotations

import itertools

import pytest
import torch

from dml_kernels import reference
from dml_kernels.pairs.sets import IGNORE_INDEX, sets_of

N, M = 9, 7


@pytest.mark.parametrize("ignore", [IGNORE_INDEX, 2])
@pytest.mark.parametrize(("labelled", "excludes"), [*itertools.product((False, True), repeat=2)])
def test_every_pair(labelled, excludes, ignore):
    g = torch.Generator().manual_seed(3)
    y = torch.randint(0, M, (N,), generator=g)
    c = torch.randint(0, 4, (M,), generator=g) if labelled else None
    exclude = torch.randint(-1, M, (N,), generator=g) if excludes else None
    y[0] = ignore
    if c is not None:
        c[1] = ignore
    expected = torch.zeros(3, N, M, dtype=torch.bool)
    for i, j in itertools.product(range(N), range(M)):
        if int(y[i]) == ignore:
            continue
        label = j if c is None else int(c[j])
        expected[2, i, j] = label == int(y[i])
        if (c is not None and label == ignore) or (exclude is not None and int(exclude[i]) == j):
            continue
        expected[0 if label == int(y[i]) else 1, i, j] = True
    assert torch.equal(torch.stack(reference.sets(y, c, M, exclude, ignore)), expected[:2])
    for k in (slice(0, M), slice(2, 5)):
        assert torch.equal(torch.stack(sets_of(y, c, exclude, ignore, k)), expected[:, :, k])

"""The number of positives and negatives of each row, compared with a dense count."""

from __future__ import annotations

import pytest
import torch

from dml_kernels.pairs.class_ranges import ClassRanges, count_pairs
from tests.support.problems import randint

N, M, IGNORED = 40, 30, -100


@pytest.mark.parametrize("classes", [1, 3, 20])
@pytest.mark.parametrize("excluded", ["none", "its own", "any or none"])
@pytest.mark.parametrize("bank", [M, 0])
def test_counts_are_those_of_the_matrix(classes, excluded, bank):
    y, c = randint(0, classes, N, seed=1), randint(0, classes, bank, seed=2)
    y[::7], c[::5] = IGNORED, IGNORED
    most = max(bank, 1)
    choices = {"none": None, "its own": torch.arange(N) % most, "any or none": randint(-1, most, N, seed=3)}
    exclude = choices[excluded]
    there = (c != IGNORED) & (y != IGNORED)[:, None]
    if exclude is not None:
        there &= exclude[:, None] != torch.arange(bank)
    same = y[:, None] == c
    expected = (there & same).sum(1), (there & ~same).sum(1)
    ranges = ClassRanges.of(y, c, exclude, IGNORED)
    for found in (count_pairs(y, c, exclude, IGNORED), (ranges.positives, ranges.negatives)):
        assert [t.tolist() for t in found] == [t.tolist() for t in expected]

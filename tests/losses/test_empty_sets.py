"""Both derivatives of every loss are those of the formula where anchors lack positives, negatives or both."""

from __future__ import annotations

import pytest
import torch

from dml_kernels.losses import REGISTRY
from tests.support.problems import randn

LABELS = {
    "one class": [0, 0, 0, 0, 0, 0],
    "no two alike": [0, 1, 2, 3, 4, 5],
    "one apart": [0, 0, 0, 0, 0, 1],
    "one class and ignored rows": [0, 0, -100, 0, 0, -100],
    "pairs": [0, 0, 1, -100, 2, 2],
    "all ignored": [-100] * 6,
}
CASES = [(name, i) for name, entry in REGISTRY.items() for i in range(len(entry.options))]


def calls(entry, options, y):
    """Functions of (loss, its leaves), with the leaves: one for each way to call a loss of the family."""
    x = randn(6, 3, seed=1)
    if entry.family == "proxies":
        yield lambda loss, x, w: loss(x, w, y, **options), [x, randn(6 * entry.centres, 3, seed=2)]
    elif entry.family == "clusters":
        classes = torch.tensor([0, 1, 1, 2, 2, 0])
        yield lambda loss, x: loss(x, y, classes, **options), [x]
    else:
        yield lambda loss, x: loss(x, y, **options), [x]
        if entry.loss.takes_references:
            c = torch.tensor([0, 0, 1, 7, -100])
            yield lambda loss, x, w: loss(x, y, ref_emb=w, ref_labels=c, **options), [x, randn(5, 3, seed=2)]


def listed(entry, options, y):
    """A function of the embeddings: the loss of all pairs of the batch, listed."""
    same = (y[:, None] == y) & (y != -100)[:, None] & ~torch.eye(6, dtype=torch.bool)
    different = (y[:, None] != y) & (y != -100)[:, None] & (y != -100)
    tuples = (*same.nonzero(as_tuple=True), *different.nonzero(as_tuple=True))
    return lambda x: entry.loss(**options).double()(x, y, tuples)


def derivatives(function, leaves):
    leaves = [t.clone().requires_grad_() for t in leaves]
    total = function(*leaves).sum() + sum((0 * t).sum() for t in leaves)
    first = torch.autograd.grad(total, leaves, create_graph=True)
    along = sum((g * randn(*g.shape, seed=9)).sum() + 0 * g.sum() for g in first) + sum((0 * t).sum() for t in leaves)
    return first, torch.autograd.grad(along, leaves)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(("name", "which"), CASES, ids=[f"{name}-{i}" for name, i in CASES])
def test_both_derivatives_are_those_of_the_formula(name, which, labels):
    entry, y = REGISTRY[name], torch.tensor(LABELS[labels])
    options = entry.options[which]
    for call, leaves in calls(entry, options, y):
        found = derivatives(lambda *t, call=call: call(entry.function, *t), leaves)
        expected = derivatives(lambda *t, call=call: call(entry.reference, *t), leaves)
        for ours, truth in zip(found, expected, strict=True):
            for a, b in zip(ours, truth, strict=True):
                assert a.isfinite().all()
                if b.isfinite().all():  # a dense formula may have NaN at the edge of its domain
                    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    if entry.family == "pairs":
        for g in (g for order in derivatives(listed(entry, options, y), [randn(6, 3, seed=1)]) for g in order):
            assert g.isfinite().all()

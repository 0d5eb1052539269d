"""Losses on proxies of this library and of pytorch-metric-learning with equal settings, for tests that compare them."""

from __future__ import annotations

import pytest
import torch

from dml_kernels import losses
from tests.support.problems import randint, randn

N, C, D = 12, 7, 5


# The name of the loss; settings other than the defaults; the number of bank rows of a class.
CASES = {
    "ProxyNCALoss": ({}, {"softmax_scale": 9}),
    "ProxyAnchorLoss": ({}, {"margin": 0.3, "alpha": 5}),
    "NormalizedSoftmaxLoss": ({}, {"temperature": 0.3}),
    "CosFaceLoss": ({}, {"margin": 0.1, "scale": 5}),
    "ArcFaceLoss": ({}, {"margin": 50, "scale": 5}),
    "SphereFaceLoss": ({}, {"margin": 3, "scale": 2}),
    "LargeMarginSoftmaxLoss": ({}, {"margin": 3, "scale": 0.5}),
    "SubCenterArcFaceLoss": ({}, {"sub_centers": 2, "scale": 7}),
    "SoftTripleLoss": ({}, {"centers_per_class": 3, "la": 5, "gamma": 0.5, "margin": 0.2}),
}
on_cases = pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name, several in CASES.items() for options in several],
    ids=lambda value: value if isinstance(value, str) else str(value or "defaults"),
)
on_names = pytest.mark.parametrize("name", CASES)


def both(pml, name, options=None, dtype=torch.float64, **more):
    """pytorch-metric-learning's loss and ours with the same initial parameters, from the same seed."""
    built = []
    for source in (pml.losses, losses):
        torch.manual_seed(5)
        given = {k: v(source) if callable(v) else v for k, v in more.items()}
        built.append(getattr(source, name)(num_classes=C, embedding_size=D, **(options or {}), **given).to(dtype))
    return built


def theirs_as_ours(theirs, ours):
    """The parameter of pytorch-metric-learning's loss as (M, D) rows."""
    ((name, parameter),) = theirs.named_parameters()
    return parameter if name == ours.bank_name else parameter.t()


def batch(n=N, dtype=torch.float64):
    return randn(n, D, seed=1).to(dtype) * 2, randint(0, C, n, seed=2)


def outcome(loss, bank_grad, x, y, *rest):
    x = x.clone().requires_grad_()
    loss.zero_grad()
    value = loss(x, y, *rest)
    value.backward()
    return value.detach(), x.grad, bank_grad(loss)


def assert_theirs(theirs, ours, x, y, *rest):
    a = outcome(ours, lambda loss: loss.bank.grad, x, y, *rest)
    b = outcome(theirs, lambda loss: loss.get_parameter(next(iter(dict(loss.named_parameters())))).grad, x, y, *rest)
    if ours.transposed_name is not None:
        b = (*b[:2], b[2].t())
    for what, found, expected in zip(("value", "grad of embeddings", "grad of bank"), a, b, strict=True):
        torch.testing.assert_close(found, expected, msg=lambda m, what=what: f"{what}: {m}")


def triplets(y):
    """A miner's triplets, each row in a different number of them, some in none."""
    a, p, n = [], [], []
    for i in range(len(y) - 2):
        for j in range(len(y)):
            for k in range(i):
                if i != j and y[i] == y[j] and y[k] != y[i]:
                    a, p, n = [*a, i], [*p, j], [*n, k]
    assert len(a) > 3
    return tuple(torch.tensor(t) for t in (a, p, n))


TUPLES = {
    "none": lambda y: None,
    "triplets": triplets,
    "pairs": lambda y: (torch.tensor([0, 0, 3]), torch.tensor([1, 2, 4]), torch.tensor([5, 0]), torch.tensor([6, 0])),
    "empty": lambda y: (torch.zeros(0, dtype=torch.int64),) * 3,
}

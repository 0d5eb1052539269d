"""``ignore_index`` is a label: it leaves rows out, and a bank entry only where a label ``c`` of its own says so."""

from __future__ import annotations

import pytest
import torch

from dml_kernels import functional as F
from dml_kernels import losses
from tests.support.problems import randint, randn

N, M, D, IGNORED = 16, 6, 4, 2


def logsumexp(x, w, y, c, **options):
    out = F.masked_logsumexp(x, w, y, c, scale=3.0, sums=True, **options)
    return out.same, out.different, out.sum_same, out.sum_different


def hinge(x, w, y, c, **options):
    return F.masked_hinge_sum(x, w, y, c, same=(-1.0, 1.0), different=(1.0, 0.2), **options)


def argmax(x, w, y, c, **options):
    found = F.masked_argmax(x, w, y, c, which="both", **options)
    return found.same.index, found.same.count, found.different.index, found.different.count, found.different.score


def pair_sum(x, w, y, c, **options):
    return F.positive_pair_sum(x, w, y, c, torch.linspace(-1, 1, N).double(), kind="softplus", params=(2.0,), **options)


def triplets(x, w, y, c, **options):
    return F.triplet_sum(x, w, y, c, margin=0.3, **options)


OPS = {f.__name__: f for f in (logsumexp, hinge, argmax, pair_sum, triplets)}


ON_THE_CPU = ("logsumexp", "hinge", "argmax")


@pytest.mark.cpp
@pytest.mark.parametrize(
    ("op", "backend"), [(op, b) for op in OPS for b in ("cpu", "torch", "reference") if b != "cpu" or op in ON_THE_CPU]
)
def test_a_bank_without_labels_keeps_the_entry_of_that_index(op, backend):
    x, w, y = randn(N, D, seed=1).double(), randn(M, D, seed=2).double(), randint(0, M, N, seed=3)
    assert (y == IGNORED).any()
    found = OPS[op](x, w, y, None, ignore_index=IGNORED, backend=backend)
    # The same stated apart: no bank entry has the label of an ignored row, and each has its index as label.
    expected = OPS[op](x, w, torch.where(y == IGNORED, -100, y), torch.arange(M), ignore_index=-100, backend=backend)
    torch.testing.assert_close(tuple(found), tuple(expected))


@pytest.mark.parametrize("op", OPS)
def test_labels_beyond_a_bank_without_labels_are_refused(op):
    x, w, y = randn(N, D, seed=1).double(), randn(M, D, seed=2).double(), randint(0, M, N, seed=3)
    y[5] = M
    with pytest.raises(ValueError, match=rf"labels must be in \[0, {M}\)"):
        OPS[op](x, w, y, None)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("ignored", [0, 1, 4])
def test_a_mapped_label_is_not_taken_for_the_ignored_one(ignored, metric):
    x, w, y = randn(N, D, seed=1).double(), randn(3, D, seed=2).double(), randint(0, 5, N, seed=3)
    to_proxy = torch.tensor([1, 0, 2, 1, 0])
    options = {"label_to_proxy": to_proxy, "softmax_scale": 3.0, "metric": metric}
    found = losses.REGISTRY["ProxyNCALoss"].function(x, w, y, ignore_index=ignored, reduction="none", **options)
    z = -(torch.nn.functional.normalize(x)[:, None] - torch.nn.functional.normalize(w)).square().sum(2)
    z = z if metric == "sqeuclidean" else z / 2 + 1
    rows = torch.nn.functional.cross_entropy(3 * z, to_proxy[y], reduction="none")
    torch.testing.assert_close(found, torch.where(y == ignored, 0, rows))


@pytest.mark.parametrize("ignored", [0, 1])
def test_proxies_start_from_all_rows_that_are_not_ignored(ignored):
    loss = losses.ProxyNCALoss(3, D, label_to_proxy=torch.tensor([1, 0, 1]), ignore_index=ignored).double()
    x, y = randn(N, D, seed=1).double(), randint(0, 3, N, seed=3)
    loss.init_from_data(x, y)
    u = torch.nn.functional.normalize(x)
    for proxy, labels in ((0, [1]), (1, [0, 2])):
        members = torch.isin(y, torch.tensor(labels)) & (y != ignored)
        if members.any():
            torch.testing.assert_close(loss.proxies[proxy].detach(), u[members].mean(0))


@pytest.mark.parametrize("name", [n for n, e in losses.family("proxies").items()])
def test_every_loss_on_proxies_leaves_out_rows_alone(name):
    entry = losses.REGISTRY[name]
    options = {**entry.options[0], "ignore_index": IGNORED}
    x, y = randn(N, D, seed=1).double(), randint(0, M, N, seed=3)
    w = randn(M * entry.centres, D, seed=2).double()
    kept = y != IGNORED
    torch.testing.assert_close(
        entry.function(x, w, y, **options), entry.function(x[kept], w, y[kept], **options | {"ignore_index": -100})
    )

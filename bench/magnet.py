"""The Magnet loss, compared with dense PyTorch and torch.compile: forward, and backward to embeddings and centres.

Two suites: a batch of clusters with its own means, and many clusters given. A problem's bank entries are the clusters'
centres, its labels the cluster ids, in no order and of unequal sizes; three clusters make a class.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dml_kernels.losses import REGISTRY

from . import floor
from .case import Case, Contender, Outputs, Step, training_step
from .losses import BACKENDS, compiled
from .problem import Problem

BATCH, GIVEN = "MagnetLoss", "MagnetLoss-centres"
SUITES = (BATCH, GIVEN)
ENTRY = REGISTRY["MagnetLoss"]
CLUSTERS_PER_CLASS = 3
ALPHA = 1.0


def dense_magnet(x: Tensor, clusters: Tensor, classes: Tensor, *, centers: Tensor | None, alpha: float) -> Tensor:
    """The formula as one writes it in PyTorch with care: means by a matrix product, one N x M matrix, in log space."""
    x = x.float()
    if centers is None:
        one = torch.nn.functional.one_hot(clusters, classes.numel()).float()
        rows_in = one.sum(0)
        bank, used = (one.T @ x) / rows_in.clamp_min(1)[:, None], rows_in > 0
    else:
        bank, used = centers.float(), torch.ones_like(classes, dtype=torch.bool)
    own = (x - bank[clusters]).square().sum(1)
    scale = 0.5 / (own.sum() / max(x.size(0) - 1, 1)).clamp_min(1e-6)  # 0 where every cluster has one row
    d2 = x.square().sum(1)[:, None] + bank.square().sum(1) - 2 * x @ bank.T
    z = (-scale * d2).masked_fill((classes[clusters][:, None] == classes) | ~used, -torch.inf)
    return torch.relu(alpha + scale * own + torch.logsumexp(z, 1)).mean()


def _step(function: Callable[..., Tensor], problem: Problem, given: bool, **options) -> Step:
    classes = torch.arange(problem.size.m) // CLUSTERS_PER_CLASS

    def loss(x: Tensor, w: Tensor) -> Outputs:
        centers = w if given else None
        return (function(x, problem.y, classes, centers=centers, alpha=ALPHA, **options),)

    return training_step(loss, problem, wants="xw" if given else "x")


def contenders(suite: str) -> list[Contender]:
    """The floor, our backends and the peers, in the order of the table."""
    given = suite == GIVEN
    case = Case(
        suite,
        truth=lambda p: _step(ENTRY.function, p, given, backend="torch")(),
        reference=lambda p: _step(ENTRY.reference, p, given)(),
    )

    def ours(backend: str) -> Contender:
        make = lambda p: _step(ENTRY.function, p, given, backend=backend)  # noqa: E731
        return Contender(f"ours ({backend})", case, make, passes=4)

    def peer(name: str, function: Callable[[Problem], Callable[..., Tensor]], **options) -> Contender:
        make = lambda p: _step(function(p), p, given)  # noqa: E731
        return Contender(name, case, make, kind="peer", dense=4.0, passes=3, **options)

    warm = {"slow_first": True, "warm": lambda contender, problem: contender.make(problem)()}
    return [
        floor.four_contender(),
        *map(ours, BACKENDS),
        peer("torch.compile", lambda p: compiled(dense_magnet, p.size, p.dtype), **warm),
        peer("eager", lambda p: dense_magnet),
    ]

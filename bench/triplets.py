"""Losses whose terms are pairs or triplets of a batch, beside pytorch-metric-learning: forward, and backward to the
embeddings.

A problem is NxNxD, so that the floor is that of a batch compared with itself; its examples have some 8 of a class, and
lie as at the start of a training, in no clusters. Ours is the drop-in Module, called as theirs. Theirs lists all N K N
triplets, or holds every positive pair beside every negative pair (K N x N^2 numbers): what that takes is worked out
before it is tried, and said where it is too much.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dml_kernels.losses import REGISTRY

from . import floor
from .case import Case, Contender, Step, training_step
from .problem import Problem, Size

SUITES = ("TripletMarginLoss", "NTXentLoss", "LiftedStructureLoss")
EACH = 8  # examples of a class
GIB = 1 << 30


def _step(function: Callable[..., Tensor], problem: Problem) -> Step:
    labels = problem.y // EACH
    return training_step(lambda x, w: (function(x, labels),), problem, wants="x")


def their_bytes(suite: str, size: Size) -> float:
    """What theirs holds at least at its peak; labels drawn at random give an example EACH positives.

    Triplets: three int64 lists, twice while they are joined. Pairs: the negatives beside each positive, their mask as
    such and as numbers, and the masked negatives, in fp32.
    """
    positives, negatives = size.n * EACH, max(size.n - EACH - 1, 0)
    if suite == "TripletMarginLoss":
        return positives * negatives * 6 * 8
    return positives * size.n * negatives * (1 + 3 * 4)


def _theirs(suite: str, case: Case) -> Contender:
    def make(problem: Problem) -> Step:
        from pytorch_metric_learning import losses

        loss: Any = getattr(losses, suite)()
        return _step(lambda x, y: loss(x, y), problem)

    def dense(size: Size) -> float:
        return their_bytes(suite, size) / (4 * size.n * size.m)

    def note(problem: Problem) -> str:
        return f"theirs holds at least {their_bytes(suite, problem.size) / GIB:.2g} GiB"

    return Contender("pytorch-metric-learning", case, make, kind="peer", dense=dense, note=note)


def contenders(suite: str) -> list[Contender]:
    """The floor, ours and theirs."""
    entry = REGISTRY[suite]
    case = Case(
        suite,
        truth=lambda p: _step(entry.function, p)(),
        reference=lambda p: _step(entry.reference, p)(),
    )
    found = [floor.four_contender(), Contender("ours", case, lambda p: _step(entry.loss(), p), passes=4)]
    if importlib.util.find_spec("pytorch_metric_learning"):
        found.append(_theirs(suite, case))
    return found

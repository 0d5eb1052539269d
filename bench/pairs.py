"""The losses on pairs and triplets, compared with pytorch-metric-learning: forward, and backward to the embeddings.

The rows of a problem are the embeddings, 8 of each class, compared with each other; its bank, of the same size, is used
only for the floor. The embeddings form no clusters yet, as at the start of training. One suite holds most losses. Those
for which pytorch-metric-learning lists every triplet, or every positive pair with every negative pair, have their own.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from dml_kernels import use_backend
from dml_kernels.losses import family

from . import floor
from .case import Case, Contender, Outputs, Step, training_step
from .problem import Problem, Size

PER_CLASS = 8
# Every pair or triplet is active, which is the most work for our kernels. Where a hinge passes 0 among millions of
# terms the slope jumps, rounding decides about the nearest terms, and the gradients of two methods do not agree.
OPTIONS = {
    "ContrastiveLoss": {"neg_margin": 2.0},
    "MarginLoss": {"beta": 1.5, "margin": 0.45},
    "TripletMarginLoss": {"margin": 2.0},
}


def _listed_triplets(size: Size) -> float:
    """The memory of three int64 lists of every triplet, twice while they are joined."""
    return (PER_CLASS - 1) * max(size.n - PER_CLASS, 0) * 6 * 8 / (4 * size.m)


def _pairs_with_pairs(size: Size) -> float:
    """The memory of each positive's negatives in fp32, their mask as booleans and numbers, and the masked negatives."""
    return (PER_CLASS - 1) * max(size.n - PER_CLASS, 0) * size.n * (1 + 3 * 4) / (4 * size.m)


# The losses with a suite of their own -> how many N x N fp32 matrices pytorch-metric-learning holds at least.
SUITE = "pairs"
APART: dict[str, Callable[[Size], float]] = {
    "TripletMarginLoss": _listed_triplets,
    "NTXentLoss": _pairs_with_pairs,
    "LiftedStructureLoss": _pairs_with_pairs,
}
SUITES = (SUITE, *APART)
# The same of the others, measured at N = 2,048; what is not here, 20.
DENSE = {"MarginLoss": 110.0}


def _step(loss: Callable[[Tensor, Tensor], Tensor], problem: Problem) -> Step:
    labels = torch.arange(problem.size.n) // PER_CLASS
    return training_step(lambda x, w: (loss(x, labels),), problem, wants="x")


def _streamed(name: str, problem: Problem) -> Step:
    loss = family("pairs")[name].loss(**OPTIONS.get(name, {}))

    def on_torch(x: Tensor, labels: Tensor) -> Tensor:
        with use_backend("torch"):
            return loss(x, labels)

    return _step(on_torch, problem)


def _contenders(name: str, prefix: str = "") -> list[Contender]:
    entry, options = family("pairs")[name], OPTIONS.get(name, {})

    def reference(problem: Problem) -> Outputs:
        return _step(functools.partial(entry.reference, **options), problem)()

    def pml_step(problem: Problem) -> Step:
        from pytorch_metric_learning import losses

        return _step(getattr(losses, name)(**options), problem)

    case = Case(name, truth=lambda p: _streamed(name, p)(), reference=reference)
    found = [Contender(f"{prefix}ours", case, lambda p: _step(entry.loss(**options), p), variant="ours", passes=4)]
    if importlib.util.find_spec("pytorch_metric_learning"):
        title, dense = f"{prefix}pytorch-metric-learning", APART.get(name, DENSE.get(name, 20.0))
        found.append(Contender(title, case, pml_step, kind="peer", variant="PML", dense=dense, passes=4))
    return found


def contenders(suite: str) -> list[Contender]:
    """The floor, then the losses of a suite, each of this package and of pytorch-metric-learning."""
    if suite in APART:
        return [floor.four_contender(), *_contenders(suite)]
    together = (name for name in family("pairs") if name not in APART)
    return [floor.four_contender(), *(c for name in together for c in _contenders(name, f"{name}: "))]

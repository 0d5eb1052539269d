"""The pair losses beside pytorch-metric-learning's: forward, and backward to the embeddings, 8 examples a class.

A problem's rows are the embeddings, compared with each other; its bank, as large, serves the floor alone. The
embeddings are not clustered yet, as at the start of a training.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from dml_kernels import use_backend
from dml_kernels.losses import family

from . import floor, triplets
from .case import Case, Contender, Outputs, Step, training_step
from .problem import Problem

SUITE = "pairs"
PER_CLASS = 8
# At the default, 1, next to no pair of unclustered embeddings is active, and bf16's rounding decides on those that are.
OPTIONS = {"ContrastiveLoss": {"neg_margin": 1.4}}
# How many N x N fp32 matrices theirs holds at its peak, measured at N = 2,048; what is not here, 20.
DENSE = {"MarginLoss": 110.0}


def _step(loss: Callable[[Tensor, Tensor], Tensor], problem: Problem) -> Step:
    labels = torch.arange(problem.size.n) // PER_CLASS
    return training_step(lambda x, w: (loss(x, labels),), problem, wants="x")


def _streamed(name: str, problem: Problem) -> Step:
    loss = family(SUITE)[name].loss(**OPTIONS.get(name, {}))

    def on_torch(x: Tensor, labels: Tensor) -> Tensor:
        with use_backend("torch"):
            return loss(x, labels)

    return _step(on_torch, problem)


def _contenders(name: str) -> list[Contender]:
    entry, options = family(SUITE)[name], OPTIONS.get(name, {})

    def reference(problem: Problem) -> Outputs:
        return _step(functools.partial(entry.reference, **options), problem)()

    def theirs(problem: Problem) -> Step:
        from pytorch_metric_learning import losses

        return _step(getattr(losses, name)(**options), problem)

    case = Case(name, truth=lambda p: _streamed(name, p)(), reference=reference)
    found = [Contender(f"{name}: ours", case, lambda p: _step(entry.loss(**options), p), variant="ours", passes=4)]
    if importlib.util.find_spec("pytorch_metric_learning"):
        title, dense = f"{name}: pytorch-metric-learning", DENSE.get(name, 20.0)
        found.append(Contender(title, case, theirs, kind="peer", variant="theirs", dense=dense, passes=4))
    return found


def contenders() -> list[Contender]:
    """The floor, then every pair loss of the registry, ours and theirs, but those with a suite of their own."""
    names = (name for name in family(SUITE) if name not in triplets.SUITES)
    return [floor.four_contender(), *(c for name in names for c in _contenders(name))]

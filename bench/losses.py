"""The losses on proxies beside what people use today: forward, and backward to embeddings and proxies.

Walks the registry of `dml_kernels.losses`: every loss meets the floor and runs on each of our backends. Peers are
optional.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dml_kernels.losses import LossEntry, family

from . import floor
from .case import Case, Contender, Outputs, Step, training_step
from .problem import Problem

BACKENDS = ("cpu", "torch")
SUITES = tuple(family("proxies"))


def dense_proxy_nca(embeddings: Tensor, proxies: Tensor, labels: Tensor, softmax_scale: float) -> Tensor:
    """Proxy-NCA as one writes it down in PyTorch, positive in: a cross-entropy over -scale |x^ - p^|^2."""
    similarity = F.normalize(embeddings) @ F.normalize(proxies).T
    return F.cross_entropy(-softmax_scale * (2 - 2 * similarity).float(), labels)


@dataclass(frozen=True)
class Peers:
    """What a loss is measured with and against.

    options: of our function and of the dense one. dense: plain PyTorch, dense(embeddings, proxies, labels,
    **options). pml: keyword arguments of pytorch-metric-learning's class of the same name; pml_parameter: its
    (M, D) parameter.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    dense: Callable[..., Tensor] | None = None
    pml: Mapping[str, Any] | None = None
    pml_parameter: str = "proxies"


# Scale 8, as in training. The span of the logits, 4 x 8, leaves every method free to skip the running
# maximum.
PEERS = {
    "ProxyNCALoss": Peers(options={"softmax_scale": 8.0}, dense=dense_proxy_nca, pml={"softmax_scale": 8.0}),
}


def _loss_step(function: Callable[..., Tensor], problem: Problem, **options) -> Step:
    return training_step(lambda x, w: (function(x, w, problem.y, **options),), problem)


def _case(entry: LossEntry, options: Mapping[str, Any]) -> Case:
    def truth(problem: Problem) -> Outputs:
        return _loss_step(entry.function, problem, backend="torch", **options)()

    def reference(problem: Problem) -> Outputs:
        return _loss_step(entry.reference, problem, **options)()

    return Case(entry.loss.__name__, truth, reference)


@functools.lru_cache(maxsize=1)
def compiled(dense: Callable[..., Tensor], size, dtype) -> Callable[..., Tensor]:
    torch.compiler.reset()
    return torch.compile(dense, fullgraph=True, dynamic=False)


def _pml_step(problem: Problem, name: str, peers: Peers) -> Step:
    from pytorch_metric_learning import losses

    # Embedding size 1: the parameter it makes is replaced by w, and for a million classes it takes seconds to
    # fill.
    loss = getattr(losses, name)(problem.size.m, 1, **peers.pml)

    def call(x: Tensor, w: Tensor) -> Outputs:
        # Not a Parameter of its own: the gradient is to arrive at w. Its dtype is w's, so the module leaves
        # it alone.
        loss._parameters.pop(peers.pml_parameter, None)
        setattr(loss, peers.pml_parameter, w)
        return (loss(x, problem.y),)

    return training_step(call, problem)


def _ours(entry: LossEntry, case: Case, backend: str, options: Mapping[str, Any]) -> Contender:
    return Contender(
        f"ours ({backend})",
        case,
        lambda problem: _loss_step(entry.function, problem, backend=backend, **options),
        passes=4,
    )


def _peers(name: str, case: Case, peers: Peers) -> list[Contender]:
    found = []
    if peers.dense is not None:
        dense, options = peers.dense, peers.options
        found += [
            Contender(
                "torch.compile",
                case,
                lambda p: _loss_step(compiled(dense, p.size, p.dtype), p, **options),
                kind="peer",
                slow_first=True,
                dense=3.5,
                passes=3,
                warm=lambda contender, problem: contender.make(problem)(),  # compiled for one size
            ),
            Contender("eager", case, lambda p: _loss_step(dense, p, **options), kind="peer", dense=5.0, passes=3),
        ]
    if peers.pml is not None and importlib.util.find_spec("pytorch_metric_learning"):
        title = "pytorch-metric-learning"
        found.append(Contender(title, case, lambda p: _pml_step(p, name, peers), kind="peer", dense=5.0, passes=3))
    return found


def contenders(name: str) -> list[Contender]:
    """The floor, ours and the peers of one loss of the registry, in the order of the table."""
    entry, peers = family("proxies")[name], PEERS.get(name, Peers())
    case = _case(entry, peers.options)
    ours = [_ours(entry, case, backend, peers.options) for backend in BACKENDS]
    return [floor.four_contender(), *ours, *_peers(name, case, peers)]

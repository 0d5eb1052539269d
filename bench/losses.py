"""The losses on proxies, compared with their alternatives: forward, and backward to embeddings and proxies.

This suite walks the registry of `dml_kernels.losses`: every loss is compared with the floor and runs on each of our
backends. Peers are optional.
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
from dml_kernels.ops import choice as backends

from . import floor
from .case import Case, Contender, Outputs, Step, training_step
from .problem import Problem

BACKENDS = ("cpu", "torch")
SUITES = tuple(family("proxies"))


def dense_proxy_nca(embeddings: Tensor, proxies: Tensor, labels: Tensor, softmax_scale: float) -> Tensor:
    """Proxy-NCA as one writes it in PyTorch, with the positive in the sum: a cross-entropy over -scale |x^ - p^|^2."""
    similarity = F.normalize(embeddings) @ F.normalize(proxies).T
    return F.cross_entropy(-softmax_scale * (2 - 2 * similarity).float(), labels)


@dataclass(frozen=True)
class Peers:
    """The arguments of a loss, and what it is compared with.

    Attributes:
        options: arguments of our function and of the dense one.
        dense: plain PyTorch, dense(embeddings, proxies, labels, **options).
        pml: keyword arguments of the class of the same name in pytorch-metric-learning; None: no comparison.
        pml_parameter: the name of its (M, D) parameter.
        transposed: whether that parameter is (D, M).
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    dense: Callable[..., Tensor] | None = None
    pml: Mapping[str, Any] | None = None
    pml_parameter: str = "proxies"
    transposed: bool = False


# Scale 8, as in training. The span of the logits, 4 x 8, allows every method to skip the running maximum.
PEERS = {
    "ProxyNCALoss": Peers(options={"softmax_scale": 8.0}, dense=dense_proxy_nca, pml={"softmax_scale": 8.0}),
    "ProxyAnchorLoss": Peers(options={"alpha": 8.0}, pml={"alpha": 8.0}),
    "NormalizedSoftmaxLoss": Peers(
        options={"temperature": 0.125}, pml={"temperature": 0.125}, pml_parameter="W", transposed=True
    ),
    "CosFaceLoss": Peers(options={"scale": 8.0}, pml={"scale": 8.0}, pml_parameter="W", transposed=True),
    "ArcFaceLoss": Peers(options={"scale": 8.0}, pml={"scale": 8.0}, pml_parameter="W", transposed=True),
    "LargeMarginSoftmaxLoss": Peers(pml={}, pml_parameter="W", transposed=True),
    "SphereFaceLoss": Peers(pml={}, pml_parameter="W", transposed=True),
    "SubCenterArcFaceLoss": Peers(options={"scale": 8.0}, pml={"scale": 8.0}, pml_parameter="W", transposed=True),
    "SoftTripleLoss": Peers(
        options={"centers_per_class": 3, "la": 8.0},
        pml={"centers_per_class": 3, "la": 8.0},
        pml_parameter="fc",
        transposed=True,
    ),
}


def _loss_step(function: Callable[..., Tensor], problem: Problem, centres: int = 1, **options) -> Step:
    """Make a step of a loss; the M rows of the bank are M / centres classes, and a remainder is left out."""
    if centres == 1:
        return training_step(lambda x, w: (function(x, w, problem.y, **options),), problem)
    classes = problem.size.m // centres
    y = (problem.y // centres).clamp_max(classes - 1)
    return training_step(lambda x, w: (function(x, w[: classes * centres], y, **options),), problem)


def _case(entry: LossEntry, options: Mapping[str, Any]) -> Case:
    def truth(problem: Problem) -> Outputs:
        return _loss_step(entry.function, problem, entry.centres, backend="torch", **options)()

    def reference(problem: Problem) -> Outputs:
        return _loss_step(entry.reference, problem, entry.centres, **options)()

    return Case(entry.loss.__name__, truth, reference)


@functools.lru_cache(maxsize=1)
def compiled(dense: Callable[..., Tensor], size, dtype) -> Callable[..., Tensor]:
    torch.compiler.reset()
    return torch.compile(dense, fullgraph=True, dynamic=False)


def _pml_step(problem: Problem, name: str, peers: Peers, centres: int) -> Step:
    from pytorch_metric_learning import losses

    # Embedding size 1, because w replaces the parameter, which takes seconds to fill for a million classes.
    loss = getattr(losses, name)(num_classes=problem.size.m // centres, embedding_size=1, **peers.pml)

    def function(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        # Not a Parameter, because the gradient must arrive at w. It has w's dtype, so the module leaves it as it is.
        loss._parameters.pop(peers.pml_parameter, None)
        setattr(loss, peers.pml_parameter, w.t() if peers.transposed else w)
        return loss(x, y)

    return _loss_step(function, problem, centres)


def _ours(entry: LossEntry, case: Case, backend: str, options: Mapping[str, Any]) -> Contender:
    return Contender(
        f"ours ({backend})",
        case,
        lambda problem: _loss_step(entry.function, problem, entry.centres, backend=backend, **options),
        passes=4,
    )


def _runs(entry: LossEntry, backend: str) -> bool:
    """Whether a backend has the op and policy of a loss; one that failed to load is kept, so that the table says so."""
    refusal = backends.refusal(backend, entry.op, torch.device("cpu"), torch.float32, entry.asked)
    return refusal is None or "not implemented" not in refusal


def _peers(name: str, case: Case, peers: Peers, centres: int) -> list[Contender]:
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
        found.append(
            Contender(title, case, lambda p: _pml_step(p, name, peers, centres), kind="peer", dense=5.0, passes=3)
        )
    return found


def contenders(name: str) -> list[Contender]:
    """The floor, our backends and the peers of one loss of the registry, in the order of the table."""
    entry, peers = family("proxies")[name], PEERS.get(name, Peers())
    case = _case(entry, peers.options)
    ours = [_ours(entry, case, backend, peers.options) for backend in BACKENDS if _runs(entry, backend)]
    return [floor.four_contender(), *ours, *_peers(name, case, peers, entry.centres)]

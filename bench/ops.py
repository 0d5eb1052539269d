"""The ops alone, compared with one bare product, 2NMD: forward, frozen bank or embeddings, all metrics, few classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dml_kernels import functional

from . import floor
from .case import Case, Contender, Outputs, Step, training_step
from .losses import BACKENDS
from .problem import Problem

LSE = ("n", "n")


@dataclass(frozen=True)
class OpCase:
    """A case of an op.

    Attributes:
        name: the name in tables.
        shapes: the shape of each output: n, nm or md.
        run: run(x, w, problem, backend) -> outputs.
        wants: the gradients that are computed, some of "xw".
        passes: how many products of 2NMD it needs at least.
        peer: the same in plain PyTorch, peer(x, w, problem).
        dense: how many N x M matrices the peer holds.
        jumps: whether the gradient jumps where two scores tie, which half precision moves.
    """

    name: str
    shapes: tuple[str, ...]
    run: Callable[[Tensor, Tensor, Problem, str], Outputs]
    wants: str = ""
    passes: int = 0
    peer: Callable[[Tensor, Tensor, Problem], Outputs] | None = None
    dense: float = 4.0
    jumps: bool = False


def _lse(name: str, metric: str, wants: str, passes: int, few: bool = False) -> OpCase:
    def run(x: Tensor, w: Tensor, problem: Problem, backend: str) -> Outputs:
        y, c = (problem.c[problem.y], problem.c) if few else (problem.y, None)
        # Unit vectors for every metric but dot, whose logits a small scale keeps within the softmax's reach.
        unit, scale = metric != "dot", 8.0 / problem.size.d if metric == "dot" else 8.0
        out = functional.masked_logsumexp(x, w, y, c, metric=metric, normalize=unit, scale=scale, backend=backend)
        return out.same, out.different

    return OpCase(f"lse {metric}{name}", LSE, run, wants, passes)


# What plain PyTorch has for normalized_distance, by metric.
PLAIN_DISTANCE = {
    "cosine": lambda x, w: F.normalize(x) @ F.normalize(w).T,
    "euclidean": lambda x, w: torch.cdist(F.normalize(x), F.normalize(w)),
}


def _distance(name: str, metric: str, wants: str, passes: int) -> OpCase:
    def run(x: Tensor, w: Tensor, problem: Problem, backend: str) -> Outputs:
        return (functional.normalized_distance(x, w, metric, backend=backend),)

    plain = PLAIN_DISTANCE.get(metric)
    peer = None if plain is None else lambda x, w, problem: (plain(x, w),)
    return OpCase(f"distance {metric}{name}", ("nm",), run, wants, passes, peer)


def _normalize(name: str, wants: str) -> OpCase:
    def run(x: Tensor, w: Tensor, problem: Problem, backend: str) -> Outputs:
        return (functional.normalize(w, backend=backend),)

    return OpCase(f"normalize{name}", ("md",), run, wants, peer=lambda x, w, problem: (F.normalize(w),))


def _dense_pair(z: Tensor, same: Tensor) -> Outputs:
    return z.masked_fill(~same, -torch.inf).logsumexp(1), z.masked_fill(same, -torch.inf).logsumexp(1)


# How many centres a class has in the pooled cases; M, a multiple of it, counts the centres.
CENTRES = 5


def _pooled(policy: str, pool: Callable[[Tensor], Tensor], *params: float) -> OpCase:
    def run(x: Tensor, w: Tensor, problem: Problem, backend: str) -> Outputs:
        y, given = problem.y // CENTRES, (CENTRES, *params)
        out = functional.masked_logsumexp(x, w, y, scale=8.0, policy=policy, policy_params=given, backend=backend)
        return out.same, out.different

    def dense(x: Tensor, w: Tensor, problem: Problem) -> Outputs:
        s = (F.normalize(x) @ F.normalize(w).T).view(x.size(0), -1, CENTRES)
        z = 8 * pool(s).float()
        return _dense_pair(z, (problem.y // CENTRES)[:, None] == torch.arange(z.size(1)))

    return OpCase(f"lse cosine, {policy} of {CENTRES}, gradients", LSE, run, "xw", 4, dense, 8.0, policy == "max_pool")


def _circle(m: float, gamma: float) -> OpCase:
    def run(x: Tensor, w: Tensor, problem: Problem, backend: str) -> Outputs:
        out = functional.masked_logsumexp(
            x, w, problem.c[problem.y], problem.c, scale=gamma, policy="quadratic", policy_params=(m,), backend=backend
        )
        return out.same, out.different

    def dense(x: Tensor, w: Tensor, problem: Problem) -> Outputs:
        s = (F.normalize(x) @ F.normalize(w).T).float()
        same = problem.c[problem.y][:, None] == problem.c
        positive = -gamma * (1 + m - s).relu().detach() * (s - (1 - m))
        return _dense_pair(torch.where(same, positive, gamma * (s + m).relu().detach() * (s - m)), same)

    return OpCase("lse cosine, quadratic, 10 classes, gradients", LSE, run, "xw", 4, dense, 8.0)


def _softmax_pool(s: Tensor, gamma: float = 0.1) -> Tensor:
    return (torch.softmax(s / gamma, 2) * s).sum(2)


# Margins that keep every term positive: at the edge of a hinge rounding decides, which prevents a comparison.
MARGINS = (0.1, 2.0)


def _plain_contrastive(x: Tensor, w: Tensor, problem: Problem) -> Outputs:
    distance = torch.cdist(F.normalize(x), F.normalize(w))
    same = problem.c[problem.y][:, None] == problem.c
    return tuple(
        (F.relu(v) * set_).sum(1) for v, set_ in ((distance - MARGINS[0], same), (MARGINS[1] - distance, ~same))
    )


def _contrastive(name: str, wants: str, passes: int) -> OpCase:
    def run(x: Tensor, w: Tensor, problem: Problem, backend: str) -> Outputs:
        out = functional.masked_hinge_sum(
            x, w, problem.c[problem.y], problem.c, same=(-1, -MARGINS[0]), different=(1, MARGINS[1]), backend=backend
        )
        return out.same, out.different

    return OpCase(f"hinge euclidean, 10 classes{name}", LSE, run, wants, passes, _plain_contrastive)


def _plain_ranking(x: Tensor, w: Tensor, problem: Problem) -> Outputs:
    s = F.normalize(x) @ F.normalize(w).T
    own = problem.y[:, None]
    return (F.relu(MARGINS[1] + s - s.gather(1, own)).scatter(1, own, 0).sum(1),)


def _ranking(name: str, wants: str, passes: int) -> OpCase:
    def run(x: Tensor, w: Tensor, problem: Problem, backend: str) -> Outputs:
        out = functional.masked_hinge_sum(
            x, w, problem.y, metric="cosine", different=(1, MARGINS[1]), relative=True, backend=backend
        )
        return (out.different,)

    return OpCase(f"hinge cosine, relative{name}", ("n",), run, wants, passes, _plain_ranking)


def _plain_hardest(x: Tensor, w: Tensor, problem: Problem) -> Outputs:
    s = F.normalize(x) @ F.normalize(w).T
    same = problem.c[problem.y][:, None] == problem.c
    farthest, nearest = torch.where(same, s, torch.inf).min(1), torch.where(same, -torch.inf, s).max(1)
    return farthest.values.float(), nearest.values.float()


def _hardest() -> OpCase:
    def run(x: Tensor, w: Tensor, problem: Problem, backend: str) -> Outputs:
        y = problem.c[problem.y]
        found = functional.masked_argmax(x, w, y, problem.c, metric="cosine", backend=backend)
        return found.same.score, found.different.score

    return OpCase("argmax cosine, 10 classes", LSE, run, passes=1, peer=_plain_hardest)


def _draw() -> OpCase:
    def run(x: Tensor, w: Tensor, problem: Problem, backend: str) -> Outputs:
        y = problem.c[problem.y]
        # Which entry is drawn may depend on a rounded distance, which the tests check; here candidates are counted.
        found = functional.masked_argmax(
            x, w, y, problem.c, metric="cosine", which="different", noise_seed=1,
            nonzero_loss_cutoff=1.99, backend=backend,
        ).different  # fmt: skip
        return (found.count.float(),)

    return OpCase("argmax cosine, 10 classes, distance draw", ("n",), run, passes=1)


METRICS = ("cosine", "dot", "sqeuclidean", "euclidean")
CASES = (
    *(_lse("", metric, "", 1) for metric in METRICS),
    *(_lse(", gradients", metric, "xw", 4) for metric in METRICS),
    _lse(", frozen bank", "cosine", "x", 2),
    _lse(", frozen rows", "cosine", "w", 3),
    _lse(", 10 classes", "cosine", "", 1, few=True),
    _lse(", 10 classes, gradients", "cosine", "xw", 4, few=True),
    _pooled("max_pool", lambda s: s.max(2).values),
    _pooled("softmax_pool", _softmax_pool, 0.1),
    _circle(m=0.4, gamma=8.0),
    *(_distance("", metric, "", 1) for metric in METRICS),
    *(_distance(", gradients", metric, "xw", 3) for metric in METRICS),
    _contrastive("", "", 1),
    _contrastive(", gradients", "xw", 4),
    _ranking("", "", 1),
    _ranking(", gradients", "xw", 4),
    _hardest(),
    _draw(),
    _normalize("", ""),
    _normalize(", gradient", "w"),
)


def _step(op: OpCase, run: Callable[[Tensor, Tensor], Outputs], problem: Problem) -> Step:
    """Make a step with a fixed random gradient for each value, the same in every dtype."""
    grads = None
    if op.wants:
        generator = torch.Generator().manual_seed(2)
        dtype = problem.dtype if op.shapes in (("nm",), ("md",)) or problem.dtype == torch.float64 else torch.float32
        shapes = [[getattr(problem.size, axis) for axis in shape] for shape in op.shapes]
        grads = tuple(torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes)
    return training_step(run, problem, op.wants, grads)


def _case(op: OpCase) -> Case:
    def on(backend: str) -> Callable[[Problem], Outputs]:
        return lambda p: _step(op, lambda x, w: op.run(x, w, p, backend), p)()

    def unfit(problem: Problem) -> str:
        half = op.jumps and problem.dtype in (torch.bfloat16, torch.float16)
        return "rounding to half precision sends the gradient of some maxima to another centre" if half else ""

    return Case(op.name, truth=on("torch"), reference=on("reference"), unfit=unfit)


def _contenders(op: OpCase) -> list[Contender]:
    case = _case(op)

    def ours(backend: str) -> Contender:
        def make(problem: Problem) -> Step:
            return _step(op, lambda x, w: op.run(x, w, problem, backend), problem)

        return Contender(f"{op.name} ({backend})", case, make, variant=backend, passes=op.passes)

    def peer_step(problem: Problem) -> Step:
        return _step(op, lambda x, w: op.peer(x, w, problem), problem)

    found = [ours(backend) for backend in BACKENDS]
    if op.peer is not None:
        title = f"{op.name} (plain PyTorch)"
        found.append(
            Contender(title, case, peer_step, kind="peer", variant="plain PyTorch", dense=op.dense, passes=op.passes)
        )
    return found


def contenders() -> list[Contender]:
    """The bare product, then every op on each of our backends, and its peer where there is one."""
    return [floor.one_contender(), *(c for op in CASES for c in _contenders(op))]

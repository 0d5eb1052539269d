"""Cases, contenders, and the check that comes before every timing.

The chain of trust: a case's `reference` is dense and written from the paper; on a small part of the problem
it vouches for the case's `truth`, which streams and so can do the whole problem in fp64; on the whole problem
the truth vouches for each contender, on the very inputs that are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Problem, Size

Outputs = tuple[Tensor, ...]
Step = Callable[[], Outputs]

PART = (24, 1500)  # rows and bank entries of the part that the reference sees
TRUTH_TOLERANCE = 1e-9  # fp64 against fp64


@dataclass(frozen=True)
class Tolerance:
    """value: |v - truth| / max(1, |truth|) of the worst entry. rows: row_error, of a matrix's worst row."""

    value: float
    rows: float


# Ours keeps sums, norms and the softmax in fp32 whatever the products' dtype. Peers in bf16 do not: slack.
TOLERANCES = {
    torch.float32: Tolerance(value=1e-5, rows=2e-4),
    torch.bfloat16: Tolerance(value=5e-2, rows=0.1),
    torch.float16: Tolerance(value=1e-2, rows=2e-2),
    torch.float64: Tolerance(value=1e-10, rows=1e-9),
}
PEER_SLACK = 3


@dataclass(frozen=True)
class Case:
    """Something to compute: (value, gradients...) of an fp64 problem, in full and, if `reference` is there,
    densely. unfit(problem): why no contender's numbers could be judged on it, or nothing.
    """

    name: str
    truth: Callable[[Problem], Outputs]
    reference: Callable[[Problem], Outputs] | None = None
    unfit: Callable[[Problem], str] = lambda problem: ""


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    make(problem) prepares what a user would prepare once and returns the step to time. dense: how many N x M
    fp32 matrices it holds at its peak, to skip it where memory is short; a function where that follows the
    size. warm: how to load its code before memory is measured. passes: products of 2NMD the step cannot do
    without, 0 where that is no measure. slow_first: the first step says nothing about the next, since it
    compiles.
    """

    name: str
    case: Case
    make: Callable[[Problem], Step]
    kind: str = "ours"  # ours, peer or floor
    variant: str = ""  # the backend or peer, for a table with one row a case
    slow_first: bool = False
    dense: float | Callable[[Size], float] = 0.0
    passes: int = 0
    note: Callable[[Problem], str] = lambda problem: ""
    warm: Callable[[Contender, Problem], object] = lambda contender, problem: contender.make(problem.part(8, 300))()


def training_step(
    function: Callable[[Tensor, Tensor], Outputs],
    problem: Problem,
    wants: str = "xw",
    grads: Outputs | None = None,
) -> Step:
    """A step: the function's values, and by backward the gradients of those of x and w named in `wants`.

    Leaves are made anew in each step (no copy), so that a step holds no gradient of the one before. grads:
    the gradient of each value; None for a scalar loss.
    """

    def step() -> Outputs:
        x = problem.x.detach().requires_grad_("x" in wants)
        w = problem.w.detach().requires_grad_("w" in wants)
        with torch.set_grad_enabled(bool(wants)):
            values = function(x, w)
        if wants:
            torch.autograd.backward(values, grads)
        return (*(v.detach() for v in values), *(t.grad for t in (x, w) if t.grad is not None))

    return step


def row_error(got: Tensor, truth: Tensor) -> float:
    """The worst row's |got - truth| / max(|truth|, the median row's |truth|): one wrong row of a million
    shows.
    """
    floor = float(torch.linalg.vector_norm(truth, dim=1).median())
    worst = 0.0
    for start in range(0, truth.size(0), 65536):
        t = truth[start : start + 65536]
        gap = torch.linalg.vector_norm(got[start : start + 65536].double() - t, dim=1)
        worst = max(worst, _largest(gap / torch.linalg.vector_norm(t, dim=1).clamp_min(max(floor, 1e-300))))
    return worst


def value_error(got: Tensor, truth: Tensor) -> float:
    return _largest((got.double() - truth).abs() / truth.abs().clamp_min(1)) if truth.numel() else 0.0


def _largest(errors: Tensor) -> float:
    worst = float(errors.max())
    return worst if worst == worst else float("inf")  # NaN is the worst error, not the least


def compare(got: Outputs, truth: Outputs) -> tuple[float, float]:
    """(worst value error, worst row error) over all outputs."""
    if [tuple(t.shape) for t in got] != [tuple(t.shape) for t in truth]:
        raise AssertionError(f"shapes {[*map(tuple, (t.shape for t in got))]}, not those of the truth")
    values, rows = [0.0], [0.0]
    for g, t in zip(got, truth, strict=True):
        (rows if t.dim() == 2 else values).append((row_error if t.dim() == 2 else value_error)(g, t))
    return max(values), max(rows)


def tolerance(contender: Contender, dtype: torch.dtype) -> Tolerance:
    found, slack = TOLERANCES[dtype], PEER_SLACK if contender.kind == "peer" else 1
    return Tolerance(found.value * slack, found.rows * slack)


def check(errors: tuple[float, float], limits: Tolerance) -> str | None:
    """Why the errors are too large, or None."""
    found = []
    for name, error, limit in zip(("value", "row"), errors, (limits.value, limits.rows), strict=True):
        if not error <= limit:
            found.append(f"{name} error {error:.1e} over {limit:.0e}")
    return " and ".join(found) or None


def truth_of(case: Case, problem: Problem) -> Outputs:
    """The fp64 truth of the whole problem, after the reference has vouched for it on a part."""
    problem = problem.double()
    if case.reference is not None:
        part = problem.part(*PART)
        exact = Tolerance(TRUTH_TOLERANCE, TRUTH_TOLERANCE)
        wrong = check(compare(case.truth(part), case.reference(part)), exact)
        if wrong:
            raise AssertionError(f"the truth of {case.name} differs from its reference: {wrong}")
    return case.truth(problem)

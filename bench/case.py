"""Cases, contenders, and the check that comes before every timing.

The chain of trust: the `reference` of a case is dense and written from the paper. On a small part of the problem it
vouches for the `truth` of the case, which streams and so can compute the whole problem in fp64. On the whole problem
the truth vouches for each contender, on the inputs that are timed.
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
    """The largest errors allowed.

    Attributes:
        value: |v - truth| / max(1, |truth|) of the worst entry of a value.
        rows: ``row_error`` of the worst row of a matrix.
    """

    value: float
    rows: float


# Our ops keep sums, norms and the softmax in fp32 for any dtype of the products. Peers in bf16 do not, and get slack.
TOLERANCES = {
    torch.float32: Tolerance(value=1e-5, rows=2e-4),
    torch.bfloat16: Tolerance(value=5e-2, rows=0.1),
    torch.float16: Tolerance(value=1e-2, rows=2e-2),
    torch.float64: Tolerance(value=1e-10, rows=1e-9),
}
PEER_SLACK = 3


@dataclass(frozen=True)
class Case:
    """Something to compute.

    Attributes:
        truth: (value, gradients...) of an fp64 problem.
        reference: the same, computed densely, or None.
        unfit: says why no numbers could be judged on a problem, or nothing.
    """

    name: str
    truth: Callable[[Problem], Outputs]
    reference: Callable[[Problem], Outputs] | None = None
    unfit: Callable[[Problem], str] = lambda problem: ""


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        name: the name in tables.
        case: what it computes.
        make: make(problem) prepares what a user would prepare once, and returns the step to time.
        kind: ours, peer or floor.
        variant: the backend or peer, for a table with one row a case.
        dense: how many N x M fp32 matrices it holds at its peak, to skip it where memory is short; a function of the
            size where the number depends on it.
        warm: how to load its code before memory is measured.
        passes: how many products of 2NMD the step needs at least; 0 where that is no measure.
        slow_first: whether the first step compiles, and so says nothing about the next one.
    """

    name: str
    case: Case
    make: Callable[[Problem], Step]
    kind: str = "ours"
    variant: str = ""
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
    """Make a step: the values of a function, and by backward the gradients that `wants` names.

    Leaves are made anew in each step (without a copy), so that a step holds no gradient of the one before.

    Args:
        function: function(x, w) -> values.
        problem: gives x and w.
        wants: the gradients, some of "xw".
        grads: the gradient of each value; None for a scalar loss.
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
    """The largest |got - truth| / max(|truth|, median |truth|) of a row: it shows one wrong row of a million."""
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
    """The worst value error and the worst row error over all outputs."""
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
    """Say why the errors are too large; None if they are not."""
    found = []
    for name, error, limit in zip(("value", "row"), errors, (limits.value, limits.rows), strict=True):
        if not error <= limit:
            found.append(f"{name} error {error:.1e} over {limit:.0e}")
    return " and ".join(found) or None


def truth_of(case: Case, problem: Problem) -> Outputs:
    """Compute the fp64 truth of the whole problem, after the reference has vouched for it on a part."""
    problem = problem.double()
    if case.reference is not None:
        part = problem.part(*PART)
        exact = Tolerance(TRUTH_TOLERANCE, TRUTH_TOLERANCE)
        wrong = check(compare(case.truth(part), case.reference(part)), exact)
        if wrong:
            raise AssertionError(f"the truth of {case.name} differs from its reference: {wrong}")
    return case.truth(problem)

"""Hostile inputs for every public function and loss, and the check of the results.

The truth is the dense reference in fp64. The effect of rounding is measured: the reference runs again with the inputs,
the matrix products and other results off by up to one unit in the last place of the dtype under test (Monte Carlo
arithmetic, Parker 1997). An error much larger than those of several such runs is a fault. Equal rows stay equal in
those runs, so that their distance stays exactly 0.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dml_kernels import reference
from tests.support.features import every_other
from tests.support.problems import randint, randn
from tests.support.tolerance import product_scores, scores_by

# The dtypes of x and w. Every mix is allowed; common ones are drawn more often.
DTYPES = tuple(itertools.product((torch.float32, torch.float64, torch.bfloat16, torch.float16), repeat=2))
DTYPES += tuple((dtype, dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)) * 3
DTYPES += ((torch.float64, torch.float64),) * 4  # where second derivatives are compared
DRAWS = 6  # runs with rounding
# The allowed error over the largest effect of rounding in the draws, which may be small by chance, and an op may err by
# more than one unit.
ALLOWED = 12


def fuzz(examples: int) -> settings:
    """Uses the same examples always, so that a failure can be repeated; DML_FUZZ=10 takes ten times as many."""
    many = max(1, round(examples * float(os.environ.get("DML_FUZZ", "1"))))
    return settings(
        derandomize=True, max_examples=many, deadline=None, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Inputs

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "sliced": lambda t: torch.cat((torch.full_like(t, torch.nan), t), 1)[:, t.size(1) :],
    "every other column": every_other,
    "stride 0": lambda t: t[:1].expand_as(t),
}


@dataclass(repr=False)
class Case:
    """Two sets of points, taken from one list so that equal rows are equal in every dtype, and their labels.

    ``points`` (P, D) fp64; x = points[rows], w = points[cols]. ``other``: further inputs that may need a gradient.
    """

    points: Tensor
    rows: Tensor
    cols: Tensor
    y: Tensor
    c: Tensor
    x_dtype: torch.dtype
    w_dtype: torch.dtype
    layouts: tuple[str, str]
    needs: frozenset[str]
    seed: int
    other: dict[str, Tensor] = field(default_factory=dict)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Prints what a reader of a failure needs; the points follow from the seed."""
        norms = self.points.norm(dim=1)
        names = [str(t).removeprefix("torch.") for t in (self.x_dtype, self.w_dtype)]
        printer.text(
            f"Case(seed={self.seed}, N={len(self.rows)}, M={len(self.cols)}, D={self.points.size(1)}, {names}, "
            f"{self.layouts}, needs={sorted(self.needs)}, norms {norms.amin():.1e} to {norms.amax():.1e}, "
            f"{len(self.rows) + len(self.cols) - len(torch.cat((self.rows, self.cols)).unique())} repeated, "
            f"other={sorted(self.other)}, y={self.y.tolist()}, c={self.c.tolist()})"
        )

    def vector(self, size: int, place: int) -> Tensor:
        """A further vector, in the dtype of sums."""
        dtype = torch.float64 if self.product == torch.float64 else torch.float32
        return randn(size, seed=self.seed + place).to(dtype)

    @property
    def product(self) -> torch.dtype:
        """The dtype whose unit in the last place counts: the half-precision one, else the wider of the pair."""
        halves = [d for d in (self.x_dtype, self.w_dtype) if d.itemsize == 2]
        if torch.float64 in (self.x_dtype, self.w_dtype):
            return torch.float64
        return max(halves, key=lambda d: torch.finfo(d).eps) if halves else torch.float32

    @property
    def eps(self) -> float:
        return torch.finfo(self.product).eps

    @property
    def order(self) -> int:
        """The order of derivatives that are compared: 2 where everything is in fp64, else 1."""
        return 2 if self.x_dtype == self.w_dtype == torch.float64 else 1

    def extreme(self) -> bool:
        """Whether derivatives in neighbouring rows differ so much in size that second derivatives lose digits."""
        norms = self.points.norm(dim=1)
        return bool(((norms < 1e-3) | (norms > 1e3)).any())

    def leaves(self) -> dict[str, Tensor]:
        """The inputs as a user has them: dtypes, strides, gradients needed."""
        x, w = self.points[self.rows].to(self.x_dtype), self.points[self.cols].to(self.w_dtype)
        made = {"x": LAYOUTS[self.layouts[0]](x), "w": LAYOUTS[self.layouts[1]](w), **self.other}
        return {k: t.detach().requires_grad_(k in self.needs) for k, t in made.items()}

    def exact(self, rounding: torch.Generator | None = None) -> dict[str, Tensor]:
        """The same values in fp64; each element off by up to one unit where ``rounding`` is given."""

        def off(t: Tensor) -> Tensor:
            u = torch.rand(t.shape, dtype=torch.float64, generator=rounding) * 2 - 1
            return t * (1 + self.eps * u)

        points = self.points if rounding is None else off(self.points)
        made = {"x": points[self.rows], "w": points[self.cols]}
        made |= {k: t.double() if rounding is None else off(t.double()) for k, t in self.other.items()}
        return {k: t.detach().requires_grad_(k in self.needs) for k, t in made.items()}


def _norms(draw: Any, count: int, seed: int, low: float) -> Tensor:
    """(count, 1) lengths: all of one size, or mixed from ``low`` to 1e5."""
    kind = draw(st.sampled_from(["one", "one", "small", "large", "all"]))
    if kind == "all":
        return 10 ** (low + (5 - low) * torch.rand(count, 1, dtype=torch.float64, generator=_generator(seed)))
    size = {"one": 0.0, "small": low, "large": 5.0}[kind]
    return torch.full((count, 1), 10**size, dtype=torch.float64)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def cases(
    draw: Any, *, centres: int = 1, labels: str = "classes", least: int = 0, largest: int = 70,
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]] = DTYPES,
) -> Case:  # fmt: skip
    """A hostile case. ``labels``: ``bank``, y names rows of the bank (or its groups of ``centres``); ``classes``."""
    most = draw(st.sampled_from([8, largest]))
    n, m, d = draw(st.integers(least, most)), draw(st.integers(1, most)), draw(st.integers(2, 40))
    seed = draw(st.integers(0, 1 << 20))
    x_dtype, w_dtype = draw(st.sampled_from(dtypes))
    narrow = min((x_dtype, w_dtype), key=lambda t: (t.itemsize, t == torch.bfloat16))
    half = torch.float16 in (x_dtype, w_dtype)
    count = n + m * centres
    points = randn(count, d, seed=seed)
    # fp16 ends at 6e-8 and 65,504.
    points = points / points.norm(dim=1, keepdim=True) * _norms(draw, count, seed + 1, -3.0 if half else -6.0)
    zeros = draw(st.sampled_from([0.0, 0.0, 0.05, 0.5]))
    points[torch.rand(count, generator=_generator(seed + 2)) < zeros] = 0
    points = points.clamp(-6e4, 6e4) if half else points
    for dtype in (narrow, x_dtype, w_dtype):
        points = points.to(dtype).double()  # exact in both
    rows, cols = torch.arange(n), n + torch.arange(m * centres)
    again = draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    for index in (rows, cols):  # rows of the same side and of the other
        repeat = torch.rand(len(index), generator=_generator(seed + 3)) < again
        index[repeat] = randint(0, count if index is rows or n == 0 else n, int(repeat.sum()), seed=seed + 4)
    if labels == "bank":
        c, y = torch.arange(m), randint(0, m, n, seed=seed + 5)
    else:
        classes = draw(st.integers(1, 8))
        c, y = randint(0, classes, m, seed=seed + 6), randint(0, classes + 1, n, seed=seed + 5)
        c[:: draw(st.integers(2, 80))] = -100
    y[:: draw(st.integers(2, 80))] = -100
    needs = draw(st.sampled_from([{"x"}, {"w"}, {"w"}, {"x", "w"}]))
    layouts = draw(st.tuples(*(st.sampled_from(sorted(LAYOUTS)) for _ in range(2))))
    for index, layout in zip((rows, cols), layouts):
        if layout == "stride 0":
            index[:] = index[:1].clone()
    return Case(points, rows, cols, y, c, x_dtype, w_dtype, layouts, frozenset(needs), seed)


# ---------------------------------------------------------------------------------------------------------------------
# The judge

Call = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class Rounding(TorchDispatchMode):
    """Results off by up to one unit: of matrix products, of sums, and of exponentials and logarithms; once
    ``everywhere``, of all arithmetic. (Forward, a unit vector's own must not tell equal rows apart.)"""

    def __init__(self, eps: float, generator: torch.Generator):
        super().__init__()
        self.eps, self.generator, self.everywhere = eps, generator, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, op, aten = func(*args, **(kwargs or {})), func.overloadpacket, torch.ops.aten
        if not isinstance(out, Tensor) or not out.is_floating_point() or not out.numel():
            return out
        if op in (aten.logsumexp, aten._log_softmax, aten.logaddexp):  # of 1, and of the terms
            return out + self._noise(out) * max(1.0, args[0].nan_to_num(neginf=0).abs().amax().item())
        if op is aten._log_softmax_backward_data:  # g - p sum(g), where p is nearly 1
            return out + self._noise(out) * args[0].abs().amax().item()
        if op is aten._softmax:
            return out * (1 + self._noise(out) * max(1.0, args[0].abs().amax().item()))
        # A sum over the last dimension that keeps it is a norm's.
        summed = op is aten.sum and args[0].dim() > 1 and not (len(args) > 2 and args[2])
        if summed or op in (aten.mm, aten.bmm) or (self.everywhere and op in (aten.mul, aten.div, aten.add, aten.sum)):
            return out * (1 + self._noise(out))
        return out

    def _noise(self, like: Tensor) -> Tensor:
        return self.eps * (torch.rand(like.shape, dtype=like.dtype, generator=self.generator) * 2 - 1)


def derivatives(
    call: Call, leaves: Mapping[str, Tensor], seed: int, order: int, rounding: Rounding | None = None
) -> dict[str, Tensor]:
    """The outputs of a call, the gradients of a random sum of them, and the same of those where ``order`` is 2."""
    outputs = call(leaves)
    if rounding is not None:
        rounding.everywhere = True
    found = {k: t.detach() for k, t in outputs.items()}
    wanted = [k for k, t in leaves.items() if t.requires_grad]
    current = {k: t for k, t in outputs.items() if t.requires_grad}
    for depth in range(1, order + 1):
        if not current or not wanted:
            break
        total = 0.0
        for i, t in enumerate(current.values()):
            g = randn(*t.shape, seed=seed + 100 * depth + i)
            # An infinite output sends nothing back.
            total = total + (torch.where(t.isfinite(), t, 0).double() * g).sum()
        grads = torch.autograd.grad(total, [leaves[k] for k in wanted], create_graph=depth < order, allow_unused=True)
        current = {
            f"{'d' * depth} {k}": torch.zeros_like(leaves[k]) if g is None else g
            for k, g in zip(wanted, grads, strict=True)
        }
        found |= {k: t.detach() for k, t in current.items()}
        current = {k: t for k, t in current.items() if t.requires_grad}
    return found


def check(case: Case, ours: Call, dense: Call) -> None:
    """Compares ours, on the inputs as they are, with the truth, by row; ours is finite wherever the truth is."""
    found = derivatives(ours, case.leaves(), case.seed, case.order)
    truth = derivatives(dense, case.exact(), case.seed, case.order)
    for name, dtype, index in (("d x", case.x_dtype, case.rows), ("d w", case.w_dtype, case.cols)):
        # In fp16 the gradient of a row of zeros, which is divided by eps, is 0 or too large.
        if dtype == torch.float16 and name in found and name in truth:
            zero = (case.points[index] == 0).all(1)
            found[name][zero] = truth[name][zero].to(dtype)
    runs = []
    for i in range(DRAWS):
        generator = _generator(case.seed + 1000 + i)
        leaves = case.exact(generator)
        # A distance may be taken from differences, or as every kernel must, from the matrix product.
        form = product_scores if i % 2 else reference.scores
        with scores_by(form), Rounding(case.eps, generator) as rounding:
            runs.append(derivatives(dense, leaves, case.seed, case.order, rounding))
    for name in {**found, **truth}:
        # A derivative that does not depend on an input is 0, whether autograd knows or not.
        zero = torch.zeros_like(found[name] if name in found else truth[name])
        ours_here, truth_here, *runs_here = (source.get(name, zero) for source in (found, truth, *runs))
        judged = not (name.startswith("dd ") and case.extreme())
        compare(name, ours_here, truth_here, runs_here, case.eps, judged)


def compare(name: str, value: Tensor, truth: Tensor, runs: list[Tensor], eps: float, judged: bool) -> None:
    """Compares one output. Where the truth of a naive reference is NaN, ours must still be a number.

    Args:
        judged: whether its digits count, in addition to its being a number.
    """
    assert value.shape == truth.shape, f"{name}: shape {tuple(value.shape)}, the truth has {tuple(truth.shape)}"
    kind = torch.finfo(value.dtype)
    known = truth.isfinite() & (truth.abs() < kind.max / 8)
    infinite = truth.isinf()
    assert torch.equal(value[infinite].double(), truth[infinite]), f"{name}: {value[infinite]}, not {truth[infinite]}"
    bad = (known | truth.isnan()) & ~value.isfinite()
    assert not bad.any(), f"{name}: not a finite number at {bad.nonzero()[:5].tolist()}, the truth {truth[bad][:5]}"
    if value.numel() == 0 or not judged:
        return
    exactly = known & (truth == 0) & torch.stack([run == 0 for run in runs]).all(0)
    if not name.startswith(("d ", "dd ")):  # the distance of equal rows, the sum of an empty set
        assert (value[exactly] == 0).all(), f"{name}: {value[exactly].abs().max():.3g} where it is exactly 0"
    value, truth = (torch.where(known, t.double(), 0).reshape(t.size(0) if t.dim() else 1, -1) for t in (value, truth))
    runs = [torch.where(known, run, 0).reshape(truth.shape).nan_to_num() for run in runs]
    effect = torch.stack([(run - truth).norm(dim=1) for run in runs]).amax(0)
    if name.startswith(("d ", "dd ")):
        size = truth.norm(dim=1)  # of the row itself: a small gradient is as good as a large one
    else:
        size = truth.norm(dim=1).amax().expand(len(truth))
    unit = max(eps, kind.eps)
    smallest = kind.tiny * value.size(1)
    off = (value - truth).norm(dim=1)
    # In fp64 the truth errs like ours, and twice differentiated, more.
    allowed = (ALLOWED * effect + 64 * unit * size) * (8 if name.startswith("dd ") else 1) + smallest
    # Where rounding alone may amount to half of a row, there is nothing to compare.
    chaotic = 2 * ALLOWED * effect > size
    off = torch.where(chaotic, 0, off)
    worst = (off / allowed.clamp_min(1e-300)).argmax()
    assert (off <= allowed).all(), (
        f"{name}, row {worst}: off by {off[worst]:.3g}, rounding explains {allowed[worst]:.3g} (the row is "
        f"{size[worst]:.3g}); found {value[worst][:4].tolist()}, truth {truth[worst][:4].tolist()}"
    )

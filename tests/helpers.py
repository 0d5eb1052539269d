"""Shared by the tests: backends, dtypes, the one tolerance rule, and problems to compare a kernel with the truth on."""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from dml_kernels import build_info, reference
from dml_kernels import functional as F
from dml_kernels.losses import LossEntry
from dml_kernels.ops import choice as backends

# The backends that tests run on, and the marks of these tests.
MARKS: dict[str, Any] = {"torch": (), "cpu": pytest.mark.cpp}
BACKENDS = tuple(pytest.param(name, marks=marks) for name, marks in MARKS.items())
on_backends = pytest.mark.parametrize("backend", BACKENDS)


def missing(what: str) -> None:
    """Something the tests need is not there: a skip, or a failure where DML_REQUIRE_CPU=1 says that it must be."""
    if os.environ.get("DML_REQUIRE_CPU", "0") == "1":
        pytest.fail(f"{what} (DML_REQUIRE_CPU=1 makes this a failure)")
    pytest.skip(what)


def require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing(f"{module} is a test requirement: {error}")


class Dtype(NamedTuple):
    """Dtypes of rows, bank and the vectors beside them; matrix products run in `product`."""

    name: str
    x: torch.dtype
    w: torch.dtype
    vectors: torch.dtype
    product: torch.dtype

    @property
    def accumulated(self) -> torch.dtype:
        """That of sums and losses."""
        return torch.float64 if self.product == torch.float64 else torch.float32


FP32 = Dtype("fp32", torch.float32, torch.float32, torch.float32, torch.float32)
FP64 = Dtype("fp64", torch.float64, torch.float64, torch.float64, torch.float64)
BF16 = Dtype("bf16", torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16)
MIXED = Dtype("bf16_with_fp32", torch.bfloat16, torch.float32, torch.float32, torch.bfloat16)
FP16 = Dtype("fp16", torch.float16, torch.float16, torch.float32, torch.float16)
DTYPES = (FP32, FP64, BF16, MIXED, FP16)
# Every other pair that may meet, in both orders where one is wider.
MIXES = (
    Dtype("fp64_with_fp32", torch.float64, torch.float32, torch.float32, torch.float64),
    Dtype("fp32_with_fp64", torch.float32, torch.float64, torch.float32, torch.float64),
    Dtype("fp16_with_fp32", torch.float16, torch.float32, torch.float32, torch.float16),
    Dtype("fp32_with_bf16", torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),
    Dtype("fp16_with_bf16", torch.float16, torch.bfloat16, torch.float32, torch.float32),
    Dtype("fp64_with_fp16", torch.float64, torch.float16, torch.float32, torch.float64),
    Dtype("bf16_with_fp64", torch.bfloat16, torch.float64, torch.float32, torch.float64),
)
EVERY_DTYPE = (*DTYPES, *MIXES)


def on_backends_and(dtypes: tuple[Dtype, ...]) -> Any:
    """Parametrises over `dtype` and `backend`, the backend fastest."""
    pairs = [(d, b) for d in dtypes for b in MARKS]
    return pytest.mark.parametrize(
        ("dtype", "backend"), [pytest.param(d, b, marks=MARKS[b], id=f"{d.name}-{b}") for d, b in pairs]
    )


def backends_of(entry: LossEntry, dtype: torch.dtype = torch.float32) -> list[Any]:
    """The backends that have a loss's op and policy. Without the extension all: the mark `cpp` then speaks."""
    device = torch.device("cpu")
    absent = {"cpu"} if not build_info.load() else set()
    return [
        pytest.param(name, marks=mark)
        for name, mark in MARKS.items()
        if name in absent or backends.BACKENDS[name].can_run(entry.op, device, dtype, entry.policy) is None
    ]


def on_losses(names: Mapping[str, LossEntry], *, options: bool = True, **only: Any) -> Any:
    """Parametrises over `name`, with `options` also `which` of its options, and every `backend` that runs the loss.

    `only`: fields that the entry must have, such as by_row=True.
    """
    rows = []
    for name, entry in names.items():
        if all(getattr(entry, key) == value for key, value in only.items()):
            for i in range(len(entry.options) if options else 1):
                for backend in backends_of(entry):
                    case = (name, i, *backend.values) if options else (name, *backend.values)
                    label = f"-{entry.options[i] or 'defaults'}" if options else ""
                    rows.append(pytest.param(*case, marks=backend.marks, id=f"{name}{label}-{backend.values[0]}"))
    return pytest.mark.parametrize(("name", "which", "backend") if options else ("name", "backend"), rows)


# ---------------------------------------------------------------------------------------------------------------------
# The tolerance rule: error against fp64 truth at most twice that of the dense PyTorch expression in the same dtype, or
# ULPS units in the last place of the output's largest value. One rule for every comparison with the truth.
#
# A distance has two dense expressions, and the worse one counts: from differences (N M D values, the reference) and
# from the matrix product, as torch.cdist takes it and as every kernel must. The second is given the differences where
# expanding would cancel, so that it is no excuse for small distances.

ULPS = 4
NEAR = 1 / 16


def product_scores(x: Tensor, w: Tensor, metric: str, normalized: bool, eps: float = 1e-12) -> Tensor:
    """reference.scores from the matrix product."""
    if metric in ("cosine", "dot"):
        return by_differences(x, w, metric, normalized, eps)
    u, p = (reference.normalize(t, eps) for t in (x, w)) if normalized else (x, w)
    span = u.square().sum(1)[:, None] + p.square().sum(1)
    d2 = span - 2 * (u @ p.T)
    d2 = torch.where(d2 < NEAR * span, (u[:, None] - p).square().sum(-1), d2)
    return -d2 if metric == "sqeuclidean" else -torch.where(d2 == 0, 0, torch.where(d2 == 0, 1, d2).sqrt())


by_differences = reference.scores


def error(value: Tensor, truth: Tensor, *, by_row: bool = False) -> float:
    """Largest error relative to the truth's largest value, over all or the worst row. Infinities and NaN must agree."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape, f"shape {tuple(value.shape)}, the truth has {tuple(truth.shape)}"
    if truth.numel() == 0:
        return 0.0
    finite = truth.isfinite()
    if not torch.equal(value[~finite].nan_to_num(nan=7.0), truth[~finite].nan_to_num(nan=7.0)):
        return math.inf
    value, truth = (torch.where(finite, t, 0) for t in (value, truth))
    if not value.isfinite().all():
        return math.inf
    rows = truth.size(0) if by_row and truth.dim() > 1 else 1
    off, scale = (t.abs().reshape(rows, -1).amax(1) for t in (value - truth, truth))
    # Where the truth is 0 throughout, so must the value be.
    return torch.where(scale > 0, off / scale, torch.where(off > 0, math.inf, 0.0)).max().item()


class Yardstick(NamedTuple):
    """The truth of one output, and the dense expression's error against it: over all, and in the worst row."""

    truth: Tensor
    error: float
    error_by_row: float

    @staticmethod
    def of(dense: Tensor, truth: Tensor) -> Yardstick:
        return Yardstick(truth, error(dense, truth), error(dense, truth, by_row=True))

    def or_worse(self, *others: Yardstick) -> Yardstick:
        """This truth, with the dense error of the worst of several draws: one alone may be luckily small."""
        every = (self, *others)
        return Yardstick(self.truth, max(s.error for s in every), max(s.error_by_row for s in every))

    def in_fp64(self, truth: Tensor) -> Yardstick:
        """From fp32 to fp64, where the truth is the dense expression itself: rounding shrinks with the unit.

        Times 8, as that truth errs like any other: in fp64 it is the formula that is tested, not the rounding.
        """
        shrink = 8 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return Yardstick(truth, self.error * shrink, self.error_by_row * shrink)


def worst(sticks: Sequence[Mapping[str, Yardstick]]) -> dict[str, Yardstick]:
    """The first truths, each with the worst dense error."""
    return {k: stick.or_worse(*(s[k] for s in sticks[1:])) for k, stick in sticks[0].items()}


def dense_forms(metric: str) -> tuple[Callable[..., Tensor], ...]:
    return (by_differences, product_scores) if metric.endswith("euclidean") else (by_differences,)


def assert_accurate(value: Tensor, stick: Yardstick, what: str, *, by_row: bool = False) -> None:
    """The tolerance rule."""
    theirs = stick.error_by_row if by_row else stick.error
    assert math.isfinite(theirs), f"{what}: the dense expression has no finite error here, so it is no yardstick"
    ours, bound = (
        error(value, stick.truth, by_row=by_row),
        max(2 * theirs, ULPS * torch.finfo(value.dtype).eps),
    )
    assert ours <= bound, f"{what}: error {ours:.3g}, allowed {bound:.3g} (the dense expression's is {theirs:.3g})"


def assert_all_accurate(ours: Mapping[str, Tensor], sticks: Mapping[str, Yardstick]) -> None:
    assert ours.keys() == sticks.keys()
    for name, value in ours.items():
        assert_accurate(value, sticks[name], name)
        if name in ("grad x", "grad w"):
            assert_accurate(value, sticks[name], f"{name}, row by row", by_row=True)


def assert_same_bits(a: Any, b: Any) -> None:
    for s, t in zip(a, b, strict=True):
        assert s.dtype == t.dtype
        assert s.shape == t.shape
        assert torch.equal(s.isnan(), t.isnan())
        assert torch.equal(s.nan_to_num(nan=0.0), t.nan_to_num(nan=0.0))


# ---------------------------------------------------------------------------------------------------------------------
# Problems: the arguments of one masked_logsumexp call, held in fp64 and evaluated in any dtype

# (metric, normalize): all that differ.
METRICS = (
    ("cosine", False),
    ("dot", False),
    ("sqeuclidean", True),
    ("sqeuclidean", False),
    ("euclidean", True),
    ("euclidean", False),
)
METRIC_IDS = ("cosine", "dot", "sqeuclidean-unit", "sqeuclidean-raw", "euclidean-unit", "euclidean-raw")
on_metrics = pytest.mark.parametrize(("metric", "normalize"), METRICS, ids=METRIC_IDS)
OUTPUTS = ("same", "different", "sum same", "sum different")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def leaf(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*shape, seed=seed).to(dtype).requires_grad_()


def randint(low: int, high: int, size: int, *, seed: int) -> Tensor:
    return torch.randint(low, high, (size,), generator=torch.Generator().manual_seed(seed))


def unchanged(name: str, t: Tensor) -> Tensor:
    return t


@dataclass
class Problem:
    """Arguments of one call: `tensors` get gradients, `options` are passed on, `layout` changes strides, not values.

    Without `sums` the op is not asked for plain sums.
    """

    tensors: dict[str, Tensor]  # x, w and any of scale, col_bias, in fp64
    y: Tensor
    options: dict[str, Any]
    grads: dict[str, Tensor] = field(default_factory=dict)  # incoming, by output
    layout: Callable[[str, Tensor], Tensor] = unchanged
    seed: int = 0
    sums: bool = True

    @staticmethod
    def random(n: int, m: int, d: int, metric: str = "cosine", normalize: bool = False, seed: int = 0) -> Problem:
        # Norms around 1 whatever D: raw metrics then keep logits of a few units.
        x, w = randn(n, d, seed=seed) / math.sqrt(d), randn(m, d, seed=seed + 1) / math.sqrt(d)
        grads = {name: randn(n, seed=seed + 3 + i) for i, name in enumerate(OUTPUTS)}
        y = randint(0, m, n, seed=seed + 2)
        return Problem({"x": x, "w": w}, y, {"metric": metric, "normalize": normalize}, grads, seed=seed)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return (*self.tensors["x"].shape, self.tensors["w"].size(0))

    def leaves(self, dtype: Dtype) -> dict[str, Tensor]:
        kinds = {"x": dtype.x, "w": dtype.w}
        return {k: t.to(kinds.get(k, dtype.vectors)).requires_grad_() for k, t in self.tensors.items()}

    def ours(self, leaves: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        call = {k: self.layout(k, t) for k, t in leaves.items()}
        rest = {k: self.layout(k, v) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        y = self.layout("y", self.y)
        out = F.masked_logsumexp(call.pop("x"), call.pop("w"), y, **call, **rest, sums=self.sums, backend=backend)
        return {name: t for name, t in zip(OUTPUTS, out, strict=True) if t is not None}

    def dense(self, leaves: Mapping[str, Tensor], product: torch.dtype) -> dict[str, Tensor]:
        call = {k: self.layout(k, t) for k, t in leaves.items()}
        rest = dict(self.options)
        rest["normalized"] = rest.pop("normalize")
        x, w = call.pop("x").to(product), call.pop("w").to(product)
        out = reference.masked_logsumexp(x, w, self.y, **call, **rest)
        return dict(zip(OUTPUTS if self.sums else OUTPUTS[:2], out, strict=self.sums))

    def with_gradients(self, out: dict[str, Tensor], leaves: Mapping[str, Tensor], like: Dtype) -> dict[str, Tensor]:
        """`out` and the gradients of sum <grads, out>, with the incoming gradients rounded to `like`'s outputs."""
        grads = [self.layout("grad", self.grads[k].to(like.accumulated).to(v.dtype)) for k, v in out.items()]
        found = torch.autograd.grad(list(out.values()), list(leaves.values()), grads)
        return {**out, **{f"grad {k}": g for k, g in zip(leaves, found, strict=True)}}

    def run(self, dtype: Dtype, backend: str) -> dict[str, Tensor]:
        leaves = self.leaves(dtype)
        out = self.with_gradients(self.ours(leaves, backend), leaves, dtype)
        for name, t in out.items():
            want = leaves[name[5:]].dtype if name.startswith("grad ") else dtype.accumulated
            assert t.dtype == want, f"{name} is {t.dtype}, not {want}"
        return out

    def yardsticks(self, dtype: Dtype) -> dict[str, Yardstick]:
        """By output and gradient: the fp64 truth on the same (rounded) inputs, and the dense expression's error."""
        leaves = {k: t.detach().double().requires_grad_() for k, t in self.leaves(dtype).items()}
        truth = self.with_gradients(self.dense(leaves, torch.float64), leaves, dtype)
        if dtype.product == torch.float64:
            return {k: stick.in_fp64(truth[k]) for k, stick in self.yardsticks(FP32).items()}
        leaves, sticks = self.leaves(dtype), []
        for form in dense_forms(self.options["metric"]):
            with mock.patch.object(reference, "scores", form):
                dense = self.with_gradients(self.dense(leaves, dtype.product), leaves, dtype)
            sticks.append({k: Yardstick.of(dense[k], t) for k, t in truth.items()})
        return worst(sticks)


def draws(n: int, m: int, d: int) -> range:
    """Seeds of the draws a dense error is taken over: small problems vary more and cost less."""
    work = n * m * d
    return range(0, 100 * (10 if work < 200_000 else 3 if work < 3_000_000 else 1), 100)


@functools.lru_cache(maxsize=1)
def drawn(make: Callable[..., Problem], key: tuple[Any, ...], dtype: Dtype) -> tuple[Problem, dict[str, Yardstick]]:
    """The problem make(*key, seed=0) and its yardsticks, the dense error taken over several seeds.

    Kept for one more call: the backends come one after the other.
    """
    first = make(*key, seed=0)
    n, d, m = first.sizes
    return first, worst([make(*key, seed=seed).yardsticks(dtype) for seed in draws(n, m, d)])


def check(make: Callable[..., Problem], key: tuple[Any, ...], dtype: Dtype, backend: str) -> None:
    """Every output and gradient of the problem make(*key) on `backend` keeps the tolerance rule."""
    problem, sticks = drawn(make, key, dtype)
    assert_all_accurate(problem.run(dtype, backend), sticks)

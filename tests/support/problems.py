"""Problems: the arguments of one masked_logsumexp call, held in fp64 and evaluated in any dtype."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dml_kernels import functional as F
from dml_kernels import reference
from tests.support.dtypes import FP32, Dtype
from tests.support.tolerance import Yardstick, assert_all_accurate, dense_forms, scores_by, worst

# (metric, normalize): all combinations that differ.
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
        """For each output and gradient: the fp64 truth on the same (rounded) inputs, and the dense error."""
        leaves = {k: t.detach().double().requires_grad_() for k, t in self.leaves(dtype).items()}
        truth = self.with_gradients(self.dense(leaves, torch.float64), leaves, dtype)
        if dtype.product == torch.float64:
            return {k: stick.in_fp64(truth[k]) for k, stick in self.yardsticks(FP32).items()}
        leaves, sticks = self.leaves(dtype), []
        for form in dense_forms(self.options["metric"]):
            with scores_by(form):
                dense = self.with_gradients(self.dense(leaves, dtype.product), leaves, dtype)
            sticks.append({k: Yardstick.of(dense[k], t) for k, t in truth.items()})
        return worst(sticks)


def draws(n: int, m: int, d: int) -> range:
    """The seeds over which a dense error is taken: small problems vary more and cost less."""
    work = n * m * d
    return range(0, 100 * (10 if work < 200_000 else 3 if work < 3_000_000 else 1), 100)


@functools.lru_cache(maxsize=1)
def drawn(make: Callable[..., Problem], key: tuple[Any, ...], dtype: Dtype) -> tuple[Problem, dict[str, Yardstick]]:
    """The problem make(*key, seed=0) and its yardsticks, the dense error taken over several seeds.

    The result is cached for the next call, because the backends follow one another.
    """
    first = make(*key, seed=0)
    n, d, m = first.sizes
    return first, worst([make(*key, seed=seed).yardsticks(dtype) for seed in draws(n, m, d)])


def check(make: Callable[..., Problem], key: tuple[Any, ...], dtype: Dtype, backend: str) -> None:
    """Checks that every output and gradient of the problem make(*key) on `backend` keeps the tolerance rule."""
    problem, sticks = drawn(make, key, dtype)
    assert_all_accurate(problem.run(dtype, backend), sticks)

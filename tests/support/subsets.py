"""Every op and loss as a function of its differentiable tensors, and the gradients for any subset of these.

An op is told which gradients are needed and may leave out the others. A gradient does not depend on which others are
needed: it is that of the dense expression where one is known, else that of the call in which all tensors need one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dml_kernels import functional as F
from dml_kernels import use_backend
from dml_kernels.losses import REGISTRY, family
from dml_kernels.ops import choice as backends
from dml_kernels.ops import segments
from tests.support.problems import randn

N, M, D = 6, 7, 3
# One metric for each way from scores to gradients: through unit vectors, through a root and both, through neither.
METRICS = (("cosine", False), ("euclidean", True), ("sqeuclidean", False))
Y = torch.tensor([0, 1, 0, 9, 2, 1])  # one row has no positive
C = torch.tensor([0, 1, 2, 0, 1, -100, 2])
EXCLUDE = torch.tensor([-1, 1, 0, -1, -1, 4])
ROWS, COLS = torch.tensor([0, 0, 3, 1, 5]), torch.tensor([2, 6, 3, 1, 0])


@dataclass
class Case:
    """``call`` takes the tensors by name; ``dense`` where the call knows the backend ``reference``; ``op`` of OPS."""

    tensors: Mapping[str, Tensor]
    call: Callable[..., Any]
    op: str | None = None
    dense: bool = False

    def subsets(self) -> Iterator[tuple[str, ...]]:
        """All nonempty subsets."""
        names = tuple(self.tensors)
        for size in range(1, len(names) + 1):
            yield from itertools.combinations(names, size)


@contextmanager
def preferring(backend: str) -> Iterator[None]:
    """Runs every op on this backend if it can, else on the next; ``reference`` has no substitute."""
    if backend == backends.REFERENCE:
        with use_backend(backend):
            yield
        return
    order = sorted(backends.BACKENDS, key=lambda name: (name != backend, name == "triton"))
    with mock.patch.object(backends, "order", return_value=order):
        yield


def bank(*names: str) -> dict[str, Tensor]:
    every = {
        "x": randn(N, D, seed=1), "w": randn(M, D, seed=2), "scale": randn(N, seed=3).abs() + 0.5,
        "col_bias": randn(M, seed=5), "t_same": randn(N, seed=6), "t_different": randn(1, seed=7)[0],
        "u": randn(N, seed=8), "v": randn(M, seed=9),
    }  # fmt: skip
    return {name: every[name] for name in names}


def ops() -> dict[str, Case]:
    """One or several cases for every op that has a gradient."""
    found = {
        "normalize": Case(bank("x"), lambda x: F.normalize(x), "normalize", True),
        "pair_scores": Case(bank("x", "w"), lambda x, w: F.pair_scores(x, w, ROWS, COLS, "euclidean")),
        "pair_scores-dot": Case(bank("x", "w"), lambda x, w: F.pair_scores(x, w, ROWS, COLS, "cosine")),
        "segments": Case(
            {"values": randn(5, seed=1), "rows": randn(3, seed=2)},
            lambda values, rows: _segments(values, rows, torch.tensor([0, 0, 1, 1, 2])),
        ),
    }  # fmt: skip
    for metric, unit in METRICS:
        call = {"metric": metric, "normalize": unit}
        label = f"{metric}{'-unit' * unit}"
        found[f"normalized_distance-{label}"] = Case(
            bank("x", "w"), _bind(F.normalized_distance, **call), "normalized_distance", True
        )
        lines = {"same": (-1.5, 0.1), "different": (2.0, -0.3), "y": Y, "c": C, "exclude": EXCLUDE}
        found[f"masked_logsumexp-{label}"] = Case(
            bank("x", "w", "scale", "col_bias"), _bind(F.masked_logsumexp, **call, **lines, sums=True),
            "masked_logsumexp", True,
        )  # fmt: skip
        found[f"masked_hinge_sum-{label}"] = Case(
            bank("x", "w", "t_same", "t_different"), _hinge(**call, **lines), "masked_hinge_sum", True
        )
        for kind, numbers, vectors in (("softplus", (1.3,), ("u",)), ("lifted", (1.3, -2.0), ("u", "v"))):
            found[f"positive_pair_sum-{kind}-{label}"] = Case(
                bank("x", "w", *vectors),
                _first(F.positive_pair_sum, y=Y, c=C, exclude=EXCLUDE, kind=kind, params=numbers, **call),
                "positive_pair_sum", True,
            )  # fmt: skip
        for swap, smooth in itertools.product((False, True), repeat=2):
            found[f"triplet_sum-{swap}-{smooth}-{label}"] = Case(
                bank("x", "w"),
                _first(F.triplet_sum, y=Y, c=C, exclude=EXCLUDE, margin=0.4, swap=swap, smooth=smooth, **call),
                "triplet_sum", True,
            )  # fmt: skip
    found["masked_hinge_sum-relative"] = Case(
        bank("x", "w", "t_same", "t_different"),
        _hinge(y=Y.clamp_max(2), same=(0.0, 0.3), different=(2.0, -0.3), relative=True),
        "masked_hinge_sum", True,
    )  # fmt: skip
    for policy, params in (("max_pool", (2,)), ("softmax_pool", (2, 0.4)), ("quadratic", (0.3,))):
        pooled = policy != "quadratic"
        tensors = bank("x", "w", "scale", "col_bias")
        tensors["w"] = randn(2 * M, D, seed=2) if pooled else tensors["w"]
        found[f"masked_logsumexp-{policy}"] = Case(
            tensors, _bind(F.masked_logsumexp, y=Y, c=C, policy=policy, policy_params=params, sums=True),
            "masked_logsumexp", True,
        )  # fmt: skip
    scalar = bank("x", "w", "scale")
    scalar["scale"] = scalar["scale"][0]
    found["masked_logsumexp-one scale"] = Case(scalar, _bind(F.masked_logsumexp, y=Y, c=C), "masked_logsumexp", True)
    return found


def losses() -> dict[str, Case]:
    """Every loss of the registry, with each of its options."""
    found = {}
    for name, entry in family("proxies").items():
        for i, options in enumerate(entry.options):
            y = torch.tensor([0, 1, -100, 5, 2, 1])
            tensors = {"x": randn(N, D, seed=1), "w": randn(M * entry.centres, D, seed=2)}
            function = _bind(entry.function, names=("embeddings", "proxies"), labels=y, **options)
            found[f"{name}-{i}"] = Case(tensors, function, entry.op)
    for name, key in (
        ("ProxyNCALoss", "softmax_scale"), ("NormalizedSoftmaxLoss", "temperature"), ("CosFaceLoss", "scale"),
        ("ArcFaceLoss", "scale"), ("SphereFaceLoss", "scale"), ("LargeMarginSoftmaxLoss", "scale"),
        ("SubCenterArcFaceLoss", "scale"), ("SoftTripleLoss", "la"),
    ):  # fmt: skip
        case, entry = found[f"{name}-0"], REGISTRY[name]
        options = {k: v for k, v in entry.options[0].items() if k != key}
        tensors = {**case.tensors, key: torch.tensor(1.7, dtype=torch.float64)}
        y = torch.tensor([0, 1, -100, 5, 2, 1])
        function = _bind(entry.function, names=("embeddings", "proxies", key), labels=y, **options)
        found[f"{name}-{key}"] = Case(tensors, function, entry.op)
    for name, entry in family("pairs").items():
        for i, options in enumerate(entry.options):
            for refs in (False, True):
                if not (refs and not entry.loss.takes_references):
                    found[f"{name}-{i}{'-refs' * refs}"] = _pairs(entry, options, refs)
    for given, varied in itertools.product((False, True), repeat=2):
        for normalize in (False, True):
            for reduction in ("mean", "none"):
                label = "-".join(("MagnetLoss", *("centers",) * given, *("variance",) * varied, *("unit",) * normalize))
                found[f"{label}-{reduction}"] = _magnet(given, varied, normalize, reduction)
    return found


def _bind(function: Callable[..., Any], names: tuple[str, ...] | None = None, **options: Any) -> Callable[..., Any]:
    """``function`` of tensors in the order of the case; by the given argument names, else by their own."""

    def call(**tensors: Tensor) -> Any:
        return function(**dict(zip(names or tensors, tensors.values(), strict=True)), **options)

    return call


def _first(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda **tensors: function(**tensors, **options)[0]


def _hinge(**options: Any) -> Callable[..., Any]:
    return lambda x, w, t_same, t_different: F.masked_hinge_sum(
        x, w, threshold=(t_same, t_different), **options
    )[:2]  # fmt: skip


def _segments(values: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    bounds = segments.offsets(index, 3)
    return segments.total(values * segments.spread(rows, index, bounds), index, bounds)


def _pairs(entry: Any, options: Mapping[str, Any], refs: bool) -> Case:
    y, c = torch.tensor([0, 1, 0, 4, 2, 1, 0, 2]), torch.tensor([0, 1, 2, 0, 1, -100, 2])
    tensors = {"x": randn(8, D, seed=1)}
    if refs:
        tensors["w"] = randn(7, D, seed=2)
    module = entry.loss(**options).double()
    learned = dict(module.named_parameters())
    tensors |= {name: p.detach().clone() for name, p in learned.items()}

    def call(x: Tensor, w: Tensor | None = None, **parameters: Tensor) -> Tensor:
        given = {} if w is None else {"ref_emb": w, "ref_labels": c}
        return torch.func.functional_call(module, parameters, (x, y), given)

    return Case(tensors, call)


def _magnet(given: bool, varied: bool, normalize: bool, reduction: str) -> Case:
    clusters, classes = torch.tensor([0, 1, 2, 3, 0, -100, 1, 2]), torch.tensor([0, 1, 2, 2])
    tensors = {"x": randn(8, D, seed=1)}
    if given:
        tensors["centers"] = randn(4, D, seed=2)
    if varied:
        tensors["variance"] = torch.tensor(0.8, dtype=torch.float64)

    def call(x: Tensor, **rest: Tensor) -> Tensor:
        return F.magnet_loss(
            x, clusters, classes, alpha=3.0, normalize=normalize, reduction=reduction, **rest
        )  # fmt: skip

    return Case(tensors, call, "magnet", True)


# ---------------------------------------------------------------------------------------------------------------------


def outputs(case: Case, needs: tuple[str, ...]) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Leaves, of which ``needs`` need a gradient; what the case makes of them; fixed gradients of that, coming in."""
    leaves = {k: t.clone().requires_grad_(k in needs) for k, t in case.tensors.items()}
    out = case.call(**leaves)
    out = (out,) if isinstance(out, Tensor) else out
    out = [torch.where(t == -math.inf, 0, t) for t in out if t is not None]  # an empty set has no gradient
    return leaves, out, [randn(*t.shape, seed=20 + i).requires_grad_() for i, t in enumerate(out)]


def direction(case: Case, name: str) -> Tensor:
    return randn(*case.tensors[name].shape, seed=40 + list(case.tensors).index(name))


def all_derivatives(case: Case) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The gradients where every tensor needs one, and for each, its gradients along a fixed direction."""
    leaves, out, grads = outputs(case, tuple(case.tensors))
    first = torch.autograd.grad(out, list(leaves.values()), grads, create_graph=True, materialize_grads=True)
    roots = {**leaves, **{f"incoming {i}": g for i, g in enumerate(grads)}}
    second = {}
    for name, g in zip(leaves, first, strict=True):
        along = (g * direction(case, name)).sum()
        found = torch.autograd.grad(along, list(roots.values()), retain_graph=True, materialize_grads=True)
        second[name] = dict(zip(roots, found, strict=True))
    return {k: g.detach() for k, g in zip(leaves, first, strict=True)}, second


def assert_any_subset_gives_the_same(case: Case, backend: str) -> None:
    with preferring(backends.REFERENCE if case.dense else backend):
        first, second = all_derivatives(case)
    for wanted in case.subsets():
        for needs in {wanted, tuple(case.tensors)} if len(wanted) == 1 else {wanted}:
            with preferring(backend):
                leaves, out, grads = outputs(case, needs)
            inputs = [leaves[k] for k in wanted]
            plain = torch.autograd.grad(out, inputs, grads, retain_graph=True, materialize_grads=True)
            again = torch.autograd.grad(out, inputs, grads, create_graph=True, materialize_grads=True)
            along = sum((g * direction(case, k)).sum() for k, g in zip(wanted, again, strict=True))
            roots = {**{k: leaves[k] for k in wanted}, **{f"incoming {i}": g for i, g in enumerate(grads)}}
            twice = torch.autograd.grad(along, list(roots.values()), materialize_grads=True)
            what = f"where {', '.join(needs)} need a gradient, that of"
            for k, a, b in zip(wanted, plain, again, strict=True):
                _assert_close(a, first[k], f"{what} {k}")
                _assert_close(b.detach(), first[k], f"{what} {k}, kept to be differentiated again")
            for k, t in zip(roots, twice, strict=True):
                _assert_close(t, sum(second[name][k] for name in wanted), f"{what} the gradients in {k}")


def _assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9, msg=lambda m: f"{what}: {m}")

"""The time and memory of one step of Proxy-NCA, compared with the same loss in plain PyTorch.

    python -m dml_kernels.demo.step_cost [--classes 100000] [--batch 512] [--dim 128] [--rounds 5]

A step is forward and backward: the loss, and its gradients with respect to embeddings and proxies.

The numbers come first: the two losses and both gradients are compared on the tensors that are then timed. Where they
differ by more than the tolerances below, nothing is timed and ComparisonError is raised.

Time is the median of interleaved rounds in this process (``profiling.interleaved_times``), after one warm-up each.
Memory is measured in a fresh process per variant. It makes the inputs, runs a step on 8 rows and 64 classes (which
loads code and starts threads), then one step at full size. The figure is the peak of resident memory during that step,
less the resident memory just before it. So it counts the gradients and every temporary of PyTorch, of the C++ extension
and of the BLAS, by any allocator; it does not count the inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from .. import functional, profiling
from ..cli.arguments import Parser, integer, number, threads
from ..ops import choice as backend_choice

__all__ = ["ComparisonError", "StepCost", "VariantCost", "measure", "plain_bytes", "plain_proxy_nca"]

# For fp32 sums of 100,000 terms in two orders. The demo prints the observed differences next to these.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
SEED = 0


class ComparisonError(RuntimeError):
    """The fused loss and plain PyTorch give different numbers, so a comparison of their cost would mean nothing."""


@dataclass(frozen=True)
class VariantCost:
    """The cost of one variant.

    Attributes:
        seconds: the median of the rounds.
        samples: the seconds of each round.
        peak_bytes: the peak extra memory of one step.
    """

    seconds: float
    samples: list[float]
    peak_bytes: int


@dataclass(frozen=True)
class StepCost:
    """The cost of both variants at one size.

    Attributes:
        batch, classes, dim, dtype: the size.
        variants: name -> cost.
        gradient_bytes: the size of the two gradients.
        loss_error: the relative difference of the losses.
        gradient_error: the largest difference of a gradient, relative to its largest entry.
        loss_tolerance: the allowed loss_error.
        gradient_tolerance: the allowed gradient_error.
    """

    batch: int
    classes: int
    dim: int
    dtype: str
    variants: dict[str, VariantCost]
    gradient_bytes: int
    loss_error: float
    gradient_error: float
    loss_tolerance: float = LOSS_TOLERANCE
    gradient_tolerance: float = GRADIENT_TOLERANCE


def plain_proxy_nca(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, softmax_scale: float, exclude_positive: bool
) -> Tensor:
    """Proxy-NCA as one writes it in plain PyTorch: dense, with autograd's backward.

    On unit vectors |x - p|^2 = 2 - 2 x.p, so it takes one matrix product and no (N, M, D) difference. Formula and
    arguments are those of ``functional.proxy_nca_loss``.
    """
    x = torch_functional.normalize(embeddings, dim=1)
    p = torch_functional.normalize(proxies, dim=1)
    logits = -softmax_scale * (2 - 2 * x @ p.T)
    positive = logits.gather(1, labels[:, None])
    if exclude_positive:
        logits = logits.scatter(1, labels[:, None], -torch.inf)
    return (torch.logsumexp(logits, dim=1) - positive[:, 0]).mean()


VARIANTS: dict[str, Callable[..., Tensor]] = {"fused": functional.proxy_nca_loss, "plain": plain_proxy_nca}


class _Problem:
    """Random inputs of one size, the same in every process, and a step of a variant on them."""

    def __init__(self, batch: int, classes: int, dim: int, softmax_scale: float, exclude_positive: bool) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.embeddings = torch.randn(batch, dim, generator=generator).requires_grad_()
        self.proxies = torch.randn(classes, dim, generator=generator).requires_grad_()
        self.labels = torch.randint(classes, (batch,), generator=generator)
        self.options = {"softmax_scale": softmax_scale, "exclude_positive": exclude_positive}

    def step(self, variant: str) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the gradient of the embeddings, the gradient of the proxies."""
        loss = VARIANTS[variant](self.embeddings, self.proxies, self.labels, **self.options)
        grad_embeddings, grad_proxies = torch.autograd.grad(loss, (self.embeddings, self.proxies))
        return loss.detach(), grad_embeddings, grad_proxies


def measure(
    batch: int = 512,
    classes: int = 100_000,
    dim: int = 128,
    *,
    softmax_scale: float = 1.0,
    exclude_positive: bool = False,
    rounds: int = 5,
    progress: Callable[[], object] | None = None,
) -> StepCost:
    """Compare both variants, then measure them, as the module describes.

    Args:
        batch: the number of embeddings.
        classes: the number of proxies.
        dim: the dimensions of both.
        softmax_scale, exclude_positive: as in ``functional.proxy_nca_loss``.
        rounds: how many rounds are timed.
        progress: called ``steps_of(rounds)`` times.

    Raises:
        ComparisonError: the numbers of the variants differ by more than the tolerances.
        RuntimeError: a child process failed, for example for lack of memory.
    """
    tick = progress or (lambda: None)
    problem = _Problem(batch, classes, dim, softmax_scale, exclude_positive)
    loss_error, gradient_error = _compare(problem)
    tick()
    peaks = {}
    backend = backend_choice.requested()  # `with use_backend(...)` does not reach child processes
    for name in VARIANTS:
        sizes = ("--batch", batch, "--classes", classes, "--dim", dim, "--softmax-scale", softmax_scale)
        flags = ["--exclude-positive"] if exclude_positive else []
        threads = ("--threads", torch.get_num_threads())
        printed = profiling.run_in_child(
            "dml_kernels.demo.step_cost",
            *("--peak-of", name, *map(str, (*sizes, *threads)), *flags),
            environment={"DML_BACKEND": backend} if backend else None,
        )
        peaks[name] = int(printed.strip().splitlines()[-1])
        tick()
    times = profiling.interleaved_times(
        {name: partial(problem.step, name) for name in VARIANTS}, rounds, warmup=1, progress=progress
    )
    return StepCost(
        batch=batch,
        classes=classes,
        dim=dim,
        dtype="fp32",
        variants={
            name: VariantCost(statistics.median(samples), samples, peaks[name]) for name, samples in times.items()
        },
        gradient_bytes=4 * dim * (batch + classes),
        loss_error=loss_error,
        gradient_error=gradient_error,
    )


def plain_bytes(classes: int, batch: int = 512, dim: int = 128) -> int:
    """About how many bytes a step of plain PyTorch needs: seven matrices of batch x classes, proxies and gradients."""
    return 4 * classes * (7 * batch + 3 * dim)


def steps_of(rounds: int) -> int:
    """How often ``measure`` calls its progress function."""
    return 1 + len(VARIANTS) + len(VARIANTS) * (rounds + 1)


def _compare(problem: _Problem) -> tuple[float, float]:
    """The relative difference of the losses; the largest difference of a gradient, relative to its largest entry."""
    fused, plain = problem.step("fused"), problem.step("plain")
    loss_error = float((fused[0] - plain[0]).abs() / plain[0].abs())
    gradient_error = max(float((f - p).abs().max() / p.abs().max()) for f, p in zip(fused[1:], plain[1:]))
    # Written such that NaN fails.
    if not (loss_error <= LOSS_TOLERANCE and gradient_error <= GRADIENT_TOLERANCE):
        raise ComparisonError(
            f"fused and plain Proxy-NCA differ: loss by {loss_error:.1e} (allowed {LOSS_TOLERANCE:.0e}), "
            f"gradients by {gradient_error:.1e} (allowed {GRADIENT_TOLERANCE:.0e}); not timed"
        )
    return loss_error, gradient_error


def _peak_of(variant: str, options: argparse.Namespace) -> int:
    scale, exclude = options.softmax_scale, options.exclude_positive
    tiny = _Problem(8, 64, options.dim, scale, exclude)
    problem = _Problem(options.batch, options.classes, options.dim, scale, exclude)
    return profiling.peak_extra_bytes(lambda: problem.step(variant), lambda: tiny.step(variant))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison as JSON, or the peak of one variant in bytes."""
    parser = Parser(
        prog="python -m dml_kernels.demo.step_cost",
        description="Time (s) and peak memory (bytes) of one Proxy-NCA step, fused and in plain PyTorch; prints JSON.",
    )
    size = integer(1, 1 << 30)
    scale = number(0, 1e4, above=True)
    parser.add_argument("--batch", type=size, default=512, metavar="N", help="embeddings (default %(default)s)")
    parser.add_argument("--classes", type=size, default=100_000, metavar="M", help="proxies (default %(default)s)")
    parser.add_argument("--dim", type=size, default=128, metavar="D", help="dimensions (default %(default)s)")
    parser.add_argument("--rounds", type=size, default=5, help="interleaved timed rounds (default %(default)s)")
    parser.add_argument("--softmax-scale", type=scale, default=1.0, metavar="S", help="default %(default)s")
    parser.add_argument("--exclude-positive", action="store_true", help="the 2017 paper's sum")
    parser.add_argument("--threads", type=threads(), metavar="T", help="of PyTorch (default: its own choice)")
    parser.add_argument(
        "--peak-of",
        choices=tuple(VARIANTS),
        help="print this variant's peak extra bytes in this process, and end",
    )
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak_of:
        print(_peak_of(options.peak_of, options))
        return 0
    cost = measure(
        options.batch,
        options.classes,
        options.dim,
        softmax_scale=options.softmax_scale,
        exclude_positive=options.exclude_positive,
        rounds=options.rounds,
    )
    print(json.dumps({"machine": profiling.machine(), **asdict(cost)}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

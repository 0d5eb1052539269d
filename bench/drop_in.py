"""`python -m bench.drop_in`: a step of every drop-in loss, compared with that of pytorch-metric-learning.

Both get the same arguments, embeddings, labels and parameters. Their values and gradients of the embeddings are
compared before anything is timed. Rounds are interleaved, times are medians, and the peak memory of each is measured in
a fresh process. `--write docs/losses.md` renews the table between the markers of the page.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dml_kernels import losses
from dml_kernels.cli import tables
from dml_kernels.demo.checkpoint import write_json
from dml_kernels.profiling import interleaved_times, peak_extra_bytes, run_in_child

from . import machine
from .busy import Usage, share_of_others

RUNS = Path(__file__).resolve().parent.parent / "runs" / "bench"
MARKERS = ("<!-- measured: python -m bench.drop_in --write docs/losses.md -->", "<!-- end of measured -->")
# Relative to the value, and to the largest entry of a gradient: fp32 on both sides.
TOLERANCE = 1e-3
# Here pytorch-metric-learning holds every positive pair with every negative pair: over 20 GB at N = 512.
FEWER = {"LiftedStructureLoss": 256, "NTXentLoss": 256}
BUDGET = 30.0  # seconds of pytorch-metric-learning: a slow loss gets fewer rounds, at least one
# Settings other than the defaults: pytorch-metric-learning needs 28 matrices of N x M x centres for SoftTriple.
SETTINGS: dict[str, dict[str, Any]] = {"SoftTripleLoss": {"centers_per_class": 5}}
# A scale as used in training: with the default of 1 the softmax over many classes is flat.
SETTINGS["ProxyNCALoss"] = {"softmax_scale": 8}


@dataclass(frozen=True)
class Size:
    """The numbers of embeddings and classes (of the bank, or in the batch, each `per_class` times), and the width."""

    n: int
    m: int
    d: int
    per_class: int = 8

    def __str__(self) -> str:
        return f"{self.n} x {self.m:,} x {self.d}" if self.m else f"{self.n} x {self.d}"


@dataclass
class Record:
    """The measurements of one loss: seconds of each round, and peak bytes including gradients; None: not measured."""

    name: str
    size: str
    value_error: float
    gradient_error: float
    ours: list[float]
    pml: list[float]
    ours_bytes: int | None = None
    pml_bytes: int | None = None

    @property
    def speedup(self) -> float:
        return statistics.median(b / a for a, b in zip(self.ours, self.pml, strict=True))


def pml_losses() -> Any:
    """The losses of pytorch-metric-learning."""
    return importlib.import_module("pytorch_metric_learning.losses")


def names() -> list[str]:
    """The losses that both libraries have, those with a learned bank first."""
    found = [*losses.family("proxies"), *losses.family("pairs")]
    return [name for name in found if hasattr(pml_losses(), name)]


def step(name: str, whose: str, size: Size) -> Callable[[], tuple[Tensor, Tensor]]:
    """Make one forward and backward: it returns the value and the gradient of the embeddings."""
    generator = torch.Generator().manual_seed(0)
    bank = name in losses.family("proxies")
    options = {**SETTINGS.get(name, {}), **({"num_classes": size.m, "embedding_size": size.d} if bank else {})}
    torch.manual_seed(0)  # the same parameters in both
    loss = getattr(losses if whose == "ours" else pml_losses(), name)(**options)
    y = torch.randint(size.m, (size.n,), generator=generator) if bank else torch.arange(size.n) // size.per_class
    # A batch early in training: classes overlap, so no loss is 0.
    centres = torch.randn(size.n if bank else size.n // size.per_class + 1, size.d, generator=generator)
    x = centres[torch.arange(size.n) if bank else y] + 2.5 * torch.randn(size.n, size.d, generator=generator)
    x.requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        x.grad = None
        for parameter in loss.parameters():
            parameter.grad = None
        value = loss(x, y)
        value.backward()
        assert x.grad is not None
        return value.detach(), x.grad

    return run


def peak(name: str, whose: str, n: int, m: int, d: int) -> int:
    """The peak extra bytes of a step; call it in a fresh process."""
    run, small = step(name, whose, Size(n, m, d)), step(name, whose, Size(16, min(m, 64), d))
    return peak_extra_bytes(run, small)


def measure(name: str, size: Size, rounds: int, memory: bool) -> Record:
    """Compare the two losses, then time them. Raises AssertionError where they differ; then neither is timed."""
    ours, others = step(name, "ours", size), step(name, "pml", size)
    value, gradient = ours()
    start = time.perf_counter()
    expected, expected_gradient = others()
    slow = time.perf_counter() - start
    value_error = float((value - expected).abs() / expected.abs().clamp_min(1e-3))
    gradient_error = float((gradient - expected_gradient).abs().max() / expected_gradient.abs().max().clamp_min(1e-9))
    assert expected > 0, f"{name}: pytorch-metric-learning gives {expected:.1e} on this batch, which compares nothing"
    assert max(value_error, gradient_error) < TOLERANCE, f"{name}: differs by {value_error:.1e}, {gradient_error:.1e}"
    rounds, warmup = max(1, min(rounds, int(BUDGET / slow))), int(slow < BUDGET / 10)
    times = interleaved_times({"ours": ours, "pml": others}, rounds, warmup=warmup)
    record = Record(name, str(size), value_error, gradient_error, times["ours"], times["pml"])
    if memory:
        for whose in ("ours", "pml"):
            found = run_in_child(f"{__package__}.drop_in", "--peak", name, whose, *map(str, (size.n, size.m, size.d)))
            setattr(record, f"{whose}_bytes", json.loads(found))
    return record


def rows(records: list[Record]) -> list[tuple[str, ...]]:
    """The table: milliseconds, megabytes and ratios."""

    def megabytes(size: int | None) -> str:
        return "" if size is None else f"{size / 2**20:,.0f}"

    def ratio(record: Record) -> str:
        if record.ours_bytes is None or record.pml_bytes is None:
            return ""
        return f"{record.pml_bytes / max(record.ours_bytes, 2**20):.1f}x"

    return [
        (
            r.name, r.size, f"{statistics.median(r.ours) * 1e3:,.1f}", f"{statistics.median(r.pml) * 1e3:,.1f}",
            f"{r.speedup:.1f}x", megabytes(r.ours_bytes), megabytes(r.pml_bytes), ratio(r),
            f"{r.value_error:.0e}", f"{r.gradient_error:.0e}",
        )
        for r in records
    ]  # fmt: skip


HEADER = (
    "loss", "size", "ms", "ms, PML", "PML / ours", "MB", "MB, PML", "PML / ours", "value differs by",
    "gradient differs by",
)  # fmt: skip


def write(page: Path, records: list[Record], line: str) -> None:
    """Replace the text between the markers of a page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    if not rest or MARKERS[1] not in rest:
        raise ValueError(f"{page} has no place for the table: the lines {MARKERS[0]!r} and {MARKERS[1]!r}")
    lines = [" | ".join(("", *row, "")).strip() for row in (HEADER, ("---",) * len(HEADER), *rows(records))]
    page.write_text(
        f"{before}{MARKERS[0]}\n\n" + "\n".join(lines) + f"\n\n{line}\n\n{MARKERS[1]}{after}", encoding="utf-8"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.drop_in", description=__doc__.splitlines()[0])
    parser.add_argument("--losses", default="", help="names, with commas; default: all that both have")
    parser.add_argument("--proxies", default="512,10000,128", help="N,M,D of losses with a bank; default %(default)s")
    parser.add_argument("--pairs", default="512,128", help="N,D of pair losses, 8 a class; default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved; default %(default)s")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, a process for each figure")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="renew the table in a Markdown page")
    parser.add_argument("--out", type=Path, default=RUNS, metavar="DIR", help="default runs/bench")
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.peak:
        name, whose, *size = options.peak
        print(json.dumps(peak(name, whose, *map(int, size))))
        return 0
    wanted = [name for name in options.losses.split(",") if name] or names()
    unknown = sorted(set(wanted) - set(names()))
    if unknown:
        parser.error(f"not in both libraries: {', '.join(unknown)}; there are {', '.join(names())}")
    banked = Size(*map(int, options.proxies.split(",")))
    n, d = map(int, options.pairs.split(","))
    found, before, records, wrong = machine.describe(), Usage.now(), [], []
    for name in wanted:
        print(name, file=sys.stderr, flush=True)
        size = banked if name in losses.family("proxies") else Size(min(n, FEWER.get(name, n)), 0, d)
        try:
            records.append(measure(name, size, options.rounds, not options.no_memory))
        except AssertionError as error:
            wrong.append(str(error))
    others = share_of_others(before, Usage.now()) or 0
    tables.show("A step, here and by the class of that name in pytorch-metric-learning (PML)", HEADER, rows(records))
    line = f"{machine.line(found)}. Other processes took {others:.0%} of the cores."
    print(line)
    path = options.out / f"drop_in-{time.strftime('%Y%m%d-%H%M%S')}.json"
    write_json(path, {"machine": found, "records": [asdict(record) for record in records]})
    print(f"saved {path}")
    if options.write:
        write(options.write, records, line)
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

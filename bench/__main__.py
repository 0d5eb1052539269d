"""`python -m bench`: run the suites through pytest-benchmark, print tables, save plots and the figures."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dml_kernels.cli.arguments import Parser, folder

from . import bars, conftest, machine, report
from .harness import Runner
from .options import add_options, read_options

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "runs" / "bench"
DESCRIPTION = """\
Time and peak memory of the losses and ops, compared with the bare matrix products (the floor), plain PyTorch,
torch.compile and pytorch-metric-learning. Every contender is checked against an fp64 truth before it is
timed; a wrong one is not timed. Times are medians of interleaved rounds; "x floor" is the median over rounds
of the ratio within a round.
"""
EPILOG = """\
examples:
  python -m bench --quick
  python -m bench --suites ProxyNCALoss,ArcFaceLoss --sizes 512x100kx128 --dtypes fp32,bf16

status: 0; 1 when a loss or op of ours is wrong or raises, or, with --check, when a binding bar is missed;
2 when --check has no bar to measure, or other processes kept the machine too busy to measure one.
The same suites under pytest-benchmark's own options: pytest bench/ --help
"""


class Plugin:
    """Gives our Runner to the pytest session in place of its own."""

    def __init__(self, runner: Runner):
        self.runner = runner

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[conftest.RUNNER] = self.runner


class Bar:
    """Progress on standard error: tqdm in a terminal, a line for each group elsewhere."""

    def __init__(self) -> None:
        self.bar, self.text = None, ""
        self.stream = sys.stderr  # before pytest captures it

    def start(self, total: int) -> None:
        if not self.stream.isatty():
            return
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            layout = "{percentage:3.0f}% |{bar:20}| {elapsed} {desc}"
            self.bar = tqdm(total=total, bar_format=layout, file=self.stream, leave=False, dynamic_ncols=True)

    def __call__(self, text: str, done: float) -> None:
        if self.bar is not None:
            self.bar.set_description_str(text, refresh=False)
            self.bar.update(done)
        elif text.split(":")[0] != self.text:
            self.text = text.split(":")[0]
            print(self.text, file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m bench", description=DESCRIPTION, epilog=EPILOG)
    add_options(parser.add_argument)
    parser.add_argument("--check", action="store_true", help="exit with status 1 when a binding bar is missed")
    parser.add_argument(
        "--out", type=folder, default=RUNS, metavar="DIR", help="default runs/bench; a folder per run in it"
    )
    parser.add_argument("--no-plot", action="store_true", help="skip the plots")
    found = parser.parse_args(argv)
    try:
        found.options = read_options(found)
    except ValueError as error:
        parser.error(str(error))
    return found


def run(runner: Runner, out: Path) -> tuple[int, str]:
    """Run the pytest session; return its status and what it printed."""
    arguments = [str(HERE), "-q", "--tb=short", "-p", "no:cacheprovider", "--capture=sys"]
    arguments += ["--benchmark-quiet", f"--benchmark-json={out / 'pytest-benchmark.json'}"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = pytest.main(arguments, plugins=[Plugin(runner)])
    return int(status), printed.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.options.threads:
        torch.set_num_threads(args.options.threads)
    found = machine.describe()
    out = args.out / time.strftime("%Y%m%d-%H%M%S")
    out.mkdir(parents=True, exist_ok=True)
    bar = Bar()
    runner = Runner(args.options, bar)
    bar.start(runner.work())
    status, printed = run(runner, out)
    bar.close()
    records = list(runner.all())
    whole = len(records) == sum(len(args.options.contenders(group)) for group in args.options.groups())
    if not whole or status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        print(printed)
        return status or 1
    report.show(records)
    note = report.busy_note(records)
    line = f"{machine.line(found)}. {note}".rstrip()
    print(textwrap.fill(line, 110))
    verdicts = bars.verdicts(records)
    report.show_bars(verdicts)
    report.save(out / "bench.json", records, verdicts, found)
    saved = [out / "bench.json", out / "pytest-benchmark.json"]
    if not args.no_plot:
        saved += plots(records, line, out)
    print("saved " + ", ".join(map(_shown, saved)))
    return verdict(records, verdicts, args.check)


def plots(records, machine_line: str, out: Path) -> list[Path]:
    try:
        from . import plot
    except ImportError as error:
        print(f"no plots: {error.name} is missing, pip install -r requirements/demo.txt")
        return []
    return plot.draw(records, machine_line, out)


def verdict(records, verdicts, check: bool) -> int:
    """The exit status; print a line on standard error for everything that makes it other than 0."""
    wrong = [r for r in records if r.kind != "peer" and r.status in ("wrong", "unchecked", "raises")]
    if wrong:
        print(f"{len(wrong)} of our own are wrong, unchecked or raise: see above", file=sys.stderr)
    missed = [v for v in verdicts if check and v.binding and v.met is False]
    unknown = [v for v in verdicts if check and v.binding and v.met is None]
    for bar in missed:
        print(f"bar missed: {bar.what}: {bar.found}, limit {bar.limit}", file=sys.stderr)
    if wrong or missed:
        return 1
    for bar in unknown:
        print(f"bar not measured, the machine was busy: {bar.what}: {bar.found}", file=sys.stderr)
    if check and not any(v.binding for v in verdicts):
        print("--check: this run has no binding bar", file=sys.stderr)
        return 2
    return 2 if unknown else 0


def _shown(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


if __name__ == "__main__":
    sys.exit(main())

"""Measures a group: checks every contender, times those that pass in interleaved rounds, measures their peak memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dml_kernels.profiling import interleaved_times

from . import losses as proxy_losses
from . import magnet, ops, pairs, peak
from . import problem as problems
from .busy import Usage, share_of_others
from .case import Case, Contender, Outputs, Step, check, compare, tolerance, truth_of
from .problem import DTYPES, Problem, Size

SHORTEST_ROUND = 0.02  # seconds: a faster step is repeated within its round
SLOW_STEP = 3.0  # seconds
SPARE_MEMORY = 1 << 30
OPS = "ops"
LOSSES = (proxy_losses, magnet, pairs)  # modules: SUITES, and contenders(suite)
SUITES = (*(suite for module in LOSSES for suite in module.SUITES), OPS)
SIZES_OF = {
    OPS: problems.OP_SIZES,
    magnet.BATCH: problems.CLUSTER_SIZES,
    magnet.GIVEN: problems.GIVEN_SIZES,
    **dict.fromkeys(pairs.SUITES, problems.BATCH_SIZES),
}


class Group(NamedTuple):
    """A suite (the name of a loss, or `ops`) on one size and dtype."""

    suite: str
    size: Size
    dtype: str

    def __str__(self) -> str:
        return f"{self.suite} {self.size} {self.dtype}"


@dataclass(frozen=True)
class Options:
    """What to measure, and for how long.

    Attributes:
        suites: names of losses, and `ops`.
        sizes: empty: the sizes of each suite.
        dtypes: names of dtypes.
        only: parts of names of contenders; the floor always runs.
        rounds: how many rounds are timed.
        budget: seconds of timing for one contender of one group; a slow one gets fewer rounds, at least one.
        memory: whose peak memory is measured: losses, all (with the ops) or none.
        threads: 0: PyTorch's own number.
    """

    suites: tuple[str, ...] = SUITES
    sizes: tuple[Size, ...] = ()
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    only: tuple[str, ...] = ()
    rounds: int = 7
    budget: float = 12.0
    memory: str = "losses"
    threads: int = 0

    def groups(self) -> list[Group]:
        return [
            Group(suite, size, dtype)
            for suite in self.suites
            for size in self.sizes or SIZES_OF.get(suite, problems.SIZES)
            for dtype in self.dtypes
        ]

    def wants_memory(self, group: Group) -> bool:
        return self.memory == "all" or (self.memory == "losses" and group.suite != OPS)

    def contenders(self, group: Group) -> list[Contender]:
        found = contenders(group.suite)
        return [c for c in found if c.kind == "floor" or not self.only or any(part in c.name for part in self.only)]


def contenders(suite: str) -> list[Contender]:
    """The contenders of a suite, in the order of the table."""
    if suite == OPS:
        return ops.contenders()
    return next(module for module in LOSSES if suite in module.SUITES).contenders(suite)


@dataclass(frozen=True)
class Record:
    """The results of one contender.

    Attributes:
        variant: the backend or peer, where a case has several contenders.
        status: ok; or wrong, unchecked (there is no truth), raises or skipped, and then it is not timed.
        reason: why, or a note.
        seconds: the seconds of each round.
        to_floor: these, divided by the floor's seconds of the same round.
        errors: (worst value, worst row).
        others: the share of the cores' time that other processes took while the group was timed.
    """

    group: Group
    name: str
    case: str
    variant: str
    kind: str
    status: str = "ok"
    reason: str = ""
    seconds: tuple[float, ...] = ()
    to_floor: tuple[float, ...] = ()
    passes: int = 0
    errors: tuple[float, float] | None = None
    gradient_bytes: int = 0
    peak_bytes: int | None = None
    peak_failure: str = ""
    others: float | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.to_floor) if self.to_floor else None

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        suite, size, dtype = found.pop("group")
        return {
            "suite": suite,
            "size": str(Size(*size)),
            "dtype": dtype,
            **found,
            "median": self.median,
            "ratio": self.ratio,
        }


@dataclass
class Entrant:
    """A contender on its way through a group."""

    contender: Contender
    record: Record
    step: Step | None = None
    estimate: float = 0.0  # seconds of a step

    def drop(self, status: str, reason: str) -> None:
        self.step, self.record = None, replace(self.record, status=status, reason=reason)


@dataclass
class Runner:
    """Measures each group once, when its first record is requested."""

    options: Options
    progress: Callable[[str, float], None] = lambda text, done: None
    records: dict[Group, dict[str, Record]] = field(default_factory=dict)

    def record(self, group: Group, name: str) -> Record:
        if group not in self.records:
            found = measure(group, self.options, self.progress)
            self.records[group] = {record.name: record for record in found}
        return self.records[group][name]

    def all(self) -> Iterable[Record]:
        return (record for group in self.records.values() for record in group.values())

    def work(self) -> int:
        """The total of the work that is reported to `progress`."""
        options = self.options
        return sum((2 + options.wants_memory(g)) * len(options.contenders(g)) for g in options.groups())


def measure(group: Group, options: Options, progress: Callable[[str, float], None]) -> list[Record]:
    if options.threads:
        torch.set_num_threads(options.threads)
    problem = problems.make(group.size, DTYPES[group.dtype])
    entrants = [
        Entrant(
            c,
            Record(
                group,
                c.name,
                c.case.name,
                c.variant,
                c.kind,
                passes=c.passes,
                gradient_bytes=problem.gradient_bytes,
            ),
        )
        for c in options.contenders(group)
    ]
    _check_all(entrants, problem, lambda name: progress(f"{group}: checking {name}", 1))
    alive = [e for e in entrants if e.step is not None]
    timing = lambda share: progress(f"{group}: timing", share * len(entrants))  # noqa: E731
    _time_all(alive, options, timing) if alive else timing(1)
    for entrant in entrants:
        entrant.step = None
    gc.collect()
    if options.wants_memory(group):
        for entrant in entrants:
            progress(f"{group}: memory of {entrant.contender.name}", 1)
            if entrant.record.status == "ok":
                entrant.record = replace(entrant.record, **_peak(entrant.record, options.threads))
    return [e.record for e in entrants]


def _peak(record: Record, threads: int) -> dict[str, Any]:
    group = record.group
    try:
        found = peak.in_child(group.suite, record.name, group.size, group.dtype, threads)
    except (RuntimeError, ValueError) as error:
        return {"peak_failure": str(error).strip().splitlines()[-1][:160]}
    return {"peak_bytes": found}


def _check_all(entrants: list[Entrant], problem: Problem, progress: Callable[[str], None]) -> None:
    """Check all contenders; those of one case follow each other, so that only one truth is in memory at a time."""
    truth: tuple[str, Outputs | str] | None = None
    for entrant in entrants:
        contender = entrant.contender
        progress(contender.name)
        why = contender.case.unfit(problem) or _memory_short(contender, problem)
        if why:
            entrant.drop("skipped", why)
            continue
        if truth is None or truth[0] != contender.case.name:
            truth = None  # freed before the next is made
            truth = contender.case.name, _truth(contender.case, problem)
        if isinstance(truth[1], str):
            entrant.drop("unchecked", truth[1])
            continue
        try:
            _check(entrant, problem, truth[1])
        except Exception as error:
            entrant.drop("raises", _first_line(error))
        gc.collect()


def _truth(case: Case, problem: Problem) -> Outputs | str:
    """Compute the truth, or say why there is none."""
    try:
        return truth_of(case, problem)
    except Exception as error:
        return _first_line(error)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def _check(entrant: Entrant, problem: Problem, truth: Outputs) -> None:
    contender = entrant.contender
    step = contender.make(problem)
    first, got = _clock(step)
    errors = compare(got, truth)
    del got
    entrant.record = replace(entrant.record, errors=errors, reason=contender.note(problem))
    wrong = check(errors, tolerance(contender, problem.dtype))
    if wrong:
        entrant.drop("wrong", f"{wrong}: not timed")
        return
    # A first step may have started threads and filled caches; beyond some seconds that adds little.
    again = contender.slow_first or first < SLOW_STEP
    entrant.step, entrant.estimate = step, _clock(step)[0] if again else first


def _clock(step: Step) -> tuple[float, Outputs]:
    start = time.perf_counter()
    got = step()
    return time.perf_counter() - start, got


def _time_all(entrants: list[Entrant], options: Options, progress: Callable[[float], None]) -> None:
    """Time interleaved rounds; a contender that is too slow for its budget takes part only in the first ones."""
    rounds, repeats = {}, {}
    for entrant in entrants:
        name, seconds = entrant.contender.name, max(entrant.estimate, 1e-7)
        repeats[name] = max(1, int(SHORTEST_ROUND / seconds))
        least = 1 if entrant.contender.kind == "peer" else min(3, options.rounds)
        rounds[name] = max(least, min(options.rounds, int(options.budget / (seconds * repeats[name]))))
    steps = {e.contender.name: _repeated(e.step, repeats[e.contender.name]) for e in entrants}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    before = Usage.now()
    calls, done = sum(rounds.values()), 0
    for stop in sorted(set(rounds.values())):
        still = {name: step for name, step in steps.items() if rounds[name] >= stop}
        part = interleaved_times(still, stop - done, warmup=0, progress=lambda: progress(1 / calls))
        for name, times in part.items():
            seconds[name] += [t / repeats[name] for t in times]
        done = stop
    floor = next((seconds[e.contender.name] for e in entrants if e.contender.kind == "floor"), [])
    others = share_of_others(before, Usage.now())
    for entrant in entrants:
        own = seconds[entrant.contender.name]
        entrant.record = replace(
            entrant.record,
            seconds=tuple(own),
            to_floor=tuple(a / b for a, b in zip(own, floor, strict=False)),
            others=others,
        )


def _repeated(step: Step, times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            step()

    return run


def _memory_short(contender: Contender, problem: Problem) -> str:
    """Say why the memory of the machine is now too small for this contender, or nothing."""
    n, m, _ = problem.size
    dense = contender.dense(problem.size) if callable(contender.dense) else contender.dense
    need = int(dense * n * m * 4) + 3 * problem.gradient_bytes + SPARE_MEMORY
    free = available_memory()
    if free is None or need <= free:
        return ""
    return f"needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def available_memory() -> int | None:
    """How many bytes a new allocation can get; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)

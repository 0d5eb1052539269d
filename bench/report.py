"""The tables, the bars and the JSON of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from dml_kernels.cli import tables

from .bars import Verdict, is_busy
from .harness import OPS, Record

HEADER = ("problem", "contender", "median", "runs", "x floor", "peak / grads MiB", "errors")


def show(records: Sequence[Record]) -> None:
    """Print a table for the losses, a row for each contender, and one for the ops, a row for each op."""
    losses = [r for r in records if r.group.suite != OPS]
    for suite in dict.fromkeys(r.group.suite for r in losses):
        rows = _loss_rows([r for r in losses if r.group.suite == suite])
        tables.show(f"{suite}: forward and backward; medians of interleaved rounds", HEADER, rows)
    if losses:
        print("errors: worst value, worst row of a gradient, against fp64. Peaks include the gradients.")
    ops = [r for r in records if r.group.suite == OPS]
    for group in dict.fromkeys(r.group for r in ops):
        _show_ops(str(group), [r for r in ops if r.group == group])
    for record in records:
        if record.status != "ok":
            print(f"{record.status}: {record.group}: {record.name}: {record.reason}")
        if record.peak_failure:
            print(f"no peak memory: {record.group}: {record.name}: {record.peak_failure}")


def _loss_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    heading: list[str] = []
    last = None
    for record in records:
        if record.group != last:
            rows += [("",) * len(HEADER)] if rows else []
            last = record.group
            heading = [str(last.size), last.dtype]
        rows.append((heading.pop(0) if heading else "", *_cells(record)))
    return rows


def _cells(record: Record) -> tuple[str, ...]:
    ok = record.status == "ok"
    name = f"{record.name}, {record.reason}" if ok and record.reason else record.name
    time = seconds(record.median) if ok else record.status
    count = str(len(record.seconds)) if record.seconds else ""
    memory = f"{mebibytes(record.peak_bytes):>5} / {mebibytes(record.gradient_bytes)}" if ok else ""
    error = "" if record.errors is None else " ".join(f"{e:.0e}" for e in record.errors)
    return name, time, count, ratio(record), memory, error


def _show_ops(title: str, records: Sequence[Record]) -> None:
    """Print the backends side by side; a cell has the time, its ratio to the bare product, and the peak MiB."""
    floor = next(r for r in records if r.kind == "floor")
    variants = [v for v in dict.fromkeys(r.variant for r in records) if v]
    cases: dict[str, dict[str, Record]] = {}
    for record in records:
        if record.kind != "floor":
            cases.setdefault(record.case, {})[record.variant] = record
    rows = [
        (case, str(next(iter(found.values())).passes or ""), *(_ops_cell(found.get(v)) for v in variants))
        for case, found in cases.items()
    ]
    memory = ", peak extra MiB" if any(r.peak_bytes for r in records) else ""
    subtitle = f"{title}: time, times one bare product ({seconds(floor.median)}, {floor.reason}){memory}"
    tables.show(subtitle, ("op", "needs", *variants), rows)


def _ops_cell(record: Record | None) -> str:
    if record is None:
        return ""
    if record.status != "ok":
        return record.status
    times = "" if record.ratio is None else f"{figures(record.ratio)}x"
    return f"{seconds(record.median):>7} {times:>6} {mebibytes(record.peak_bytes):>5}".rstrip()


def ratio(record: Record) -> str:
    return "" if record.ratio is None else f"{record.ratio:.2f}" if record.ratio < 100 else figures(record.ratio)


def mebibytes(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**20:.1f}" if count < 100 * 2**20 else f"{count / 2**20:.0f}"


def seconds(value: float | None) -> str:
    """A time with three significant digits, in a fitting unit."""
    if value is None:
        return ""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= factor * 0.9995:
            return f"{figures(value / factor)} {unit}"
    return f"{value * 1e9:.0f} ns"


def figures(value: float) -> str:
    """A number with three significant digits and no exponent."""
    return f"{value:.2f}" if value < 0.995 else f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def busy_note(records: Iterable[Record]) -> str:
    """A line that says that others used the machine while a group was timed, or nothing."""
    shares = {r.group: r.others for r in records if is_busy(r)}
    if not shares:
        return ""
    low, high = min(shares.values()), max(shares.values())
    span = f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"
    return f"Busy: others took {span} of the cores during {len(shares)} of the groups"


def show_bars(verdicts: Iterable[Verdict]) -> None:
    rows = [(v.what, v.found, v.limit, _word(v)) for v in verdicts]
    if rows:
        tables.show("Bars", ("bar", "found", "limit", ""), rows)


def _word(verdict: Verdict) -> str:
    if verdict.met is None:
        return "machine busy"
    if verdict.binding:
        return "met" if verdict.met else "MISSED"
    return "as expected" if verdict.met else "less than expected"


def save(path: Path, records: Iterable[Record], verdicts: Iterable[Verdict], machine: dict) -> None:
    found = {
        "machine": machine,
        "records": [record.as_dict() for record in records],
        "bars": [verdict.as_dict() for verdict in verdicts],
    }
    path.write_text(json.dumps(found, indent=1) + "\n")

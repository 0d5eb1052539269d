"""The plots of a run: time and memory by contender and size, and the ops in units of the bare product."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from .bars import MEMORY_SPARE, OURS
from .harness import OPS, Record
from .report import mebibytes, seconds

# The colours are those of Okabe and Ito, which people with any colour vision can tell apart; lightness and hatching
# tell the dtype.
COLOURS = {
    "floor": "#999999",
    "ours (cpu)": "#0072B2",
    "ours (torch)": "#56B4E9",
    "torch.compile": "#E69F00",
    "eager": "#D55E00",
    "pytorch-metric-learning": "#CC79A7",
}
OTHERS = ("#009E73", "#F0E442", "#000000")
HATCHES = ("", "////", "....")
INK = "#333333"
TEXT_WIDTH = 0.16  # the width of the text after a bar, as a share of the axis


def draw(records: Sequence[Record], machine: str, out: Path) -> list[Path]:
    """Draw one picture for each loss and one for the ops, where more than the floor was measured; return the paths."""
    saved = []
    for suite in dict.fromkeys(r.group.suite for r in records if r.kind != "floor"):
        own = [r for r in records if r.group.suite == suite]
        path = out / f"{suite}.png"
        (_draw_ops if suite == OPS else _draw_loss)(own, suite, machine, path)
        saved.append(path)
    return saved


def colour(name: str, names: Sequence[str]) -> str:
    unknown = [n for n in names if n not in COLOURS]
    return COLOURS.get(name) or OTHERS[unknown.index(name) % len(OTHERS)]


def _draw_loss(records: Sequence[Record], suite: str, machine: str, path: Path) -> None:
    sizes, names, dtypes = (
        list(dict.fromkeys(v)) for v in zip(*((r.group.size, r.name, r.group.dtype) for r in records))
    )
    with_memory = any(r.peak_bytes for r in records)
    figure, axes = plt.subplots(
        1 + with_memory, len(sizes), squeeze=False, sharey=True, layout="constrained",
        figsize=(2.2 + 3.6 * len(sizes), 0.4 + (0.5 + 0.21 * len(dtypes) * len(names)) * (1 + with_memory)),
    )  # fmt: skip
    for size, column in zip(sizes, axes.T):
        found = {(r.name, r.group.dtype): r for r in records if r.group.size == size}
        column[0].set_title(f"{size.n:,} x {size.m:,} x {size.d}", fontsize=11)
        times = {key: Bar(r.median * 1e3, seconds(r.median)) for key, r in found.items() if r.median}
        _bars(column[0], times, names, dtypes, "forward and backward, ms")
        _statuses(column[0], found, names, dtypes)
        if with_memory:
            peaks = {key: _memory_bar(r) for key, r in found.items() if r.peak_bytes}
            _bars(column[1], peaks, names, dtypes, "peak extra memory, MiB")
    for row in axes:
        row[0].set_yticks(range(len(names)), names)
        row[0].set_ylim(len(names) - 0.5, -0.5)
    handles: list[Patch | Line2D] = [
        Patch(facecolor="#777777", alpha=_alpha(i), hatch=HATCHES[i], edgecolor="white", lw=0, label=dtype)
        for i, dtype in enumerate(dtypes)
    ]
    if with_memory:
        handles.append(Line2D([], [], color=INK, lw=1.5, label="the gradients alone"))
        handles.append(Line2D([], [], color=INK, lw=1.5, ls=":", label="our bar: gradients + 64 MiB"))
    _finish(figure, f"{suite}, embeddings x proxies x dimensions", handles, machine, path)


def _alpha(index: int) -> float:
    return (1.0, 0.6, 0.35)[index % 3]


def _offsets(count: int) -> tuple[list[float], float]:
    """The centres of `count` bars around 0, and their thickness."""
    thick = 0.8 / count
    return [(i - (count - 1) / 2) * thick for i in range(count)], thick * 0.92


class Bar(NamedTuple):
    """A bar, the text after it, and two marks: the size of the gradients, and the limit."""

    value: float
    text: str
    mark: float | None = None
    limit: float | None = None

    def end(self, axis: Axes | None = None) -> float:
        """Where the text goes: after the bar, or after the mark of the limit where that is in the way."""
        if self.limit is None or self.limit <= self.value:
            return self.value
        if axis is not None:
            low, high = axis.get_xlim()
            if math.log(self.limit / self.value) > TEXT_WIDTH * math.log(high / low):
                return self.value
        return self.limit


def _memory_bar(record: Record) -> Bar:
    limit = (record.gradient_bytes + MEMORY_SPARE) / 2**20 if record.name == OURS else None
    peak = record.peak_bytes or 0
    return Bar(peak / 2**20, mebibytes(peak), record.gradient_bytes / 2**20, limit)


def _bars(ax: Axes, bars: dict[tuple[str, str], Bar], names, dtypes, label: str) -> None:
    offsets, thick = _offsets(len(dtypes))
    low = min((min(b.value, b.mark or b.value) for b in bars.values()), default=1)
    high = max((b.end() for b in bars.values()), default=10)
    ax.set_xscale("log")
    ax.set_xlim(low / 2.5, high * (2.5 * high / low) ** 0.3)  # room for the text on the right
    for (name, dtype), bar in bars.items():
        i = dtypes.index(dtype)
        at = names.index(name) + offsets[i]
        style = {"color": colour(name, names), "alpha": _alpha(i), "hatch": HATCHES[i], "edgecolor": "white"}
        ax.barh(at, bar.value, thick, lw=0, **style)
        for mark, line in ((bar.mark, "-"), (bar.limit, ":")):
            if mark:
                ax.vlines(mark, at - thick / 2, at + thick / 2, color=INK, lw=1.5, ls=line)
        place = {"textcoords": "offset points", "va": "center"}
        ax.annotate(bar.text, (bar.end(ax), at), (4, 0), fontsize=8, color=INK, **place)
    ax.set_xlabel(label)
    _tidy(ax)


def _statuses(ax: Axes, found, names, dtypes) -> None:
    """Write why a bar is missing."""
    offsets, _ = _offsets(len(dtypes))
    for (name, dtype), record in found.items():
        if record.status != "ok":
            at = ax.get_xlim()[0], names.index(name) + offsets[dtypes.index(dtype)]
            style = {"va": "center", "fontsize": 8, "color": INK, "style": "italic"}
            ax.annotate(f"{dtype} {record.status}", at, (4, 0), textcoords="offset points", **style)


def _draw_ops(records: Sequence[Record], suite: str, machine: str, path: Path) -> None:
    groups = list(dict.fromkeys(r.group for r in records))
    shown = [r for r in records if r.kind != "floor"]
    cases, variants = (list(dict.fromkeys(v)) for v in zip(*((r.case, r.variant) for r in shown)))
    palette = dict(zip(variants, ("#0072B2", "#E69F00", "#CC79A7", *OTHERS)))
    figure, axes = plt.subplots(
        1, len(groups), figsize=(3 + 3.2 * len(groups), 0.9 + 0.42 * len(cases)), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    offsets, thick = _offsets(len(variants))
    for ax, group in zip(axes[0], groups):
        own = {(r.case, r.variant): r for r in shown if r.group == group and r.ratio}
        for (case, variant), record in own.items():
            at = cases.index(case) + offsets[variants.index(variant)]
            ax.barh(at, record.ratio, thick, color=palette[variant])
        for y, case in enumerate(cases):
            passes = next((r.passes for r in shown if r.case == case and r.passes), 0)
            if passes:
                ax.vlines(passes, y - 0.42, y + 0.42, color=INK, lw=1.5)
        ax.set_xscale("log")
        ax.set_title(f"{group.size} {group.dtype}", fontsize=11)
        ax.set_xlabel("time over one bare product, 2NMD")
        _tidy(ax)
    axes[0][0].set_yticks(range(len(cases)), cases)
    axes[0][0].set_ylim(len(cases) - 0.4, -0.6)
    handles = [Patch(color=c, label=v) for v, c in palette.items()]
    handles.append(Line2D([], [], color=INK, lw=1.5, label="products it needs"))
    _finish(figure, "The ops alone (lse: masked_logsumexp)", handles, machine, path)


def _tidy(ax: Axes) -> None:
    low, high = ax.get_xlim()
    decades = math.log10(high / low)
    ax.xaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2.5 else (1, 3) if decades > 1.2 else (1, 2, 5)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, position: f"{value:,g}")
    ax.grid(axis="x", which="major", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _finish(figure, title: str, handles, machine: str, path: Path) -> None:
    """Add title and legend above and the machine below, each in its own strip (lengths in inches), and save."""
    width, height = figure.get_size_inches()
    columns = len(handles) if width > 8 else 2
    note = textwrap.wrap(machine, int(width * 17))
    above, below = 0.4 + 0.25 * -(-len(handles) // columns), 0.1 + 0.13 * len(note)
    height += above + below
    figure.set_size_inches(width, height)
    figure.get_layout_engine().set(rect=(0, below / height, 1, 1 - (above + below) / height))
    figure.text(0.12 / width, 1 - 0.1 / height, title, va="top", fontsize=13, fontweight="bold")
    place = {"loc": "upper left", "bbox_to_anchor": (0, 1 - 0.35 / height)}
    figure.legend(handles=handles, ncols=columns, frameon=False, **place)
    figure.text(0.12 / width, 0.08 / height, "\n".join(note), fontsize=7, color="#666666")
    figure.savefig(path, dpi=130)
    plt.close(figure)

"""The plots of a run: time and memory by contender and size, and the ops in units of the bare product."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .bars import MEMORY_SPARE, OURS
from .harness import OPS, Record
from .report import mebibytes, seconds

# Okabe and Ito's colours, told apart by every kind of colour vision; the dtype is told by lightness and
# hatching.
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


def draw(records: Sequence[Record], machine: str, out: Path) -> list[Path]:
    """One picture for each loss and one for the ops; the paths written."""
    saved = []
    for suite in dict.fromkeys(r.group.suite for r in records):
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
        column[0].set_xlabel("forward and backward, ms")
        _bars(
            column[0],
            found,
            names,
            dtypes,
            lambda r: r.median and r.median * 1e3,
            lambda r: seconds(r.median),
        )
        _statuses(column[0], found, names, dtypes)
        if with_memory:
            column[1].set_xlabel("peak extra memory, MiB")
            _bars(column[1], found, names, dtypes, lambda r: r.peak_bytes and r.peak_bytes / 2**20,
                  lambda r: mebibytes(r.peak_bytes))  # fmt: skip
            _gradient_marks(column[1], found, names, dtypes)
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
    """Centres of `count` bars around 0, and their thickness."""
    thick = 0.8 / count
    return [(i - (count - 1) / 2) * thick for i in range(count)], thick * 0.92


def _bars(ax: Axes, found, names, dtypes, value, text) -> None:
    offsets, thick = _offsets(len(dtypes))
    values = [v for r in found.values() if (v := value(r))]
    low, high = (min(values), max(values)) if values else (1, 10)
    ax.set_xscale("log")
    ax.set_xlim(low / 2.5, high * (2.5 * high / low) ** 0.25)  # room for the figures on the right
    for (name, dtype), record in found.items():
        if v := value(record):
            i = dtypes.index(dtype)
            at = names.index(name) + offsets[i]
            ax.barh(
                at,
                v,
                thick,
                color=colour(name, names),
                alpha=_alpha(i),
                hatch=HATCHES[i],
                edgecolor="white",
                lw=0,
            )
            ax.annotate(
                text(record), (v, at), (3, 0), textcoords="offset points", va="center", fontsize=8, color=INK
            )
    _tidy(ax)


def _statuses(ax: Axes, found, names, dtypes) -> None:
    """Why a bar is not there."""
    offsets, _ = _offsets(len(dtypes))
    for (name, dtype), record in found.items():
        if record.status != "ok":
            at = ax.get_xlim()[0], names.index(name) + offsets[dtypes.index(dtype)]
            style = {"va": "center", "fontsize": 8, "color": INK, "style": "italic"}
            ax.annotate(f"{dtype} {record.status}", at, (4, 0), textcoords="offset points", **style)


def _gradient_marks(ax: Axes, found, names, dtypes) -> None:
    offsets, thick = _offsets(len(dtypes))
    for y, name in enumerate(names):
        for i, dtype in enumerate(dtypes):
            record = found.get((name, dtype))
            if record is None or not record.peak_bytes:
                continue
            low, high = y + offsets[i] - thick / 2, y + offsets[i] + thick / 2
            ax.vlines(record.gradient_bytes / 2**20, low, high, color=INK, lw=1.5)
            if name == OURS:
                ax.vlines(
                    (record.gradient_bytes + MEMORY_SPARE) / 2**20, low, high, color=INK, lw=1.5, ls=":"
                )


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
    ax.xaxis.set_major_formatter(lambda value, position: f"{value:,g}")
    ax.grid(axis="x", which="major", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _finish(figure, title: str, handles, machine: str, path: Path) -> None:
    """Title and legend above, the machine below, each in its own strip; lengths in inches."""
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

"""The plots of the demo, as PNG: loss curves, contact sheet of neighbours, 2-D map of unseen classes, bars of cost.

``cluster_plot`` adds the sheet of clusters.

The colours are those of Okabe and Ito, which people with any colour vision can tell apart; the frames of right and
wrong neighbours also differ in their line. All text is ASCII, so that no font with Han characters is needed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from .checkpoint import atomic
from .data import ImageSet
from .step_cost import StepCost

__all__ = ["class_map", "contact_sheet", "cost_bars", "draw_glyph", "loss_curves", "save"]

BLUE, YELLOW, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8A8A8A"
ROW_PITCH = 1.24  # from row to row of the contact sheet, whose drawings have height 0.84
MAP_INKS = (BLUE, RED, GREEN, "black", "#CC79A7", "#8C6D00", "#5E3C99", "#56B4E9")
MAP_GLYPH = 0.028  # the side of a drawing on the map, whose side is 1 before the drawings are pushed apart
# The frames of drawings.
PLAIN = {"edgecolor": "black", "linewidth": 0.8}
RIGHT = {"edgecolor": GREEN, "linewidth": 2.5}
WRONG = {"edgecolor": RED, "linewidth": 2.5, "linestyle": "--"}
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 120,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.15,
}


def loss_curves(path: Path, curves: Sequence[tuple[str, Sequence[float], int]]) -> None:
    """Plot the loss of every step and its mean over each epoch.

    Args:
        path: where the PNG goes.
        curves: (name, losses of the steps, steps of an epoch) for each panel.
    """
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(curves), figsize=(0.5 + 6 * len(curves), 4.2), squeeze=False)
        for axes, (name, step_losses, steps_per_epoch) in zip(panels[0], curves):
            axes.plot(np.arange(1, len(step_losses) + 1), step_losses, color=BLUE, linewidth=1, label="each step")
            means = np.asarray(step_losses).reshape(-1, steps_per_epoch).mean(axis=1)
            starts = np.arange(len(means)) * steps_per_epoch
            axes.hlines(means, starts + 1, starts + steps_per_epoch, color=RED, linewidth=2, label="mean of an epoch")
            for start, mean in zip(starts, means):
                end = (start + steps_per_epoch, mean)
                halo = [withStroke(linewidth=3, foreground="white")]
                axes.annotate(
                    f"{mean:.2f}", end, (0, 5), textcoords="offset points", ha="right", color=RED, path_effects=halo
                )
            axes.set(title=f"{name} in training", xlabel="step", ylabel="loss (nats)")
            axes.set_xlim(0, len(step_losses) * 1.01)
            axes.legend(frameon=False)
        figure.tight_layout()
        save(figure, path)


def contact_sheet(
    path: Path,
    images: ImageSet,
    faces: Sequence[str],
    neighbours: npt.NDArray[np.int64],
    trained_with: str,
    *,
    random_rows: int = 5,
    hard_rows: int = 6,
    seed: int = 0,
) -> None:
    """Plot queries, each with its nearest neighbours: random queries first, then some whose nearest one is wrong.

    The hard queries come from the faces that fail most, one of each.

    Args:
        path: where the PNG goes.
        images: the unseen drawings.
        faces: the names of the faces.
        neighbours: (n, k) indices into images, nearest first.
        trained_with: the name of the loss, for the title.
        random_rows: how many random queries are shown.
        hard_rows: how many hard queries are shown.
        seed: of the choice of queries.
    """
    right = images.labels[neighbours] == images.labels[:, None]
    generator = np.random.default_rng(seed)
    chosen = list(generator.choice(len(right), min(random_rows, len(right)), replace=False))
    hard = _hard_queries(right[:, 0], images.faces, hard_rows, generator)
    rows = chosen + hard
    across, down = neighbours.shape[1] + 1, len(rows)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(1.1 * across, 1.35 * down))
        for row, query in enumerate(rows):
            y = ROW_PITCH * row
            draw_glyph(axes, (0.0, y), images.images[query], faces[images.faces[query]])
            for place, neighbour in enumerate(neighbours[query]):
                frame = RIGHT if right[query, place] else WRONG
                face = faces[images.faces[neighbour]]
                draw_glyph(axes, (place + 1.1, y), images.images[neighbour], face, frame)
        for start, count, text in (
            (0, len(chosen), "random queries"),
            (len(chosen), len(hard), "failures, one a face, hardest faces first"),
        ):
            if count:
                middle = ROW_PITCH * (start + (count - 1) / 2)
                axes.text(-0.72, middle, text, rotation=90, ha="center", va="center", fontsize=10)
        axes.text(0.0, -0.55, "query", ha="center", fontsize=10)
        axes.text(0.65, -0.55, "nearest neighbours, the nearest first", ha="left", fontsize=10)
        axes.set(xlim=(-0.85, across - 0.35), ylim=(ROW_PITCH * (down - 1) + 0.75, -0.75))
        axes.axis("off")
        axes.set_title(
            f"Unseen characters, {trained_with} (green: same character; dashed orange: another)", fontsize=12
        )
        save(figure, path)


def _hard_queries(
    hit: npt.NDArray[np.bool_], faces: npt.NDArray[np.int64], count: int, generator: np.random.Generator
) -> list[int]:
    """Choose missed queries: one of each face in turn, faces with the most misses first."""
    missed = np.flatnonzero(~hit)
    generator.shuffle(missed)
    by_face = {face: list(missed[faces[missed] == face]) for face in np.unique(faces[missed])}
    order = sorted(by_face, key=lambda face: -len(by_face[face]))
    picked: list[int] = []
    while len(picked) < min(count, len(missed)):
        picked += [by_face[face].pop() for face in order if by_face[face]]
    return picked[:count]


def draw_glyph(
    axes: Axes,
    centre: tuple[float, float],
    image: npt.NDArray[np.uint8],
    face: str,
    frame: Mapping[str, Any] = PLAIN,
) -> None:
    """Draw an image in a frame (arguments of a line), with the name of its face below."""
    (x, y), half = centre, 0.42
    axes.imshow(255 - image, cmap="gray", vmin=0, vmax=255, extent=(x - half, x + half, y + half, y - half))
    axes.add_patch(Rectangle((x - half, y - half), 2 * half, 2 * half, fill=False, **frame))
    name = "\n".join(textwrap.wrap(face, 12)[:2])
    axes.text(x, y + half + 0.03, name, ha="center", va="top", fontsize=7.5, linespacing=1.1)


def class_map(
    path: Path,
    images: ImageSet,
    embeddings: npt.NDArray[np.float32],
    trained_with: str,
    *,
    classes: int = 20,
    seed: int = 0,
) -> None:
    """Plot a t-SNE map of some unseen classes (cosine distance): each drawing at the place of its embedding.

    The drawings of a class have one colour, which shows drawings that stray. Drawings are pushed apart until none
    covers another, so their places are exact to about the size of the patch of a class.

    Args:
        path: where the PNG goes.
        images: the unseen drawings.
        embeddings: (n, D), of the images.
        trained_with: the name of the loss, for the title.
        classes: how many classes are shown.
        seed: of the choice of classes and of t-SNE.
    """
    from sklearn.manifold import TSNE

    everyone = np.unique(images.labels)
    generator = np.random.default_rng(seed)
    shown = np.sort(generator.choice(everyone, min(classes, len(everyone)), replace=False))
    rows = np.flatnonzero(np.isin(images.labels, shown))
    unit = embeddings[rows] / np.linalg.norm(embeddings[rows], axis=1, keepdims=True).clip(1e-12)
    perplexity = min(12.0, (len(rows) - 1) / 3)
    # For some hundreds of points the exact method is several times less work than Barnes-Hut, and starts no threads.
    tsne = TSNE(perplexity=perplexity, metric="cosine", init="random", method="exact", max_iter=600, random_state=seed)
    places = tsne.fit_transform(unit)
    places = (places - places.min(axis=0)) / np.ptp(places, axis=0).clip(1e-9)
    owner = np.searchsorted(shown, images.labels[rows])
    ink = _part_neighbours(np.stack([places[owner == i].mean(axis=0) for i in range(len(shown))]))[owner]
    canvas = _paste(images.images[rows], _spread(places, MAP_GLYPH), ink)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9.5, 9.5))
        axes.imshow(canvas, interpolation="lanczos")
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{len(shown)} characters never seen in training, as {trained_with} places them (t-SNE)")
        axes.set_xlabel("neighbouring characters differ in colour; overlapping drawings are pushed apart")
        for spine in axes.spines.values():
            spine.set_visible(False)
        save(figure, path)


def _part_neighbours(centres: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """Choose an ink for each class (its centre, (n, 2)) such that classes of one ink lie far apart."""
    ink = np.full(len(centres), -1)
    for i, centre in enumerate(centres):
        distance = np.linalg.norm(centres - centre, axis=1)
        nearest = [distance[ink == choice].min(initial=np.inf) for choice in range(len(MAP_INKS))]
        ink[i] = int(np.argmax(nearest))
    return ink


def _paste(
    images: npt.NDArray[np.uint8], places: npt.NDArray[np.floating], ink: npt.NDArray[np.int64]
) -> npt.NDArray[np.floating]:
    """Paste all drawings, at their places and in their inks, into one RGB picture."""
    side = images.shape[1]
    corners = np.rint((places - places.min(axis=0)) * side / MAP_GLYPH).astype(int)
    width, height = corners.max(axis=0) + side
    canvas = np.ones((height, width, 3))
    for image, (x, y), choice in zip(images, corners, ink):
        paper = 1 - image[..., None] / 255.0
        canvas[y : y + side, x : x + side] *= paper + (1 - paper) * np.asarray(to_rgb(MAP_INKS[choice]))
    return canvas


def _spread(places: npt.NDArray[np.floating], size: float, rounds: int = 300) -> npt.NDArray[np.floating]:
    """Push squares of ``size`` at ``places`` (n, 2) apart, along their lesser overlap, for some rounds at most."""
    places = places + np.random.default_rng(0).normal(0, 1e-4 * size, places.shape)  # separates equal places
    for _ in range(rounds):
        apart = places[:, None] - places[None]
        overlap = size - np.abs(apart)
        touching = np.asarray((overlap > 0.05 * size).all(axis=2))
        np.fill_diagonal(touching, False)
        if not touching.any():
            break
        along = np.arange(2) == overlap.argmin(axis=2)[..., None]
        push = np.where(touching[..., None] & along, np.sign(apart) * overlap, 0.0)
        places = places + 0.25 * push.sum(axis=1)
    return places


def cost_bars(path: Path, cost: StepCost) -> None:
    """Plot the time and the peak extra memory of one step, fused and in plain PyTorch."""
    names = {"fused": "fused", "plain": "plain PyTorch"}
    time = [cost.variants[name].seconds * 1e3 for name in names]
    memory = [cost.variants[name].peak_bytes / 1e6 for name in names]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 4.2))
        spread = [
            [time[i] - min(cost.variants[name].samples) * 1e3 for i, name in enumerate(names)],
            [max(cost.variants[name].samples) * 1e3 - time[i] for i, name in enumerate(names)],
        ]
        _bars(left, list(names.values()), time, "ms", "Time of a step", spread)
        _bars(right, list(names.values()), memory, "MB", "Peak extra memory of a step")
        gradients = cost.gradient_bytes / 1e6
        line = right.axhline(gradients, color="black", linewidth=1.2, linestyle=":")
        text = f"gradients\nalone: {gradients:,.0f} MB"
        right.legend([line], [text], frameon=False, fontsize=10, loc="center left", handlelength=1.5)
        figure.suptitle(
            f"Proxy-NCA, forward and backward: {cost.batch:,} embeddings x {cost.classes:,} classes "
            f"x {cost.dim} dimensions, {cost.dtype}",
            x=0.02, ha="left", fontsize=11,
        )  # fmt: skip
        figure.tight_layout()
        save(figure, path)


def _bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    unit: str,
    title: str,
    spread: Sequence[Sequence[float]] | None = None,
) -> None:
    bars = axes.bar(names, values, color=[BLUE, YELLOW], width=0.6, yerr=spread, capsize=4)
    labels = [f"{value:,.0f} {unit}" for value in values]
    if values[1] > values[0]:
        labels[0] += f"\n{values[1] / values[0]:.1f}x less"
    axes.bar_label(bars, labels, padding=4, fontweight="bold")
    axes.set(ylabel=unit, title=title)
    axes.set_xlim(-0.55, 1.55)
    axes.margins(y=0.18)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, and close it."""
    try:
        with atomic(path) as file:
            figure.savefig(file, format="png")
    finally:
        plt.close(figure)

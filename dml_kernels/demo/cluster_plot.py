"""The sheet of clusters, which shows how Magnet divides the drawings of a few characters among clusters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.patches import FancyBboxPatch

from .data import ImageSet
from .plots import BLUE, GREEN, GREY, RED, STYLE, YELLOW, draw_glyph, save

__all__ = ["cluster_sheet"]

INKS = (BLUE, RED, GREEN, YELLOW, GREY)
ROW_PITCH = 1.62  # a drawing of height 0.84, two lines for the name of its face, a gap
GROUP_GAP = 0.3  # between the clusters of a row, in widths of a drawing
INCHES = 0.9  # the width of a drawing with its margin: room for twelve letters below it
FRAME = {"edgecolor": "black", "linewidth": 0.6}


def cluster_sheet(
    path: Path,
    images: ImageSet,
    faces: Sequence[str],
    clusters: npt.NDArray[np.int64],
    *,
    characters: int = 6,
    seed: int = 0,
) -> None:
    """Plot a row for each of some characters: its drawings, the largest cluster first.

    The characters are drawn at random among those that are divided most evenly (``_divided_characters``), because a
    cluster of one odd drawing and a cluster of all others show little.

    Args:
        path: where the PNG goes.
        images: the training drawings.
        faces: the names of the faces.
        clusters: (n,) the cluster of each of the images.
        characters: how many characters are shown.
        seed: of the choice of characters.
    """
    shown, least = _divided_characters(images.labels, clusters, characters, np.random.default_rng(seed))
    rows = [_groups(np.flatnonzero(images.labels == label), clusters) for label in shown]
    wide = max(sum(map(len, groups)) + GROUP_GAP * (len(groups) - 1) for groups in rows)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(INCHES * wide, INCHES * ROW_PITCH * len(rows)))
        axes = figure.add_axes((0, 0, 1, 1))
        for row, groups in enumerate(rows):
            x, y = 0.0, ROW_PITCH * row
            for ink, members in zip(_inks(len(groups)), groups):
                axes.add_patch(_panel(x - 0.5, y - 0.52, len(members), facecolor=ink, alpha=0.16, linewidth=0))
                axes.add_patch(_panel(x - 0.5, y - 0.52, len(members), fill=False, edgecolor=ink, linewidth=1.6))
                for place, member in enumerate(members):
                    draw_glyph(axes, (x + place, y), images.images[member], faces[images.faces[member]], FRAME)
                x += len(members) + GROUP_GAP
        axes.set(xlim=(-0.65, wide - 0.35), ylim=(ROW_PITCH * (len(rows) - 1) + 1.05, -0.7))
        axes.axis("off")
        axes.set_title(
            f"Clusters within {len(rows)} characters after training with Magnet: a row a character, a frame a cluster\n"
            f"(characters drawn at random among those with {least} or more drawings in each cluster)",
            fontsize=12,
        )
        save(figure, path)


def _panel(left: float, top: float, width: float, **look: Any) -> FancyBboxPatch:
    """A box with round corners, to go behind the drawings of a cluster."""
    style = f"round,pad={GROUP_GAP / 6},rounding_size=0.1"
    return FancyBboxPatch((left, top), width, 1.36, boxstyle=style, zorder=-1, **look)


def _inks(count: int) -> list[str]:
    return [INKS[place % len(INKS)] for place in range(count)]


def _groups(members: npt.NDArray[np.int64], clusters: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """The members of a class by cluster, the largest first."""
    groups = [members[clusters[members] == cluster] for cluster in np.unique(clusters[members])]
    return sorted(groups, key=lambda group: -len(group))


def _divided_characters(
    labels: npt.NDArray[np.int64],
    clusters: npt.NDArray[np.int64],
    count: int,
    generator: np.random.Generator,
) -> tuple[npt.NDArray[np.int64], int]:
    """Draw ``count`` classes among those whose smallest cluster is large; return them and the bound on its size.

    A class of fewer clusters than others counts as one with an empty cluster. The bound is the largest that ``count``
    classes meet, but at most 3. The classes are in ascending order.
    """
    everyone = np.unique(labels)
    sizes = [np.unique(clusters[labels == label], return_counts=True)[1] for label in everyone]
    most = max(map(len, sizes))
    smallest = np.array([size.min() if len(size) == most else 0 for size in sizes])
    count = min(count, len(everyone))
    least = min(3, int(np.sort(smallest)[-count]))
    return np.sort(generator.choice(everyone[smallest >= least], count, replace=False)), least

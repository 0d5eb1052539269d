"""The closing tables of the demo, and the content of metrics.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .. import __version__, profiling
from .judging import Judged, JudgedSeen
from .step_cost import StepCost
from .trainer import Trainer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Findings", "metrics", "print_tables"]


@dataclass(frozen=True)
class Findings:
    """All results of a run.

    Attributes:
        faces: the names of the faces.
        trainers: a trainer for each loss.
        unseen: results on unseen characters: of raw pixels first, then of each trainer.
        seen: results on held-out drawings of seen characters, of each trainer.
        cost: the cost of a step; None where it was not measured.
        seconds: part of the run -> seconds.
    """

    faces: Sequence[str]
    trainers: Sequence[Trainer]
    unseen: Sequence[Judged]
    seen: Sequence[JudgedSeen]
    cost: StepCost | None
    seconds: dict[str, float]


def metrics(findings: Findings) -> dict[str, Any]:
    """The content of metrics.json. Fractions in [0, 1], seconds, bytes."""
    return {
        "dml_kernels": __version__,
        "machine": profiling.machine(),
        "training": {trainer.recipe.title: _training(trainer) for trainer in findings.trainers},
        "unseen": {
            one.name: {
                "recall": {str(k): value for k, value in one.result.recall.items()},
                "map_at_r": one.result.map_at_r,
                "r_precision": one.result.r_precision,
                "queries": one.result.queries,
                "skipped": one.result.skipped,
                "recall_at_1_by_face": dict(zip(findings.faces, one.face_recall)),
                "seconds": one.seconds,
            }
            for one in findings.unseen
        },
        "seen_held_out": {one.name: _without(asdict(one), "name") for one in findings.seen},
        "step_cost": asdict(findings.cost) if findings.cost else None,
        "seconds_by_part": findings.seconds,
    }


def _training(trainer: Trainer) -> dict[str, Any]:
    last = trainer.step_losses[-trainer.steps_per_epoch :]
    return {
        "recipe": asdict(trainer.recipe),
        "seconds": trainer.seconds,
        "refresh_seconds": trainer.refresh_seconds,
        "refresh_share": _refresh_share(trainer),
        "steps": len(trainer.step_losses),
        "first_loss": trainer.step_losses[0] if trainer.step_losses else None,
        "last_epoch_mean_loss": sum(last) / len(last) if last else None,
    }


def _refresh_share(trainer: Trainer) -> float:
    return trainer.refresh_seconds / trainer.seconds if trainer.seconds else 0.0


def _without(content: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key}


def print_tables(console: Console, findings: Findings) -> None:
    """Print retrieval, classification, Recall@1 by face, the cost of the loss, and where the time went."""
    _print_retrieval(console, findings.unseen)
    _print_seen(console, findings.seen)
    _print_faces(console, findings.faces, findings.unseen)
    if findings.cost:
        _print_cost(console, findings.cost)
    for trainer in findings.trainers:
        if trainer.refresh_seconds:
            console.print(
                f"{trainer.recipe.title}: refreshing the clusters took {trainer.refresh_seconds:.1f} of "
                f"{trainer.seconds:.1f} s of training, {_refresh_share(trainer):.0%}."
            )
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in findings.seconds.items())
    console.print(f"Seconds: {parts}")


def _print_retrieval(console: Console, unseen: Sequence[Judged]) -> None:
    queries = unseen[0].result.queries
    depths = list(unseen[0].result.recall)
    _print_table(
        console,
        f"Retrieval among {queries:,} drawings of characters never seen in training",
        ["", *(f"Recall@{k}" for k in depths), "MAP@R", "seconds"],
        [
            [
                one.name,
                *(f"{one.result.recall[k]:.3f}" for k in depths),
                f"{one.result.map_at_r:.3f}",
                f"{one.seconds:.1f}",
            ]
            for one in unseen
        ],
    )


def _print_seen(console: Console, seen: Sequence[JudgedSeen]) -> None:
    first = seen[0]
    _print_table(
        console,
        f"Naming the character of {first.drawings:,} held-out drawings, by {first.references:,} training drawings",
        ["", "kNN error (nearest drawing)", "kNC error (soft nearest clusters)", "clusters", "seconds"],
        [
            [
                one.name,
                f"{one.knn_error:.3f}",
                "-" if one.knc_error is None else f"{one.knc_error:.3f}",
                "-" if one.clusters is None else f"{one.clusters:,}",
                f"{one.seconds:.1f}",
            ]
            for one in seen
        ],
    )


def _print_faces(console: Console, faces: Sequence[str], unseen: Sequence[Judged]) -> None:
    last = unseen[-1]
    order = sorted(range(len(faces)), key=lambda face: last.face_recall[face])
    names = [one.name.split(",")[0] for one in unseen]
    marks = "#." if console.options.ascii_only else "█·"
    _print_table(
        console,
        "Recall@1 by the face of the query, hardest first",
        ["face", *names, f"({names[-1]})"],
        [
            [faces[face], *(f"{one.face_recall[face]:.3f}" for one in unseen), _bar(last.face_recall[face], *marks)]
            for face in order
        ],
    )


def _print_cost(console: Console, cost: StepCost) -> None:
    fused, plain = cost.variants["fused"], cost.variants["plain"]
    _print_table(
        console,
        f"One step of the loss (forward and backward): {cost.batch:,} embeddings, {cost.classes:,} classes, "
        f"{cost.dim} dimensions, {cost.dtype}",
        ["", "ms (median)", "peak extra MB", "of which gradients MB"],
        [
            [label, f"{v.seconds * 1e3:,.0f}", f"{v.peak_bytes / 1e6:,.0f}", f"{cost.gradient_bytes / 1e6:,.0f}"]
            for label, v in (("fused Proxy-NCA", fused), ("plain PyTorch", plain))
        ]
        + [
            [
                "plain / fused",
                f"{plain.seconds / fused.seconds:.1f}x",
                f"{plain.peak_bytes / fused.peak_bytes:.1f}x",
                "",
            ]
        ],
    )
    console.print(
        f"Same numbers first: the losses differ by {cost.loss_error:.1e} (relative), the gradients by "
        f"{cost.gradient_error:.1e} of the largest entry; allowed {cost.loss_tolerance:.0e} and "
        f"{cost.gradient_tolerance:.0e}.",
        highlight=False,
    )


def _bar(fraction: float, full: str, empty: str, width: int = 20) -> str:
    filled = int(fraction * width)  # rounded down: the bar is full only where every query is right
    return full * filled + empty * (width - filled)


def _print_table(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(f"\n[bold]{title}[/bold]")  # rich folds the title of a table to its width
    table, least = Table(), 1
    for place, name in enumerate(header):
        # Headers and names may be broken between words; a number is never cut, however narrow the terminal.
        word = max(len(word) for cell in (name, *(row[place] for row in rows)) for word in (cell.split() or [""]))
        table.add_column(name, justify="left" if place == 0 else "right", min_width=word)
        least += word + 3
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table, width=max(console.width, least), crop=False)

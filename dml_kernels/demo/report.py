"""What the demo says at the end: the judgement of a representation, closing tables, and metrics.json."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import __version__, evaluation, profiling
from .step_cost import StepCost
from .trainer import Trainer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Judged", "judge", "metrics", "print_tables"]

NEIGHBOURS = 8
DEPTHS = (1, 10)


@dataclass(frozen=True)
class Judged:
    """One representation of the unseen drawings, judged: metrics, each query's nearest, seconds for it
    all.
    """

    name: str
    result: evaluation.RetrievalResult
    neighbours: Tensor  # (n, NEIGHBOURS) int64, nearest first
    face_recall: list[float]  # Recall@1 of the queries drawn by each face, against drawings by all faces
    seconds: float


def judge(
    name: str,
    make: Callable[[], Tensor],
    labels: Tensor,
    faces: Tensor,
    progress: Callable[[int], object] | None = None,
) -> Judged:
    """Evaluate the embeddings that make() returns, its time included."""
    start = time.perf_counter()
    embeddings = make()
    depths = tuple(k for k in DEPTHS if k < len(labels))
    result = evaluation.evaluate(embeddings, labels, depths, progress=progress)
    _, neighbours = evaluation.nearest(embeddings, min(NEIGHBOURS, len(labels) - 1))
    hit = (labels[neighbours[:, 0]] == labels).double()
    face_recall = [hit[faces == face].mean().item() for face in range(int(faces.max()) + 1)]
    return Judged(name, result, neighbours, face_recall, time.perf_counter() - start)


def metrics(
    trainer: Trainer,
    faces: Sequence[str],
    judged: Sequence[Judged],
    cost: StepCost | None,
    parts: dict[str, float],
) -> dict[str, Any]:
    """The content of metrics.json. Fractions in [0, 1], seconds, bytes."""
    return {
        "dml_kernels": __version__,
        "machine": profiling.machine(),
        "recipe": asdict(trainer.recipe),
        "training": {
            "seconds": trainer.seconds,
            "steps": len(trainer.step_losses),
            "first_loss": trainer.step_losses[0] if trainer.step_losses else None,
            "last_epoch_mean_loss": _last_epoch_mean(trainer),
        },
        "unseen": {
            one.name: {
                "recall": {str(k): value for k, value in one.result.recall.items()},
                "map_at_r": one.result.map_at_r,
                "r_precision": one.result.r_precision,
                "queries": one.result.queries,
                "skipped": one.result.skipped,
                "recall_at_1_by_face": dict(zip(faces, one.face_recall)),
                "seconds": one.seconds,
            }
            for one in judged
        },
        "step_cost": asdict(cost) if cost else None,
        "seconds_by_part": parts,
    }


def _last_epoch_mean(trainer: Trainer) -> float | None:
    last = trainer.step_losses[-trainer.steps_per_epoch :]
    return sum(last) / len(last) if last else None


def print_tables(
    console: Console,
    faces: Sequence[str],
    raw: Judged,
    trained: Judged,
    cost: StepCost | None,
    parts: dict[str, float],
) -> None:
    """Retrieval, Recall@1 by face, the loss's cost, and where the time went."""
    queries = trained.result.queries
    depths = list(trained.result.recall)
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
            for one in (raw, trained)
        ],
    )
    order = sorted(range(len(faces)), key=lambda face: trained.face_recall[face])
    _print_table(
        console,
        "Recall@1 by the face of the query, hardest first",
        ["face", "raw", "trained", ""],
        [
            [
                faces[f],
                f"{raw.face_recall[f]:.3f}",
                f"{trained.face_recall[f]:.3f}",
                _bar(trained.face_recall[f]),
            ]
            for f in order
        ],
    )
    if cost:
        _print_cost(console, cost)
    console.print("Seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items()), highlight=False)


def _print_cost(console: Console, cost: StepCost) -> None:
    fused, plain = cost.variants["fused"], cost.variants["plain"]
    _print_table(
        console,
        f"One step of the loss (forward and backward): {cost.batch:,} embeddings, {cost.classes:,} classes, "
        f"{cost.dim} dimensions, {cost.dtype}",
        ["", "ms (median)", "peak extra MB", "of which gradients MB"],
        [
            [
                label,
                f"{v.seconds * 1e3:,.0f}",
                f"{v.peak_bytes / 1e6:,.0f}",
                f"{cost.gradient_bytes / 1e6:,.0f}",
            ]
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


def _bar(fraction: float, width: int = 20) -> str:
    filled = int(fraction * width)  # full only where every query is right
    return "█" * filled + "·" * (width - filled)


def _print_table(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(f"\n[bold]{title}[/bold]")  # a table's own title is folded to the table's width
    table = Table()
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)

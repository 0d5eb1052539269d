"""The main job: train an embedding of Han characters with fused Proxy-NCA and evaluate it on characters never
seen.

    python -m dml_kernels train [--quick] [--resume] ...        (also: make demo)

A class is a character, a sample of it one typeface's drawing. The network trains on 600 characters and is
judged on 400 others, as CUB and Stanford Online Products do: Recall@1, Recall@10 and MAP@R, against raw
pixels. Beside it stands what the loss costs at 100,000 classes, against the same loss in plain PyTorch.
Everything is written into one folder: metrics.json, checkpoint.pt and four plots.

The same command on the same machine with the same number of threads gives the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import use_backend
from ..ops import backend as backend_choice
from . import report
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint, write_json
from .data import ImageSet, load_sample, split_classes
from .model import embed
from .step_cost import ComparisonError, StepCost, measure, steps_of
from .trainer import Recipe, Trainer

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["main"]

EXTRAS = ("rich", "matplotlib", "sklearn")
COST_ROUNDS = 5
INTERRUPTED = 130  # the shell's status for Ctrl-C
QUICK = {"epochs": 2, "train_classes": 80, "unseen_classes": 60, "cost_classes": 10_000}
FULL = {"epochs": 6, "train_classes": 600, "unseen_classes": 0, "cost_classes": 100_000}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: the demo needs {', '.join(missing)}: pip install 'dml_kernels[demo]'", file=sys.stderr)
        return 1
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Run(options, arguments)
    try:
        with use_backend(options.backend) if options.backend else contextlib.nullcontext():
            run.everything()
    except KeyboardInterrupt:
        run.say_how_to_resume()
        return INTERRUPTED
    except (CheckpointError, ComparisonError, FloatingPointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with --quick's or the full run's sizes filled in where none were given."""
    usual = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m dml_kernels train",
        description="Train an embedding of Han characters with fused Proxy-NCA, evaluate it on characters "
        "never seen in training, and compare the loss's time and memory with plain PyTorch.",
    )
    # fmt: off
    add = parser.add_argument
    add("--quick", action="store_true", help="a small setting, to see that all works; its recall says little")
    add("--epochs", type=_positive, help="passes over the training drawings (default 6, quick 2)")
    add("--batch-size", type=_positive, default=usual.batch_size, metavar="N", help="default %(default)s")
    add("--embedding-size", type=_positive, default=usual.embedding_size, metavar="D",
        help="default %(default)s")
    add("--softmax-scale", type=float, default=usual.softmax_scale, metavar="S",
        help="multiplies the squared distances in the loss (default %(default)s)")
    add("--exclude-positive", action="store_true",
        help="leave the positive out of the sum, as in the 2017 paper")
    add("--lr", type=float, default=usual.lr,
        help="Adam's first rate, falling along half a cosine; ten times it for proxies (default %(default)s)")
    add("--seed", type=int, default=usual.seed, help="of weights, proxies and batches (default %(default)s)")
    add("--train-classes", type=_positive, metavar="C",
        help="characters to train on (default 600, quick 80); the rest of the 1,000 is unseen")
    add("--unseen-classes", type=_positive, metavar="C",
        help="how many of the rest to judge on (default all, quick 60)")
    add("--cost-classes", type=int, metavar="M",
        help="classes in the comparison of cost with plain PyTorch, 0 for none (default 100000, quick 10000)")
    add("--out", type=Path, default=Path("runs/demo"), metavar="DIR",
        help="where files go (default %(default)s)")
    add("--resume", action="store_true", help="go on from DIR/checkpoint.pt, to the same bits")
    add("--backend", choices=backend_choice.names(), help="backend of the loss (default: chosen, see `info`)")
    add("--threads", type=_positive, help="threads of PyTorch (default: its own choice)")
    # fmt: on
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.proxy_lr_factor = usual.proxy_lr_factor
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


class Run:
    """One run of the demo: what it does, prints and writes, in order."""

    def __init__(self, options: argparse.Namespace, arguments: list[str]) -> None:
        from rich.console import Console

        self.options, self.arguments = options, arguments
        self.console = Console(highlight=False) if sys.stdout.isatty() else Console(width=110, highlight=False)
        self.checkpoint: Path = options.out / "checkpoint.pt"
        self.recipe = Recipe(**{name: getattr(options, name) for name in asdict(Recipe())})
        self.seconds: dict[str, float] = {}
        self.saved_epoch: int | None = None

    def everything(self) -> None:
        """Train, judge, compare costs, plot, report."""
        start = time.perf_counter()
        sample = load_sample()
        train, unseen = split_classes(sample, self.recipe.train_classes, seed=0)
        unseen = _first_classes(unseen, self.options.unseen_classes)
        self._introduce(sample.faces, train, unseen)
        trainer = Trainer(self.recipe, torch.from_numpy(train.images), torch.from_numpy(train.labels))
        if self.options.resume:
            self._resume(trainer)
        self.seconds["data"] = time.perf_counter() - start
        with self._timed("training"):
            self._train(trainer)
        with self._timed("evaluation"):
            raw, trained, embeddings = self._judge(trainer, unseen)
        cost = None
        if self.options.cost_classes:
            with self._timed("step cost"):
                cost = self._measure_cost()
        with self._timed("plots"):
            plots = self._plot(trainer, unseen, sample.faces, trained, embeddings, cost)
        self.seconds["total"] = time.perf_counter() - start
        path = self.options.out / "metrics.json"
        write_json(path, report.metrics(trainer, sample.faces, (raw, trained), cost, self.seconds))
        report.print_tables(self.console, sample.faces, raw, trained, cost, self.seconds)
        self.console.print(
            "Written: " + ", ".join(map(str, (*plots, path, self.checkpoint))), markup=False, soft_wrap=True
        )

    def say_how_to_resume(self) -> None:
        """After Ctrl-C: what is on disk, and the command that goes on from it."""
        if self.saved_epoch is None:
            self.console.print("\nInterrupted before the first checkpoint: there is nothing to resume.")
            return
        again = shlex.join([*self.arguments, *([] if self.options.resume else ["--resume"])])
        python = min(os.path.relpath(sys.executable), sys.executable, key=len)
        self.console.print(
            f"\nInterrupted. {self.checkpoint} holds the state after epoch {self.saved_epoch} "
            f"of {self.recipe.epochs}.\nTo go on from there: {python} -m dml_kernels train {again}",
            markup=False,
            soft_wrap=True,
        )

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start

    def _introduce(self, faces: Sequence[str], train: ImageSet, unseen: ImageSet) -> None:
        name = backend_choice.requested()
        if name is None:
            verdicts = backend_choice.explain("masked_logsumexp", "cpu", torch.float32)
            name = next((verdict.backend for verdict in verdicts if verdict.ok), "none")
        self.console.print(
            f"Training on {len(train.images):,} drawings, {self.recipe.train_classes} Han characters by "
            f"{len(faces)} faces; judged on {len(unseen.images):,} drawings of "
            f"{int(unseen.labels.max()) + 1} other characters.\n"
            f"Loss: Proxy-NCA on backend '{name}', softmax scale {self.recipe.softmax_scale:g}, positive "
            f"{'out of' if self.recipe.exclude_positive else 'in'} the sum. "
            f"Threads {torch.get_num_threads()}, seed {self.recipe.seed}."
        )

    def _progress(self) -> Progress:
        from rich import progress as columns

        return columns.Progress(
            columns.TextColumn("{task.description:<22}"),
            columns.BarColumn(bar_width=30),
            columns.MofNCompleteColumn(),
            columns.TimeElapsedColumn(),
            columns.TimeRemainingColumn(),
            columns.TextColumn("{task.fields[note]}"),
            console=self.console,
        )

    def _resume(self, trainer: Trainer) -> None:
        state = load_checkpoint(self.checkpoint)
        trainer.load_state(state)
        self.saved_epoch = trainer.epoch
        self.console.print(f"Resumed after epoch {trainer.epoch} of {self.recipe.epochs}.")
        if state["threads"] != torch.get_num_threads():
            self.console.print(
                f"The first part ran on {state['threads']} threads, this one on {torch.get_num_threads()}: "
                "the result will be as good, but not the same to the last bit."
            )

    def _train(self, trainer: Trainer) -> None:
        if self.saved_epoch is None:
            self._save(trainer)
        epochs, steps = self.recipe.epochs, trainer.steps_per_epoch
        with self._progress() as bar:
            task = bar.add_task("training", total=epochs * steps, completed=trainer.epoch * steps, note="")
            while trainer.epoch < epochs:
                bar.update(task, description=f"training, epoch {trainer.epoch + 1}/{epochs}")
                before = trainer.seconds
                mean = trainer.run_epoch(lambda loss: bar.update(task, advance=1, note=f"loss {loss:.3f}"))
                self._save(trainer)
                seconds = trainer.seconds - before
                bar.console.print(
                    f"epoch {trainer.epoch}/{epochs}: mean loss {mean:.3f}, {seconds:.1f} s, "
                    f"{seconds / steps * 1e3:.0f} ms a step"
                )

    def _save(self, trainer: Trainer) -> None:
        save_checkpoint(self.checkpoint, trainer.state())
        self.saved_epoch = trainer.epoch

    def _judge(self, trainer: Trainer, unseen: ImageSet) -> tuple[report.Judged, report.Judged, Tensor]:
        images, labels, faces = map(torch.from_numpy, unseen)
        embeddings: list[Tensor] = []

        def make() -> Tensor:
            embeddings.append(embed(trainer.model, images))
            return embeddings[0]

        with self._progress() as bar:
            raw_task, task = (
                bar.add_task(f"judging {what}", total=len(images), note="queries")
                for what in ("raw pixels", "the embedding")
            )
            raw = report.judge(
                "raw pixels, 1024-d", lambda: images.flatten(1).float(), labels, faces,
                lambda done: bar.advance(raw_task, done),
            )  # fmt: skip
            trained = report.judge(
                f"trained, {self.recipe.embedding_size}-d",
                make,
                labels,
                faces,
                lambda done: bar.advance(task, done),
            )
        return raw, trained, embeddings[0]

    def _measure_cost(self) -> StepCost:
        with self._progress() as bar:
            task = bar.add_task("step cost", total=steps_of(COST_ROUNDS), note=f"{self.options.cost_classes:,} classes")
            return measure(
                classes=self.options.cost_classes,
                softmax_scale=self.recipe.softmax_scale,
                exclude_positive=self.recipe.exclude_positive,
                rounds=COST_ROUNDS,
                progress=lambda: bar.advance(task),
            )

    def _plot(
        self,
        trainer: Trainer,
        unseen: ImageSet,
        faces: Sequence[str],
        trained: report.Judged,
        embeddings: Tensor,
        cost: StepCost | None,
    ) -> list[Path]:
        from . import plots

        neighbours, out = trained.neighbours.numpy(), self.options.out
        jobs: dict[str, Any] = {
            "loss.png": lambda path: plots.loss_curve(path, trainer.step_losses, trainer.steps_per_epoch),
            "neighbours.png": lambda path: plots.contact_sheet(path, unseen, faces, neighbours, seed=self.recipe.seed),
            "map.png": lambda path: plots.class_map(path, unseen, embeddings.numpy(), seed=self.recipe.seed),
        }
        if cost:
            jobs["step_cost.png"] = lambda path: plots.cost_bars(path, cost)
        with self._progress() as bar:
            task = bar.add_task("plots", total=len(jobs), note="")
            for name, draw in jobs.items():
                bar.update(task, note=name)
                draw(out / name)
                bar.advance(task)
        return [out / name for name in jobs]


def _first_classes(images: ImageSet, count: int) -> ImageSet:
    """The first `count` classes; all of them where it is 0."""
    if not count:
        return images
    keep = images.labels < count
    return ImageSet(images.images[keep], images.labels[keep], images.faces[keep])

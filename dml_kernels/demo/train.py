"""The main job: train embeddings of Han characters with fused Proxy-NCA and with Magnet, and evaluate them.

    python -m dml_kernels train [--quick] [--loss both|proxy-nca|magnet] [--resume] ...        (also: make demo)

A class is a character; an example of it is its drawing in one typeface. The networks train on 600 characters and are
judged on 400 others, as in the protocols of CUB and Stanford Online Products: Recall@1, Recall@10 and MAP@R, compared
with raw pixels. Two drawings of each training character are held out, and are then named by their nearest neighbours
and, for Magnet, by the clusters around them. The run also compares the cost of Proxy-NCA at 100,000 classes with the
same loss in plain PyTorch. It writes everything into one folder: metrics.json, a checkpoint for each loss, and the
plots.

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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import use_backend
from ..cli.arguments import OptionError
from ..cli.process import exit_status
from ..ops import choice as backend_choice
from ..optional import how_to_install, import_optional
from . import judging, report
from .checkpoint import (
    START_ANEW,
    CheckpointError,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
    write_json,
)
from .data import CorruptSampleError, HanSample, ImageSet, hold_out, load_sample, split_classes
from .lock import FolderInUseError, hold
from .model import embed
from .objectives import Magnet, Recipe
from .options import fit, parse, recipes_of
from .step_cost import ComparisonError, StepCost, measure, steps_of
from .trainer import Trainer

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["main"]

EXTRAS = ("rich", "matplotlib", "sklearn", "faiss")
# Imported early: a package that exists but cannot be imported is noticed before the training, not after it.
NEEDED_LATER = ("rich.progress", "matplotlib.pyplot", "sklearn.manifold", "faiss")
COST_ROUNDS = 3
FAILED, REFUSED = 1, 2  # exit statuses: the work failed; it was refused before it began


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status (see `train --help`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f"the demo needs {', '.join(missing)}: {how_to_install(*missing)}")
    with contextlib.ExitStack() as stack:
        try:
            sample = load_sample()
            fit(options, *sample.images.shape[:2])
            os.environ["MPLBACKEND"] = (
                "Agg"  # plots go to files; an unknown backend in the environment would break the import of matplotlib
            )
            for module in NEEDED_LATER:
                import_optional(module, "the demo")
        except (OptionError, CorruptSampleError, FileNotFoundError, ImportError) as error:
            return _refuse(str(error))
        try:
            stack.enter_context(hold(options.out))
        except (FolderInUseError, OSError) as error:
            return _refuse(f"argument --out: {error}")
        remove_leftovers(options.out)
        if options.threads:
            torch.set_num_threads(options.threads)
        if options.backend:
            stack.enter_context(use_backend(options.backend))
        run = Run(options, arguments)
        try:
            run.everything(sample)
        except KeyboardInterrupt as interrupt:
            run.say_how_to_resume()
            return exit_status(interrupt)
        except OSError as error:  # a full disk
            print(f"error: {error}; correct that, and continue with --resume", file=sys.stderr)
            return FAILED
        except (CheckpointError, ComparisonError, FloatingPointError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return FAILED
    return 0


def _refuse(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return REFUSED


class Run:
    """One run of the demo: what it does, prints and writes, in this order."""

    def __init__(self, options: argparse.Namespace, arguments: list[str]) -> None:
        from rich.console import Console

        self.options, self.arguments = options, arguments
        self.console = Console(highlight=False) if sys.stdout.isatty() else Console(width=110, highlight=False)
        self.recipes = recipes_of(options)
        self.seconds: dict[str, float] = {}
        self.saved_epochs: dict[str, int] = {}  # title of a loss -> epochs of its training that are on disk

    def everything(self, sample: HanSample) -> None:
        """Train, judge, compare costs, plot, report."""
        start = time.perf_counter()
        train, unseen = split_classes(sample, self.options.train_classes, seed=0)
        train, held = hold_out(train, self.options.held_out, self.options.seed)
        unseen = _first_classes(unseen, self.options.unseen_classes)
        self._introduce(sample.faces, train, held, unseen)
        images, labels = torch.from_numpy(train.images), torch.from_numpy(train.labels)
        trainers = [Trainer(recipe, images, labels) for recipe in self.recipes]
        if self.options.resume:
            self._resume(trainers)
        for trainer in trainers:  # now, so that no checkpoint of an earlier run is left
            if trainer.recipe.title not in self.saved_epochs:
                self._save(trainer)
        self.seconds["data"] = time.perf_counter() - start
        for trainer in trainers:
            with self._timed(f"training {trainer.recipe.title}"):
                self._train(trainer)
        with self._timed("evaluation"):
            judged, seen, embeddings = self._judge(trainers, held, unseen)
        cost = None
        if self.options.cost_classes and self.options.loss != "magnet":
            with self._timed("step cost"):
                cost = self._measure_cost()
        with self._timed("plots"):
            plots = self._plot(trainers, train, unseen, sample.faces, judged, embeddings, cost)
        self.seconds["total"] = time.perf_counter() - start
        findings = report.Findings(sample.faces, trainers, judged, seen, cost, self.seconds)
        path = self.options.out / "metrics.json"
        write_json(path, report.metrics(findings))
        report.print_tables(self.console, findings)
        written = (*plots, path, *map(self._checkpoint, self.recipes))
        self.console.print("Written: " + ", ".join(map(str, written)), markup=False, soft_wrap=True)

    def say_how_to_resume(self) -> None:
        """Print what is on disk after Ctrl-C, and the command that continues from it."""
        if not self.saved_epochs:
            self.console.print("\nInterrupted before the first checkpoint: there is nothing to resume.")
            return
        again = shlex.join([*self.arguments, *([] if self.options.resume else ["--resume"])])
        python = min(os.path.relpath(sys.executable), sys.executable, key=len)
        lines = [
            f"{self._checkpoint(recipe)} holds {recipe.title} after epoch {self.saved_epochs[recipe.title]} "
            f"of {recipe.epochs}."
            for recipe in self.recipes
            if recipe.title in self.saved_epochs
        ]
        lines.append(f"To continue: {python} -m dml_kernels train {again}")
        self.console.print("\nInterrupted. " + "\n".join(lines), markup=False, soft_wrap=True)

    def _checkpoint(self, recipe: Recipe) -> Path:
        return Path(self.options.out / f"{recipe.key}.pt")

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start

    def _introduce(self, faces: Sequence[str], train: ImageSet, held: ImageSet, unseen: ImageSet) -> None:
        self.console.print(
            f"Training on {len(train.images):,} drawings, {self.options.train_classes} Han characters by "
            f"{len(faces)} faces, {len(held.images):,} more held out; judged on those and on {len(unseen.images):,} "
            f"drawings of {int(unseen.labels.max()) + 1} other characters."
        )
        for recipe in self.recipes:
            self.console.print(f"{recipe.title} on backend '{_backend_of(recipe)}': {recipe.describe()}.")
        self.console.print(f"Threads {torch.get_num_threads()}, seed {self.options.seed}.")

    def _progress(self) -> Progress:
        from rich import progress as columns

        return columns.Progress(
            columns.TextColumn("{task.description:<24}"),
            columns.BarColumn(bar_width=30),
            columns.MofNCompleteColumn(),
            columns.TimeElapsedColumn(),
            columns.TimeRemainingColumn(),
            columns.TextColumn("{task.fields[note]}"),
            console=self.console,
        )

    def _resume(self, trainers: Sequence[Trainer]) -> None:
        """Load every checkpoint that exists, at least one; a loss without a checkpoint begins anew."""
        there = [trainer for trainer in trainers if self._checkpoint(trainer.recipe).exists()]
        for trainer in there or trainers:
            state = load_checkpoint(self._checkpoint(trainer.recipe))
            try:
                trainer.load_state(state)
            except CheckpointError as error:
                path = self._checkpoint(trainer.recipe)
                raise CheckpointError(f"{path} cannot be resumed from ({error}): {START_ANEW}") from error
            title = trainer.recipe.title
            self.saved_epochs[title] = trainer.epoch
            self.console.print(f"Resumed {title} after epoch {trainer.epoch} of {trainer.recipe.epochs}.")
            if state["threads"] != torch.get_num_threads():
                self.console.print(
                    f"The first part ran on {state['threads']} threads, this one on {torch.get_num_threads()}: "
                    "the result will be as good, but not the same to the last bit."
                )

    def _train(self, trainer: Trainer) -> None:
        title, epochs, steps = trainer.recipe.title, trainer.recipe.epochs, trainer.steps_per_epoch
        with self._progress() as bar:
            done = trainer.epoch * steps
            task = bar.add_task(title, total=epochs * steps, completed=done, note="")
            refresh = bar.add_task("  refreshing clusters", total=len(trainer.images), visible=False, note="drawings")
            while trainer.epoch < epochs:
                bar.update(task, description=f"{title}, epoch {trainer.epoch + 1}/{epochs}")
                bar.reset(refresh)
                before = trainer.seconds
                mean = trainer.run_epoch(
                    lambda loss: bar.update(task, advance=1, note=f"loss {loss:.3f}"),
                    lambda drawings: bar.update(refresh, advance=drawings, visible=True),
                )
                self._save(trainer)
                bar.console.print(_epoch_line(trainer, mean, trainer.seconds - before))

    def _save(self, trainer: Trainer) -> None:
        save_checkpoint(self._checkpoint(trainer.recipe), trainer.state())
        self.saved_epochs[trainer.recipe.title] = trainer.epoch

    def _judge(
        self, trainers: Sequence[Trainer], held: ImageSet, unseen: ImageSet
    ) -> tuple[list[judging.Judged], list[judging.JudgedSeen], list[Tensor]]:
        images, labels, faces = map(torch.from_numpy, unseen)
        names = [f"{trainer.recipe.title}, {trainer.recipe.embedding_size}-d" for trainer in trainers]
        embeddings: list[Tensor] = []
        with self._progress() as bar:
            pixels, *tasks = (
                bar.add_task(f"judging {what}", total=total, note="queries")
                for what, total in (
                    ("raw pixels", len(images)),
                    *((trainer.recipe.title, len(images) + len(held.images)) for trainer in trainers),
                )
            )
            judged = [
                judging.judge(
                    "raw pixels, 1024-d",
                    lambda: images.flatten(1).float(),
                    labels,
                    faces,
                    lambda done: bar.advance(pixels, done),
                )
            ]
            seen = []
            for name, trainer, task in zip(names, trainers, tasks, strict=True):

                def make(trainer: Trainer = trainer) -> Tensor:
                    embeddings.append(embed(trainer.model, images))
                    return embeddings[-1]

                def advance(done: int, task: Any = task) -> None:
                    bar.advance(task, done)

                judged.append(judging.judge(name, make, labels, faces, advance))
                seen.append(judging.judge_seen(name, trainer, held, advance))
        return judged, seen, embeddings

    def _measure_cost(self) -> StepCost:
        with self._progress() as bar:
            task = bar.add_task("step cost", total=steps_of(COST_ROUNDS), note=f"{self.options.cost_classes:,} classes")
            return self._measured(lambda: bar.advance(task))

    def _measured(self, tick: Callable[[], object]) -> StepCost:
        try:
            return measure(
                classes=self.options.cost_classes,
                softmax_scale=self.options.softmax_scale,
                exclude_positive=self.options.exclude_positive,
                rounds=COST_ROUNDS,
                progress=tick,
            )
        except (RuntimeError, MemoryError) as error:  # PyTorch raises RuntimeError where memory is short
            reason = (str(error).strip().splitlines() or ["no memory"])[-1]
            raise ComparisonError(
                f"the step cost could not be measured ({reason}); what was trained is saved: continue with "
                "--resume and fewer --cost-classes or 0"
            ) from error

    def _plot(
        self,
        trainers: Sequence[Trainer],
        train: ImageSet,
        unseen: ImageSet,
        faces: Sequence[str],
        judged: Sequence[judging.Judged],
        embeddings: Sequence[Tensor],
        cost: StepCost | None,
    ) -> list[Path]:
        """Draw all plots; neighbours and map are those of the loss that was trained first."""
        from . import cluster_plot, plots

        neighbours, points = judged[1].neighbours.numpy(), embeddings[0].numpy()
        title, seed, out = trainers[0].recipe.title, self.options.seed, self.options.out
        curves = [(trainer.recipe.title, trainer.step_losses, trainer.steps_per_epoch) for trainer in trainers]
        jobs: dict[str, Any] = {
            "loss.png": lambda path: plots.loss_curves(path, curves),
            "neighbours.png": lambda path: plots.contact_sheet(path, unseen, faces, neighbours, title, seed=seed),
            "map.png": lambda path: plots.class_map(path, unseen, points, title, seed=seed),
        }
        for objective in (trainer.objective for trainer in trainers):
            if isinstance(objective, Magnet):
                clusters = objective.index.clusters.numpy()
                jobs["clusters.png"] = partial(
                    cluster_plot.cluster_sheet, images=train, faces=faces, clusters=clusters, seed=seed
                )
        if cost:
            jobs["step_cost.png"] = lambda path: plots.cost_bars(path, cost)
        with self._progress() as bar:
            task = bar.add_task("plots", total=len(jobs), note="")
            for name, draw in jobs.items():
                bar.update(task, note=name)
                draw(out / name)
                bar.advance(task)
        return [out / name for name in jobs]


def _backend_of(recipe: Recipe) -> str:
    """The backend that will run the recipe's loss on the CPU in fp32."""
    if name := backend_choice.requested():
        return name
    verdicts = backend_choice.explain(recipe.op, "cpu", torch.float32)
    return next((verdict.backend for verdict in verdicts if verdict.ok), "none")


def _epoch_line(trainer: Trainer, mean: float, seconds: float) -> str:
    line = f"epoch {trainer.epoch}/{trainer.recipe.epochs}: mean loss {mean:.3f}, {seconds:.1f} s"
    if refreshed := trainer.refreshed:
        seconds -= refreshed.seconds
        kmeans, moved = refreshed.kmeans_seconds, refreshed.moved
        line += f", refresh {refreshed.seconds:.1f} (k-means {kmeans:.2f}; {moved:.0%} moved)"
    return f"{line}, {seconds / trainer.steps_per_epoch * 1e3:.0f} ms a step"


def _first_classes(images: ImageSet, count: int) -> ImageSet:
    """The first ``count`` classes; all classes where it is 0."""
    if not count:
        return images
    keep = images.labels < count
    return ImageSet(images.images[keep], images.labels[keep], images.faces[keep])

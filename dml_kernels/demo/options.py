"""The command line of the demo."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from ..cli.arguments import OptionError, Parser, folder, integer, number, threads
from ..ops import choice as backend_choice
from .objectives import MagnetRecipe, ProxyNCARecipe, Recipe
from .step_cost import plain_bytes

__all__ = ["fit", "make_parser", "parse", "recipes_of"]

RECIPES: tuple[type[Recipe], ...] = (ProxyNCARecipe, MagnetRecipe)
QUICK = {"epochs": 2, "train_classes": 80, "cost_classes": 10_000}
QUICK_UNSEEN_CLASSES = 60
FULL = {"epochs": 6, "train_classes": 600, "cost_classes": 100_000}
EPILOG = """\
examples:
  python -m dml_kernels train --quick                   a minute: does everything work here?
  python -m dml_kernels train --out runs/a              the whole job, some minutes on two cores
  python -m dml_kernels train --out runs/a --resume     continue where it was stopped, with the same options
  python -m dml_kernels train --loss magnet --clusters-per-class 2 --cost-classes 0

exit status: 0 done; 1 the run failed, and the last checkpoints are whole; 2 refused before any work;
130 stopped by Ctrl-C, 143 by SIGTERM: --resume continues from the last whole epoch.
"""


def make_parser() -> Parser:
    """Make the parser; each option accepts the values that can make sense for some data."""
    proxy, magnet = ProxyNCARecipe(), MagnetRecipe()
    parser = Parser(
        prog="python -m dml_kernels train",
        description="Train an embedding of Han characters with Proxy-NCA and with Magnet, evaluate both on characters\n"
        "never seen in training and on held-out drawings of those seen, and compare the time and memory\n"
        "of Proxy-NCA with plain PyTorch. The drawings come with the package: 1,000 characters by 16 faces.",
        epilog=EPILOG,
    )
    # fmt: off
    add = parser.add_argument
    add("--quick", action="store_true", help="a small setting, to see that all works; its recall says little")
    add("--loss", choices=("both", *(recipe.key for recipe in RECIPES)), default="both",
        help="what to train with (default %(default)s)")
    add("--epochs", type=integer(1, 100_000), metavar="E",
        help="passes over the training drawings (default 6, quick 2)")
    add("--batch-size", type=integer(2, 1 << 20), default=proxy.batch_size, metavar="N",
        help="drawings in a step (default %(default)s)")
    add("--embedding-size", type=integer(1, 8192), default=proxy.embedding_size, metavar="D",
        help="dimensions of the embedding (default %(default)s)")
    add("--lr", type=number(0, 100, above=True), default=proxy.lr, metavar="RATE",
        help="Adam's first rate, falling along half a cosine; ten times it for proxies (default %(default)s)")
    add("--seed", type=integer(0, 2**32 - 1), default=proxy.seed, metavar="SEED",
        help="of weights, batches, clusters and the choice of held-out drawings (default %(default)s)")
    add("--train-classes", type=integer(2, 1 << 20), metavar="C",
        help="characters to train on (default 600, quick 80); the rest of the 1,000 is unseen")
    add("--held-out", type=integer(1, 1 << 20), default=proxy.held_out, metavar="H",
        help="drawings of each of them kept out of training, to be classified (default %(default)s of 16)")
    add("--unseen-classes", type=integer(1, 1 << 20), metavar="C",
        help="how many of the rest to judge on (default all, quick 60)")
    add("--cost-classes", type=integer(2, 10_000_000, or_zero=True), metavar="M",
        help="classes in the comparison of Proxy-NCA's cost with plain PyTorch, which needs some 15 kB of memory "
        "for each; 0 for none (default 100000, quick 10000)")
    add("--out", type=folder, default=Path("runs/demo"), metavar="DIR", help="where files go (default %(default)s)")
    add("--resume", action="store_true", help="continue from the checkpoints in DIR, to the same bits")
    add("--backend", choices=backend_choice.names(), help="backend of the losses (default: chosen, see `info`)")
    add("--threads", type=threads(), metavar="T", help="threads of PyTorch (default: its own choice)")
    add = parser.add_argument_group(ProxyNCARecipe.title).add_argument
    add("--softmax-scale", type=number(0, 1e4, above=True), default=proxy.softmax_scale, metavar="S",
        help="multiplies the squared distances in the loss (default %(default)s)")
    add("--exclude-positive", action="store_true", help="leave the positive out of the sum, as in the 2017 paper")
    add = parser.add_argument_group(MagnetRecipe.title).add_argument
    add("--alpha", type=number(0, 1e4), default=magnet.alpha, metavar="A", help="the margin (default %(default)s)")
    add("--clusters-per-class", type=integer(1, 1 << 20), default=magnet.clusters_per_class, metavar="K",
        help="fewer than a character has training drawings (default %(default)s)")
    add("--examples-per-cluster", type=integer(1, 1 << 20), default=magnet.examples_per_cluster, metavar="E",
        help="drawings of a cluster in a batch, of N / E clusters (default %(default)s)")
    # fmt: on
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options, and fill in the sizes of ``--quick`` or of the full run where none were given."""
    options = make_parser().parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.proxy_lr_factor = ProxyNCARecipe().proxy_lr_factor
    return options


def fit(options: argparse.Namespace, classes: int, faces: int) -> None:
    """Check the options against each other, the data and this machine; fill in unseen_classes if it was not given.

    Args:
        options: what ``parse`` returned.
        classes: the number of characters in the sample.
        faces: the number of drawings of each.

    Raises:
        OptionError: an option does not fit; the message names it.
    """
    unseen = classes - options.train_classes
    _at_most("--train-classes", options.train_classes, classes - 1, "one of the sample's characters must be unseen")
    _at_most("--held-out", options.held_out, faces - 1, "one drawing of each character must be left for training")
    _at_most("--unseen-classes", options.unseen_classes or 1, unseen, f"{unseen} characters are left")
    if options.unseen_classes is None:
        options.unseen_classes = min(unseen, QUICK_UNSEEN_CLASSES) if options.quick else unseen
    kept = faces - options.held_out
    drawings = options.train_classes * kept
    if options.batch_size > drawings:
        raise OptionError(
            f"argument --batch-size: {drawings} training images do not fill one batch of {options.batch_size}"
        )
    if options.loss != ProxyNCARecipe.key:
        why = f"a character has {kept} drawings to train on"
        _at_most("--held-out", options.held_out, faces - 2, "Magnet needs two drawings of each character for training")
        _at_most(
            "--clusters-per-class", options.clusters_per_class, kept - 1, f"{why}, and clusters of one have no spread"
        )
        _at_most("--examples-per-cluster", options.examples_per_cluster, kept, why)
        if options.batch_size % options.examples_per_cluster or options.batch_size < 2 * options.examples_per_cluster:
            raise OptionError(
                f"argument --examples-per-cluster: a batch of {options.batch_size} is not made up of two or more "
                f"clusters of {options.examples_per_cluster}: give another --batch-size or --examples-per-cluster"
            )
    for recipe in recipes_of(options):
        try:
            backend_choice.choose(recipe.op, torch.device("cpu"), torch.float32, argument=options.backend)
        except (ValueError, RuntimeError) as error:
            raise OptionError(f"{'argument --backend' if options.backend else 'DML_BACKEND'}: {error}") from error
    needed, there = plain_bytes(options.cost_classes), _memory_bytes()
    if there and needed > there:
        raise OptionError(
            f"argument --cost-classes: plain PyTorch needs some {needed / 1e9:.0f} GB for {options.cost_classes:,} "
            f"classes, and this machine has {there / 1e9:.0f}: give fewer, or 0 to leave the comparison out"
        )


def recipes_of(options: argparse.Namespace) -> list[Recipe]:
    """The recipes to train, in order."""
    return [
        recipe(**{field.name: getattr(options, field.name) for field in fields(recipe)})
        for recipe in RECIPES
        if options.loss in ("both", recipe.key)
    ]


def _at_most(option: str, value: int, most: int, why: str) -> None:
    if value > most:
        raise OptionError(f"argument {option}: must be at most {most}, as {why}; got {value}")


def _memory_bytes() -> int | None:
    """The memory of this machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None

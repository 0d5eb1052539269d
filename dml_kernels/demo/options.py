"""The demo's command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ..ops import backend as backend_choice
from .objectives import MagnetRecipe, ProxyNCARecipe, Recipe

__all__ = ["parse", "recipes_of"]

RECIPES: tuple[type[Recipe], ...] = (ProxyNCARecipe, MagnetRecipe)
QUICK = {"epochs": 2, "train_classes": 80, "unseen_classes": 60, "cost_classes": 10_000}
FULL = {"epochs": 6, "train_classes": 600, "unseen_classes": 0, "cost_classes": 100_000}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with --quick's or the full run's sizes filled in where none were given."""
    proxy, magnet = ProxyNCARecipe(), MagnetRecipe()
    parser = argparse.ArgumentParser(
        prog="python -m dml_kernels train",
        description="Train an embedding of Han characters with Proxy-NCA and with Magnet, evaluate both on characters "
        "never seen in training and on held-out drawings of those seen, and compare the time and memory of Proxy-NCA "
        "with plain PyTorch.",
    )
    # fmt: off
    add = parser.add_argument
    add("--quick", action="store_true", help="a small setting, to see that all works; its recall says little")
    add("--loss", choices=("both", *(recipe.key for recipe in RECIPES)), default="both",
        help="what to train with (default %(default)s)")
    add("--epochs", type=_positive, help="passes over the training drawings (default 6, quick 2)")
    add("--batch-size", type=_positive, default=proxy.batch_size, metavar="N", help="default %(default)s")
    add("--embedding-size", type=_positive, default=proxy.embedding_size, metavar="D", help="default %(default)s")
    add("--lr", type=float, default=proxy.lr,
        help="Adam's first rate, falling along half a cosine; ten times it for proxies (default %(default)s)")
    add("--seed", type=int, default=proxy.seed,
        help="of weights, batches, clusters and the choice of held-out drawings (default %(default)s)")
    add("--train-classes", type=_positive, metavar="C",
        help="characters to train on (default 600, quick 80); the rest of the 1,000 is unseen")
    add("--held-out", type=_positive, default=proxy.held_out, metavar="H",
        help="drawings of each of them kept out of training, to be classified (default %(default)s of 16)")
    add("--unseen-classes", type=_positive, metavar="C",
        help="how many of the rest to judge on (default all, quick 60)")
    add("--cost-classes", type=int, metavar="M",
        help="classes in the comparison of Proxy-NCA's cost with plain PyTorch, 0 for none "
        "(default 100000, quick 10000)")
    add("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="where files go (default %(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoints in DIR, to the same bits")
    add("--backend", choices=backend_choice.names(), help="backend of the losses (default: chosen, see `info`)")
    add("--threads", type=_positive, help="threads of PyTorch (default: its own choice)")
    add = parser.add_argument_group(ProxyNCARecipe.title).add_argument
    add("--softmax-scale", type=float, default=proxy.softmax_scale, metavar="S",
        help="multiplies the squared distances in the loss (default %(default)s)")
    add("--exclude-positive", action="store_true", help="leave the positive out of the sum, as in the 2017 paper")
    add = parser.add_argument_group(MagnetRecipe.title).add_argument
    add("--alpha", type=float, default=magnet.alpha, help="the margin (default %(default)s)")
    add("--clusters-per-class", type=_positive, default=magnet.clusters_per_class, metavar="K",
        help="default %(default)s")
    add("--examples-per-cluster", type=_positive, default=magnet.examples_per_cluster, metavar="E",
        help="drawings of a cluster in a batch, of N / E clusters (default %(default)s)")
    # fmt: on
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.proxy_lr_factor = proxy.proxy_lr_factor
    return options


def recipes_of(options: argparse.Namespace) -> list[Recipe]:
    """The recipes to train, in order."""
    return [
        recipe(**{field.name: getattr(options, field.name) for field in fields(recipe)})
        for recipe in RECIPES
        if options.loss in ("both", recipe.key)
    ]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value

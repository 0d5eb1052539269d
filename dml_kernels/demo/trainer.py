"""Training: the recipe, and a trainer whose state can be saved between two epochs and taken up again, bit for
bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import losses
from .checkpoint import CheckpointError
from .model import EmbeddingNet

__all__ = ["Recipe", "Trainer"]


@dataclass(frozen=True)
class Recipe:
    """What decides the trained weights, together with the data, the machine and the number of threads."""

    epochs: int = 6
    batch_size: int = 128
    embedding_size: int = 64
    softmax_scale: float = 1.0
    exclude_positive: bool = False
    lr: float = 3e-3
    proxy_lr_factor: float = 10.0
    seed: int = 0
    train_classes: int = 600


class Trainer:
    """Network, proxies and optimiser, trained an epoch at a time; `state` is all that the next epoch depends
    on.

    images (n, 32, 32) uint8, labels (n,) int64 in [0, recipe.train_classes). Each epoch visits the drawings
    in a fresh random order, in whole batches. Adam, both learning rates falling to 0 along half a cosine.
    """

    def __init__(self, recipe: Recipe, images: Tensor, labels: Tensor) -> None:
        if len(images) < recipe.batch_size:
            raise ValueError(f"{len(images)} training images do not fill one batch of {recipe.batch_size}")
        self.recipe, self.images, self.labels = recipe, images, labels
        torch.manual_seed(recipe.seed)
        self.model = EmbeddingNet(recipe.embedding_size)
        self.model.set_pixel_statistics(images)
        self.loss = losses.ProxyNCALoss(
            recipe.train_classes,
            recipe.embedding_size,
            softmax_scale=recipe.softmax_scale,
            exclude_positive=recipe.exclude_positive,
        )
        self.optimiser = torch.optim.Adam([{"params": self.model.parameters()}, {"params": self.loss.parameters()}])
        self.shuffle = torch.Generator().manual_seed(recipe.seed)
        self.epoch = 0
        self.step_losses: list[float] = []
        self.seconds = 0.0

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training set."""
        return len(self.images) // self.recipe.batch_size

    def run_epoch(self, on_step: Callable[[float], object] | None = None) -> float:
        """Train one epoch and return its mean loss; on_step is called with each step's loss."""
        start = time.perf_counter()
        self.model.train()
        order = torch.randperm(len(self.images), generator=self.shuffle)
        epoch_losses = []
        for step in range(self.steps_per_epoch):
            rows = order[step * self.recipe.batch_size :][: self.recipe.batch_size]
            self._set_learning_rates(self.epoch * self.steps_per_epoch + step)
            loss = self.loss(self.model(self.images[rows]), self.labels[rows])
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            epoch_losses.append(loss.item())
            if not math.isfinite(epoch_losses[-1]):
                raise FloatingPointError(f"the loss is {epoch_losses[-1]} at step {step + 1}: lower --lr")
            if on_step:
                on_step(epoch_losses[-1])
        # No checkpoint is ever made of weights that cannot be trained further.
        if not all(bool(torch.isfinite(weight).all()) for weight in self.model.state_dict().values()):
            raise FloatingPointError(f"weights are NaN or infinite after epoch {self.epoch + 1}: lower --lr")
        self.step_losses += epoch_losses
        self.epoch += 1
        self.seconds += time.perf_counter() - start
        return sum(epoch_losses) / len(epoch_losses)

    def _set_learning_rates(self, step: int) -> None:
        rate = self.recipe.lr * 0.5 * (1 + math.cos(math.pi * step / (self.recipe.epochs * self.steps_per_epoch)))
        network, proxies = self.optimiser.param_groups
        network["lr"], proxies["lr"] = rate, rate * self.recipe.proxy_lr_factor

    def state(self) -> dict[str, Any]:
        """Everything to go on from, between two epochs."""
        return {
            "recipe": asdict(self.recipe),
            "threads": torch.get_num_threads(),
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "rng": torch.get_rng_state(),
            "shuffle": self.shuffle.get_state(),
            "step_losses": self.step_losses,
            "seconds": self.seconds,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises CheckpointError where it is of another recipe, naming what differs."""
        wanted, stored = asdict(self.recipe), state["recipe"]
        differing = [name for name in wanted if wanted[name] != stored.get(name)]
        if differing:
            raise CheckpointError(
                "the checkpoint is of another recipe: "
                + ", ".join(f"{name} {stored.get(name)} there, {wanted[name]} asked for" for name in differing)
            )
        self.model.load_state_dict(state["model"])
        self.loss.load_state_dict(state["loss"])
        self.optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["rng"])
        self.shuffle.set_state(state["shuffle"])
        self.epoch, self.step_losses, self.seconds = (
            state["epoch"],
            list(state["step_losses"]),
            state["seconds"],
        )

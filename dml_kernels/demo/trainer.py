"""A trainer whose state can be saved between two epochs and taken up again, bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..clustering import RefreshReport
from .checkpoint import CheckpointError
from .model import EmbeddingNet, embed
from .objectives import Recipe

__all__ = ["Trainer"]


class Trainer:
    """Network, objective and optimiser, trained an epoch at a time; `state` is all that the next epoch depends on.

    images (n, 32, 32) uint8, labels (n,) int64 in [0, recipe.train_classes). An epoch has as many steps as there are
    whole batches in the training set. Adam, all learning rates falling to 0 along half a cosine.
    """

    def __init__(self, recipe: Recipe, images: Tensor, labels: Tensor) -> None:
        if len(images) < recipe.batch_size:
            raise ValueError(f"{len(images)} training images do not fill one batch of {recipe.batch_size}")
        self.recipe, self.images, self.labels = recipe, images, labels
        torch.manual_seed(recipe.seed)
        self.model = EmbeddingNet(recipe.embedding_size)
        self.model.set_pixel_statistics(images)
        self.objective = recipe.objective(labels)
        groups: list[dict[str, Any]] = [{"params": list(self.model.parameters()), "factor": 1.0}]
        if parameters := list(self.objective.module.parameters()):
            groups.append({"params": parameters, "factor": self.objective.lr_factor})
        self.optimiser = torch.optim.Adam(groups)
        self.epoch = 0
        self.step_losses: list[float] = []
        self.seconds = 0.0
        self.refresh_seconds = 0.0  # of these
        self.refreshed: RefreshReport | None = None  # the last refresh

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training set."""
        return len(self.images) // self.recipe.batch_size

    def refresh(self, progress: Callable[[int], object] | None = None) -> RefreshReport | None:
        """Bring what the objective derives from the embeddings up to date; progress(count) of drawings embedded."""
        return self.objective.begin_epoch(lambda rows: embed(self.model, self.images[rows], progress=progress))

    def run_epoch(
        self,
        on_step: Callable[[float], object] | None = None,
        on_refresh: Callable[[int], object] | None = None,
    ) -> float:
        """Train one epoch and return its mean loss; on_step is called with each step's loss."""
        start = time.perf_counter()
        self.refreshed = self.refresh(on_refresh)
        refresh_seconds = time.perf_counter() - start if self.refreshed else 0.0
        self.model.train()
        epoch_losses: list[float] = []
        for rows in self.objective.batches():
            self._set_learning_rates(self.epoch * self.steps_per_epoch + len(epoch_losses))
            loss = self.objective.loss(self.model(self.images[rows]), rows)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            epoch_losses.append(loss.item())
            if not math.isfinite(epoch_losses[-1]):
                raise FloatingPointError(f"the loss is {epoch_losses[-1]} at step {len(epoch_losses)}: lower --lr")
            self.objective.end_step()
            if on_step:
                on_step(epoch_losses[-1])
        # No checkpoint is ever made of weights that cannot be trained further.
        if not all(bool(torch.isfinite(weight).all()) for weight in self.model.state_dict().values()):
            raise FloatingPointError(f"weights are NaN or infinite after epoch {self.epoch + 1}: lower --lr")
        self.step_losses += epoch_losses
        self.epoch += 1
        self.seconds += time.perf_counter() - start
        self.refresh_seconds += refresh_seconds
        return sum(epoch_losses) / len(epoch_losses)

    def _set_learning_rates(self, step: int) -> None:
        rate = self.recipe.lr * 0.5 * (1 + math.cos(math.pi * step / (self.recipe.epochs * self.steps_per_epoch)))
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["factor"]

    def state(self) -> dict[str, Any]:
        """Everything to go on from, between two epochs."""
        return {
            "loss_name": self.recipe.key,
            "recipe": asdict(self.recipe),
            "threads": torch.get_num_threads(),
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "loss": self.objective.module.state_dict(),
            "objective": self.objective.state(),
            "optimiser": self.optimiser.state_dict(),
            "rng": torch.get_rng_state(),
            "step_losses": self.step_losses,
            "seconds": [self.seconds, self.refresh_seconds],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises CheckpointError where it is of another recipe, naming what differs."""
        wanted = {"loss": self.recipe.key, **asdict(self.recipe)}
        stored = {"loss": state["loss_name"], **state["recipe"]}
        differing = [name for name in wanted if wanted[name] != stored.get(name)]
        if differing:
            raise CheckpointError(
                "the checkpoint is of another recipe: "
                + ", ".join(f"{name} {stored.get(name)} there, {wanted[name]} asked for" for name in differing)
            )
        self.model.load_state_dict(state["model"])
        self.objective.module.load_state_dict(state["loss"])
        self.objective.load_state(state["objective"])
        self.optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["rng"])
        self.epoch, self.step_losses = state["epoch"], list(state["step_losses"])
        self.seconds, self.refresh_seconds = state["seconds"]

"""A trainer whose state can be saved between two epochs and loaded again, bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..clustering import RefreshReport
from ..saved_state import check_count, check_like
from .checkpoint import CheckpointError
from .model import EmbeddingNet, embed
from .objectives import Recipe

__all__ = ["Trainer"]


class Trainer:
    """Network, objective and optimiser, trained an epoch at a time; ``state`` is all that the next epoch depends on.

    An epoch has as many steps as there are whole batches in the training set. The optimiser is Adam, and all learning
    rates fall to 0 along half a cosine.

    Args:
        recipe: the numbers of the training.
        images: (n, 32, 32) uint8.
        labels: (n,) int64 in [0, recipe.train_classes).

    Raises:
        ValueError: the images do not fill a batch.
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
        self.refresh_seconds = 0.0  # of the seconds
        self.refreshed: RefreshReport | None = None  # by the last refresh

    @property
    def steps_per_epoch(self) -> int:
        """The number of whole batches in the training set."""
        return len(self.images) // self.recipe.batch_size

    def refresh(self, progress: Callable[[int], object] | None = None) -> RefreshReport | None:
        """Bring up to date what the objective derives from the embeddings.

        Args:
            progress: called with the number of drawings just embedded.
        """
        return self.objective.begin_epoch(lambda rows: embed(self.model, self.images[rows], progress=progress))

    def run_epoch(
        self,
        on_step: Callable[[float], object] | None = None,
        on_refresh: Callable[[int], object] | None = None,
    ) -> float:
        """Train one epoch.

        Args:
            on_step: called with the loss of each step.
            on_refresh: called with the number of drawings just embedded for the refresh.

        Returns:
            The mean loss of the epoch.

        Raises:
            FloatingPointError: the loss or the weights are NaN or infinite.
        """
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
        # Weights that cannot be trained further must not reach a checkpoint.
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self._trained()):
            raise FloatingPointError(f"weights are NaN or infinite after epoch {self.epoch + 1}: lower --lr")
        self.step_losses += epoch_losses
        self.epoch += 1
        self.seconds += time.perf_counter() - start
        self.refresh_seconds += refresh_seconds
        return sum(epoch_losses) / len(epoch_losses)

    def _trained(self) -> Iterator[Tensor]:
        """Yield all tensors that the steps change."""
        yield from self.model.state_dict().values()
        yield from self.objective.module.state_dict().values()
        for moments in self.optimiser.state.values():
            yield from moments.values()

    def _set_learning_rates(self, step: int) -> None:
        rate = self.recipe.lr * 0.5 * (1 + math.cos(math.pi * step / (self.recipe.epochs * self.steps_per_epoch)))
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["factor"]

    def state(self) -> dict[str, Any]:
        """All that the training needs to continue, between two epochs."""
        return {
            "loss_name": self.recipe.key,
            "recipe": asdict(self.recipe),
            "threads": torch.get_num_threads(),
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "loss": self.objective.module.state_dict(),
            "objective": self.objective.state(),
            "optimiser": self.optimiser.state_dict()["state"],  # its settings are the recipe's
            "rng": torch.get_rng_state(),
            "step_losses": self.step_losses,
            "seconds": [self.seconds, self.refresh_seconds],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            CheckpointError: the state has another recipe, or no trainer can have made it; one line says what is wrong.
        """
        try:
            self._check_state(state)
            self.objective.load_state(state["objective"])
            torch.set_rng_state(state["rng"])
        except (ValueError, TypeError, RuntimeError) as error:  # generators raise the last two for a wrong state
            raise CheckpointError(str(error).partition("\n")[0]) from error
        self.model.load_state_dict(state["model"])
        self.objective.module.load_state_dict(state["loss"])
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state["optimiser"]})
        self.epoch, self.step_losses = state["epoch"], list(state["step_losses"])
        self.seconds, self.refresh_seconds = state["seconds"]

    def _check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError unless a trainer of this recipe and data can have had this state after some epoch."""
        wanted = {"loss": self.recipe.key, **asdict(self.recipe)}
        recipe = state.get("recipe")
        stored = {"loss": state.get("loss_name"), **(recipe if isinstance(recipe, dict) else {})}
        pairs = {name: (stored.get(name), value) for name, value in wanted.items()}
        differing = [name for name, (there, value) in pairs.items() if type(there) is not type(value) or there != value]
        if differing:
            raise ValueError(
                "the checkpoint is of another recipe: "
                + ", ".join(f"{name} {stored.get(name)} there, {wanted[name]} asked for" for name in differing)
                + "; continue with the options it was made with"
            )
        epoch = check_count("epoch", state.get("epoch"), 0, self.recipe.epochs)
        steps = epoch * self.steps_per_epoch
        weights = [weight for group in self.optimiser.param_groups for weight in group["params"]]
        one = {place: {"step": torch.tensor(0.0), "exp_avg": w, "exp_avg_sq": w} for place, w in enumerate(weights)}
        unread = ("recipe", "objective")  # the first is compared above, the objective checks the second
        like = {**self.state(), "optimiser": one if epoch else {}, **{key: state.get(key) for key in unread}}
        check_like("checkpoint", state, like)
        for moments in state["optimiser"].values():
            if moments["step"] != steps or bool((moments["exp_avg_sq"] < 0).any()):
                raise ValueError(f"the optimiser's state is not that of {steps} steps of Adam")
        for name, tensor in state["model"].items():
            if name.endswith("running_var") and bool((tensor < 0).any()):
                raise ValueError(f"checkpoint.model.{name} is negative: it is a variance")
            if name.startswith("pixel_") and not torch.equal(tensor, like["model"][name]):
                raise ValueError(f"the checkpoint is of other drawings: {name} is {float(tensor):.6g}")
        _check_numbers("step_losses", state["step_losses"], steps)
        _check_numbers("seconds", state["seconds"], 2)
        check_count("threads", state["threads"], 1, 1 << 31)


def _check_numbers(what: str, found: list[Any], count: int) -> None:
    if len(found) != count or not all(isinstance(value, float) and math.isfinite(value) for value in found):
        raise ValueError(f"{what} must be a list of {count} finite numbers; it has {len(found)} entries")

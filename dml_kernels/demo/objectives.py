"""What the demo trains: a recipe of numbers for each loss, and the objective that is made from it.

An objective gives the trainer the batches of an epoch and the loss of a batch, and keeps what these depend on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import losses
from ..clustering import ClusterIndex, RefreshReport
from ..samplers import MagnetBatchSampler
from ..saved_state import check_keys, check_like

__all__ = ["Magnet", "MagnetRecipe", "Objective", "ProxyNCA", "ProxyNCARecipe", "Recipe"]


@dataclass(frozen=True)
class Recipe(ABC):
    """The numbers that, with the data, the machine and the number of threads, determine the trained weights."""

    key: ClassVar[str]  # the name in options and files
    title: ClassVar[str]
    op: ClassVar[str]  # the op that the loss calls

    epochs: int = 6
    batch_size: int = 128
    embedding_size: int = 64
    lr: float = 3e-3
    seed: int = 0
    train_classes: int = 600
    held_out: int = 2

    @abstractmethod
    def objective(self, labels: Tensor) -> Objective:
        """Make the objective for training drawings with these labels (n,)."""

    @abstractmethod
    def describe(self) -> str:
        """The settings of the loss, in words."""


@dataclass(frozen=True)
class ProxyNCARecipe(Recipe):
    key: ClassVar[str] = "proxy-nca"
    title: ClassVar[str] = "Proxy-NCA"
    op: ClassVar[str] = losses.REGISTRY["ProxyNCALoss"].op

    softmax_scale: float = 1.0
    exclude_positive: bool = False
    proxy_lr_factor: float = 10.0

    def objective(self, labels: Tensor) -> Objective:
        return ProxyNCA(self, labels)

    def describe(self) -> str:
        place = "out of" if self.exclude_positive else "in"
        return f"softmax scale {self.softmax_scale:g}, positive {place} the sum; batches of {self.batch_size}"


@dataclass(frozen=True)
class MagnetRecipe(Recipe):
    key: ClassVar[str] = "magnet"
    title: ClassVar[str] = "Magnet"
    op: ClassVar[str] = losses.REGISTRY["MagnetLoss"].op

    alpha: float = 4.0
    clusters_per_class: int = 3
    examples_per_cluster: int = 2

    @property
    def clusters_per_batch(self) -> int:
        """As many clusters as make up the batch size."""
        return self.batch_size // self.examples_per_cluster

    def objective(self, labels: Tensor) -> Objective:
        return Magnet(self, labels)

    def describe(self) -> str:
        return (
            f"alpha {self.alpha:g}, {self.clusters_per_class} clusters a character; batches of "
            f"{self.clusters_per_batch} clusters x {self.examples_per_cluster}"
        )


class Objective(ABC):
    """What the trainer minimises.

    Attributes:
        module: the loss, with its parameters.
        lr_factor: these are trained at ``lr_factor`` times the learning rate of the network.
    """

    module: nn.Module
    lr_factor = 1.0

    def begin_epoch(self, embed: Callable[[Tensor], Tensor]) -> RefreshReport | None:
        """Bring up to date what depends on the embeddings.

        Args:
            embed: returns the embeddings of the drawings with given indices, in evaluation mode.
        """
        return None

    @abstractmethod
    def batches(self) -> Iterator[Tensor]:
        """Yield the indices of each batch of the next epoch."""

    @abstractmethod
    def loss(self, embeddings: Tensor, rows: Tensor) -> Tensor:
        """The loss of a batch: its embeddings and its indices."""

    def end_step(self) -> None:
        """Called after each step whose loss was finite."""
        return

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on, apart from the module."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Load a state.

        Raises:
            ValueError, TypeError, RuntimeError: ``state`` cannot have returned it.
        """


class ProxyNCA(Objective):
    """Proxy-NCA on batches in a new random order in each epoch."""

    def __init__(self, recipe: ProxyNCARecipe, labels: Tensor) -> None:
        self.labels, self.batch_size = labels, recipe.batch_size
        self.module = losses.ProxyNCALoss(
            recipe.train_classes,
            recipe.embedding_size,
            softmax_scale=recipe.softmax_scale,
            exclude_positive=recipe.exclude_positive,
        )
        self.lr_factor = recipe.proxy_lr_factor
        self.shuffle = torch.Generator().manual_seed(recipe.seed)

    def batches(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.labels), generator=self.shuffle)
        whole = len(order) - len(order) % self.batch_size
        yield from order[:whole].split(self.batch_size)

    def loss(self, embeddings: Tensor, rows: Tensor) -> Tensor:
        return self.module(embeddings, self.labels[rows])

    def state(self) -> dict[str, Any]:
        return {"shuffle": self.shuffle.get_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        check_like("objective", state, self.state())
        self.shuffle.set_state(state["shuffle"])


class Magnet(Objective):
    """Magnet on batches of neighbouring clusters; the clusters are refreshed before each epoch.

    The first clusters are those of the untrained network's embeddings (the paper starts from a trained network).
    """

    def __init__(self, recipe: MagnetRecipe, labels: Tensor) -> None:
        if recipe.batch_size % recipe.examples_per_cluster or recipe.clusters_per_batch < 2:
            raise ValueError(
                f"a batch of {recipe.batch_size} is not made up of two or more clusters of "
                f"{recipe.examples_per_cluster}: give another --batch-size or --examples-per-cluster"
            )
        self.module = losses.MagnetLoss(recipe.alpha, reduction="none")
        self.index = ClusterIndex(labels, clusters_per_class=recipe.clusters_per_class, seed=recipe.seed)
        self.sampler = MagnetBatchSampler(
            self.index,
            recipe.clusters_per_batch,
            recipe.examples_per_cluster,
            batches=len(labels) // recipe.batch_size,
            seed=recipe.seed,
        )
        self._embedding_size = recipe.embedding_size
        self._step: tuple[Tensor, Tensor] | None = None

    def begin_epoch(self, embed: Callable[[Tensor], Tensor]) -> RefreshReport | None:
        return self.index.refresh(embed)

    def batches(self) -> Iterator[Tensor]:
        return map(torch.tensor, self.sampler)

    def loss(self, embeddings: Tensor, rows: Tensor) -> Tensor:
        clusters = self.index.clusters[rows]
        each = self.module(embeddings, clusters, self.index.cluster_classes)
        self._step = clusters, each.detach()
        return each.mean()

    def end_step(self) -> None:
        if self._step:
            self.sampler.update(*self._step)
            self._step = None

    def state(self) -> dict[str, Any]:
        return {"index": self.index.state_dict(), "sampler": self.sampler.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        check_keys("objective", state, ("index", "sampler"))
        for name, part in state.items():
            check_keys(name, part)
        self.index.load_state_dict(state["index"])
        self.sampler.load_state_dict(state["sampler"])
        centers = state["index"]["centers"]
        if centers is not None and centers.shape[1] != self._embedding_size:
            raise ValueError(f"the clusters' centers have {centers.shape[1]} coordinates, not {self._embedding_size}")
        if state["sampler"]["position"] not in (0, len(self.sampler)):
            raise ValueError("the sampler's state is not one between two epochs")

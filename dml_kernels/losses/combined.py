"""Wrappers of losses: a weighted sum of several, and two views of the same examples instead of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .cross_batch_memory import CrossBatchMemory
from .metric_loss import MetricLoss, check_takes_references


class MultipleLosses(torch.nn.Module):
    """sum_k weight_k loss_k(embeddings, labels, tuples_k), with the arguments of pytorch-metric-learning 2.9's class.

    Args:
        losses: a dict or a sequence of modules that are called with (embeddings, labels, indices_tuple), of this
            package or of pytorch-metric-learning.
        miners: modules that are called with (embeddings, labels) and return ``indices_tuple``. For a dict of losses, a
            dict of some of its keys; for a sequence, one of the same length, with None where a loss takes all pairs.
        weights: a number for each key or place; None: 1.

    Raises:
        ValueError, TypeError: keys, lengths or kinds that do not fit together.
    """

    def __init__(self, losses: Any, miners: Any = None, weights: Any = None):
        super().__init__()
        self.is_dict = isinstance(losses, Mapping)
        if not self.is_dict and not isinstance(losses, (Sequence, torch.nn.ModuleList)):
            raise TypeError(f"losses must be a dict or a list of losses; got {type(losses).__name__}")
        if not len(losses):
            raise ValueError("losses must hold at least one loss")
        keys = list(losses) if self.is_dict else list(range(len(losses)))
        for name, given in (("miners", miners), ("weights", weights)):
            if given is None:
                continue
            if isinstance(given, Mapping) != self.is_dict:
                raise TypeError(f"{name} must be a {'dict' if self.is_dict else 'list'}, as losses are; got "
                                f"{type(given).__name__}")  # fmt: skip
            found = set(given) if self.is_dict else set(range(len(given)))
            if found - set(keys) or ((name == "weights" or not self.is_dict) and found != set(keys)):
                raise ValueError(f"{name} must be for the losses {keys}; got {sorted(found, key=str)}")
        made: Any = torch.nn.ModuleDict if self.is_dict else torch.nn.ModuleList
        self.losses = made(losses)
        self.miners = None if miners is None else made(miners)
        self.weights = weights if weights is not None else dict.fromkeys(keys, 1) if self.is_dict else [1] * len(keys)

    def forward(self, embeddings: Tensor, labels: Tensor | None, indices_tuple: Any = None) -> Tensor:
        """The weighted sum.

        Raises:
            ValueError: both ``indices_tuple`` and miners are given.
        """
        if self.miners is not None and indices_tuple is not None:
            raise ValueError("indices_tuple and miners both choose the pairs; give one")
        found = []
        for key, loss in self.losses.items() if self.is_dict else enumerate(self.losses):
            miner = self.miners[key] if self.miners and (not self.is_dict or key in self.miners) else None
            tuples = indices_tuple if miner is None else miner(embeddings, labels)
            found.append(loss(embeddings, labels, tuples) * self.weights[key])
        return torch.stack(found).sum()


class SelfSupervisedLoss(torch.nn.Module):
    """A pair loss of two views of the same examples, with the arguments of pytorch-metric-learning 2.9's class.

    Row i of both views is one example, and every other row another class.

    Args:
        loss: a pair loss of this package.
        symmetric: whether the rows of both views are anchors, each compared with all other rows of both views. If
            False, only the rows of the first view are anchors, each compared with the second view.

    Raises:
        TypeError: anything but a pair loss that takes references.
    """

    def __init__(self, loss: MetricLoss, symmetric: bool = True):
        super().__init__()
        check_takes_references(loss)
        self.loss, self.symmetric = loss, symmetric

    # The same losses as for a memory: pair losses that take references.
    supported_losses = staticmethod(CrossBatchMemory.supported_losses)

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """The loss of two views (N, D)."""
        if ref_emb.shape != embeddings.shape:
            raise ValueError(f"both views must have one shape; got {tuple(embeddings.shape)} and "
                             f"{tuple(ref_emb.shape)}")  # fmt: skip
        labels = torch.arange(embeddings.size(0), device=embeddings.device)
        if self.symmetric:
            return self.loss(torch.cat((embeddings, ref_emb)), torch.cat((labels, labels)))
        return self.loss(embeddings, labels, ref_emb=ref_emb, ref_labels=labels.clone())

"""Samplers of class-balanced batches: some classes, and the same number of examples of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from ..labels import integers_by_position
from ..ops.checks import check_integer


class MPerClassSampler(Sampler[int]):
    """Draws ``m`` examples of each class in turn, for ``DataLoader(dataset, batch_size=B, sampler=...)``.

    Without ``batch_size`` a pass visits all classes in a new order. With it every run of ``batch_size`` indices holds
    ``batch_size / m`` different classes, drawn again for each run. A class of fewer than ``m`` examples gives all of
    them, and repeats some.

    Args:
        labels: (n,) labels of the data, integers or names (strings), in a tensor, array, list or pandas column, read by
            position.
        m: examples per class.
        batch_size: the batch size of the DataLoader, a multiple of m, at most m times the number of classes; None:
            passes over all classes.
        length_before_new_iter: the number of indices of an epoch, rounded down to whole batches (or passes).
        seed: of the draws. None: each epoch takes a new seed from torch's generator, so ``torch.manual_seed``
            determines the draws. With a seed, call :meth:`set_epoch` before each epoch, as with ``DistributedSampler``:
            the draws depend only on epoch and seed, so a run that continues from a checkpoint makes the same draws.
        ignore_index: the label of examples that are never drawn.

    Raises:
        ValueError: no labels, or sizes that do not fit; the message names the numbers.
        TypeError: labels that are neither integers nor names.
    """

    def __init__(
        self,
        labels: Any,
        m: int,
        batch_size: int | None = None,
        length_before_new_iter: int = 100000,
        *,
        seed: int | None = None,
        ignore_index: int = -100,
    ):
        values = integers_by_position("labels", labels, names=True).cpu().numpy()
        if values.ndim != 1:
            raise ValueError(f"labels must have shape (n,), one for each example; got {values.shape}")
        self.m_per_class, self.epoch = check_integer("m", m, 1), 0
        self.seed = None if seed is None else check_integer("seed", seed, 0)
        ignore_index = check_integer("ignore_index", ignore_index)
        self.batch_size = None if batch_size is None else check_integer("batch_size", batch_size, 1)
        # The examples sorted by class, and where each class starts: O(n), whatever the number of classes.
        self._examples = np.argsort(values, kind="stable")
        kept = values[self._examples] != ignore_index
        self._examples = self._examples[kept]
        self.labels, self._starts, self._sizes = self._classes(values[self._examples])
        if not self.labels.size:
            raise ValueError("labels name no example to draw")
        one_pass = self.m_per_class * self.labels.size
        unit = one_pass if self.batch_size is None else self.batch_size
        if self.batch_size is not None and (unit % self.m_per_class or unit > one_pass):
            raise ValueError(
                f"batch_size must be a multiple of m = {self.m_per_class} and at most m times the "
                f"{self.labels.size} classes, {one_pass}; got {unit}"
            )
        length = check_integer("length_before_new_iter", length_before_new_iter, 1)
        if length < unit:
            if self.batch_size is not None:
                raise ValueError(f"length_before_new_iter must be at least batch_size = {unit}; got {length}")
            unit = length  # one pass, cut
        self.list_size = length - length % unit

    def _classes(self, sorted_labels: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
        return np.unique(sorted_labels, return_index=True, return_counts=True)

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch, for use with ``seed``: each epoch has its own draws."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.list_size

    def __iter__(self) -> Iterator[int]:
        seed = int(torch.randint(1 << 62, ())) if self.seed is None else self.seed
        generator = np.random.default_rng((seed, self.epoch))
        classes = self.labels.size if self.batch_size is None else self.batch_size // self.m_per_class
        left = self.list_size
        while left > 0:
            # Drawing k of C classes takes O(k): a run of small batches over a million classes stays cheap.
            drawn = generator.choice(self.labels.size, classes, replace=False, shuffle=True)
            for which in drawn[: -(-left // self.m_per_class)]:
                start, size = self._starts[which], self._sizes[which]
                places = generator.permutation(size)[: self.m_per_class] if size <= 4 * self.m_per_class else (
                    generator.choice(size, self.m_per_class, replace=False)
                )  # fmt: skip
                if size < self.m_per_class:
                    again = generator.integers(size, size=self.m_per_class - size)
                    places = np.concatenate([places, again])
                yield from self._examples[start + places[:left]].tolist()
                left -= min(left, self.m_per_class)


class NPairsSampler(MPerClassSampler):
    """Draws two examples of each of ``batch_size / 2`` classes, for the N-pairs loss (Sohn 2016, NIPS).

    Classes with a single example make no pair and are left out.

    Args:
        labels: as in :class:`MPerClassSampler`.
        batch_size: as in :class:`MPerClassSampler`, with m = 2.
        length_before_new_iter: as in :class:`MPerClassSampler`.
        options: ``seed`` and ``ignore_index`` of :class:`MPerClassSampler`.
    """

    def __init__(self, labels: Any, batch_size: int, length_before_new_iter: int = 100000, **options: Any):
        super().__init__(labels, 2, batch_size, length_before_new_iter, **options)

    def _classes(self, sorted_labels: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
        labels, starts, sizes = super()._classes(sorted_labels)
        pairs = sizes > 1
        return labels[pairs], starts[pairs], sizes[pairs]

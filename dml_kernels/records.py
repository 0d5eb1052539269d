"""The attributes of losses, miners, distances and reducers that pytorch-metric-learning's record keepers read."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .ops.checks import check_flag

__all__ = ["Recorded"]


class Recorded(torch.nn.Module):
    """A module whose settings, and the statistics of its last call, are attributes that record keepers find.

    Args:
        collect_stats: whether record keepers see the ``statistics`` too.

    Attributes:
        collect_stats: bool.
        statistics: names of the numbers that a call sets on the module; they are 0 before the first call.
        fixed: names of settings that the module is built from; they cannot be assigned afterwards.
        unused: names of attributes with which the module in pytorch-metric-learning computes, and this one does not.

    Raises:
        ValueError: an assignment that would have no effect, or a different effect than in pytorch-metric-learning.
    """

    statistics: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def __init__(self, collect_stats: bool | None = None):
        super().__init__()
        self.collect_stats = collect_stats is not None and check_flag("collect_stats", collect_stats)
        for name in self.statistics:
            setattr(self, name, 0)

    def __setattr__(self, name: str, value: Any) -> None:
        kind = type(self).__name__
        if name in self.unused:
            raise ValueError(
                f"{kind} computes with no {name}, which pytorch-metric-learning's does: it can't be assigned"
            )
        if name in self.fixed and name in self.__dict__:
            raise ValueError(f"{name} can't be assigned: make a new {kind}({name}=...)")
        super().__setattr__(name, value)

    @property
    def _record_these(self) -> list[str]:
        """The names of the settings that are numbers.

        Record keepers of pytorch-metric-learning look for this property and the next by their names.
        """
        names = inspect.signature(type(self).__init__).parameters
        return [name for name in names if type(getattr(self, name, None)) in (int, float)]

    @property
    def _record_these_stats(self) -> list[str]:
        return list(self.statistics) if self.collect_stats else []

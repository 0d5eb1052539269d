"""What every loss shares: its registry entry, the checks on labels, the reduction over rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops.contract import as_int64, check_labels

__all__ = [
    "REDUCTIONS", "LossEntry", "as_int64", "check_class_weight", "check_labels", "check_reduction",
    "values_can_be_read",
]  # fmt: skip

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class LossEntry:
    """One loss for the tests and benchmarks to walk.

    ``function`` is the loss, ``reference`` the dense version from the paper with the same arguments, ``options`` the
    settings worth testing. ``family`` says what the loss compares embeddings with, and so the arguments it takes before
    its options: ``proxies`` (embeddings, proxies, labels), ``clusters`` (embeddings, clusters, cluster_classes),
    ``pairs`` (embeddings, labels, and as keywords ref_emb, ref_labels; the options are the Module's).
    """

    loss: type[torch.nn.Module]
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    paper: str
    options: Sequence[Mapping[str, Any]] = field(default_factory=lambda: ({},))
    family: str = "proxies"


def check_class_weight(class_weight: Tensor | None, num_classes: int) -> None:
    """A finite floating (num_classes,) tensor, or None. Values are looked at on the CPU, in eager mode."""
    if class_weight is None:
        return
    if not isinstance(class_weight, Tensor):
        raise TypeError(f"class_weight must be a torch.Tensor; got {type(class_weight).__name__}")
    if class_weight.shape != (num_classes,):
        raise ValueError(f"class_weight must have shape ({num_classes},); got {tuple(class_weight.shape)}")
    if class_weight.requires_grad:
        raise ValueError("class_weight gets no gradient; use class_weight.detach()")
    if values_can_be_read(class_weight) and not class_weight.isfinite().all():
        raise ValueError("class_weight must be finite")


def values_can_be_read(t: Tensor) -> bool:
    """Whether looking at values costs no synchronisation and does not break a graph being traced."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def check_reduction(reduction: str) -> None:
    """Refuses a reduction that no loss knows."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")

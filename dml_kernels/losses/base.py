"""What every loss shares: its registry entry, the checks on labels, the reduction over rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import check_choice, check_number, check_tensor
from ..ops.contract import FLOATS, as_int64, check_labels, values_can_be_read

__all__ = [
    "REDUCTIONS", "LossEntry", "as_int64", "check_class_weight", "check_labels", "check_reduction",
    "values_can_be_read",
]  # fmt: skip

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class LossEntry:
    """One loss, as tests and benchmarks see it.

    ``function`` is the loss, ``reference`` the dense version from the paper with the same arguments, ``options`` the
    settings worth testing. ``family`` says what the loss compares embeddings with, and so the arguments it takes before
    its options: ``proxies`` (embeddings, proxies, labels), ``clusters`` (embeddings, clusters, cluster_classes),
    ``pairs`` (embeddings, labels, and as keywords ref_emb, ref_labels; the options are the Module's).

    What does not hold for every loss is stated here, never by a list of names in a test:

    - ``by_row``: ``reduction="none"`` gives one value for each embedding (Proxy-Anchor's rows are the proxies).
    - ``lengths_matter``: the loss changes with the length of an embedding.
    - ``angular``: computed from the angle. Within sqrt(eps) of 0 and 180 degrees the value is good to sqrt(eps), and
      the gradient there has no direction.
    - ``centres``: rows of the bank to a class.
    - ``at_scale``: the options that multiply the scores by a number.
    - ``bank_sized``: tensors of the bank's size that a step allocates; 1 is its gradient.
    - ``op``, ``policy``: what the loss needs of a backend.
    """

    loss: type[torch.nn.Module]
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    paper: str
    options: Sequence[Mapping[str, Any]] = field(default_factory=lambda: ({},))
    family: str = "proxies"
    by_row: bool = True
    lengths_matter: bool = False
    angular: bool = False
    centres: int = 1
    at_scale: Callable[[float], Mapping[str, Any]] = lambda scale: {"scale": scale}
    bank_sized: int = 1
    op: str = "masked_logsumexp"
    policy: str = "linear"

    @property
    def asked(self) -> dict[str, str]:
        """The options that a backend must know, as :func:`dml_kernels.ops.choice.choose` takes them."""
        return {} if self.policy == "linear" else {"policy": self.policy}


# Filled by the package, which finds every file with an ENTRY.
REGISTRY: dict[str, LossEntry] = {}


def family(name: str) -> dict[str, LossEntry]:
    """The registered losses of one family: ``proxies``, ``clusters`` or ``pairs``; see LossEntry."""
    return {loss: entry for loss, entry in REGISTRY.items() if entry.family == name}


def check_class_weight(class_weight: Tensor | None, num_classes: int) -> None:
    """Refuse anything but None or a finite floating (num_classes,) tensor; values are read on the CPU in eager mode."""
    if class_weight is None:
        return
    check_tensor("class_weight", class_weight)
    if class_weight.dtype not in FLOATS:
        raise TypeError(f"class_weight must be a floating dtype; got {class_weight.dtype}. Use class_weight.float()")
    if class_weight.shape != (num_classes,):
        raise ValueError(f"class_weight must have shape ({num_classes},); got {tuple(class_weight.shape)}")
    if class_weight.requires_grad:
        raise ValueError("class_weight gets no gradient; use class_weight.detach()")
    if values_can_be_read(class_weight) and not class_weight.isfinite().all():
        raise ValueError("class_weight must be finite")


def check_reduction(reduction: str) -> None:
    """Refuse an unknown reduction."""
    check_choice("reduction", reduction, REDUCTIONS)


def check_label_range(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse labels other than classes or ``ignore_index``; values are read on the CPU, in eager mode."""
    if not values_can_be_read(labels):
        return
    bad = labels[(labels != ignore_index) & ((labels < 0) | (labels >= num_classes))]
    if bad.numel():
        raise ValueError(
            f"labels must be in [0, {num_classes}) or ignore_index ({ignore_index}): each names a class; "
            f"got {bad[0].item()}"
        )


def check_smoothing(label_smoothing: float) -> float:
    """Check the share of the target that is smoothed: from 0 to under 1."""
    share = check_number("label_smoothing", label_smoothing)
    if not 0 <= share < 1:
        raise ValueError(f"label_smoothing must be in [0, 1); got {share}")
    return share


def row_weight(class_weight: Tensor, labels: Tensor, like: Tensor) -> Tensor:
    """The weight of the class of each row, in the dtype of ``like``; any value for an ignored row."""
    inside = labels.clamp(0, class_weight.numel() - 1)
    return class_weight.to(device=like.device, dtype=like.dtype)[inside]


def reduce_rows(rows: Tensor, mass: Tensor, reduction: str) -> Tensor:
    """Reduce the values of rows.

    Args:
        rows: (N,) values.
        mass: (N,) numbers or booleans: what each row counts in the mean.
        reduction: ``mean``: the sum divided by the sum of ``mass``, 0 where that is 0; ``sum``; ``none``: the rows.
    """
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    count = mass.sum()
    return total / (count.clamp_min(1) if mass.dtype == torch.bool else torch.where(count == 0, 1, count))

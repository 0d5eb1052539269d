"""Which pairs are same and different, for the dense references; production has a separate version."""

from __future__ import annotations

import torch
from torch import Tensor


def sets(
    y: Tensor, c: Tensor | None, m: int, exclude: Tensor | None = None, ignore_index: int = -100, first_class: int = 0
) -> tuple[Tensor, Tensor]:
    """(N, m) bool each: a row's bank entries of its own label, and of other labels.

    Without c column j has the label first_class + j.
    """
    columns = torch.arange(m, device=y.device)
    match = y[:, None] == (first_class + columns if c is None else c)
    used = (y != ignore_index)[:, None].expand_as(match)
    if c is not None:
        used = used & (c != ignore_index)
    if exclude is not None:
        for entry in exclude.unbind(1) if exclude.dim() == 2 else (exclude,):
            used = used & (entry[:, None] != columns)
    return match & used, ~match & used

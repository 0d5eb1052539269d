"""The bank sorted by label, and where the class of each row lies in it. Shapes do not depend on the labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClassRanges(NamedTuple):
    """Where the class of each row lies in the bank sorted by label, found by binary search.

    Args:
        order: (M,) bank indices, sorted by label.
        start, stop: (N,) the range of the row's class in ``order``; empty for an ignored row.
        own: (N, E) the places of the row's E excluded entries in ``order`` if these are of its class; else -1.
        positives, negatives: (N,) int64, the number of each for every row.
    """

    order: Tensor
    start: Tensor
    stop: Tensor
    own: Tensor
    positives: Tensor
    negatives: Tensor

    @staticmethod
    def of(y: Tensor, c: Tensor, exclude: Tensor | None, ignore_index: int) -> ClassRanges:
        """For rows labelled y (N,) and a bank labelled c (M,); exclude is (N,) or (N, 2), no entry twice in a row."""
        labels, order = torch.sort(c, stable=True)
        start = torch.searchsorted(labels, y)
        stop = torch.searchsorted(labels, y, right=True)
        stop = torch.where(y == ignore_index, start, stop)
        negatives = (c != ignore_index).sum() - (stop - start)
        if exclude is None or c.numel() == 0:
            own = torch.full_like(y, -1)[:, None]
        else:
            exclude = exclude if exclude.dim() == 2 else exclude[:, None]
            there, at = exclude >= 0, exclude.clamp_min(0)
            place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=c.device))[at]
            own = torch.where(there & (place >= start[:, None]) & (place < stop[:, None]), place, -1)
            label = c[at]
            negatives = negatives - (there & (label != y[:, None]) & (label != ignore_index)).sum(1)
        negatives = torch.where(y == ignore_index, 0, negatives)
        return ClassRanges(order, start, stop, own, stop - start - (own >= 0).sum(1), negatives)


def count_pairs(y: Tensor, c: Tensor, exclude: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Returns only ``positives`` and ``negatives``, in half as many steps."""
    labels = c.sort().values
    positives = torch.searchsorted(labels, y, right=True) - torch.searchsorted(labels, y)
    others = (c != ignore_index).sum()
    if exclude is not None and c.numel():
        left_out = torch.where(exclude >= 0, c[exclude.clamp_min(0)], ignore_index)
        positives = positives - (left_out == y).long()
        others = others - (left_out != ignore_index).long()
    ignored = y == ignore_index
    return positives.masked_fill(ignored, 0), (others - positives).masked_fill(ignored, 0)

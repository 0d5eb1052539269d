"""Which pairs are same, different, ignored and excluded, for all comparisons in plain PyTorch.

The references have a separate version, :mod:`dml_kernels.reference.sets`, so that each checks the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The label that is in no pair, if a call does not name another one.
IGNORE_INDEX = -100


class Sets(NamedTuple):
    """Which of some bank entries are in the sets of N rows, (N, chunk) bool each.

    ``same`` are the entries of the row's label, ``different`` those of other labels, and ``labelled`` the entries of
    the row's label including the excluded one.
    """

    same: Tensor
    different: Tensor
    labelled: Tensor


def left_out(exclude: Tensor, columns: Tensor) -> Tensor:
    """(N, K) bool: which of ``columns``, (K,) or (N, K), a row excludes; it names one entry, (N,), or E, (N, E)."""
    first, *others = exclude.unbind(1) if exclude.dim() == 2 else (exclude,)
    found = first[:, None] == columns
    for other in others:
        found |= other[:, None] == columns
    return found


def sets_of(
    y: Tensor, c: Tensor | None, exclude: Tensor | None, ignore_index: int, k: slice, first_class: int = -1
) -> Sets:
    """The sets of rows labelled y (N,) among the bank entries ``k``.

    Args:
        y: (N,) labels of the rows.
        c: (M,) labels of the bank; None: each entry's own index, counted from ``first_class`` on.
        exclude: (N,) bank index that is in no set of the row, -1 for none, or (N, E) several; or None.
        ignore_index: rows and bank entries of this label are in no set.
        k: bank entries, with a start and a stop.
        first_class: the label of the first bank entry where c is None; -1 for 0.
    """
    columns = torch.arange(k.start, k.stop, device=y.device)
    labels = c[k] if c is not None else columns if first_class < 0 else columns + first_class
    match, row = y[:, None] == labels, (y != ignore_index)[:, None]
    used = row.expand_as(match)
    if c is not None:
        used = used & (labels != ignore_index)
    if exclude is not None:
        used = used & ~left_out(exclude, columns)
    return Sets(match & used, ~match & used, match & row)

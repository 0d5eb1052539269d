"""Gathers the arguments of a call of a loss from all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from ..ops.checks import check_choice
from ..ops.contract import FLOATS, as_int64, check_matrix
from ..pairs.batch import check_tuples
from .collectives import Group, RankRows, exchange, world_size

GRADIENTS = ("mean", "sum")


class GlobalTuple(tuple[Tensor, ...]):
    """Pairs or triplets that DistributedMinerWrapper found: rows of the whole batch, the same list on every rank.

    With ``efficient`` it holds only those of this rank: anchors are rows of the rank's own batch, positives and
    negatives rows of the whole batch.
    """

    efficient: bool

    def __new__(cls, tensors: Iterable[Tensor], efficient: bool = False) -> GlobalTuple:
        """Make a tuple of the tensors, marked by its type."""
        self = super().__new__(cls, tensors)
        self.efficient = efficient
        return self


class Gathered(NamedTuple):
    """The arguments of a call over the batches of all ranks, rank after rank: ``loss(*gathered)``."""

    embeddings: Tensor
    labels: Tensor | None
    indices_tuple: tuple[Tensor, ...] | None
    ref_emb: Tensor | None
    ref_labels: Tensor | None


def gather(
    embeddings: Tensor, labels: Tensor | None = None, indices_tuple: Any = None, ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None, *, group: Group = None, gradient: str = "mean",
) -> Gathered:  # fmt: skip
    """Join the batches of all ranks to one batch, on every rank; :mod:`dml_kernels.distributed` explains the gradient.

    Args:
        embeddings: (N_r, D) floating point; N_r may differ between ranks and may be 0.
        labels: (N_r,) or (N_r, K) integers, or None.
        indices_tuple: a miner's pairs or triplets of the rank's own rows; they become rows of the whole batch.
        ref_emb: (M_r, D) floating point, or None; where it is ``embeddings``, the result is the batch itself.
        ref_labels: (M_r,) integers, or None.
        group: a process group; None: all ranks.
        gradient: how gradients are combined over the ranks afterwards: ``mean``, as in DistributedDataParallel, or
            ``sum``.

    Returns:
        The arguments of a call of a loss: ``loss(*gather(...))``. On one rank they are those given.

    Raises:
        ValueError: an index outside the rank's rows; arguments that differ in more than length between the ranks.
    """
    check_choice("gradient", gradient, GRADIENTS)
    ranks = world_size(group)
    if ranks == 1:
        return Gathered(embeddings, labels, indices_tuple, ref_emb, ref_labels)
    if isinstance(indices_tuple, GlobalTuple) and indices_tuple.efficient:
        raise ValueError("indices_tuple is of a miner with efficient=True; gather takes one with efficient=False")
    parts = Parts(embeddings, labels, ref_emb, ref_labels, group, indices_tuple)
    found = parts.gathered()
    if gradient == "sum":
        scaled = [divide_gradient(t, ranks) for t in (found.embeddings, found.ref_emb)]
        refs = scaled[0] if found.ref_emb is found.embeddings else scaled[1]
        found = found._replace(embeddings=scaled[0], ref_emb=refs)
    return found._replace(indices_tuple=parts.whole_tuples())


def divide_gradient(t: Any, ranks: int) -> Any:
    """A view of ``t`` whose gradient is divided by ``ranks``; None for None."""
    if t is None or not t.requires_grad:
        return t
    t = t.view_as(t)
    t.register_hook(lambda grad: grad / ranks)
    return t


class Parts:
    """The checked arguments of this rank, and the numbers of rows on all ranks, from one exchange of numbers.

    Args:
        embeddings, labels, ref_emb, ref_labels, group: as in :func:`gather`.
        indices_tuple: a GlobalTuple, or a tuple of the rank's own rows.
        enqueue_mask: (N_r,) bool, for a CrossBatchMemory.
        places: where positives and negatives are indices into something that all ranks share (a memory), its size.

    Raises:
        ValueError: as :func:`gather`.
    """

    def __init__(
        self, embeddings: Tensor, labels: Tensor | None, ref_emb: Tensor | None, ref_labels: Tensor | None,
        group: Group, indices_tuple: Any = None, enqueue_mask: Tensor | None = None, places: int | None = None,
    ):  # fmt: skip
        self.embeddings, self.labels = _checked("embeddings", embeddings, "labels", labels)
        self.same_emb, self.same_labels = ref_emb is embeddings, ref_labels is labels
        self.ref_emb, self.ref_labels = None, None
        if ref_emb is not None:
            self.ref_emb, self.ref_labels = _checked("ref_emb", ref_emb, "ref_labels", ref_labels)
        elif ref_labels is not None:
            raise ValueError("ref_emb and ref_labels come together; ref_emb is missing")
        self.tuples, self.marked = check_tuples(indices_tuple, embeddings), isinstance(indices_tuple, GlobalTuple)
        self.mask, self.group, self.places = enqueue_mask, group, places
        self._check_tuples()
        self._check_mask()
        known = {
            **_signature("embeddings", self.embeddings, self.labels),
            "ref_emb": 0 if ref_emb is None else 1 + self.same_emb + 2 * self.same_labels,
            **_signature("ref_emb", self.ref_emb, self.ref_labels),
            "the kind of indices_tuple": 0 if self.tuples is None else len(self.tuples) + 10 * self.marked,
            "whether enqueue_mask is given": int(enqueue_mask is not None),
        }
        lists = _lists(() if self.tuples is None or self.marked else self.tuples)
        lengths = [0 if t is None else t.size(0) for t in (self.embeddings, self.ref_emb, *lists)]
        lengths += [0] * (4 - len(lengths))
        by_rank = exchange([*known.values(), *lengths], self.embeddings.device, group)
        check_alike(known, by_rank)
        self.rows, self.ref_rows, *self.list_rows = (
            RankRows(sizes, distributed.get_rank(group), group) for sizes in list(zip(*by_rank))[len(known) :]
        )

    def _check_tuples(self) -> None:
        if self.tuples is None or self.marked:
            return
        rows = self.embeddings.size(0)
        others = rows if self.ref_emb is None else self.ref_emb.size(0)
        others = others if self.places is None else self.places
        for t, limit in zip(self.tuples, _by_kind(self.tuples, rows, others), strict=True):
            if t.numel() and not 0 <= int(t.min()) <= int(t.max()) < limit:
                raise ValueError(
                    f"indices_tuple must hold this rank's own rows, in [0, {limit}); got {int(t.min())} to "
                    f"{int(t.max())}. A DistributedMinerWrapper's tuple, of rows of the whole batch, is known by its "
                    "type: pass it on as it is"
                )

    def _check_mask(self) -> None:
        mask = self.mask
        if mask is not None and (mask.dtype != torch.bool or mask.shape != self.embeddings.shape[:1]):
            wanted = f"bool of shape ({self.embeddings.size(0)},)"
            raise ValueError(f"enqueue_mask must be {wanted}; got {mask.dtype} {tuple(mask.shape)}")

    def gathered(self) -> Gathered:
        """Embeddings, labels and references of all ranks, without tuples."""
        x, y = self.rows.gather(self.embeddings), None if self.labels is None else self.rows.gather(self.labels)
        if self.ref_emb is None:
            return Gathered(x, y, None, None, None)
        w = x if self.same_emb else self.ref_rows.gather(self.ref_emb)
        if self.same_labels or self.ref_labels is None:
            return Gathered(x, y, None, w, y if self.same_labels else None)
        return Gathered(x, y, None, w, self.ref_rows.gather(self.ref_labels))

    def _shift(self) -> int:
        """What turns indices of the rank's own positives and negatives into those of the whole batch, by addition."""
        if self.places is not None:
            return 0
        return self.rows.start if self.ref_emb is None or self.same_emb else self.ref_rows.start

    def own_tuples(self) -> tuple[Tensor, ...] | None:
        """The tuple with anchors in the rank's own rows, and positives and negatives in the whole batch."""
        if self.tuples is None or self.marked:
            return self.tuples
        return tuple(t + by for t, by in zip(self.tuples, _by_kind(self.tuples, 0, self._shift()), strict=True))

    def whole_tuples(self) -> tuple[Tensor, ...] | None:
        """The tuples of all ranks as one tuple, as rows of the whole batch."""
        if self.tuples is None or self.marked:
            return self.tuples
        shifts = _by_kind(self.tuples, self.rows.start, self._shift())
        lists = _lists(tuple(t + by for t, by in zip(self.tuples, shifts, strict=True)))
        whole = [rows.gather(t) for rows, t in zip(self.list_rows, lists)]
        return tuple(column for listed in whole for column in listed.unbind(1))

    def references(self, found: Gathered) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the rank's rows are compared with, its labels, and the place of each row's own copy in it, if any."""
        if self.ref_emb is None:
            return found.embeddings, found.labels, self.rows.places(self.embeddings.device)
        assert found.ref_emb is not None
        return found.ref_emb, found.ref_labels, self.rows.places(self.embeddings.device) if self.same_emb else None

    def whole_mask(self) -> Tensor | None:
        """The masks of all ranks as one mask."""
        if self.mask is None:
            return None
        return self.rows.gather(self.mask.to(self.embeddings.device, torch.int64)).bool()


def _lists(tuples: tuple[Tensor, ...]) -> list[Tensor]:
    """A tuple as tensors whose rows belong together: (T, 3), or (P, 2) and (P', 2)."""
    groups = (tuples[:2], tuples[2:]) if len(tuples) == 4 else (tuples,)
    return [torch.stack(group, 1) for group in groups if group]


def _by_kind(tuples: tuple[Tensor, ...], anchors: int, others: int) -> tuple[int, ...]:
    """A number for each tensor of a tuple: one for anchors, one for positives and negatives."""
    return (anchors, others, others) if len(tuples) == 3 else (anchors, others, anchors, others)


def _checked(name: str, x: Tensor, labels_name: str, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    check_matrix(name, x)
    if labels is None:
        return x, None
    y = as_int64(labels_name, labels, x)
    if y.dim() not in (1, 2) or y.size(0) != x.size(0):
        raise ValueError(f"{labels_name} must have shape ({x.size(0)},), one for each embedding; got {tuple(y.shape)}")
    return x, y


def _signature(name: str, x: Tensor | None, y: Tensor | None) -> dict[str, int]:
    """What must be the same on all ranks for collectives to fit together, as numbers."""
    width = -1 if y is None else y.size(1) if y.dim() == 2 else 0
    facts = (0, 0, 0) if x is None else (x.size(1), FLOATS.index(x.dtype), x.requires_grad and torch.is_grad_enabled())
    names = (f"{name}.size(1)", f"{name}.dtype", f"{name}.requires_grad", f"labels of {name}")
    return dict(zip(names, (*map(int, facts), width), strict=True))


def check_alike(known: dict[str, int], by_rank: list[list[int]]) -> None:
    """Raise ValueError, on every rank, for facts that differ between ranks; the ranks would wait for each other.

    Args:
        known: name of a fact -> its value on this rank.
        by_rank: the values on each rank, in the same order.
    """
    for i, name in enumerate(known):
        values = [numbers[i] for numbers in by_rank]
        if len(set(values)) > 1:
            low, high = values.index(min(values)), values.index(max(values))
            raise ValueError(f"{name} must be the same on every rank; ranks {low} and {high} differ")

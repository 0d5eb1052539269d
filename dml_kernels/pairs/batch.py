"""The batch that a loss or a miner compares: pytorch-metric-learning's arguments, checked once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distances import Distance
from ..ops.contract import accumulate_dtype, as_int64, check_labels, check_matrix, check_pair, product_dtype
from ..ops.normalized_distance import matrix_in
from .sets import IGNORE_INDEX, sets_of

# The most scores of a tile: 16 MB in fp32.
TILE_ELEMENTS = 1 << 22


class BankArguments(NamedTuple):
    """The arguments w, c and exclude of an op."""

    w: Tensor | None
    c: Tensor | None
    exclude: Tensor | None


class Batch(NamedTuple):
    """Embeddings and what they are compared with; labels as int64 on the embeddings' device.

    Args:
        x: (N, D) embeddings.
        y: (N,) their labels; None where the tuples determine everything.
        w: (M, D) bank that the embeddings are compared with: the batch itself, or the references.
        c: (M,) the labels of the bank.
        exclude: (N,) bank index of each row's own copy, -1 for none; None where the references hold no copies.
        tuples: a miner's pairs (a1, p, a2, n) or triplets (a, p, n); None for all that the labels define.
    """

    x: Tensor
    y: Tensor | None
    w: Tensor
    c: Tensor | None
    exclude: Tensor | None
    tuples: tuple[Tensor, ...] | None

    @property
    def is_own_bank(self) -> bool:
        """Whether the embeddings are compared with themselves, under the same labels."""
        return self.w is self.x and self.c is self.y

    @property
    def bank(self) -> BankArguments:
        """The bank as the ops take it: three times None where it is the batch itself."""
        return BankArguments(None, None, None) if self.is_own_bank else BankArguments(self.w, self.c, self.exclude)


class Tile(NamedTuple):
    """Some rows compared with the whole bank: scores (R, M), larger is closer, and the entries of both sets."""

    rows: slice
    scores: Tensor
    same: Tensor
    different: Tensor


def check_tuples(tuples: Any, like: Tensor) -> tuple[Tensor, ...] | None:
    """A miner's tuple as int64 index tensors on the embeddings' device: 3 of one length, or 4 of two lengths."""
    if tuples is None:
        return None
    if not isinstance(tuples, Sequence) or len(tuples) not in (3, 4):
        got = f"{len(tuples)} of them" if isinstance(tuples, Sequence) else type(tuples).__name__
        raise ValueError(f"indices_tuple must be triplets (a, p, n) or pairs (a1, p, a2, n); got {got}")
    out = tuple(_indices(t, like) for t in tuples)
    lengths = [t.numel() for t in out]
    groups = [lengths] if len(out) == 3 else [lengths[:2], lengths[2:]]
    if any(t.dim() != 1 for t in out) or any(len(set(group)) > 1 for group in groups):
        raise ValueError(
            "indices_tuple needs one-dimensional index tensors, of one length for (a, p, n) and of equal lengths "
            f"within (a1, p) and (a2, n); got {[tuple(t.shape) for t in out]}"
        )
    return out


def _indices(given: Any, like: Tensor) -> Tensor:
    """One tensor or list of a tuple, as int64."""
    if not isinstance(given, Tensor):
        given = torch.as_tensor(given)
        given = given.long() if given.numel() == 0 else given  # an empty list has no particular dtype
    if given.dtype == torch.bool:
        raise TypeError("indices_tuple must hold indices, not masks; use mask.nonzero()")
    return as_int64("indices_tuple", given, like)


def make_batch(
    embeddings: Tensor, labels: Tensor | None, indices_tuple: Any = None, ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None, exclude: Tensor | None = None,
) -> Batch:  # fmt: skip
    """Checks the arguments of a call of a loss or miner. ``exclude`` has the places of own copies in the references.

    Where ``ref_emb`` is the same tensor as ``embeddings``, the batch is compared with itself, and each row's own copy
    is left out.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or combination; the message names the fix.
    """
    own_batch = ref_emb is None or ref_emb is embeddings
    w = embeddings if ref_emb is None else ref_emb
    if own_batch:
        check_matrix("embeddings", embeddings)  # there may be no rows; a loss is then 0
    else:
        check_pair(embeddings, w, ("embeddings", "ref_emb"))
    tuples = check_tuples(indices_tuple, embeddings)
    if labels is None and tuples is None:
        raise ValueError("labels are needed where no indices_tuple says which pairs to compare")
    y = None if labels is None else check_labels(labels, embeddings)
    if (ref_emb is None) != (ref_labels is None) and not (ref_labels is None and tuples is not None):
        missing = "ref_labels" if ref_labels is None else "ref_emb"
        raise ValueError(f"ref_emb and ref_labels come together; {missing} is missing")
    if (own_batch and ref_labels is labels) or ref_emb is None:
        c = y
    else:
        c = None if ref_labels is None else check_labels(ref_labels, w, "ref_labels")
    if own_batch:
        exclude = torch.arange(embeddings.size(0), device=embeddings.device)
    return Batch(embeddings, y, w, c, exclude, tuples)


def tiles(batch: Batch, distance: Distance) -> Iterator[Tile]:
    """Yields the scores of some rows at a time: at most ``TILE_ELEMENTS`` scores, but at least one row."""
    x, y, w, c, exclude, _ = batch
    assert y is not None
    assert c is not None
    step = max(1, TILE_ELEMENTS // w.size(0))
    dtype = accumulate_dtype(product_dtype(x, w))
    for start in range(0, x.size(0), step):
        rows = slice(start, start + step)
        # In half precision close pairs would tie, and fp16 cannot represent a distance above 65504.
        values = matrix_in(dtype, x[rows], w, distance.metric, normalize=distance.normalize_embeddings)
        own_copy = None if exclude is None else exclude[rows]
        same, different, _ = sets_of(y[rows], c, own_copy, IGNORE_INDEX, slice(0, w.size(0)))
        yield Tile(rows, values if distance.is_inverted else values.neg_(), same, different)

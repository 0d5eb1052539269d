r"""What the softmax losses share: cross-entropy of scores against a bank, with a margin only on the positive's score.

A row with label y and logits z_j = scale s_j has, with z'_y the positive's logit after the margin::

    l = -z'_y + log(exp(z'_y) + sum_{j != y} exp(z_j)) = log(1 + exp(L- - z'_y))

The op gives z_y and L-, both (N,); the margin is a function of z_y. So no loss sees an N x M matrix, and none gathers
w[y]. Label smoothing e adds e (z'_y - mean of all logits). Labels (N, L), padded with ``ignore_index``, are targets of
L classes: a row is then the mean of -log p(label) over its labels, each with its own margin; a row of L labels costs as
much as L rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack as Unpack  # comes with PyTorch; typing has it from Python 3.11

from .. import logspace
from ..distances import cosines
from ..ops import choice
from ..ops.checks import check_integer, check_number, check_positive, check_tensor
from ..ops.contract import (
    accumulate_dtype,
    check_eps,
    check_pair,
    check_vector,
    product_dtype,
    split_metric,
)
from ..ops.masked_logsumexp import logsumexp_of
from ..ops.normalized_distance import normalized_distance
from ..ops.signatures import Bank, Spec
from .base import (
    as_int64,
    check_class_weight,
    check_labels,
    check_reduction,
    check_smoothing,
    reduce_rows,
    row_weight,
)


class SoftmaxOptions(TypedDict, total=False):
    """The keyword arguments of every softmax loss, in addition to its own settings; C classes.

    class_weight (None): (C,), a weight for each label; the mean is then weighted.
    label_smoothing (0): as in ``torch.nn.functional.cross_entropy``, except that class weights weigh whole rows.
    ignore_index (-100): rows with this label contribute 0 and are not counted in the mean.
    reduction ("mean"): ``mean`` over counted rows, ``sum``, or ``none`` for (N,).
    eps (1e-12): guards the division by the norm.
    backend (None): overrides the choice of backend.
    """

    class_weight: Tensor | None
    label_smoothing: float
    ignore_index: int
    reduction: str
    eps: float
    backend: str | None


class Logits(NamedTuple):
    """How scores become logits.

    Args:
        scale: multiplies the scores: a number, or a () tensor, which gets a gradient.
        target: (the positive's logits (N,), the scale) -> its logits after the margin; None without a margin.
        metric: a metric of the ops.
        by_length: whether the length of the embedding multiplies its scores. Without a margin they are x . w^, linear
            in x down to the zero vector; with a margin, an embedding shorter than eps has no gradient.
        by_lengths: whether the lengths of the embedding and of the proxies multiply the scores, which are then x . w.
        policy, policy_params: how the centres of a class are pooled, as in functional.masked_logsumexp; linear where
            there is one centre.
    """

    scale: float | Tensor
    target: Callable[[Tensor, float | Tensor], Tensor] | None = None
    metric: str = "cosine"
    by_length: bool = False
    by_lengths: bool = False
    policy: str = "linear"
    policy_params: tuple[float, ...] = ()

    @property
    def centres(self) -> int:
        """The number of bank rows of a class."""
        return int(self.policy_params[0]) if self.policy.endswith("_pool") else 1

    def scale_of(self, embeddings: Tensor, dtype: torch.dtype, eps: float = 1e-12) -> float | Tensor:
        """The factor that multiplies the cosines: a number, () or (N,)."""
        if not (self.by_length or self.by_lengths):
            return self.scale
        length = torch.linalg.vector_norm(embeddings, dim=1, dtype=accumulate_dtype(dtype))
        if self.target is None and self.by_length:  # what the cosine was divided by
            length = length.clamp_min(eps)
        # A scale must be finite; the scores of an embedding that is not finite are NaN already.
        return torch.where(length.isfinite(), length, 1) * self.scale

    def __call__(self, embeddings: Tensor, bank: Tensor) -> Tensor:
        """The N x M matrix of logits without a margin; no loss builds it."""
        if self.metric == "cosine":
            s = cosines(embeddings, bank)
        else:
            s = normalized_distance(embeddings, bank, self.metric)
        if self.metric.endswith("euclidean"):
            s = -s
        if self.centres > 1:
            s = s.unflatten(1, (-1, self.centres))
            s = s.amax(2) if self.policy == "max_pool" else ((s / self.policy_params[1]).softmax(2) * s).sum(2)
        scale = self.scale_of(embeddings, s.dtype)
        if self.by_lengths:
            s = s * torch.linalg.vector_norm(bank, dim=1, dtype=accumulate_dtype(s.dtype))
        return s * (scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale)


def check_scale(name: str, scale: float | Tensor) -> float | Tensor:
    """Check a scale: a positive number; a () tensor stays as it is."""
    if isinstance(scale, Tensor):
        check_tensor(name, scale)
        if scale.dim() or not scale.is_floating_point():
            raise ValueError(f"{name} must be a number or a floating () tensor; got {scale.dtype} {tuple(scale.shape)}")
        return scale
    return check_positive(name, scale)


def softmax_loss(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    logits: Logits,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """The loss of embeddings (N, D) against proxies (C K, D), the K rows of a class together; see the module.

    Args:
        embeddings: (N, D), of any norm.
        proxies: (C K, D), of any norm; the dtypes may differ.
        labels: (N,) integers, classes; or (N, L) padded with ``ignore_index``: a row is then the mean over its labels,
            each with its own margin.
        logits: how scores become logits; its ``centres`` are K, 1 for most losses.
        class_weight, label_smoothing, ignore_index, reduction, eps, backend: as in :class:`SoftmaxOptions`.

    Returns:
        The loss in fp32, or fp64 where either input is. With one class it is 0; with every row ignored 0, connected to
        the graph.

    Raises:
        ValueError, TypeError: labels out of range, wrong shapes, dtypes or options; the message names the fix.
    """
    check_pair(embeddings, proxies, ("embeddings", "proxies"))
    check_reduction(reduction)
    label_smoothing = check_smoothing(label_smoothing)
    ignore_index, eps, centres = check_integer("ignore_index", ignore_index), check_eps(eps), logits.centres
    if proxies.size(0) % centres:
        raise ValueError(f"proxies must have {centres} rows for each class; got {proxies.size(0)} rows")
    classes = proxies.size(0) // centres
    check_class_weight(class_weight, classes)
    embeddings, y, each = _one_label_a_row(embeddings, labels)
    if isinstance(logits.scale, Tensor) and logits.scale.device != embeddings.device:
        where = f"{logits.scale.device} and embeddings on {embeddings.device}"
        raise ValueError(f"scale (called temperature or la in some losses) is on {where}; move one with .to()")
    dtype = product_dtype(embeddings, proxies)
    scale = logits.scale_of(embeddings, dtype, eps)
    metric, unit = split_metric("dot" if logits.by_lengths else logits.metric, not logits.by_lengths)
    factor = logits.scale if logits.by_lengths else scale
    tensor, k = (factor, 1.0) if isinstance(factor, Tensor) else (None, check_number("scale", factor))
    check_vector("scale", tensor, embeddings.size(0), embeddings, integer=False, scalar=True)
    spec = Spec(
        metric=metric, normalize=unit, logit=[k, 0.0, k, 0.0], eps=eps, ignore_index=ignore_index, dtype=dtype,
        sums=label_smoothing > 0, policy=logits.policy, policy_params=[*logits.policy_params],
    )  # fmt: skip
    bank = Bank(embeddings, proxies, y, scale=tensor)
    out = logsumexp_of(bank, choice.settle("masked_logsumexp", bank, spec, backend))
    counted = y != ignore_index
    ignored = ~counted
    if logits.by_lengths:  # (M,) lengths, whose gradient takes tensors of the bank's size
        lengths = torch.linalg.vector_norm(proxies, dim=1, dtype=accumulate_dtype(dtype))
        scale = scale * lengths[torch.where(counted, y, 0).clamp(0, classes - 1)]
    # fp32 has few digits after the point for logits of 64: the few numbers of a row are compared in fp64.
    positive = out.same.masked_fill(ignored, 0).double()
    if logits.target is not None:
        positive = logits.target(positive, scale.double() if isinstance(scale, Tensor) else scale)
    gap = out.different - positive  # of an ignored row -inf less a number
    if isinstance(scale, Tensor):  # which may have no number for it
        gap = gap.masked_fill(ignored, -math.inf)
    rows = logspace.log1pexp(gap)
    if label_smoothing:
        assert out.sum_different is not None
        mean = (out.sum_different + positive) / classes
        rows = rows + label_smoothing * (positive - mean).masked_fill(ignored, 0)
    rows = rows.to(out.same.dtype)
    mass = counted
    if class_weight is not None:
        mass = torch.where(counted, row_weight(class_weight, y, rows), 0)
        rows = torch.where(counted, rows * mass, 0)
    if each > 1:
        number = counted.view(-1, each).sum(1).clamp_min(1)
        rows, mass = (t.view(-1, each).sum(1) / number for t in (rows, mass))
    return reduce_rows(rows, mass, reduction)


def _one_label_a_row(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """Rows, their labels (rows,), and how many rows represent one embedding: L where labels are (N, L)."""
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return embeddings, check_labels(labels, embeddings), 1
    check_tensor("labels", labels)
    n, each = labels.shape
    if n != embeddings.size(0) or each == 0:
        raise ValueError(
            f"labels must have shape ({embeddings.size(0)},), or ({embeddings.size(0)}, L) padded with ignore_index "
            f"for several labels a row; got {tuple(labels.shape)}"
        )
    y = as_int64("labels", labels, embeddings).flatten()
    return (embeddings.repeat_interleave(each, 0) if each > 1 else embeddings), y, each


def unit(t: Tensor, eps: float) -> Tensor:
    """Unit vectors, for the dense references."""
    return t / t.norm(dim=1, keepdim=True).clamp_min(eps)


def on_targets(scores: Tensor, y: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """(N, M) scores with each row's own one changed; for the dense references."""
    own = torch.nn.functional.one_hot(y, scores.size(1)).bool()
    return torch.where(own, change(scores.gather(1, y[:, None])), scores)


def dense_cross_entropy(
    logits: Callable[[Tensor, Tensor, Tensor], Tensor],
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    lengths: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """PyTorch's cross-entropy of ``logits(x, w, y)`` (n, C), with the margin in; for the dense references.

    x (n, D) and w (C K, D) are unit vectors, y (n,) the labels of x. ``lengths`` (N, 1) or (N, C) multiply the logits.
    """
    y = labels.reshape(embeddings.size(0), -1)
    kept = y != ignore_index
    row = kept.nonzero()[:, 0]
    z = logits(unit(embeddings[row], eps), unit(proxies, eps), y[kept])
    if lengths is not None:
        z = z * lengths[row]
    each = torch.nn.functional.cross_entropy(z, y[kept], label_smoothing=label_smoothing, reduction="none")
    weight = torch.ones_like(each) if class_weight is None else class_weight.to(each)[y[kept]]
    share = weight / kept.sum(1)[row]
    rows = each.new_zeros(len(y)).index_add(0, row, each * share)
    if reduction == "none":
        return rows
    mass = share.sum()
    return rows.sum() / mass if reduction == "mean" and mass else rows.sum()

r"""SoftTriple (Qian et al. 2019, arXiv 1909.05235): K soft-pooled centres a class, a margin on the positive.

With s_ijk = x^_i . w^_jk of unit vectors, the loss of a row with label y is::

    S_ij = sum_k softmax_k(s_ijk / gamma) s_ijk
    -la (S_iy - margin) + log( exp(la (S_iy - margin)) + sum_{j != y} exp(la S_ij) )

The paper adds tau (0.2) times a regulariser that lets centres of one class merge:
``weight_regularizer=SparseCentersRegularizer(C, K), weight_reg_weight=0.2``. The pooling is inside the tile: no
N x M x K matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances
from ..ops.contract import check_integer, check_number
from .base import LossEntry
from .proxy_loss import SoftmaxLoss
from .softmax import Logits, check_scale, dense_cross_entropy, on_targets, softmax_loss, unit


def _logits(centers_per_class: int, la: float | Tensor, gamma: float, margin: float) -> Logits:
    if check_integer("centers_per_class", centers_per_class) < 1:
        raise ValueError(f"centers_per_class must be positive; got {centers_per_class}")
    margin, gamma = check_number("margin", margin), check_number("gamma", gamma)
    if gamma <= 0:
        raise ValueError(f"gamma must be positive, similarities are divided by it; got {gamma}")
    pooled = centers_per_class > 1
    return Logits(
        check_scale("la", la), lambda z, s: z - s * margin, policy="softmax_pool" if pooled else "linear",
        policy_params=(centers_per_class, gamma) if pooled else (),
    )  # fmt: skip


def soft_triple_loss(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    centers_per_class: int = 10,
    la: float | Tensor = 20.0,
    gamma: float = 0.1,
    margin: float = 0.01,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """SoftTriple of embeddings (N, D) against proxies (C K, D), the K centres class by class; see the module.

    Args:
        embeddings: (N, D), any norm. proxies: (C K, D), likewise; fp32 allowed beside half-precision embeddings.
        labels: (N,) integers, classes; or (N, L) padded with ``ignore_index``: a row is then the mean over its labels,
            each with its own margin.
        centers_per_class: K. la: multiplies the similarities; a positive number, or a () tensor, which gets a gradient.
        gamma: temperature of the pooling. margin: taken off the positive's similarity.
        class_weight: (C,), a weight for each label; the mean is then weighted.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``, of which class weights weigh whole rows.
        ignore_index: rows with this label contribute 0 and are not counted in the mean.
        reduction: ``mean`` over counted rows, ``sum``, or ``none`` for (N,).
        eps: guards the division by the norm. backend: overrides the choice of backend.

    Returns:
        The loss in fp32 (fp64 for fp64). With one class it is 0; with every row ignored 0, connected to the graph.

    Raises:
        ValueError, TypeError: labels out of range, wrong shapes, dtypes or options; the message names the fix.
    """
    return softmax_loss(
        embeddings, proxies, labels, _logits(centers_per_class, la, gamma, margin), class_weight=class_weight,
        label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction, eps=eps, backend=backend,
    )  # fmt: skip


def soft_triple_reference(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    centers_per_class: int = 10,
    la: float | Tensor = 20.0,
    gamma: float = 0.1,
    margin: float = 0.01,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """The paper's loss, written densely; independent of the ops. Tests only."""

    def logits(x: Tensor, y: Tensor) -> Tensor:
        s = (unit(x, eps) @ unit(proxies, eps).T).unflatten(1, (-1, centers_per_class))
        pooled = (torch.softmax(s / gamma, 2) * s).sum(2)
        return la * on_targets(pooled, y, lambda own: own - margin)

    return dense_cross_entropy(
        logits, embeddings, proxies, labels, class_weight=class_weight, label_smoothing=label_smoothing,
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip


class SoftTripleLoss(SoftmaxLoss):
    """SoftTriple; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Args:
        num_classes: C. embedding_size: D. centers_per_class: K. la: multiplies the similarities.
        gamma: temperature of the pooling. margin: taken off the positive's similarity.
        options: of :class:`~dml_kernels.losses.proxy_loss.SoftmaxLoss`; ``distance`` can be CosineSimilarity alone.

    Attributes:
        weight: (C K, D) parameter, class by class. fc: its transpose (D, C K), a view; assigning to it makes a new
            ``weight``. gamma: as given (theirs keeps 1 / gamma).
    """

    transposed_name = "fc"
    function = staticmethod(soft_triple_loss)
    distance_kinds = (distances.CosineSimilarity,)

    def __init__(
        self, num_classes: int, embedding_size: int, centers_per_class: int = 10, la: float | Tensor = 20,
        gamma: float = 0.1, margin: float = 0.01, **options: Any,
    ):  # fmt: skip
        _logits(centers_per_class, la, gamma, margin)
        super().__init__(num_classes, embedding_size, bank_rows=num_classes * centers_per_class, **options)
        self.centers_per_class, self.la, self.gamma, self.margin = centers_per_class, la, gamma, margin

    @staticmethod
    def default_weight_init(weight: Tensor) -> Any:
        """Uniform within 1 / sqrt(columns)."""
        return torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def default_distance(self) -> distances.Distance:
        """Cosine."""
        return distances.CosineSimilarity()

    def settings(self) -> Mapping[str, Any]:
        """Centres, factor, temperature and margin."""
        return {
            "centers_per_class": self.centers_per_class, "la": self.la, "gamma": self.gamma, "margin": self.margin
        }  # fmt: skip

    def logits(self) -> Logits:
        """Pooled similarities times ``la``."""
        return _logits(self.centers_per_class, self.la, self.gamma, self.margin)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """The (N, C) matrix of pooled similarities, not multiplied, as pytorch-metric-learning 2.9 gives it."""
        return self.logits()._replace(scale=1.0)(embeddings, self.bank)


ENTRY = LossEntry(
    loss=SoftTripleLoss,
    function=soft_triple_loss,
    reference=soft_triple_reference,
    paper="Qian et al. 2019, arXiv 1909.05235",
    options=(
        {"centers_per_class": 3},
        {"centers_per_class": 3, "la": 8.0, "gamma": 0.3, "margin": 0.1, "label_smoothing": 0.1},
        {"centers_per_class": 3, "gamma": 1.0, "reduction": "sum"},
    ),
    centres=3,
    at_scale=lambda scale: {"la": scale},
    policy="softmax_pool",
)

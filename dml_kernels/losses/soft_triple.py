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

from ..ops.checks import check_integer, check_number, check_positive
from .base import LossEntry
from .proxy_loss import SoftmaxLoss
from .softmax import Logits, SoftmaxOptions, Unpack, check_scale, dense_cross_entropy, on_targets, softmax_loss


def _logits(centers_per_class: int, la: float | Tensor, gamma: float, margin: float) -> Logits:
    centers_per_class = check_integer("centers_per_class", centers_per_class, 1)
    margin, gamma = check_number("margin", margin), check_positive("gamma", gamma, "similarities are divided by it")
    pooled = centers_per_class > 1
    return Logits(
        check_scale("la", la), lambda z, s: z - s * margin, policy="softmax_pool" if pooled else "linear",
        policy_params=(float(centers_per_class), gamma) if pooled else (),
    )  # fmt: skip


def soft_triple_loss(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, centers_per_class: int = 10, la: float | Tensor = 20.0,
    gamma: float = 0.1, margin: float = 0.01, **options: Unpack[SoftmaxOptions],
) -> Tensor:  # fmt: skip
    """SoftTriple of embeddings (N, D) against proxies (C K, D); see the module.

    Args:
        centers_per_class: K.
        la: multiplies the similarities: a positive number, or a () tensor, which gets a gradient.
        gamma: the temperature of the pooling.
        margin: subtracted from the positive's similarity.
        embeddings, proxies, labels: of :func:`~dml_kernels.losses.softmax.softmax_loss`, with its result and errors.
        options: of :class:`~dml_kernels.losses.softmax.SoftmaxOptions`.
    """
    return softmax_loss(embeddings, proxies, labels, _logits(centers_per_class, la, gamma, margin), **options)


def soft_triple_reference(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, centers_per_class: int = 10, la: float | Tensor = 20.0,
    gamma: float = 0.1, margin: float = 0.01, **options: Any,
) -> Tensor:  # fmt: skip
    """The loss of the paper, written densely and independent of the ops; for tests only."""

    def logits(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        s = (x @ w.T).unflatten(1, (-1, centers_per_class))
        pooled = (torch.softmax(s / gamma, 2) * s).sum(2)
        return la * on_targets(pooled, y, lambda own: own - margin)

    return dense_cross_entropy(logits, embeddings, proxies, labels, **options)


class SoftTripleLoss(SoftmaxLoss):
    """SoftTriple; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Args:
        num_classes, embedding_size, options: of :class:`~dml_kernels.losses.proxy_loss.SoftmaxLoss`.
        centers_per_class, la, gamma, margin: as in :func:`soft_triple_loss`. The attribute ``gamma`` is 1 / gamma.
    """

    fixed = (*SoftmaxLoss.fixed, "centers_per_class")

    transposed_name = "fc"
    function, logits_of = staticmethod(soft_triple_loss), staticmethod(_logits)

    def __init__(
        self, num_classes: int, embedding_size: int, centers_per_class: int = 10, la: float | Tensor = 20,
        gamma: float = 0.1, margin: float = 0.01, **options: Any,
    ):  # fmt: skip
        settings = {"centers_per_class": centers_per_class, "la": la, "gamma": gamma, "margin": margin}
        super().__init__(num_classes, embedding_size, settings=settings, **options)
        self.gamma = 1 / gamma

    def settings(self) -> Mapping[str, Any]:
        """The arguments, gamma as a temperature."""
        if not self.gamma > 0:
            raise ValueError(f"the attribute gamma multiplies similarities: it must be positive; got {self.gamma}")
        return {**super().settings(), "gamma": 1 / self.gamma}

    @staticmethod
    def default_weight_init(weight: Tensor) -> Any:
        """Uniform within 1 / sqrt(columns)."""
        return torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

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

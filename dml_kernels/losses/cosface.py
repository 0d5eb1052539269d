r"""CosFace (Wang et al. 2018, arXiv 1801.09414): the positive's cosine must win by a margin.

With cos_ij = x^_i . w^_j of unit vectors, the loss of a row with label y is::

    -s (cos_iy - m) + log( exp(s (cos_iy - m)) + sum_{j != y} exp(s cos_ij) )
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.checks import check_number
from .base import LossEntry
from .proxy_loss import SoftmaxLoss
from .softmax import Logits, SoftmaxOptions, Unpack, check_scale, dense_cross_entropy, on_targets, softmax_loss


def _logits(margin: float, scale: float | Tensor) -> Logits:
    margin = check_number("margin", margin)
    return Logits(check_scale("scale", scale), lambda z, s: z - s * margin)


def cosface_loss(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, margin: float = 0.35, scale: float | Tensor = 64.0,
    **options: Unpack[SoftmaxOptions],
) -> Tensor:  # fmt: skip
    """CosFace of embeddings (N, D) against proxies (C, D); see the module.

    Args:
        margin: subtracted from the positive's cosine.
        scale: a positive number, or a () tensor, which gets a gradient.
        embeddings, proxies, labels: of :func:`~dml_kernels.losses.softmax.softmax_loss`, with its result and errors.
        options: of :class:`~dml_kernels.losses.softmax.SoftmaxOptions`.
    """
    return softmax_loss(embeddings, proxies, labels, _logits(margin, scale), **options)


def cosface_reference(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, margin: float = 0.35, scale: float | Tensor = 64.0,
    **options: Any,
) -> Tensor:  # fmt: skip
    """The loss of the paper, written densely and independent of the ops; for tests only."""

    def logits(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return scale * on_targets(x @ w.T, y, lambda cosine: cosine - margin)

    return dense_cross_entropy(logits, embeddings, proxies, labels, **options)


class CosFaceLoss(SoftmaxLoss):
    """CosFace; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Args:
        num_classes, embedding_size, options: of :class:`~dml_kernels.losses.proxy_loss.SoftmaxLoss`.
        margin, scale: as in :func:`cosface_loss`.
    """

    function, logits_of = staticmethod(cosface_loss), staticmethod(_logits)

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 0.35, scale: float | Tensor = 64, **options: Any
    ):
        super().__init__(num_classes, embedding_size, settings={"margin": margin, "scale": scale}, **options)


ENTRY = LossEntry(
    loss=CosFaceLoss,
    function=cosface_loss,
    reference=cosface_reference,
    paper="Wang et al. 2018, arXiv 1801.09414",
    options=({}, {"margin": 0.1, "scale": 8.0, "label_smoothing": 0.1}, {"scale": 16.0, "reduction": "sum"}),
)

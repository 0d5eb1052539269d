r"""CosFace (Wang et al. 2018, arXiv 1801.09414): the positive's cosine must win by a margin.

With cos_ij = x^_i . w^_j of unit vectors, the loss of a row with label y is::

    -s (cos_iy - m) + log( exp(s (cos_iy - m)) + sum_{j != y} exp(s cos_ij) )
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import distances
from ..ops.contract import check_number
from .base import LossEntry
from .proxy_loss import SoftmaxLoss
from .softmax import Logits, check_scale, dense_cross_entropy, on_targets, softmax_loss, unit


def _logits(margin: float, scale: float | Tensor) -> Logits:
    margin = check_number("margin", margin)
    return Logits(check_scale("scale", scale), lambda z, s: z - s * margin)


def cosface_loss(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.35,
    scale: float | Tensor = 64.0,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """CosFace of embeddings (N, D) against proxies (M, D), one for each class; see the module.

    Args:
        embeddings: (N, D), any norm. proxies: (M, D), likewise; fp32 allowed beside half-precision embeddings.
        labels: (N,) integers, rows of ``proxies``; or (N, L) padded with ``ignore_index``: a row is then the mean over
            its labels, each with its own margin.
        margin: taken off the positive's cosine. scale: a positive number, or a () tensor, which gets a gradient.
        class_weight: (M,), a weight for each label; the mean is then weighted.
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
        embeddings, proxies, labels, _logits(margin, scale), class_weight=class_weight,
        label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction, eps=eps, backend=backend,
    )  # fmt: skip


def cosface_reference(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.35,
    scale: float | Tensor = 64.0,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """The paper's loss, written densely; independent of the ops. Tests only."""

    def logits(x: Tensor, y: Tensor) -> Tensor:
        return scale * on_targets(unit(x, eps) @ unit(proxies, eps).T, y, lambda cosine: cosine - margin)

    return dense_cross_entropy(
        logits, embeddings, proxies, labels, class_weight=class_weight, label_smoothing=label_smoothing,
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip


class CosFaceLoss(SoftmaxLoss):
    """CosFace; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Args:
        num_classes: C. embedding_size: D. margin: taken off the positive's cosine. scale: multiplies the cosines.
        options: of :class:`~dml_kernels.losses.proxy_loss.SoftmaxLoss`; ``distance`` can be CosineSimilarity alone.

    Attributes:
        weight: (C, D) parameter. W: its transpose (D, C), a view; assigning to it makes a new ``weight``.
    """

    function = staticmethod(cosface_loss)
    distance_kinds = (distances.CosineSimilarity,)

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 0.35, scale: float | Tensor = 64, **options: Any
    ):
        super().__init__(num_classes, embedding_size, **options)
        self.margin, self.scale = margin, scale
        self.logits()

    def default_distance(self) -> distances.Distance:
        """Cosine."""
        return distances.CosineSimilarity()

    def settings(self) -> Mapping[str, Any]:
        """Margin and scale."""
        return {"margin": self.margin, "scale": self.scale}

    def logits(self) -> Logits:
        """Cosines times the scale."""
        return _logits(self.margin, self.scale)


ENTRY = LossEntry(
    loss=CosFaceLoss,
    function=cosface_loss,
    reference=cosface_reference,
    paper="Wang et al. 2018, arXiv 1801.09414",
    options=({}, {"margin": 0.1, "scale": 8.0, "label_smoothing": 0.1}, {"scale": 16.0, "reduction": "sum"}),
)

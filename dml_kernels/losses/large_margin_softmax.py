r"""Large-margin softmax (Liu et al. 2016, arXiv 1612.02295): SphereFace with the lengths of the proxies left in.

With theta_ij the angle between x_i and w_j, an integer m and a factor s, the loss of a row with label y is::

    -z'_y + log( exp(z'_y) + sum_{j != y} exp(s x_i . w_j) )
    z'_y = s |x_i| |w_y| psi(theta_iy)      psi as in sphereface.py

The lengths of embeddings and proxies both matter. Those of the proxies cost two more tensors of the bank's size in the
backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import distances
from .base import LossEntry
from .proxy_loss import SoftmaxLoss
from .softmax import Logits, dense_cross_entropy, on_targets, softmax_loss, unit
from .sphereface import check_factor, multiplied_logits, psi


def _logits(margin: float, scale: float | Tensor) -> Logits:
    return multiplied_logits(margin, scale, with_proxies=True)


def large_margin_softmax_loss(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    margin: float = 4,
    scale: float | Tensor = 1.0,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """Large-margin softmax of embeddings (N, D) against proxies (M, D), one for each class; see the module.

    Args:
        embeddings: (N, D). proxies: (M, D); fp32 allowed beside half-precision embeddings.
        labels: (N,) integers, rows of ``proxies``; or (N, L) padded with ``ignore_index``: a row is then the mean over
            its labels, each with its own margin.
        margin: a positive integer, multiplies the positive's angle. scale: a positive number, or a () tensor, which
            gets a gradient.
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


def large_margin_softmax_reference(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    margin: float = 4,
    scale: float | Tensor = 1.0,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """The paper's loss, written densely, by the angle itself; independent of the ops. Tests only."""

    def logits(x: Tensor, y: Tensor) -> Tensor:
        cosines = on_targets(unit(x, eps) @ unit(proxies, eps).T, y, lambda own: psi(own, margin))
        return scale * x.norm(dim=1, keepdim=True) * proxies.norm(dim=1) * cosines

    return dense_cross_entropy(
        logits, embeddings, proxies, labels, class_weight=class_weight, label_smoothing=label_smoothing,
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip


class LargeMarginSoftmaxLoss(SoftmaxLoss):
    """Large-margin softmax; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Args:
        num_classes: C. embedding_size: D. margin: a positive integer, multiplies the angle. scale: multiplies the
            logits.
        options: of :class:`~dml_kernels.losses.proxy_loss.SoftmaxLoss`; ``distance`` can be CosineSimilarity alone.

    Attributes:
        weight: (C, D) parameter. W: its transpose (D, C), a view; assigning to it makes a new ``weight``.
    """

    function = staticmethod(large_margin_softmax_loss)
    distance_kinds = (distances.CosineSimilarity,)

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 4, scale: float | Tensor = 1, **options: Any
    ):
        super().__init__(num_classes, embedding_size, **options)
        self.margin, self.scale = check_factor(margin), scale
        self.logits()

    def default_distance(self) -> distances.Distance:
        """Cosine."""
        return distances.CosineSimilarity()

    def settings(self) -> Mapping[str, Any]:
        """Margin and scale."""
        return {"margin": self.margin, "scale": self.scale}

    def logits(self) -> Logits:
        """Products x . w times the scale."""
        return _logits(self.margin, self.scale)


ENTRY = LossEntry(
    loss=LargeMarginSoftmaxLoss,
    function=large_margin_softmax_loss,
    reference=large_margin_softmax_reference,
    paper="Liu et al. 2016, arXiv 1612.02295",
    options=({}, {"margin": 3, "scale": 2.0, "label_smoothing": 0.1}, {"margin": 1, "reduction": "sum"}),
    lengths_matter=True,
    angular=True,
    bank_sized=3,
)

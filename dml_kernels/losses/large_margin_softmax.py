r"""Large-margin softmax (Liu et al. 2016, arXiv 1612.02295): SphereFace with the lengths of the proxies left in.

With theta_ij the angle between x_i and w_j, an integer m and a factor s, the loss of a row with label y is::

    -z'_y + log( exp(z'_y) + sum_{j != y} exp(s x_i . w_j) )
    z'_y = s |x_i| |w_y| psi(theta_iy)      psi as in sphereface.py

The lengths of embeddings and proxies both matter. Those of the proxies cost two more tensors of the bank's size in the
backward.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import LossEntry
from .proxy_loss import SoftmaxLoss
from .softmax import Logits, SoftmaxOptions, Unpack, dense_cross_entropy, on_targets, softmax_loss
from .sphereface import check_factor, multiplied_logits, psi


def _logits(margin: float, scale: float | Tensor) -> Logits:
    return multiplied_logits(margin, scale, with_proxies=True)


def large_margin_softmax_loss(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, margin: float = 4, scale: float | Tensor = 1.0,
    **options: Unpack[SoftmaxOptions],
) -> Tensor:  # fmt: skip
    """Large-margin softmax of embeddings (N, D) against proxies (C, D); see the module.

    Args:
        margin: a positive integer, multiplies the positive's angle. scale: a positive number, or a () tensor, which
            gets a gradient.
        embeddings, proxies, labels: of :func:`~dml_kernels.losses.softmax.softmax_loss`, with its result and errors.
        options: of :class:`~dml_kernels.losses.softmax.SoftmaxOptions`.
    """
    return softmax_loss(embeddings, proxies, labels, _logits(margin, scale), **options)


def large_margin_softmax_reference(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, margin: float = 4, scale: float | Tensor = 1.0,
    **options: Any,
) -> Tensor:  # fmt: skip
    """The paper's loss, written densely, by the angle itself; independent of the ops. Tests only."""

    def logits(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return scale * on_targets(x @ w.T, y, lambda own: psi(own, margin))

    lengths = embeddings.norm(dim=1, keepdim=True) * proxies.norm(dim=1)
    return dense_cross_entropy(logits, embeddings, proxies, labels, lengths, **options)


class LargeMarginSoftmaxLoss(SoftmaxLoss):
    """Large-margin softmax; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Args:
        num_classes, embedding_size, options: of :class:`~dml_kernels.losses.proxy_loss.SoftmaxLoss`.
        margin, scale: as in :func:`large_margin_softmax_loss`.
    """

    function, logits_of = staticmethod(large_margin_softmax_loss), staticmethod(_logits)

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 4, scale: float | Tensor = 1, **options: Any
    ):
        settings = {"margin": check_factor(margin), "scale": scale}
        super().__init__(num_classes, embedding_size, settings=settings, **options)


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

r"""SphereFace (Liu et al. 2017, arXiv 1704.08063): large-margin softmax of unit proxies.

With theta_ij the angle between x_i and w_j, an integer m and a factor s, the loss of a row with label y is::

    -z'_y + log( exp(z'_y) + sum_{j != y} exp(s |x_i| cos theta_ij) )
    z'_y = s |x_i| psi(theta_iy)      psi as in large_margin_softmax.py

The length of an embedding matters, that of a proxy does not. A zero embedding has z = 0 for every class.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import LossEntry
from .large_margin_softmax import LargeMarginSoftmaxLoss, dense_logits, multiplied_logits
from .softmax import Logits, SoftmaxOptions, Unpack, dense_cross_entropy, softmax_loss


def _logits(margin: float, scale: float | Tensor) -> Logits:
    return multiplied_logits(margin, scale)._replace(by_length=True, by_lengths=False)


def sphereface_loss(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, margin: float = 4, scale: float | Tensor = 1.0,
    **options: Unpack[SoftmaxOptions],
) -> Tensor:  # fmt: skip
    """SphereFace of embeddings (N, D) against proxies (C, D); see the module.

    Args:
        margin, scale: of :func:`~dml_kernels.losses.large_margin_softmax.large_margin_softmax_loss`.
        embeddings, proxies, labels: of :func:`~dml_kernels.losses.softmax.softmax_loss`, with its result and errors.
        options: of :class:`~dml_kernels.losses.softmax.SoftmaxOptions`.
    """
    return softmax_loss(embeddings, proxies, labels, _logits(margin, scale), **options)


def sphereface_reference(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, margin: float = 4, scale: float | Tensor = 1.0,
    **options: Any,
) -> Tensor:  # fmt: skip
    """The loss of the paper, written densely, by the angle itself, independent of the ops; for tests only."""
    lengths = embeddings.norm(dim=1, keepdim=True)
    return dense_cross_entropy(dense_logits(margin, scale), embeddings, proxies, labels, lengths, **options)


class SphereFaceLoss(LargeMarginSoftmaxLoss):
    """SphereFace; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Args:
        num_classes, embedding_size, options: of :class:`~dml_kernels.losses.proxy_loss.SoftmaxLoss`.
        margin, scale: as in :func:`sphereface_loss`.
    """

    function, logits_of = staticmethod(sphereface_loss), staticmethod(_logits)


ENTRY = LossEntry(
    loss=SphereFaceLoss,
    function=sphereface_loss,
    reference=sphereface_reference,
    paper="Liu et al. 2017, arXiv 1704.08063",
    options=({}, {"margin": 3, "scale": 2.0, "label_smoothing": 0.1}, {"margin": 1, "reduction": "sum"}),
    lengths_matter=True,
    angular=True,
)

r"""SphereFace (Liu et al. 2017, arXiv 1704.08063): the positive's angle, multiplied, must still win.

With theta_ij the angle between x_i and w_j, an integer m and a factor s, the loss of a row with label y is::

    -z'_y + log( exp(z'_y) + sum_{j != y} exp(s |x_i| cos theta_ij) )
    z'_y = s |x_i| psi(theta_iy)      psi(theta) = (-1)^k cos(m theta) - 2k,  theta in [k pi / m, (k + 1) pi / m]

cos(m theta) is the Chebyshev polynomial T_m(cos theta): no arc cosine in the derivative. The length of an embedding
matters, that of a proxy does not. A zero embedding has z = 0 for every class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances
from .base import LossEntry
from .proxy_loss import SoftmaxLoss
from .softmax import Logits, check_scale, dense_cross_entropy, on_targets, softmax_loss, unit


def multiplied_angle(cosine: Tensor, m: int) -> Tensor:
    """psi(theta) of a cosine: falls from 1 at 0 to 1 - 2m at 180 degrees."""
    before, power = torch.ones_like(cosine), cosine
    for _ in range(m - 1):
        before, power = power, 2 * cosine * power - before
    k = (torch.acos(cosine.detach().clamp(-1, 1)) * (m / math.pi)).floor().clamp_max(m - 1)
    return (1 - 2 * (k % 2)) * power - 2 * k


def check_factor(margin: float) -> int:
    """The integer that multiplies the angle."""
    # theirs rounds a fraction down in silence
    if int(margin) != margin or margin < 1:
        raise ValueError(f"margin multiplies the angle, a positive integer; got {margin}")
    return int(margin)


def multiplied_logits(margin: float, scale: float | Tensor, *, with_proxies: bool) -> Logits:
    """Cosines times lengths, ``with_proxies`` also the proxies', the positive's angle multiplied."""
    m = check_factor(margin)

    def target(z: Tensor, s: float | Tensor) -> Tensor:
        assert isinstance(s, Tensor)
        zero = s == 0
        return s * multiplied_angle(z / torch.where(zero, 1, s), m)

    return Logits(check_scale("scale", scale), target, by_length=not with_proxies, by_lengths=with_proxies)


def sphereface_loss(
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
    """SphereFace of embeddings (N, D) against proxies (M, D), one for each class; see the module.

    Args:
        embeddings: (N, D), whose lengths multiply the cosines. proxies: (M, D), any norm; fp32 allowed beside
            half-precision embeddings.
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
        embeddings, proxies, labels, multiplied_logits(margin, scale, with_proxies=False), class_weight=class_weight,
        label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction, eps=eps, backend=backend,
    )  # fmt: skip


def psi(cosine: Tensor, margin: float) -> Tensor:
    """psi by the angle itself; for the dense references."""
    theta = torch.acos(cosine.clamp(-1, 1))
    k = (theta * (margin / math.pi)).floor().detach()
    return torch.where(k % 2 == 0, 1, -1) * torch.cos(margin * theta) - 2 * k


def sphereface_reference(
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
        return scale * x.norm(dim=1, keepdim=True) * cosines

    return dense_cross_entropy(
        logits, embeddings, proxies, labels, class_weight=class_weight, label_smoothing=label_smoothing,
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip


class SphereFaceLoss(SoftmaxLoss):
    """SphereFace; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Args:
        num_classes: C. embedding_size: D. margin: a positive integer, multiplies the angle. scale: multiplies the
            logits.
        options: of :class:`~dml_kernels.losses.proxy_loss.SoftmaxLoss`; ``distance`` can be CosineSimilarity alone.

    Attributes:
        weight: (C, D) parameter. W: its transpose (D, C), a view; assigning to it makes a new ``weight``.
    """

    function = staticmethod(sphereface_loss)
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
        """Cosines times the scale and the embedding's length."""
        return multiplied_logits(self.margin, self.scale, with_proxies=False)


ENTRY = LossEntry(
    loss=SphereFaceLoss,
    function=sphereface_loss,
    reference=sphereface_reference,
    paper="Liu et al. 2017, arXiv 1704.08063",
    options=({}, {"margin": 3, "scale": 2.0, "label_smoothing": 0.1}, {"margin": 1, "reduction": "sum"}),
    lengths_matter=True,
    angular=True,
)

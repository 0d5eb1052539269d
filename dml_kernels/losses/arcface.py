r"""ArcFace (Deng et al. 2019, arXiv 1801.07698): the positive's angle must win by a margin.

With theta_ij the angle between x_i and w_j, the loss of a row with label y is::

    -z'_y + log( exp(z'_y) + sum_{j != y} exp(s cos theta_ij) )
    z'_y = s cos(theta_iy + m)             where theta_iy <= pi - m
           s (cos theta_iy - m sin m)      beyond, so that the loss keeps growing with the angle

cos(theta + m) is taken as cos theta cos m - sin theta sin m: no arc cosine, whose derivative is infinite at 0 and 180
degrees. Where the cosine is +-1 to rounding, sin theta is 0 and has no gradient: that angle has no direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import check_number
from .base import LossEntry
from .proxy_loss import SoftmaxLoss
from .softmax import Logits, SoftmaxOptions, Unpack, check_scale, dense_cross_entropy, on_targets, softmax_loss


def angular_logits(margin: float, scale: float | Tensor, policy: str = "linear", centres: int = 1) -> Logits:
    """Cosines times the scale, the margin in degrees on the positive's angle; sub-centres are pooled by ``policy``."""
    margin = check_number("margin", margin)
    if not 0 <= margin <= 180:
        raise ValueError(f"margin is an angle in degrees, 0 to 180; got {margin}")
    m = math.radians(margin)

    def target(z: Tensor, s: float | Tensor) -> Tensor:
        cosine = z / s
        # Where the cosine is +-1 up to rounding this is 1e-75, negligible in any logit, and the clamp stops the
        # gradient, whose slope is infinite there. NaN stays.
        sine = (1 - cosine * cosine).clamp_min(1e-150).sqrt()
        turned = torch.sub(z * math.cos(m), sine * s, alpha=math.sin(m))
        return torch.where(z >= s * -math.cos(m), turned, z - s * (m * math.sin(m)))

    return Logits(
        check_scale("scale", scale), target, policy=policy, policy_params=(float(centres),) if centres > 1 else ()
    )


def arcface_loss(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, margin: float = 28.6, scale: float | Tensor = 64.0,
    **options: Unpack[SoftmaxOptions],
) -> Tensor:  # fmt: skip
    """ArcFace of embeddings (N, D) against proxies (C, D); see the module.

    Args:
        margin: in degrees, added to the positive's angle.
        scale: a positive number, or a () tensor, which gets a gradient.
        embeddings, proxies, labels: of :func:`~dml_kernels.losses.softmax.softmax_loss`, with its result and errors.
        options: of :class:`~dml_kernels.losses.softmax.SoftmaxOptions`.
    """
    return softmax_loss(embeddings, proxies, labels, angular_logits(margin, scale), **options)


def turned(cosine: Tensor, margin: float) -> Tensor:
    """The paper's target from a cosine, by the angle itself; for the dense references."""
    m = math.radians(margin)
    angle = torch.acos(cosine.clamp(-1, 1))
    return torch.where(angle <= math.pi - m, torch.cos(angle + m), cosine - m * math.sin(m))


def arcface_reference(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, margin: float = 28.6, scale: float | Tensor = 64.0,
    **options: Any,
) -> Tensor:  # fmt: skip
    """The loss of the paper, written densely and independent of the ops; for tests only."""

    def logits(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return scale * on_targets(x @ w.T, y, lambda cosine: turned(cosine, margin))

    return dense_cross_entropy(logits, embeddings, proxies, labels, **options)


class AngularLoss(SoftmaxLoss):
    """A softmax loss with a margin in degrees, whose attribute ``margin`` is in radians, as in
    pytorch-metric-learning.
    """

    def __init__(self, num_classes: int, embedding_size: int, *, settings: Mapping[str, Any], **options: Any):
        super().__init__(num_classes, embedding_size, settings=settings, **options)
        self.margin = math.radians(settings["margin"])

    def settings(self) -> Mapping[str, Any]:
        """The arguments, the margin in degrees."""
        if not 0 <= self.margin <= math.pi:
            raise ValueError(f"the attribute margin is an angle in radians, 0 to pi; got {self.margin}. Use "
                             "math.radians(degrees)")  # fmt: skip
        return {**super().settings(), "margin": math.degrees(self.margin)}


class ArcFaceLoss(AngularLoss):
    """ArcFace; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Args:
        num_classes, embedding_size, options: of :class:`~dml_kernels.losses.proxy_loss.SoftmaxLoss`.
        margin, scale: as in :func:`arcface_loss`: in degrees. The attribute ``margin`` is in radians.
    """

    function, logits_of = staticmethod(arcface_loss), staticmethod(angular_logits)

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 28.6, scale: float | Tensor = 64, **options: Any
    ):
        super().__init__(num_classes, embedding_size, settings={"margin": margin, "scale": scale}, **options)


ENTRY = LossEntry(
    loss=ArcFaceLoss,
    function=arcface_loss,
    reference=arcface_reference,
    paper="Deng et al. 2019, arXiv 1801.07698",
    # Not a scale of 64: the log-sum-exps are then 10 and more, and the accuracy test would see only their rounding in
    # fp32, times the slope of the margin.
    options=(
        {"scale": 30.0},
        {"margin": 10.0, "scale": 8.0, "label_smoothing": 0.1},
        {"scale": 16.0, "reduction": "sum"},
    ),
    angular=True,
)

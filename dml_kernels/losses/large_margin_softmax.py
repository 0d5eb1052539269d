r"""Large-margin softmax (Liu et al. 2016, arXiv 1612.02295): the positive's angle, multiplied, must still win.

With theta_ij the angle between x_i and w_j, an integer m and a factor s, the loss of a row with label y is::

    -z'_y + log( exp(z'_y) + sum_{j != y} exp(s x_i . w_j) )
    z'_y = s |x_i| |w_y| psi(theta_iy)      psi(theta) = (-1)^k cos(m theta) - 2k,  theta in [k pi / m, (k + 1) pi / m]

cos(m theta) is the Chebyshev polynomial T_m(cos theta): no arc cosine in the derivative. The lengths of embeddings and
proxies both matter. Those of the proxies cost two more tensors of the bank's size in the backward. A zero embedding has
z = 0 for every class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import check_number
from .base import LossEntry
from .proxy_loss import SoftmaxLoss
from .softmax import Logits, SoftmaxOptions, Unpack, check_scale, dense_cross_entropy, on_targets, softmax_loss


def multiplied_angle(cosine: Tensor, m: int) -> Tensor:
    """psi(theta) of a cosine: falls from 1 at 0 to 1 - 2m at 180 degrees."""
    before, power = torch.ones_like(cosine), cosine
    for _ in range(m - 1):
        before, power = power, 2 * cosine * power - before
    k = (torch.acos(cosine.detach().clamp(-1, 1)) * (m / math.pi)).floor().clamp_max(m - 1)
    return (1 - 2 * (k % 2)) * power - 2 * k


# psi then has a section for each degree. Its polynomial takes a step for each unit of the margin.
LARGEST_MARGIN = 180


def check_factor(margin: float) -> int:
    """The integer that multiplies the angle."""
    factor = check_number("margin", margin)
    # pytorch-metric-learning rounds a fraction down in silence.
    if int(factor) != factor or not 1 <= factor <= LARGEST_MARGIN:
        raise ValueError(f"margin multiplies the angle, a positive integer up to {LARGEST_MARGIN}; got {margin}")
    return int(factor)


def multiplied_logits(margin: float, scale: float | Tensor) -> Logits:
    """Products x . w times the scale, the positive's angle multiplied."""
    m = check_factor(margin)

    def target(z: Tensor, s: float | Tensor) -> Tensor:
        assert isinstance(s, Tensor)
        zero = s == 0
        return s * multiplied_angle(z / torch.where(zero, 1, s), m)

    return Logits(check_scale("scale", scale), target, by_lengths=True)


def large_margin_softmax_loss(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, margin: float = 4, scale: float | Tensor = 1.0,
    **options: Unpack[SoftmaxOptions],
) -> Tensor:  # fmt: skip
    """Large-margin softmax of embeddings (N, D) against proxies (C, D); see the module.

    Args:
        margin: a positive integer up to 180, multiplies the positive's angle.
        scale: a positive number, or a () tensor, which gets a gradient.
        embeddings, proxies, labels: of :func:`~dml_kernels.losses.softmax.softmax_loss`, with its result and errors.
        options: of :class:`~dml_kernels.losses.softmax.SoftmaxOptions`.
    """
    return softmax_loss(embeddings, proxies, labels, multiplied_logits(margin, scale), **options)


def dense_logits(margin: float, scale: float | Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What multiplies the lengths, psi by the angle itself; for the dense references."""

    def psi(cosine: Tensor) -> Tensor:
        theta = torch.acos(cosine.clamp(-1, 1))
        k = (theta * (margin / math.pi)).floor().detach()
        return torch.where(k % 2 == 0, 1, -1) * torch.cos(margin * theta) - 2 * k

    return lambda x, w, y: scale * on_targets(x @ w.T, y, psi)


def large_margin_softmax_reference(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, margin: float = 4, scale: float | Tensor = 1.0,
    **options: Any,
) -> Tensor:  # fmt: skip
    """The loss of the paper, written densely, by the angle itself, independent of the ops; for tests only."""
    lengths = embeddings.norm(dim=1, keepdim=True) * proxies.norm(dim=1)
    return dense_cross_entropy(dense_logits(margin, scale), embeddings, proxies, labels, lengths, **options)


class LargeMarginSoftmaxLoss(SoftmaxLoss):
    """Large-margin softmax; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Args:
        num_classes, embedding_size, options: of :class:`~dml_kernels.losses.proxy_loss.SoftmaxLoss`.
        margin, scale: as in :func:`large_margin_softmax_loss`.
    """

    # pytorch-metric-learning keeps tables of the first margin, and mixes them with one that is assigned.
    fixed = (*SoftmaxLoss.fixed, "margin")
    unused = (*SoftmaxLoss.unused, "max_n", "n_range", "margin_choose_n", "cos_powers", "alternating")
    function, logits_of = staticmethod(large_margin_softmax_loss), staticmethod(multiplied_logits)

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

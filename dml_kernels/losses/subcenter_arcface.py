r"""Sub-centre ArcFace (Deng et al. 2020, ECCV): ArcFace of the nearest of K sub-centres of each class.

With cos_ij = max_k x^_i . w^_jk, the rest is ArcFace's formula (arcface.py). Noisy examples of a class gather at its
other sub-centres, where ``get_outliers`` finds them. The maximum is taken inside the tile: no N x M x K matrix. Of
sub-centres that tie for it the first gets the gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import check_flag, check_integer, check_number
from ..ops.contract import accumulate_dtype, check_pair, product_dtype
from ..ops.normalize import normalize as unit_rows
from .arcface import AngularLoss, angular_logits, turned
from .base import LossEntry, check_label_range, check_labels
from .softmax import Logits, SoftmaxOptions, Unpack, dense_cross_entropy, on_targets, softmax_loss


def _logits(margin: float, scale: float | Tensor, sub_centers: int) -> Logits:
    sub_centers = check_integer("sub_centers", sub_centers, 1)
    return angular_logits(margin, scale, "max_pool" if sub_centers > 1 else "linear", sub_centers)


def subcenter_arcface_loss(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, margin: float = 28.6, scale: float | Tensor = 64.0,
    sub_centers: int = 3, **options: Unpack[SoftmaxOptions],
) -> Tensor:  # fmt: skip
    """Sub-centre ArcFace of embeddings (N, D) against proxies (C K, D); see the module.

    Args:
        margin, scale: of :func:`~dml_kernels.losses.arcface.arcface_loss`; the margin is in degrees.
        sub_centers: K.
        embeddings, proxies, labels: of :func:`~dml_kernels.losses.softmax.softmax_loss`, with its result and errors.
        options: of :class:`~dml_kernels.losses.softmax.SoftmaxOptions`.
    """
    return softmax_loss(embeddings, proxies, labels, _logits(margin, scale, sub_centers), **options)


def subcenter_arcface_reference(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, margin: float = 28.6, scale: float | Tensor = 64.0,
    sub_centers: int = 3, **options: Any,
) -> Tensor:  # fmt: skip
    """The loss of the paper, written densely and independent of the ops; for tests only."""

    def logits(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        cosines = (x @ w.T).unflatten(1, (-1, sub_centers)).max(2).values
        return scale * on_targets(cosines, y, lambda cosine: turned(cosine, margin))

    return dense_cross_entropy(logits, embeddings, proxies, labels, **options)


class SubCenterArcFaceLoss(AngularLoss):
    """Sub-centre ArcFace; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Args:
        num_classes, embedding_size, options: of :class:`~dml_kernels.losses.proxy_loss.SoftmaxLoss`.
        margin, scale, sub_centers: as in :func:`subcenter_arcface_loss`: in degrees. The attribute ``margin`` is in
            radians.
    """

    fixed = (*AngularLoss.fixed, "sub_centers")

    function, logits_of = staticmethod(subcenter_arcface_loss), staticmethod(_logits)

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 28.6, scale: float | Tensor = 64,
        sub_centers: int = 3, **options: Any,
    ):  # fmt: skip
        settings = {"margin": margin, "scale": scale, "sub_centers": sub_centers}
        super().__init__(num_classes, embedding_size, settings=settings, **options)

    @torch.no_grad()
    def get_outliers(
        self, embeddings: Tensor, labels: Tensor, threshold: float = 75, return_dominant_centers: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Examples far from the dominant sub-centre of their class, the one nearest to most of its examples.

        Args:
            embeddings: (n, D) floating point.
            labels: (n,) integers; rows labelled ``ignore_index`` are left out.
            threshold: in degrees.
            return_dominant_centers: whether to return the dominant sub-centres too.

        Returns:
            int64 indices of the examples beyond the threshold, class by class; and with ``return_dominant_centers``
            (D, C) dominant sub-centres, zeros for a class without examples. (pytorch-metric-learning 2.9 always returns
            both, with undefined values for such a class.)

        Raises:
            ValueError, TypeError: labels out of range, a wrong shape or dtype.
        """
        check_pair(embeddings, self.weight, ("embeddings", "weight"))
        check_flag("return_dominant_centers", return_dominant_centers)
        y = check_labels(labels, embeddings)
        check_label_range(y, self.num_classes, self.ignore_index)
        k, index = self.sub_centers, (y != self.ignore_index).nonzero().squeeze(1)
        y = y[index]
        rows = max(1, (1 << 22) // (k * self.embedding_size))  # 16 MB of gathered sub-centres at a time
        cosines = [self._to_own(embeddings[i], own) for i, own in zip(index.split(rows), y.split(rows))]
        cosine = torch.cat(cosines) if cosines else embeddings.new_zeros(0, k)
        nearest = torch.bincount(y * k + cosine.argmax(1), minlength=self.num_classes * k).view(-1, k)
        dominant = nearest.argmax(1)
        far = cosine.gather(1, dominant[y][:, None]).squeeze(1) < math.cos(
            math.radians(check_number("threshold", threshold))
        )
        outliers = index[far][y[far].argsort(stable=True)]
        if not return_dominant_centers:
            return outliers
        first = torch.arange(self.num_classes, device=y.device) * k
        centers = self.weight[first + dominant] * (nearest.sum(1) > 0)[:, None].to(self.weight.dtype)
        return outliers, centers.t()

    def _to_own(self, x: Tensor, y: Tensor) -> Tensor:
        """(n, K) cosines to the sub-centres of each row's own class."""
        own = self.weight.view(self.num_classes, self.sub_centers, -1)[y]
        dtype = accumulate_dtype(product_dtype(x, own))
        return torch.linalg.vecdot(unit_rows(x.to(dtype))[:, None], unit_rows(own.to(dtype)))


ENTRY = LossEntry(
    loss=SubCenterArcFaceLoss,
    function=subcenter_arcface_loss,
    reference=subcenter_arcface_reference,
    paper="Deng et al. 2020, ECCV, Sub-center ArcFace",
    options=({}, {"margin": 10.0, "scale": 8.0, "label_smoothing": 0.1}, {"scale": 16.0, "reduction": "sum"}),
    angular=True,
    centres=3,
    policy="max_pool",
)

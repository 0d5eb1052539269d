r"""Sub-centre ArcFace (Deng et al. 2020, ECCV): ArcFace of the nearest of K sub-centres of each class.

With cos_ij = max_k x^_i . w^_jk, the rest is ArcFace's formula (arcface.py). Noisy examples of a class gather at its
other sub-centres, where ``get_outliers`` finds them. The maximum is taken inside the tile: no N x M x K matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances, functional
from ..ops.contract import check_integer, check_number, check_pair
from .arcface import angular_logits, turned
from .base import LossEntry, check_label_range, check_labels
from .proxy_loss import SoftmaxLoss
from .softmax import Logits, dense_cross_entropy, on_targets, softmax_loss, unit


def _logits(margin: float, scale: float | Tensor, sub_centers: int) -> Logits:
    if check_integer("sub_centers", sub_centers) < 1:
        raise ValueError(f"sub_centers must be positive; got {sub_centers}")
    return angular_logits(margin, scale, "max_pool" if sub_centers > 1 else "linear", sub_centers)


def subcenter_arcface_loss(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    margin: float = 28.6,
    scale: float | Tensor = 64.0,
    sub_centers: int = 3,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """Sub-centre ArcFace of embeddings (N, D) against proxies (C K, D), K sub-centres a class; see the module.

    Args:
        embeddings: (N, D), any norm. proxies: (C K, D), likewise; fp32 allowed beside half-precision embeddings.
        labels: (N,) integers, classes; or (N, L) padded with ``ignore_index``: a row is then the mean over its labels,
            each with its own margin.
        margin: in degrees, added to the positive's angle. scale: a positive number, or a () tensor, which gets a
            gradient. sub_centers: K.
        class_weight: (C,), a weight for each label; the mean is then weighted.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``, of which class weights weigh whole rows.
        ignore_index: rows with this label contribute 0 and are not counted in the mean.
        reduction: ``mean`` over counted rows, ``sum``, or ``none`` for (N,).
        eps: guards the division by the norm. backend: overrides the choice of backend.

    Returns:
        The loss in fp32 (fp64 for fp64). With one class it is 0; with every row ignored 0, connected to the graph. Of
        sub-centres that tie for the maximum the first gets the gradient.

    Raises:
        ValueError, TypeError: labels out of range, wrong shapes, dtypes or options; the message names the fix.
    """
    return softmax_loss(
        embeddings, proxies, labels, _logits(margin, scale, sub_centers), class_weight=class_weight,
        label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction, eps=eps, backend=backend,
    )  # fmt: skip


def subcenter_arcface_reference(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    margin: float = 28.6,
    scale: float | Tensor = 64.0,
    sub_centers: int = 3,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """The paper's loss, written densely; independent of the ops. Tests only."""

    def logits(x: Tensor, y: Tensor) -> Tensor:
        cosines = (unit(x, eps) @ unit(proxies, eps).T).unflatten(1, (-1, sub_centers)).max(2).values
        return scale * on_targets(cosines, y, lambda cosine: turned(cosine, margin))

    return dense_cross_entropy(
        logits, embeddings, proxies, labels, class_weight=class_weight, label_smoothing=label_smoothing,
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip


class SubCenterArcFaceLoss(SoftmaxLoss):
    """Sub-centre ArcFace; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Args:
        num_classes: C. embedding_size: D. margin: in degrees. scale: multiplies the cosines. sub_centers: K.
        options: of :class:`~dml_kernels.losses.proxy_loss.SoftmaxLoss`; ``distance`` can be CosineSimilarity alone.

    Attributes:
        weight: (C K, D) parameter, class by class. W: its transpose (D, C K), a view; assigning to it makes a new
            ``weight``.
    """

    function = staticmethod(subcenter_arcface_loss)
    distance_kinds = (distances.CosineSimilarity,)

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 28.6, scale: float | Tensor = 64,
        sub_centers: int = 3, **options: Any,
    ):  # fmt: skip
        _logits(margin, scale, sub_centers)
        super().__init__(num_classes, embedding_size, bank_rows=num_classes * sub_centers, **options)
        self.margin, self.scale, self.sub_centers = margin, scale, sub_centers

    def default_distance(self) -> distances.Distance:
        """Cosine."""
        return distances.CosineSimilarity()

    def settings(self) -> Mapping[str, Any]:
        """Margin, scale and the number of sub-centres."""
        return {"margin": self.margin, "scale": self.scale, "sub_centers": self.sub_centers}

    def logits(self) -> Logits:
        """The largest cosine of each class times the scale."""
        return _logits(self.margin, self.scale, self.sub_centers)

    @torch.no_grad()
    def get_outliers(
        self, embeddings: Tensor, labels: Tensor, threshold: float = 75, return_dominant_centers: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Examples far from their class's dominant sub-centre, the one nearest to most of its examples.

        Args:
            embeddings: (n, D). labels: (n,); those with ``ignore_index`` are left out. threshold: in degrees.

        Returns:
            int64 indices of the examples beyond the threshold, class by class; and with ``return_dominant_centers``
            (D, C) dominant sub-centres, zeros for a class without examples. (pytorch-metric-learning 2.9 returns both
            whatever is asked for, and undefined values for such a class.)

        Raises:
            ValueError, TypeError: labels out of range, a wrong shape or dtype.
        """
        check_pair(embeddings, self.weight, ("embeddings", "weight"))
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
        own = self.weight.view(self.num_classes, self.sub_centers, -1)[y].float()
        return torch.linalg.vecdot(functional.normalize(x.float())[:, None], functional.normalize(own))


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

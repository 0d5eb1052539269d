r"""Normalised softmax (Zhai and Wu 2019, arXiv 1811.12649): cross-entropy of cosines over a temperature.

With unit vectors x^, w^ and z_ij = x^_i . w^_j / temperature, the loss of a row with label y is
-z_iy + log sum_j exp(z_ij). ``metric`` takes other scores: ``dot`` keeps the embedding's length, x . w^;
``sqeuclidean`` and ``euclidean`` are minus the distance of unit vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances
from .base import LossEntry
from .proxy_loss import SoftmaxLoss
from .softmax import Logits, check_scale, dense_cross_entropy, softmax_loss, unit


def _logits(temperature: float | Tensor, metric: str) -> Logits:
    scale = 1 / check_scale("temperature", temperature)
    return Logits(scale, metric="cosine" if metric == "dot" else metric, by_length=metric == "dot")


def normalized_softmax_loss(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    metric: str = "cosine",
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """Normalised softmax of embeddings (N, D) against proxies (M, D), one for each class; see the module.

    Args:
        embeddings: (N, D), any norm. proxies: (M, D), likewise; fp32 allowed beside half-precision embeddings.
        labels: (N,) integers, rows of ``proxies``; or (N, L) padded with ``ignore_index``: a row is then the mean of
            -log p(label) over its labels.
        temperature: a positive number, or a () tensor, which gets a gradient.
        metric: ``cosine``, ``dot``, ``sqeuclidean`` or ``euclidean``, see the module.
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
        embeddings, proxies, labels, _logits(temperature, metric), class_weight=class_weight,
        label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction, eps=eps, backend=backend,
    )  # fmt: skip


def normalized_softmax_reference(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    metric: str = "cosine",
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """The paper's loss, written densely; independent of the ops. Tests only."""

    def logits(x: Tensor, y: Tensor) -> Tensor:
        w = unit(proxies, eps)
        if metric == "dot":
            return x @ w.T / temperature
        x = unit(x, eps)
        if metric == "cosine":
            return x @ w.T / temperature
        squared = (x[:, None] - w).square().sum(2)
        if metric == "sqeuclidean":
            return -squared / temperature
        return -torch.where(squared > 0, torch.where(squared > 0, squared, 1).sqrt(), 0) / temperature

    return dense_cross_entropy(
        logits, embeddings, proxies, labels, class_weight=class_weight, label_smoothing=label_smoothing,
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip


class NormalizedSoftmaxLoss(SoftmaxLoss):
    """Normalised softmax; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Args:
        num_classes: C. embedding_size: D. temperature: divides the scores.
        options: of :class:`~dml_kernels.losses.proxy_loss.SoftmaxLoss`. ``distance``: CosineSimilarity, the same as
            DotProductSimilarity on unit vectors; DotProductSimilarity(normalize_embeddings=False) keeps the
            embedding's length; LpDistance of unit vectors.

    Attributes:
        weight: (C, D) parameter. W: its transpose (D, C), a view; assigning to it makes a new ``weight``.
    """

    function = staticmethod(normalized_softmax_loss)

    def __init__(self, num_classes: int, embedding_size: int, temperature: float | Tensor = 0.05, **options: Any):
        super().__init__(num_classes, embedding_size, **options)
        self.temperature = temperature
        if isinstance(self.distance, distances.LpDistance) and not self.distance.normalize_embeddings:
            raise ValueError("NormalizedSoftmaxLoss has unit weights; use LpDistance(normalize_embeddings=True)")
        self.logits()

    def default_distance(self) -> distances.Distance:
        """Cosine."""
        return distances.CosineSimilarity()

    def settings(self) -> Mapping[str, Any]:
        """Temperature and metric."""
        return {"temperature": self.temperature, "metric": self.distance.metric}

    def logits(self) -> Logits:
        """Scores over the temperature."""
        return _logits(self.temperature, self.distance.metric)


ENTRY = LossEntry(
    loss=NormalizedSoftmaxLoss,
    function=normalized_softmax_loss,
    reference=normalized_softmax_reference,
    paper="Zhai and Wu 2019, arXiv 1811.12649",
    options=({}, {"temperature": 0.2, "label_smoothing": 0.1}, {"temperature": 0.5, "reduction": "sum"}),
    at_scale=lambda scale: {"temperature": 1 / scale},
)

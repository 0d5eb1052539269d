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
from .softmax import Logits, SoftmaxOptions, Unpack, check_scale, dense_cross_entropy, softmax_loss


def _logits(temperature: float | Tensor, metric: str = "cosine") -> Logits:
    scale = 1 / check_scale("temperature", temperature)
    return Logits(scale, metric="cosine" if metric == "dot" else metric, by_length=metric == "dot")


def normalized_softmax_loss(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, temperature: float | Tensor = 0.05, metric: str = "cosine",
    **options: Unpack[SoftmaxOptions],
) -> Tensor:  # fmt: skip
    """Normalised softmax of embeddings (N, D) against proxies (C, D); see the module.

    Args:
        temperature: a positive number, or a () tensor, which gets a gradient.
        metric: ``cosine``, ``dot``, ``sqeuclidean`` or ``euclidean``, see the module.
        embeddings, proxies, labels: of :func:`~dml_kernels.losses.softmax.softmax_loss`, with its result and errors.
        options: of :class:`~dml_kernels.losses.softmax.SoftmaxOptions`.
    """
    return softmax_loss(embeddings, proxies, labels, _logits(temperature, metric), **options)


def normalized_softmax_reference(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, temperature: float | Tensor = 0.05, metric: str = "cosine",
    **options: Any,
) -> Tensor:  # fmt: skip
    """The loss of the paper, written densely and independent of the ops; for tests only."""

    def logits(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        if metric in ("cosine", "dot"):
            return x @ w.T / temperature
        squared = (x[:, None] - w).square().sum(2)
        if metric == "sqeuclidean":
            return -squared / temperature
        return -torch.where(squared > 0, torch.where(squared > 0, squared, 1).sqrt(), 0) / temperature

    lengths = embeddings.norm(dim=1, keepdim=True).clamp_min(options.get("eps", 1e-12)) if metric == "dot" else None
    return dense_cross_entropy(logits, embeddings, proxies, labels, lengths, **options)


class NormalizedSoftmaxLoss(SoftmaxLoss):
    """Normalised softmax; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Args:
        num_classes, embedding_size, options: of :class:`~dml_kernels.losses.proxy_loss.SoftmaxLoss`.
            ``distance``: CosineSimilarity, the same as DotProductSimilarity on unit vectors;
            DotProductSimilarity(normalize_embeddings=False) keeps the embedding's length; LpDistance of unit vectors.
        temperature: as in :func:`normalized_softmax_loss`.
    """

    function, logits_of = staticmethod(normalized_softmax_loss), staticmethod(_logits)
    distance_kinds = (distances.Distance,)

    def __init__(self, num_classes: int, embedding_size: int, temperature: float | Tensor = 0.05, **options: Any):
        super().__init__(num_classes, embedding_size, settings={"temperature": temperature}, **options)
        self.settings()

    def settings(self) -> Mapping[str, Any]:
        """Temperature and metric."""
        if isinstance(self.distance, distances.LpDistance) and not self.distance.normalize_embeddings:
            raise ValueError("NormalizedSoftmaxLoss has unit weights; use LpDistance(normalize_embeddings=True)")
        return {**super().settings(), "metric": self.distance.metric}


ENTRY = LossEntry(
    loss=NormalizedSoftmaxLoss,
    function=normalized_softmax_loss,
    reference=normalized_softmax_reference,
    paper="Zhai and Wu 2019, arXiv 1811.12649",
    options=({}, {"temperature": 0.2, "label_smoothing": 0.1}, {"temperature": 0.5, "reduction": "sum"}),
    at_scale=lambda scale: {"temperature": 1 / scale},
)

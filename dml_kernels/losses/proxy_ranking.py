r"""A ranking (triplet) loss on proxies (Movshovitz-Attias et al. 2017, arXiv 1703.07464, section 3.2).

Every triplet of an embedding, its own proxy and another one must keep a margin::

    sum_{z != y} relu(margin + s_iz - s_iy)

with the score s of ``metric``, larger is closer: the cosine, or minus a distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances
from ..ops import choice
from ..ops.checks import check_integer, check_number
from ..ops.contract import check_eps, check_pair, product_dtype, split_metric
from ..ops.masked_hinge_sum import hinge_sum_of
from ..ops.signatures import Hinged, HingeSpec
from .base import LossEntry, check_class_weight, check_labels, check_reduction, reduce_rows, row_weight
from .proxy_loss import ProxyLoss
from .softmax import unit


def proxy_ranking_loss(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.1,
    metric: str = "cosine",
    normalize: bool = True,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """The ranking loss of embeddings (N, D) and proxies (M, D), one for each class; see the module.

    Args:
        embeddings: (N, D).
        proxies: (M, D); the dtypes may differ.
        labels: (N,) integers, rows of ``proxies``.
        margin: the margin on the difference of two scores.
        metric, normalize: as in :func:`functional.masked_hinge_sum`.
        class_weight: (M,), a weight for each label; the mean is then weighted.
        ignore_index: rows with this label contribute 0 and are not counted in the mean.
        reduction: ``mean`` over counted rows, ``sum``, or ``none`` for (N,).
        eps: guards the division by the norm.
        backend: overrides the choice of backend.

    Returns:
        The loss in fp32, or fp64 where either input is. With one class, or every row ignored, it is 0, connected to the
        graph.

    Raises:
        ValueError, TypeError: labels out of range, wrong shapes, dtypes or options; the message names the fix.
    """
    check_pair(embeddings, proxies, ("embeddings", "proxies"))
    check_reduction(reduction)
    y = check_labels(labels, embeddings)
    check_class_weight(class_weight, proxies.size(0))
    ignore_index = check_integer("ignore_index", ignore_index)
    base, unit_vectors = split_metric(metric, normalize, plain_dot=True)
    spec = HingeSpec(
        metric=base, normalize=unit_vectors, hinge=[0.0, 0.0, 1.0, check_number("margin", margin)], relative=True,
        eps=check_eps(eps), ignore_index=ignore_index, dtype=product_dtype(embeddings, proxies),
    )  # fmt: skip
    inputs = Hinged(embeddings, proxies, y, None, None, None, None)
    found = hinge_sum_of(inputs, choice.settle("masked_hinge_sum", inputs, spec, backend))
    rows, counted = found.different, y != ignore_index
    mass = counted
    if class_weight is not None:
        mass = torch.where(counted, row_weight(class_weight, y, rows), 0)
        rows = torch.where(counted, rows * mass, 0)
    return reduce_rows(rows, mass, reduction)


def proxy_ranking_reference(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.1,
    metric: str = "cosine",
    normalize: bool = True,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """The sum over triplets, written densely; independent of the ops. For tests only."""
    x, w = (unit(embeddings, eps), unit(proxies, eps)) if normalize else (embeddings, proxies)
    kept = labels != ignore_index
    y = labels[kept]
    if metric in ("cosine", "dot"):
        s = x[kept] @ w.T
    else:
        squared = (x[kept][:, None] - w).square().sum(2)
        s = -squared if metric == "sqeuclidean" else -torch.where(squared > 0, squared, 1).sqrt() * (squared > 0)
    hinges = (margin + s - s.gather(1, y[:, None])).relu()
    other = y[:, None] != torch.arange(len(w), device=y.device)
    weight = torch.ones_like(y, dtype=s.dtype) if class_weight is None else class_weight.to(s)[y]
    rows = s.new_zeros(len(labels)).index_add(0, kept.nonzero()[:, 0], weight * torch.where(other, hinges, 0).sum(1))
    if reduction == "none":
        return rows
    mass = weight.sum()
    return rows.sum() / mass if reduction == "mean" and mass else rows.sum()


class ProxyRankingLoss(ProxyLoss):
    """The ranking loss with one learned proxy per class.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: the margin on the difference of two scores.
        options: of :class:`~dml_kernels.losses.proxy_loss.ProxyLoss`. ``distance``: any.

    Attributes:
        proxies: (C, D) parameter.
    """

    bank_name, transposed_name, other_names = "proxies", None, ("weight",)
    function = staticmethod(proxy_ranking_loss)

    def __init__(self, num_classes: int, embedding_size: int, margin: float = 0.1, **options: Any):
        super().__init__(num_classes, embedding_size, **options)
        self.margin = check_number("margin", margin)

    def default_distance(self) -> distances.Distance:
        """Cosine."""
        return distances.CosineSimilarity()

    def options(self) -> Mapping[str, Any]:
        """The keyword arguments of the function."""
        metric, normalize = self.distance.metric, self.distance.normalize_embeddings
        return {**super().options(), "margin": self.margin, "metric": metric, "normalize": normalize}


ENTRY = LossEntry(
    loss=ProxyRankingLoss,
    function=proxy_ranking_loss,
    reference=proxy_ranking_reference,
    paper="Movshovitz-Attias et al. 2017, arXiv 1703.07464, section 3.2",
    options=({}, {"margin": 0.5, "metric": "sqeuclidean"}, {"margin": 1.0, "reduction": "sum"}),
    at_scale=lambda scale: {"margin": scale},
    op="masked_hinge_sum",
)

r"""Proxy-Anchor (Kim et al. 2020, arXiv 2003.13911): each proxy is an anchor, the batch its positives and negatives.

With s_ip the cosine of embedding i and proxy p, P+ the proxies that have a positive in the batch, P all proxies::

    1/|P+| sum_{p in P+} log(1 + sum_{i: y_i = p}  exp(-alpha (s_ip - margin) + b_i))
    + 1/|P| sum_p        log(1 + sum_{i: y_i != p} exp( alpha (s_ip + margin) + b_i))

with b_i = 0, or the weight from a miner minus 1, as in pytorch-metric-learning. The proxies are the rows of the op and
the batch is the bank: both sums of a proxy come from one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances, logspace, reducers
from ..ops import choice
from ..ops.checks import check_integer, check_number
from ..ops.contract import check_eps, check_pair, check_vector, product_dtype, split_metric
from ..ops.masked_logsumexp import logsumexp_of
from ..ops.signatures import Bank, Spec
from ..pairs.tuples import row_weights
from ..reducers import Terms
from .base import LossEntry, check_label_range, check_labels, check_reduction
from .proxy_loss import ProxyLoss
from .softmax import unit

# The most proxies in one call of the ``torch`` backend.
ROWS = 8192


def _both_terms(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, margin: float, alpha: float, bias: Tensor | None,
    metric: str, normalize: bool, ignore_index: int, eps: float, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Terms of each proxy, (M,) of positives and (M,) of negatives, and () the number of proxies with a positive."""
    check_pair(embeddings, proxies, ("embeddings", "proxies"))
    ignore_index = check_integer("ignore_index", ignore_index)
    margin, alpha = check_number("margin", margin), check_number("alpha", alpha)
    y, m = check_labels(labels, embeddings), proxies.size(0)
    check_label_range(y, m, ignore_index)
    check_vector("bias", bias, embeddings.size(0), embeddings, integer=False)
    if embeddings.size(0) == 0:
        nothing = (proxies * 0).sum(1) + embeddings.sum() * 0
        nothing = nothing.to(torch.promote_types(nothing.dtype, torch.float32))
        return nothing, nothing, nothing.detach().sum()
    # Only an embedding can be ignored: the proxy of that class, if there is one, keeps its negatives.
    y = torch.where(y == ignore_index, -1, y)
    base, unit_vectors = split_metric(metric, normalize)
    spec = Spec(
        metric=base, normalize=unit_vectors, logit=[-alpha, margin, alpha, -margin], eps=check_eps(eps),
        ignore_index=-1, dtype=product_dtype(proxies, embeddings),
    )  # fmt: skip
    # That backend keeps copies of its rows, which are usually few. Here the proxies are the rows: give it blocks.
    each = torch.arange(m, device=y.device)
    spec = choice.settle("masked_logsumexp", Bank(proxies, embeddings, each, y), spec, backend)
    split = spec.backend == "torch" and m > ROWS
    blocks = zip(proxies.split(ROWS), each.split(ROWS), strict=True) if split else [(proxies, each)]
    same, different = [], []
    for block, label in blocks:
        out = logsumexp_of(Bank(block, embeddings, label, y, col_bias=bias), spec)
        same.append(out.same)
        different.append(out.different)
    pos, neg = (torch.cat(parts) if split else parts[0] for parts in (same, different))
    with_positive = (pos.detach() != -torch.inf).sum()
    return logspace.log1pexp(pos), logspace.log1pexp(neg), with_positive


def proxy_anchor_loss(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.1,
    alpha: float = 32.0,
    bias: Tensor | None = None,
    metric: str = "cosine",
    normalize: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """Proxy-Anchor of embeddings (N, D) and proxies (M, D), one for each class; see the module.

    Args:
        embeddings: (N, D), of any norm.
        proxies: (M, D), of any norm; the dtypes may differ.
        labels: (N,) integers, rows of ``proxies``.
        margin: the margin on the score.
        alpha: multiplies the scores.
        bias: (N,), added to the exponents of each embedding.
        metric, normalize: other scores, as in :func:`functional.masked_logsumexp`.
        ignore_index: embeddings with this label are neither positives nor negatives.
        reduction: ``mean``: that of the paper, each sum over its number of proxies. ``sum``: both terms, summed over
            the proxies. ``none``: (M,), both terms of each proxy.
        eps: guards the division by the norm.
        backend: overrides the choice of backend.

    Returns:
        The loss in fp32, or fp64 where either input is. A proxy without positives, or without negatives, contributes 0
        to that sum; with every row ignored the loss is 0, connected to the graph.

    Raises:
        ValueError, TypeError: labels out of range, wrong shapes, dtypes or options; the message names the fix.
    """
    check_reduction(reduction)
    pos, neg, with_positive = _both_terms(
        embeddings, proxies, labels, margin, alpha, bias, metric, normalize, ignore_index, eps, backend
    )
    if reduction == "none":
        return pos + neg
    if reduction == "sum":
        return pos.sum() + neg.sum()
    return pos.sum() / with_positive.clamp_min(1) + neg.sum() / neg.numel()


def proxy_anchor_reference(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.1,
    alpha: float = 32.0,
    bias: Tensor | None = None,
    metric: str = "cosine",
    normalize: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """The loss of the paper, written densely and independent of the ops; for tests only."""
    kept = labels != ignore_index
    x, y = embeddings[kept], labels[kept]
    b = torch.zeros(len(y), dtype=x.dtype) if bias is None else bias[kept].to(x.dtype)
    u, p = (unit(x, eps), unit(proxies, eps)) if normalize else (x, proxies)
    if metric in ("cosine", "dot"):
        s = u @ p.T
    else:
        squared = (u[:, None] - p).square().sum(2)
        s = -squared if metric == "sqeuclidean" else -squared.sqrt()
    same = y[:, None] == torch.arange(len(p), device=y.device)

    def log_one_plus(exponents: Tensor, members: Tensor) -> Tensor:
        exponents = torch.where(members, exponents + b[:, None], -torch.inf)
        return torch.logsumexp(torch.cat((exponents.new_zeros(1, len(p)), exponents)), 0)

    pos, neg = log_one_plus(-alpha * (s - margin), same), log_one_plus(alpha * (s + margin), ~same)
    if reduction == "none":
        return pos + neg
    if reduction == "sum":
        return pos.sum() + neg.sum()
    return pos.sum() / max(int(same.any(0).sum()), 1) + neg.mean()


class ProxyAnchorLoss(ProxyLoss):
    """Proxy-Anchor; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Two parts for a reducer, ``pos_loss`` and ``neg_loss``, one term a proxy; by default each is divided by its number
    of proxies. A miner's tuple adds its weights less 1 to the exponents.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: the margin on the cosine.
        alpha: multiplies the cosines.
        options: of :class:`~dml_kernels.losses.proxy_loss.ProxyLoss`, ``class_weight`` left out: a
            ClassWeightedReducer weighs each proxy's terms by its class. ``distance``: any.

    Attributes:
        proxies: (C, D) parameter, usually trained at 100 times the learning rate of the network.
    """

    bank_name, transposed_name, other_names = "proxies", None, ("weight",)
    function = staticmethod(proxy_anchor_loss)

    def __init__(self, num_classes: int, embedding_size: int, margin: float = 0.1, alpha: float = 32, **options: Any):
        super().__init__(num_classes, embedding_size, **options)
        if self.class_weight is not None:
            raise ValueError("ProxyAnchorLoss has a term for each proxy, not for each row: instead of class_weight use "
                             "reducer=ClassWeightedReducer(weights)")  # fmt: skip
        self.margin, self.alpha = check_number("margin", margin), check_number("alpha", alpha)

    @staticmethod
    def default_weight_init(weight: Tensor) -> Any:
        """Normal, with standard deviation sqrt(2 / C)."""
        return torch.nn.init.kaiming_normal_(weight, mode="fan_out")

    def default_distance(self) -> distances.Distance:
        """Cosine."""
        return distances.CosineSimilarity()

    def default_reducer(self) -> reducers.Reducer:
        """The reducer that divides each part by its number of proxies."""
        return reducers.DivisorReducer()

    def options(self) -> Mapping[str, Any]:
        """The keyword arguments of the function."""
        # A margin on a distance is a margin on minus the score.
        return {
            "margin": self.distance.threshold(self.margin), "alpha": self.alpha, "metric": self.distance.metric,
            "normalize": self.distance.normalize_embeddings, "ignore_index": self.ignore_index,
        }  # fmt: skip

    def parts(self, embeddings: Tensor, labels: Tensor, tuples: tuple[Tensor, ...] | None) -> Mapping[str, Terms]:
        """``pos_loss`` and ``neg_loss``, a term for each proxy."""
        weights = row_weights(tuples, embeddings.size(0), embeddings)
        options = dict(self.options())
        pos, neg, with_positive = _both_terms(
            embeddings, self.bank, labels, options["margin"], options["alpha"],
            None if weights is None else weights - 1, options["metric"], options["normalize"], self.ignore_index,
            1e-12, None,
        )  # fmt: skip
        classes = torch.arange(self.num_classes, device=pos.device)
        return {
            "pos_loss": Terms.elements(pos, classes, divisor=with_positive),
            "neg_loss": Terms.elements(neg, classes, divisor=torch.full_like(with_positive, self.num_classes)),
        }


ENTRY = LossEntry(
    loss=ProxyAnchorLoss,
    function=proxy_anchor_loss,
    reference=proxy_anchor_reference,
    paper="Kim et al. 2020, arXiv 2003.13911",
    options=({}, {"margin": 0.2, "alpha": 4.0}, {"alpha": 16.0, "reduction": "sum"}),
    by_row=False,
    at_scale=lambda scale: {"alpha": scale},
)

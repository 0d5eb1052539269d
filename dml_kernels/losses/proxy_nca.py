r"""Proxy-NCA (Movshovitz-Attias et al. 2017, arXiv 1703.07464): pull an embedding to the proxy of its class.

With unit vectors x^, p^ and z_ij = -softmax_scale |x^_i - p^_j|^2, the loss of a row with label y is::

    positive in (default):    -z_iy + log sum_j      exp(z_ij)      pytorch-metric-learning, ProxyNCA++
    exclude_positive=True:    -z_iy + log sum_{j!=y} exp(z_ij)      the 2017 paper; may be negative

ProxyNCA++ (Teh et al. 2020, arXiv 2004.01113) is the first with ``softmax_scale=9``, both sides scaled by 3, and
proxies trained at 100 times the network's learning rate or more. Public code of Proxy-NCA with label smoothing epsilon
spreads it over the other classes: ``label_smoothing=epsilon * C / (C - 1)`` here. ``metric`` and ``normalize`` take
other scores instead of -|x^ - p^|^2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances
from ..backends.composed import proxy_nca as composed
from ..ops import choice
from ..ops.checks import check_choice, check_flag, check_integer, check_number, check_tensor, check_values_there
from ..ops.contract import (
    apart,
    check_eps,
    check_first_class,
    check_matrix,
    check_pair,
    check_vector,
    product_dtype,
    split_metric,
)
from ..ops.masked_logsumexp import logsumexp_of
from ..ops.normalize import normalize as unit_rows
from ..ops.proxy_nca import differentiable
from ..ops.signatures import Bank, Proxied, ProxySpec, Spec
from .base import (
    LossEntry,
    check_class_weight,
    check_labels,
    check_reduction,
    check_smoothing,
    reduce_rows,
    row_weight,
    values_can_be_read,
)
from .proxy_loss import ProxyLoss


def _check_map(label_to_proxy: Tensor, num_proxies: int) -> None:
    """label_to_proxy is int64 (number of classes,), each entry a row of the proxies."""
    check_tensor("label_to_proxy", label_to_proxy)
    if label_to_proxy.dtype != torch.int64:
        raise TypeError(f"label_to_proxy must be int64; got {label_to_proxy.dtype}. Use label_to_proxy.long()")
    if label_to_proxy.dim() != 1 or label_to_proxy.numel() == 0:
        raise ValueError(f"label_to_proxy must have shape (num_classes,); got {tuple(label_to_proxy.shape)}")
    if values_can_be_read(label_to_proxy):
        for value in (int(label_to_proxy.min()), int(label_to_proxy.max())):
            if not 0 <= value < num_proxies:
                raise ValueError(f"label_to_proxy must be in [0, {num_proxies}), the rows of proxies; got {value}")


def _map_labels(labels: Tensor, label_to_proxy: Tensor | None, ignore_index: int) -> tuple[Tensor, int]:
    """The proxy of each row, and the mark of ignored rows: ``ignore_index`` is a label, and may be a proxy's index."""
    if label_to_proxy is None:
        return labels, ignore_index
    keep = labels != ignore_index
    classes = label_to_proxy.numel()
    if values_can_be_read(labels):
        bad = labels[keep & ((labels < 0) | (labels >= classes))]
        if bad.numel():
            raise ValueError(f"labels must be in [0, {classes}), the size of label_to_proxy; got {bad[0].item()}")
    check_values_there("label_to_proxy", label_to_proxy, labels)
    mapped = label_to_proxy.to(labels.device)[torch.where(keep, labels, 0).clamp(0, classes - 1)]
    return torch.where(keep, mapped, -1), -1


def _check_options(label_smoothing: float, exclude_positive: bool, reduction: str) -> tuple[float, bool]:
    check_reduction(reduction)
    label_smoothing = check_smoothing(label_smoothing)
    exclude_positive = check_flag("exclude_positive", exclude_positive)
    if label_smoothing and exclude_positive:
        raise ValueError(
            "label_smoothing needs the positive in the sum: the smoothed target is a distribution over all proxies. "
            "Use exclude_positive=False"
        )
    return label_smoothing, exclude_positive


def _check_part(first_class: int, proxies: Tensor, label_to_proxy: Tensor | None, class_weight: Tensor | None) -> int:
    """The class of the first proxy."""
    if label_to_proxy is not None:
        raise ValueError("first_class numbers the proxies' classes, and label_to_proxy names them: give one of the two")
    if class_weight is not None:
        raise ValueError(
            "class_weight has a weight for each proxy, and first_class means that labels name others, too. "
            "Use class_weight=None, reduction='none', and weigh the rows"
        )
    return check_first_class(first_class, None, proxies.size(0))


def proxy_nca_loss(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    softmax_scale: float | Tensor = 1.0,
    exclude_positive: bool = False,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_to_proxy: Tensor | None = None,
    first_class: int | None = None,
    metric: str = "sqeuclidean",
    normalize: bool = True,
    reduction: str = "mean",
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """Proxy-NCA of embeddings (N, D) against proxies (M, D); see the module for the formula.

    Args:
        embeddings: (N, D), of any norm: the loss computes their unit vectors.
        proxies: (M, D), of any norm; the dtypes may differ.
        labels: (N,) integers: rows of ``proxies``, or of ``label_to_proxy`` where given.
        softmax_scale: a number, or a () or (N,) tensor, which gets a gradient. 1 is the paper's.
        exclude_positive: leave the positive out of the sum, as the 2017 paper does.
        label_smoothing: epsilon of a target (1 - epsilon) on the positive plus epsilon / M on every proxy, as in
            ``torch.nn.functional.cross_entropy``; epsilon over the *other* classes is epsilon M / (M - 1) here.
        class_weight: (number of classes,), a weight for each label; the mean is then weighted.
        ignore_index: rows with this label contribute 0 and are not counted in the mean.
        label_to_proxy: (number of classes,) int64, the proxy of each label; several may share one.
        first_class: the proxies are those of the classes from this number on, a part of all; labels are any integers.
            The loss of a row of another class leaves z_iy out: it is log sum_j exp(z_ij), with smoothing less epsilon
            times the mean of z. Takes neither ``label_to_proxy`` nor ``class_weight``. None: there are no others. For
            the loss over all parts, combine those of :func:`functional.masked_logsumexp` by logaddexp.
        metric, normalize: other scores, as in :func:`functional.masked_logsumexp`; the default is the fused op.
        reduction: ``mean`` over counted rows, ``sum``, or ``none`` for (N,).
        eps: guards the division by the norm.
        backend: overrides the choice of backend.

    Returns:
        The loss in fp32, or fp64 where either input is. A row without negatives (one proxy) contributes 0; with every
        row ignored the loss is 0, connected to the graph.

    Raises:
        ValueError, TypeError: labels out of range, wrong shapes, dtypes or options; the message names the fix.
    """
    check_pair(embeddings, proxies, ("embeddings", "proxies"))
    label_smoothing, exclude_positive = _check_options(label_smoothing, exclude_positive, reduction)
    ignore_index, normalize = check_integer("ignore_index", ignore_index), check_flag("normalize", normalize)
    labels = check_labels(labels, embeddings)
    if label_to_proxy is not None:
        _check_map(label_to_proxy, proxies.size(0))
    first = -1 if first_class is None else _check_part(first_class, proxies, label_to_proxy, class_weight)
    check_class_weight(class_weight, proxies.size(0) if label_to_proxy is None else label_to_proxy.numel())
    y, ignored = _map_labels(labels, label_to_proxy, ignore_index)
    weight = None if class_weight is None else row_weight(class_weight, labels, embeddings)
    scale, factor = (softmax_scale, 1.0) if isinstance(softmax_scale, Tensor) else (None, softmax_scale)
    check_vector("softmax_scale", scale, embeddings.size(0), embeddings, integer=False, scalar=True)
    factor, eps = check_number("softmax_scale", factor), check_eps(eps)
    base, unit = split_metric(metric, normalize)
    fused = (base, unit) == ("sqeuclidean", True)
    dtype, size = product_dtype(embeddings, proxies), (embeddings.size(0), *proxies.shape)
    asked = {} if first_class is None else {"first_class": first}
    chosen = choice.choose("proxy_nca", embeddings.device, dtype, backend, size, **asked)
    if chosen == choice.REFERENCE:
        return proxy_nca_reference(
            embeddings, proxies, labels, softmax_scale=softmax_scale, exclude_positive=exclude_positive,
            label_smoothing=label_smoothing, class_weight=class_weight, ignore_index=ignore_index,
            label_to_proxy=label_to_proxy, first_class=first_class, metric=metric, normalize=normalize,
            reduction=reduction, eps=eps,
        )  # fmt: skip
    if not fused:
        comparison = Spec(
            metric=base, normalize=unit, logit=[factor, 0.0, factor, 0.0], eps=eps, ignore_index=ignored, dtype=dtype,
            backend=chosen, sums=label_smoothing > 0, first_class=first,
        )  # fmt: skip
        out = logsumexp_of(Bank(embeddings, proxies, y, scale=scale), comparison)
        counted = y != ignored
        elsewhere = composed.elsewhere_of(y, proxies.size(0), first)
        rows = composed.rows_of(out, counted, exclude_positive, label_smoothing, proxies.size(0), elsewhere)
        if weight is None:
            return reduce_rows(rows, counted, reduction)
        mass = torch.where(counted, weight.to(rows.dtype), 0)
        return reduce_rows(torch.where(counted, rows * mass, 0), mass, reduction)
    spec = ProxySpec(
        factor=factor, exclude_positive=exclude_positive, label_smoothing=label_smoothing, eps=eps,
        ignore_index=ignored, reduction=reduction, dtype=dtype, backend=chosen,
        first_class=first,
    )  # fmt: skip
    # The batch may be its own proxies, and Dynamo needs each argument to be a separate tensor.
    return differentiable(Proxied(embeddings, apart(proxies, embeddings), y, scale, weight), spec)


def proxy_nca_reference(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    softmax_scale: float | Tensor = 1.0,
    exclude_positive: bool = False,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_to_proxy: Tensor | None = None,
    first_class: int | None = None,
    metric: str = "sqeuclidean",
    normalize: bool = True,
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """The paper's loss, written densely and row by row; independent of the ops. For tests only."""
    x, p = embeddings, proxies
    if normalize or metric == "cosine":
        x, p = (t / t.norm(dim=1, keepdim=True).clamp_min(eps) for t in (x, p))
    rows: list[Tensor] = []
    mass: float | Tensor = 0.0
    for i, label in enumerate(labels.tolist()):
        if label == ignore_index:
            rows.append(embeddings[i].sum() * 0)
            continue
        y = label - (first_class or 0) if label_to_proxy is None else int(label_to_proxy[label])
        scale = softmax_scale[i] if isinstance(softmax_scale, Tensor) and softmax_scale.dim() else softmax_scale
        squared = (x[i] - p).square().sum(1)
        if metric in ("cosine", "dot"):
            z = scale * (p @ x[i])
        else:
            z = -scale * (squared if metric == "sqeuclidean" else squared.sqrt())
        elsewhere = first_class is not None and not 0 <= y < len(p)
        others = z if elsewhere else torch.cat([z[:y], z[y + 1 :]])
        if elsewhere:
            row = torch.logsumexp(z, 0) - label_smoothing * z.mean()
        elif others.numel() == 0:
            row = z.sum() * 0
        elif exclude_positive:
            row = -z[y] + torch.logsumexp(others, 0)
        else:
            log_p = z - torch.logsumexp(z, 0)
            row = -(1 - label_smoothing) * log_p[y] - label_smoothing * log_p.mean()
        weight: float | Tensor = 1.0 if class_weight is None else class_weight[label]
        rows.append(row * weight)
        mass = mass + weight
    if reduction == "none":
        return torch.stack(rows)
    total = torch.stack(rows).sum()
    return total / mass if reduction == "mean" and mass else total


def _module_map(label_to_proxy: Tensor, num_classes: int) -> Tensor:
    check_tensor("label_to_proxy", label_to_proxy)
    if label_to_proxy.device.type == "meta":
        raise ValueError("label_to_proxy is on meta, which holds no values")
    if label_to_proxy.shape != (num_classes,) or label_to_proxy.dtype != torch.int64:
        raise ValueError(
            f"label_to_proxy must be int64 of shape ({num_classes},), a proxy for each class; "
            f"got {label_to_proxy.dtype} {tuple(label_to_proxy.shape)}"
        )
    if int(label_to_proxy.min()) < 0:
        raise ValueError(f"label_to_proxy must not be negative; got {int(label_to_proxy.min())}")
    return label_to_proxy


class ProxyNCALoss(ProxyLoss):
    """Proxy-NCA with one learned proxy per class; a drop-in for pytorch-metric-learning 2.9's class of this name.

    Same names and numbers by default: unit vectors, squared distances, the positive in the sum, mean over rows.
    The paper's own loss is ``exclude_positive=True``; ProxyNCA++ is ``softmax_scale=9``. See :func:`proxy_nca_loss` for
    formula and options.

    Args:
        num_classes: C.
        embedding_size: D.
        softmax_scale: multiplies the squared distances: a number, or a () parameter, which is learned.
        exclude_positive, label_smoothing: as in :func:`proxy_nca_loss`.
        label_to_proxy: (C,) int64, the proxy of each class; the number of proxies is its largest entry plus 1.
        options: of :class:`~dml_kernels.losses.proxy_loss.ProxyLoss`; ``distance``: any, a similarity or a distance.

    Attributes:
        proxies: (number of proxies, D) parameter, usually trained at 10 to 100 times the learning rate of the network.

    Raises:
        ValueError: sizes that are not positive, a map or starting values of the wrong shape.
    """

    bank_name, transposed_name, other_names = "proxies", None, ("weight",)
    anchors_alone = True
    function: Callable[..., Tensor] = staticmethod(proxy_nca_loss)
    label_to_proxy: Tensor | None

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        softmax_scale: float | Tensor = 1,
        *,
        exclude_positive: bool = False,
        label_smoothing: float = 0.0,
        label_to_proxy: Tensor | None = None,
        **options: Any,
    ):
        label_smoothing, exclude_positive = _check_options(
            label_smoothing, exclude_positive, options.get("reduction", "mean")
        )
        num_classes = check_integer("num_classes", num_classes)
        if label_to_proxy is not None:
            options["bank_rows"] = int(_module_map(label_to_proxy, num_classes).max()) + 1
        super().__init__(num_classes, embedding_size, **options)
        # A tensor that needs a gradient is learned.
        learned = isinstance(softmax_scale, Tensor) and softmax_scale.requires_grad
        self.softmax_scale = softmax_scale if learned else check_number("softmax_scale", softmax_scale)
        self.exclude_positive, self.label_smoothing = exclude_positive, label_smoothing
        self.register_buffer("label_to_proxy", label_to_proxy)

    def default_distance(self) -> distances.Distance:
        """The squared distance of unit vectors."""
        return distances.LpDistance(power=2)

    @torch.no_grad()
    def init_from_data(self, embeddings: Tensor, labels: Tensor, how: str = "mean") -> None:
        """Set each proxy from the embeddings of its classes; proxies without embeddings keep their values.

        Args:
            embeddings: (n, D) floating point.
            labels: (n,) integers.
            how: ``mean``: the mean of the unit vectors. ``sample``: the first embedding. ``nearest``: the embedding
                nearest to that mean (a member of the class, as the static proxies of the paper).
        """
        check_matrix("embeddings", embeddings)
        if embeddings.size(1) != self.embedding_size:
            raise ValueError(f"embeddings must have shape (n, {self.embedding_size}); got {tuple(embeddings.shape)}")
        labels = check_labels(labels, embeddings)
        check_choice("how", how, ("mean", "sample", "nearest"))
        y, ignored = _map_labels(labels, self.label_to_proxy, self.ignore_index)
        keep = (y != ignored).nonzero().squeeze(1).to(self.proxies.device)
        y = y.to(self.proxies.device)[keep]
        if y.numel() and (int(y.min()) < 0 or int(y.max()) >= self.proxies.size(0)):
            raise ValueError(f"labels must be in [0, {self.num_classes}); got {int(y.min())} to {int(y.max())}")
        unit = unit_rows(embeddings.to(self.proxies)[keep])
        total = torch.zeros_like(self.proxies).index_add_(0, y, unit)
        count = torch.bincount(y, minlength=self.proxies.size(0))
        if how == "mean":
            values = total / count.clamp_min(1)[:, None].to(total.dtype)
        else:
            # The smallest key of each proxy wins: the order in the data, or the rank by closeness to the mean.
            closeness = (unit * unit_rows(total)[y]).sum(1)
            rank = torch.arange(y.numel(), device=y.device)
            if how == "nearest":
                rank = closeness.argsort(descending=True, stable=True).argsort()
            best = torch.full_like(count, y.numel()).scatter_reduce_(0, y, rank, "amin")
            by_rank = torch.empty_like(rank).scatter_(0, rank, torch.arange(y.numel(), device=y.device))
            values = unit[by_rank[best.clamp_max(max(y.numel() - 1, 0))]] if y.numel() else self.proxies
        self.proxies.copy_(torch.where((count > 0)[:, None], values, self.proxies))

    def options(self) -> Mapping[str, Any]:
        """The keyword arguments of the function."""
        distance = self.distance
        return {
            **super().options(), "softmax_scale": self.softmax_scale, "exclude_positive": self.exclude_positive,
            "label_smoothing": self.label_smoothing, "label_to_proxy": self.label_to_proxy,
            "metric": distance.metric, "normalize": distance.normalize_embeddings,
        }  # fmt: skip

    def extra_repr(self) -> str:
        """What ``print(loss)`` shows."""
        return (
            f"num_classes={self.num_classes}, embedding_size={self.embedding_size}, "
            f"softmax_scale={self.softmax_scale}, exclude_positive={self.exclude_positive}"
        )


ENTRY = LossEntry(
    loss=ProxyNCALoss,
    function=proxy_nca_loss,
    reference=proxy_nca_reference,
    paper="Movshovitz-Attias et al. 2017, arXiv 1703.07464",
    options=(
        {},
        {"softmax_scale": 8.0},
        {"softmax_scale": 32.0, "exclude_positive": True},
        {"softmax_scale": 9.0, "label_smoothing": 0.1},
        {"softmax_scale": 3.0, "reduction": "sum", "exclude_positive": True},
        {"softmax_scale": 6.0, "metric": "cosine", "label_smoothing": 0.1},
    ),
    at_scale=lambda scale: {"softmax_scale": scale},
    op="proxy_nca",
)

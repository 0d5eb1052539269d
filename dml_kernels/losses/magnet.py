r"""Magnet (Rippel et al. 2016, arXiv 1511.05939): a class is several clusters, kept apart from those of other classes.

With representations r_i, own(i) the cluster of i, mu_k a centre and C(k) the class of a cluster, the loss of i is::

    l_i = { alpha + |r_i - mu_own(i)|^2 / (2 sigma^2) + L-_i }_+
    L-_i = log sum_{k: C(k) != C(own(i))} exp(-|r_i - mu_k|^2 / (2 sigma^2))
    sigma^2 = sum_i |r_i - mu_own(i)|^2 / max(N - 1, 1), at least min_variance

The centres are the means of the batch, as in equation 7 of the paper, or given ones. Everything is in log space,
without an epsilon inside a logarithm, which would cap the loss and remove the gradient of the examples that need it
most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.composed.magnet import measure
from ..ops import choice, engines
from ..ops.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_momentum,
    check_number,
    check_positive,
    check_tensor,
    check_values_there,
)
from ..ops.contract import (
    accumulate_dtype,
    check_eps,
    check_matrix,
    check_pair,
    check_vector,
    product_dtype,
)
from ..ops.magnet import differentiable
from ..ops.signatures import Clustered, MagnetSpec
from .base import LossEntry, as_int64, check_reduction


def _variance_tensor(variance: float | Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    if variance is None:
        return None
    if isinstance(variance, Tensor):
        check_tensor("variance", variance)
        check_values_there("variance", variance, like)
        if variance.dim() != 0 or not variance.is_floating_point():
            raise ValueError(f"variance must be a number or a floating () tensor; got {variance.dtype} of shape "
                             f"{tuple(variance.shape)}")  # fmt: skip
        return variance.to(device=like.device, dtype=dtype)
    value = check_number("variance", variance)
    if value < 0:
        raise ValueError(f"variance must not be negative; got {value}")
    return torch.tensor(value, dtype=dtype, device=like.device)


def _check(
    embeddings: Tensor, clusters: Tensor, cluster_classes: Tensor, centers: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cluster ids and classes as int64 on the embeddings' device."""
    check_matrix("embeddings", embeddings)
    if centers is not None:
        check_pair(embeddings, centers, ("embeddings", "centers"))
    clusters = as_int64("clusters", clusters, embeddings)
    classes = as_int64("cluster_classes", cluster_classes, embeddings)
    check_vector("clusters", clusters, embeddings.size(0), embeddings, integer=True)
    if classes.dim() != 1 or classes.numel() == 0:
        raise ValueError(f"cluster_classes must have shape (K,), K at least 1; got {tuple(classes.shape)}")
    if centers is not None and centers.size(0) != classes.numel():
        raise ValueError(
            f"centers must have a row for each of the {classes.numel()} cluster_classes; got {tuple(centers.shape)}"
        )
    return clusters, classes


def _loss_and_variance(
    embeddings: Tensor,
    clusters: Tensor,
    cluster_classes: Tensor,
    *,
    alpha: float,
    centers: Tensor | None,
    variance: float | Tensor | None,
    normalize: bool,
    min_variance: float,
    ignore_index: int,
    reduction: str,
    eps: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    clusters, classes = _check(embeddings, clusters, cluster_classes, centers)
    check_reduction(reduction)
    ignore_index, normalize = check_integer("ignore_index", ignore_index), check_flag("normalize", normalize)
    alpha, eps = check_number("alpha", alpha), check_eps(eps)
    min_variance = check_positive("min_variance", min_variance, "it guards a division")
    dtype = product_dtype(embeddings, embeddings if centers is None else centers)
    variance = _variance_tensor(variance, embeddings, accumulate_dtype(dtype))
    n, d = embeddings.shape
    size = (n, min(n, classes.numel()) if centers is None else classes.numel(), d)
    chosen = choice.choose("magnet", embeddings.device, dtype, backend, size)
    inputs = Clustered(embeddings, clusters, classes, centers, variance)
    spec = MagnetSpec(
        alpha=alpha, normalize=normalize, min_variance=min_variance, eps=eps, ignore_index=ignore_index,
        reduction=reduction, dtype=dtype, backend=chosen,
    )  # fmt: skip
    return _dense(inputs, spec) if chosen == choice.REFERENCE else differentiable(inputs, spec)


def magnet_loss(
    embeddings: Tensor,
    clusters: Tensor,
    cluster_classes: Tensor,
    *,
    alpha: float = 1.0,
    centers: Tensor | None = None,
    variance: float | Tensor | None = None,
    normalize: bool = False,
    min_variance: float = 1e-6,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """The Magnet loss of embeddings (N, D) in clusters; see the module for the formula.

    Args:
        embeddings: (N, D), the representations r, or with ``normalize`` vectors whose unit vectors are r.
        clusters: (N,) integers in [0, K), in any order; clusters may differ in size. The ids of a large index can be
            used directly: no work depends on clusters that the batch lacks, unless ``centers`` are given.
        cluster_classes: (K,) integers, the class of each cluster.
        alpha: the margin between an example's own cluster and those of other classes, in units of 2 sigma^2.
        centers: (K, D) given centres, all K of which take part; they get a gradient if they require one. None: the
            means of the clusters in the batch, through which a gradient reaches the embeddings.
        variance: a number or () tensor, which gets a gradient if it requires one. None: that of the batch, through
            which a gradient reaches the embeddings. Either is raised to ``min_variance``, where its gradient is 0.
        normalize: r are unit vectors. Their means are not unit vectors, and given centres are taken as they are.
        min_variance: in squared units of the embeddings.
        ignore_index: examples of this cluster id, and clusters of this class with their examples, take no part.
        reduction: ``mean`` over the examples that take part, ``sum``, or ``none`` for (N,), 0 for those that do not.
        eps: guards the division by the norm.
        backend: overrides the choice of backend.

    Returns:
        The loss in fp32, or fp64 where either input is. An example without clusters of other classes contributes 0,
        with a zero gradient; so does a batch of one cluster, or without examples.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or value; the message names the fix.
    """
    return _loss_and_variance(
        embeddings, clusters, cluster_classes, alpha=alpha, centers=centers, variance=variance, normalize=normalize,
        min_variance=min_variance, ignore_index=ignore_index, reduction=reduction, eps=eps, backend=backend,
    )[0]  # fmt: skip


@torch.no_grad()
def batch_variance(
    embeddings: Tensor,
    clusters: Tensor,
    cluster_classes: Tensor,
    *,
    centers: Tensor | None = None,
    normalize: bool = False,
    ignore_index: int = -100,
    eps: float = 1e-12,
) -> Tensor:
    """sigma^2 of a batch, (), before any floor: a pass over the rows. Arguments as in :func:`magnet_loss`."""
    clusters, classes = _check(embeddings, clusters, cluster_classes, centers)
    dtype = product_dtype(embeddings, embeddings if centers is None else centers)
    chosen = choice.choose("normalize", embeddings.device, accumulate_dtype(dtype))
    chosen = "torch" if chosen == choice.REFERENCE else chosen
    normalize, ignore_index = check_flag("normalize", normalize), check_integer("ignore_index", ignore_index)
    spec = MagnetSpec(
        alpha=0.0, normalize=normalize, min_variance=0.0, eps=check_eps(eps), ignore_index=ignore_index,
        reduction="mean", dtype=dtype, backend=chosen,
    )  # fmt: skip
    measured = measure(Clustered(embeddings, clusters, classes, centers, None), spec, engines.functions()).measured
    return measured.to(accumulate_dtype(dtype))


def magnet_reference(
    embeddings: Tensor,
    clusters: Tensor,
    cluster_classes: Tensor,
    *,
    alpha: float = 1.0,
    centers: Tensor | None = None,
    variance: float | Tensor | None = None,
    normalize: bool = False,
    min_variance: float = 1e-6,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """The paper's loss, cluster by cluster and row by row; independent of the ops. For tests only."""
    given = None if variance is None else torch.as_tensor(variance, dtype=embeddings.dtype)
    spec = MagnetSpec(
        alpha=alpha, normalize=normalize, min_variance=min_variance, eps=eps, ignore_index=ignore_index,
        reduction=reduction, dtype=embeddings.dtype, backend=choice.REFERENCE,
    )  # fmt: skip
    return _dense(Clustered(embeddings, clusters, cluster_classes, centers, given), spec)[0]


def _dense(inputs: Clustered, spec: MagnetSpec) -> tuple[Tensor, Tensor]:
    x, clusters, classes, centers, variance = inputs
    alpha, normalize, min_variance, eps, ignore_index, reduction, _, _ = spec
    r = x / x.norm(dim=1, keepdim=True).clamp_min(eps) if normalize else x
    ids, class_of = clusters.tolist(), classes.tolist()
    counted = [i for i, k in enumerate(ids) if k != ignore_index and class_of[k] != ignore_index]
    if centers is None:
        mu = {k: r[[i for i in counted if ids[i] == k]].mean(0) for k in {ids[i] for i in counted}}
    else:
        mu = {k: centers[k] for k in range(len(class_of)) if class_of[k] != ignore_index}
    distance = {i: (r[i] - mu[ids[i]]).square().sum() for i in counted}
    measured = sum(distance.values(), r.new_zeros(())) / max(len(counted) - 1, 1)
    if variance is not None:
        measured = variance.to(r.dtype)
    sigma2 = measured if measured > min_variance or measured.isnan() else torch.full_like(measured, min_variance)
    rows = [x[i].sum() * 0 for i in range(len(ids))]
    for i in counted:
        others = [-(r[i] - mu[k]).square().sum() / (2 * sigma2) for k in mu if class_of[k] != class_of[ids[i]]]
        if others:
            impostors = torch.logsumexp(torch.stack(others), 0)
            rows[i] = torch.relu(alpha + distance[i] / (2 * sigma2) + impostors)
    value = torch.stack(rows) if rows else x.sum(1)
    if reduction != "none":
        value = value.sum() / (max(len(counted), 1) if reduction == "mean" else 1)
    return value, measured.detach()


class MagnetLoss(torch.nn.Module):
    """Magnet over a batch of clusters, as :class:`dml_kernels.samplers.MagnetBatchSampler` draws them.

    Args:
        alpha, normalize, min_variance, ignore_index, reduction: as in :func:`magnet_loss`. ``reduction="none"`` gives
            the values that the sampler tracks.
        variance: ``batch``: that of the batch with its gradient, as in the paper. ``running``: an average over
            training, constant in the backward.
        momentum: the share of a new batch in the running average.

    Attributes:
        running_variance: () fp32 buffer, the variance of the training batches so far (with either ``variance``), for
            :func:`dml_kernels.evaluation.k_nearest_clusters`. Batches in ``eval()`` mode do not change it.
        batches_seen: () int64 buffer; the first batch sets the average.

    Raises:
        ValueError: an option out of range.
    """

    running_variance: Tensor
    batches_seen: Tensor

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        normalize: bool = False,
        variance: str = "batch",
        momentum: float = 0.1,
        min_variance: float = 1e-6,
        ignore_index: int = -100,
        reduction: str = "mean",
    ):
        super().__init__()
        check_reduction(reduction)
        self.alpha, self.normalize = check_number("alpha", alpha), check_flag("normalize", normalize)
        self.variance = check_choice("variance", variance, ("batch", "running"))
        self.momentum = check_momentum(momentum)
        self.min_variance = check_positive("min_variance", min_variance, "it guards a division")
        self.ignore_index, self.reduction = check_integer("ignore_index", ignore_index), reduction
        self.register_buffer("running_variance", torch.ones(()))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))

    def forward(
        self, embeddings: Tensor, clusters: Tensor, cluster_classes: Tensor, centers: Tensor | None = None
    ) -> Tensor:
        """The loss of embeddings (N, D) in ``clusters`` (N,) of classes ``cluster_classes`` (K,).

        With ``variance="running"`` a training batch enters the average first, so that the average exists in the first
        batch.
        """
        running = self.variance == "running"
        if running and self.training:
            self._track(batch_variance(
                embeddings.detach(), clusters, cluster_classes, centers=centers, normalize=self.normalize,
                ignore_index=self.ignore_index,
            ))  # fmt: skip
        value, measured = _loss_and_variance(
            embeddings, clusters, cluster_classes, alpha=self.alpha, centers=centers,
            variance=self.running_variance.clone() if running else None, normalize=self.normalize,
            min_variance=self.min_variance, ignore_index=self.ignore_index, reduction=self.reduction, eps=1e-12,
            backend=None,
        )  # fmt: skip
        if self.training and not running:
            self._track(measured)
        return value

    @torch.no_grad()
    def _track(self, measured: Tensor) -> None:
        new = measured.to(self.running_variance)
        moved = torch.lerp(self.running_variance, new, self.momentum)
        self.running_variance.copy_(torch.where(self.batches_seen == 0, new, moved))
        self.batches_seen += 1

    def extra_repr(self) -> str:
        """What ``print(loss)`` shows."""
        return f"alpha={self.alpha}, normalize={self.normalize}, variance={self.variance!r}"


ENTRY = LossEntry(
    loss=MagnetLoss,
    function=magnet_loss,
    reference=magnet_reference,
    paper="Rippel et al. 2016, arXiv 1511.05939",
    family="clusters",
    op="magnet",
    options=(
        {},
        {"normalize": True, "alpha": 2.0},
        {"variance": 0.7, "alpha": 7.18},
        {"normalize": True, "variance": 0.2, "alpha": 0.0},
        {"reduction": "sum", "alpha": 3.0},
    ),
)

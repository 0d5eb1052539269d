"""Regularisers of embeddings or of a learned bank, under pytorch-metric-learning's names; none builds an M x M matrix.

Each is called on rows (M, D) and returns a scalar in fp32 (fp64 for fp64), which a loss multiplies by a weight and
adds. A reducer of :mod:`dml_kernels.reducers` combines the values of the rows; by default it is the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import distances, reducers
from .elsewhere import explain
from .foreign import pml_name
from .ops.checks import check_integer, check_number
from .ops.contract import accumulate_dtype, check_matrix
from .ops.masked_argmax import masked_argmax
from .ops.normalize import normalize as unit_rows
from .records import Recorded
from .reducers import Terms


class Regularizer(Recorded):
    """A function of the rows of a matrix; a subclass defines its ``terms``.

    Args:
        reducer: one of :mod:`dml_kernels.reducers`, or of pytorch-metric-learning; None: the default of the
            regulariser.
        collect_stats: accepted as in pytorch-metric-learning; nothing of a step is recorded.
    """

    def __init__(self, *, reducer: Any = None, collect_stats: bool | None = None):
        super().__init__(collect_stats)
        self.reducer = reducer

    unused = ("distance", "same_class_mask", "diff_class_mask")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "reducer":
            value = reducers.accept(value, self.default_reducer())
        super().__setattr__(name, value)

    def default_reducer(self) -> reducers.Reducer:
        """The reducer that is used if none is given: the mean."""
        return reducers.MeanReducer()

    def terms(self, weights: Tensor) -> Terms:
        """The values of the rows (M, D), as Terms for a reducer."""
        raise NotImplementedError

    def forward(self, weights: Tensor) -> Tensor:
        """The value of the regulariser, a scalar.

        Args:
            weights: (M, D) floating point.

        Raises:
            ValueError: not a matrix.
            TypeError: not a floating point tensor.
        """
        check_matrix("weights", weights)
        return self.reducer({"loss": self.terms(weights.to(accumulate_dtype(weights.dtype)))})


class LpRegularizer(Regularizer):
    """The mean of |w_j|_p^power; the gradient of a row of zeros is 0.

    Args:
        p: the order of the norm.
        power: the exponent of the norm.
        options: of :class:`Regularizer`.
    """

    def __init__(self, p: float = 2, power: float = 1, **options: Any):
        super().__init__(**options)
        self.p, self.power = check_number("p", p), check_number("power", power)

    def terms(self, weights: Tensor) -> Terms:
        """The norms of the rows, to the power."""
        norms = torch.linalg.vector_norm(weights, ord=self.p, dim=1)
        return Terms.elements(norms if self.power == 1 else norms**self.power, None)


class ZeroMeanRegularizer(Regularizer):
    """The mean of |sum_d w_jd|, which pulls the sum of each row's components to 0."""

    def terms(self, weights: Tensor) -> Terms:
        """The absolute sums of the rows."""
        return Terms.elements(weights.sum(1).abs(), None)


class CenterInvariantRegularizer(Regularizer):
    """The mean of (|w_j|^2 - mean_k |w_k|^2)^2 / 4, which pulls all rows to one length.

    Wu et al., "Deep Face Recognition with Center Invariant Loss", 2017.
    """

    def terms(self, weights: Tensor) -> Terms:
        """A quarter of the squared deviation of each row."""
        squared = torch.linalg.vecdot(weights, weights)
        return Terms.elements((squared - squared.mean()).square() / 4, None)


class RegularFaceRegularizer(Regularizer):
    """The mean over rows of the cosine to the nearest other row, which pushes classes apart.

    Zhao et al., "RegularFace", CVPR 2019. The nearest row is found by streaming, and is a constant in the derivative,
    as in pytorch-metric-learning. A bank of one row gives 0.
    """

    def terms(self, weights: Tensor) -> Terms:
        """The cosine of each row with its nearest other row."""
        own = torch.arange(weights.size(0), device=weights.device)
        found = masked_argmax(weights.detach(), None, own, metric="cosine", which="different")
        assert found.different is not None
        nearest = found.different.index
        unit = unit_rows(weights)
        cosines = torch.linalg.vecdot(unit, unit[nearest.clamp_min(0)])
        return Terms.elements(torch.where(nearest >= 0, cosines, 0), None)


class SparseCentersRegularizer(Regularizer):
    """Lets centres of one class merge (SoftTriple, Qian et al., ICCV 2019, equation 8)::

        sum_c sum_{k < l} |u_ck - u_cl| / (C K (K - 1)),  u unit vectors

    The rows are C classes of K centres, class by class. K x K cosines per class are built, never M x M. A pair that has
    merged up to rounding has distance 0 and no gradient.

    Args:
        num_classes: C.
        centers_per_class: K, at least 2.
        options: of :class:`Regularizer`.

    Raises:
        ValueError: sizes that are too small; at a call, a number of rows other than C K.
    """

    fixed = ("num_classes", "centers_per_class")

    def __init__(self, num_classes: int, centers_per_class: int, **options: Any):
        super().__init__(**options)
        num_classes = check_integer("num_classes", num_classes)
        centers_per_class = check_integer("centers_per_class", centers_per_class)
        if num_classes < 1 or centers_per_class < 2:
            raise ValueError(
                f"SparseCentersRegularizer needs at least one class of two centres; got {num_classes} of "
                f"{centers_per_class}"
            )
        self.num_classes, self.centers_per_class = num_classes, centers_per_class

    def default_reducer(self) -> reducers.Reducer:
        """The reducer that divides by the stated divisor: twice the number of pairs, as in the paper."""
        return reducers.DivisorReducer()

    def terms(self, weights: Tensor) -> Terms:
        """The sum of the distances within each class."""
        c, k = self.num_classes, self.centers_per_class
        if weights.size(0) != c * k:
            raise ValueError(f"weights must have {c} x {k} rows, the centres class by class; got {weights.size(0)}")
        unit = unit_rows(weights).view(c, k, -1)
        squared = 2 - 2 * torch.bmm(unit, unit.mT)
        apart = torch.ones_like(squared, dtype=torch.bool).triu(1) & (squared > 4 * torch.finfo(squared.dtype).eps)
        distance = torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)
        number = squared.new_full((c,), k * (k - 1) / 2)
        return Terms(distance.sum((1, 2)), number, apart.sum((1, 2)).to(number), reducers.PAIR,
                     divisor=number.sum() * 2)  # fmt: skip


def _sparse_centers(original: Any) -> SparseCentersRegularizer:
    """Convert a regulariser of pytorch-metric-learning, which keeps C and K only in a mask of K (K - 1) / 2 a class."""
    mask = original.same_class_mask
    k = 2 * int(mask.sum()) // mask.size(0) + 1
    return SparseCentersRegularizer(mask.size(0) // k, k, reducer=original.reducer)


_KNOWN: dict[str, Callable[[Any], Regularizer]] = {
    "LpRegularizer": lambda original: LpRegularizer(original.p, original.power, reducer=original.reducer),
    "ZeroMeanRegularizer": lambda original: ZeroMeanRegularizer(reducer=original.reducer),
    "CenterInvariantRegularizer": lambda original: CenterInvariantRegularizer(reducer=original.reducer),
    "RegularFaceRegularizer": lambda original: RegularFaceRegularizer(reducer=original.reducer),
    "SparseCentersRegularizer": _sparse_centers,
}
# The distance of the regularisers that use one.
_DISTANCE: dict[str, type[distances.Distance]] = {
    "CenterInvariantRegularizer": distances.LpDistance,
    "RegularFaceRegularizer": distances.CosineSimilarity,
    "SparseCentersRegularizer": distances.CosineSimilarity,
}


def accept(regularizer: Any) -> Any:
    """A regulariser for a loss: one of this module, one of pytorch-metric-learning converted to it, or any callable.

    Args:
        regularizer: what the loss was given; None stays None.

    Raises:
        TypeError: an object that cannot be called.
        ValueError: a regulariser of pytorch-metric-learning with a distance other than its default.
    """
    if regularizer is None or isinstance(regularizer, Regularizer):
        return regularizer
    name = pml_name(regularizer, "regularizers")
    if name in _KNOWN:
        if name in _DISTANCE:
            kind = _DISTANCE[name]
            distances.accept(regularizer.distance, kind(), (kind,), name)
        return _KNOWN[name](regularizer)
    if not callable(regularizer):
        raise TypeError(f"a regulariser must be callable on rows (M, D); got {type(regularizer).__name__}")
    return regularizer


explain(__name__)

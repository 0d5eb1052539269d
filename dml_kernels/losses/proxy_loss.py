"""The Module under every loss with a learned bank: one (M, D) parameter, its initial values, states and regulariser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import distances, reducers, regularizers
from ..ops.checks import check_integer, check_number
from ..ops.contract import check_matrix
from ..pairs.batch import check_tuples
from ..pairs.tuples import row_weights
from ..reducers import Terms
from .base import (
    check_class_weight,
    check_labels,
    check_reduction,
    check_smoothing,
    row_weight,
)
from .metric_loss import MetricLoss
from .softmax import Logits
from .transposed import Transposed, fill


class ProxyLoss(MetricLoss):
    """A loss of embeddings (N, D) with a learned bank (M, D); a subclass names its ``function`` and ``options``.

    Args:
        num_classes: C.
        embedding_size: D.
        bank_rows: M; None: one for each class.
        proxies: (M, D) starting values. None: from ``weight_init_func``.
        weight_init_func: called on a new tensor, which it fills. The tensor has the shape of the parameter in
            pytorch-metric-learning, (D, M) where that is called ``W`` or ``fc``, so that the same seed gives the same
            initial values.
        weight_regularizer: one of :mod:`dml_kernels.regularizers`, or of pytorch-metric-learning, or any callable on
            the bank (M, D); its value is added to the loss.
        weight_reg_weight: multiplies that value.
        class_weight, ignore_index, reduction: as in the function of the loss. Where a ``reducer`` is given,
            ``reduction`` stays ``mean``.
        device: the device of the parameter.
        dtype: the dtype of the parameter, which it keeps whatever the dtype of the embeddings.
        metric_options: ``distance``, ``reducer``, ``embedding_regularizer``, ``embedding_reg_weight``, as in
            :class:`~dml_kernels.losses.metric_loss.MetricLoss`.

    Raises:
        ValueError, TypeError: sizes that are not positive, starting values of the wrong shape, an option that does
            not apply; the message names the fix.
    """

    takes_references = False
    fixed: tuple[str, ...] = ("num_classes", "embedding_size")
    unused: tuple[str, ...] = ("cross_entropy", "proxy_labels")
    # The name of the parameter; the name of its transpose in pytorch-metric-learning 2.9, if it is transposed there;
    # other names under which a checkpoint may hold the (M, D) matrix.
    bank_name = "weight"
    transposed_name: str | None = "W"
    other_names: tuple[str, ...] = ()
    # In the NCA losses pytorch-metric-learning weighs rows by the anchors of a miner's tuple only.
    anchors_alone = False
    # function(embeddings, bank, labels, *, ..., reduction, backend), a staticmethod.
    function: Callable[..., Tensor]
    class_weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        bank_rows: int | None = None,
        proxies: Tensor | None = None,
        weight_init_func: Callable[[Tensor], Any] | None = None,
        weight_regularizer: Any = None,
        weight_reg_weight: float = 1,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **metric_options: Any,
    ):
        num_classes = check_integer("num_classes", num_classes, 1)
        embedding_size = check_integer("embedding_size", embedding_size, 1)
        check_reduction(reduction)
        check_class_weight(class_weight, num_classes)
        super().__init__(**metric_options)
        self.num_classes, self.embedding_size = num_classes, embedding_size
        self.bank_rows = num_classes if bank_rows is None else bank_rows
        self.ignore_index, self.reduction = check_integer("ignore_index", ignore_index), reduction
        self._check_one_reduction()
        self.weight_init_func = self.default_weight_init if weight_init_func is None else weight_init_func
        self.weight_regularizer = regularizers.accept(weight_regularizer)
        self.weight_reg_weight = check_number("weight_reg_weight", weight_reg_weight)
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.register_parameter(self.bank_name, self._start(proxies, device, dtype))

    def _check_one_reduction(self) -> None:
        if not self.plain and self.reduction != "mean":
            raise ValueError(f"reducer and reduction={self.reduction!r} both say how to reduce; give one")

    def _start(
        self, proxies: Tensor | None, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> torch.nn.Parameter:
        shape = (self.bank_rows, self.embedding_size)
        if proxies is None:
            transposed = self.transposed_name is not None
            proxies = torch.empty(shape[::-1] if transposed else shape, device=device, dtype=dtype)
            with torch.no_grad():
                self.weight_init_func(proxies)
            proxies = proxies.t().contiguous() if transposed else proxies
            return torch.nn.Parameter(proxies)
        check_matrix("proxies", proxies)
        if proxies.shape != shape:
            raise ValueError(f"proxies must have shape {shape}; got {tuple(proxies.shape)}")
        return torch.nn.Parameter(proxies.detach().to(device=device, dtype=dtype).clone())

    @staticmethod
    def default_weight_init(weight: Tensor) -> Any:
        """Standard normal."""
        return torch.nn.init.normal_(weight)

    @property
    def bank(self) -> Tensor:
        """The (M, D) parameter, whatever its name."""
        return getattr(self, self.bank_name)

    # --- the transpose under its known name

    def __getattr__(self, name: str) -> Any:
        if name == type(self).transposed_name:
            return Transposed.of(self.bank)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != type(self).transposed_name:
            super().__setattr__(name, value)
            return
        shape = (self.embedding_size, self.bank_rows)
        if not isinstance(value, Tensor) or value.shape != shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a tensor of shape {shape}, the transpose of {self.bank_name}; got {got}")
        fill(self.bank, value)  # into the same parameter, so that its optimiser continues to work
        if isinstance(value, torch.nn.Parameter):
            self.bank.requires_grad_(value.requires_grad)

    # --- checkpoints

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Loads states of pytorch-metric-learning too: ``W`` and ``fc``, (D, M), of 2.9, and the rows of 3.x."""
        errors, own = rest[4], prefix + self.bank_name
        if own not in state_dict:
            for name in self.other_names:
                if prefix + name in state_dict:
                    state_dict[own] = state_dict.pop(prefix + name)
            transposed = None if self.transposed_name is None else prefix + self.transposed_name
            if transposed in state_dict:
                value, shape = state_dict.pop(transposed), (self.embedding_size, self.bank_rows)
                if value.shape == shape:
                    state_dict[own] = value.t()
                else:
                    errors.append(
                        f"{transposed} must have shape {shape}, as pytorch-metric-learning 2.9 saves it (embedding "
                        f"size, rows of the bank); got {tuple(value.shape)}"
                    )
                    state_dict[own] = self.bank.detach()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def pml_state_dict(self) -> dict[str, Tensor]:
        """The parameter under the name and in the shape of pytorch-metric-learning 2.9, for its ``load_state_dict``."""
        if self.transposed_name is None:
            return {self.bank_name: self.bank.detach()}
        return {self.transposed_name: self.bank.detach().t().contiguous()}

    # --- the call

    def options(self) -> Mapping[str, Any]:
        """The keyword arguments of the function, except ``reduction`` and ``backend``."""
        return {"class_weight": self.class_weight, "ignore_index": self.ignore_index}

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of a batch.

        Args:
            embeddings: (N, D) floating point.
            labels: (N,) integers, on any device.
            indices_tuple: a miner's triplets (a, p, n) or pairs (a1, p, a2, n). As in pytorch-metric-learning 2.9 they
                choose no pairs, but weigh each row by how often they name it, divided by the largest count.
            ref_emb: None or ``embeddings``, because the proxies are the references.
            ref_labels: None or ``labels``.

        Returns:
            The loss in fp32, or fp64 where the embeddings or the parameter are.

        Raises:
            ValueError, TypeError: other references; labels missing or out of range; a wrong shape or dtype.
        """
        for name, value, own in (("ref_emb", ref_emb, embeddings), ("ref_labels", ref_labels, labels)):
            if value is not None and value is not own:
                raise ValueError(f"{type(self).__name__} does not take {name}: the proxies are its references")
        if labels is None:
            raise ValueError(f"{type(self).__name__} needs labels, one for each embedding")
        self._check_one_reduction()
        tuples = check_tuples(indices_tuple, embeddings)
        if tuples is None and self.plain:
            value = self.function(embeddings, self.bank, labels, **self.options(), reduction=self.reduction)
            for extra in self._regularisation(embeddings).values():
                value = value + extra.total
            return value
        parts = self.parts(embeddings, labels, tuples)
        if self.reduction == "none":
            (part,) = parts.values()
            return part.total + sum(extra.total for extra in self._regularisation(embeddings).values())
        reducer = reducers.SumReducer() if self.reduction == "sum" else self.reducer
        return reducer({**parts, **self._regularisation(embeddings)})

    def parts(self, embeddings: Tensor, labels: Tensor, tuples: tuple[Tensor, ...] | None) -> Mapping[str, Terms]:
        """One term for each row, for a reducer: what ``reduction="none"`` gives, times the weights of the tuple.

        The ``number`` of a row is its class weight, so that the mean is weighted.
        """
        rows = self.function(embeddings, self.bank, labels, **self.options(), reduction="none")
        several = labels.dim() == 2
        y = labels.to(embeddings.device, torch.int64) if several else check_labels(labels, embeddings)
        counted = y != self.ignore_index
        mass = counted.to(rows.dtype)
        if self.class_weight is not None:
            mass = torch.where(counted, row_weight(self.class_weight, y, rows), 0)
        if several:
            mass = mass.sum(1) / counted.sum(1).clamp_min(1)
        weights = row_weights(tuples, embeddings.size(0), embeddings, self.anchors_alone)
        if weights is not None:
            rows = rows * weights.to(rows.dtype)
        return {"loss": Terms(rows, mass, reducers.nonzero(rows), reducers.ELEMENT, None if several else y)}

    def _regularisation(self, embeddings: Tensor) -> dict[str, Terms]:
        found = {}
        if self.embedding_regularizer is not None:
            value = self.embedding_regularizer(embeddings) * self.embedding_reg_weight
            found["embedding_reg_loss"] = Terms.final(value)
        if self.weight_regularizer is not None:
            found["weight_reg_loss"] = Terms.final(self.weight_regularizer(self.bank) * self.weight_reg_weight)
        return found

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """The (N, C) matrix of the distance, as this method of pytorch-metric-learning returns."""
        return self.distance(embeddings, self.bank)

    def extra_repr(self) -> str:
        """What ``print(loss)`` shows."""
        return f"num_classes={self.num_classes}, embedding_size={self.embedding_size}"


class SoftmaxLoss(ProxyLoss):
    """A :class:`ProxyLoss` whose ``function`` is :func:`~dml_kernels.losses.softmax.softmax_loss` of ``logits_of``.

    Args:
        settings: of the loss itself: the arguments of ``logits_of``, and keyword arguments of ``function``.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        proxy_options: of :class:`ProxyLoss`; ``distance`` must be CosineSimilarity unless the loss allows others.

    Attributes:
        weight: (C K, D) parameter, class by class; K is 1 unless the loss has several centres a class.
        W: its transpose (D, C K), a view that stands for it (``grad``, ``data``, ``requires_grad_``, changes in place).
            An assignment copies the values into ``weight``, which stays the parameter, even if a Parameter is assigned.
            Optimisers and hooks need ``weight``. SoftTriple calls it ``fc``.
        Each setting: an attribute too, which may be assigned: ``loss.scale = 30``. Its unit is that of the attribute in
            pytorch-metric-learning, which may differ from that of the argument.
    """

    distance_kinds: tuple[type[distances.Distance], ...] = (distances.CosineSimilarity,)
    # logits_of(**settings), a staticmethod; checks them.
    logits_of: Callable[..., Logits]

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        settings: Mapping[str, Any],
        label_smoothing: float = 0.0,
        **proxy_options: Any,
    ):
        rows = check_integer("num_classes", num_classes) * self.logits_of(**settings).centres
        super().__init__(num_classes, embedding_size, bank_rows=rows, **proxy_options)
        self.label_smoothing, self.setting_names = check_smoothing(label_smoothing), tuple(settings)
        for name, value in settings.items():
            setattr(self, name, value)

    def default_distance(self) -> distances.Distance:
        """Cosine."""
        return distances.CosineSimilarity()

    def options(self) -> Mapping[str, Any]:
        """As ProxyLoss.options, with the smoothing and the settings of the loss."""
        return {**super().options(), "label_smoothing": self.label_smoothing, **self.settings()}

    def settings(self) -> Mapping[str, Any]:
        """The current settings of the loss, as keyword arguments."""
        return {name: getattr(self, name) for name in self.setting_names}

    def logits(self) -> Logits:
        """How scores become logits."""
        return self.logits_of(**self.settings())

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """The (N, C) matrix of logits without a margin; the loss itself never builds it."""
        return self.logits()(embeddings, self.bank)

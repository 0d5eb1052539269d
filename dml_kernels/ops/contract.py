"""What every op accepts: names, shapes, dtypes and values, checked in one place before a backend sees them.

Shapes, dtypes and devices are checked on every call. Values (a label out of range, a scale that is NaN) are always
checked on the CPU; on CUDA they are checked only under ``DML_CHECK=1``, without a synchronisation.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .checks import (
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_positive,
    check_tensor,
    check_values_there,
    shown,
)
from .library import EXTENSION
from .signatures import Bank

METRICS = ("cosine", "dot", "sqeuclidean", "euclidean")
# Logit policies, and the names of their parameters.
POLICIES = {"linear": (), "quadratic": ("m",), "max_pool": ("K",), "softmax_pool": ("K", "gamma")}
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, norms and losses: fp64 where the products are in fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(x: Tensor, w: Tensor) -> torch.dtype:
    """The dtype of the matrix products, which also determines the dtype of sums and losses (``accumulate_dtype``).

    The first rule that applies decides: fp64 where either input is fp64, also under autocast, which leaves fp64 alone
    in PyTorch as well; autocast's dtype where autocast is on; the common dtype of both inputs; the half-precision dtype
    where the other input is fp32; fp32 for fp16 with bf16, because neither of these can represent the other. No input
    is cast as a whole: a backend widens or rounds one tile at a time.
    """
    a, b, device = x.dtype, w.dtype, x.device.type
    if torch.float64 in (a, b):
        return torch.float64
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if a == b or b == torch.float32:
        return a
    return b if a == torch.float32 else torch.float32


def split_metric(metric: str, normalize: bool, *, plain_dot: bool = False) -> tuple[str, bool]:
    """The (metric, normalize) that backends know: ``cosine`` becomes the ``dot`` of unit vectors.

    With ``plain_dot``, ``dot`` compares the vectors as they are and ignores ``normalize``.
    """
    check_choice("metric", metric, METRICS)
    normalize = check_flag("normalize", normalize)
    if metric == "cosine":
        return "dot", True
    return metric, normalize and not (plain_dot and metric == "dot")


def check_matrix(name: str, t: Tensor) -> None:
    check_tensor(name, t)
    if t.dim() != 2:
        raise ValueError(f"{name} must have shape (rows, D); got {tuple(t.shape)}. Use {name}.flatten(0, -2)")
    if t.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16; got {t.dtype}. Use {name}.float()")
    if t.size(1) == 0:
        raise ValueError(f"{name} has embedding size 0, shape {tuple(t.shape)}; at least 1 is needed")


def check_pair(x: Tensor, w: Tensor, names: tuple[str, str] = ("x", "w")) -> None:
    """Checks rows and bank: both (., D) and on one device. Their dtypes may differ; see ``product_dtype``."""
    nx, nw = names
    check_matrix(nx, x)
    check_matrix(nw, w)
    if x.size(1) != w.size(1):
        raise ValueError(
            f"{nx} and {nw} must have the same embedding size; got {x.size(1)} and {w.size(1)} "
            f"(shapes {tuple(x.shape)} and {tuple(w.shape)})"
        )
    if w.size(0) == 0:
        raise ValueError(f"{nw} has no rows, shape {tuple(w.shape)}; the bank needs at least one")
    if x.device != w.device:
        raise ValueError(f"{nx} is on {x.device} and {nw} on {w.device}; move one with .to()")


def check_vector(name: str, t: Tensor | None, size: int, like: Tensor, *, integer: bool, scalar: bool = False) -> None:
    """Checks a (size,) vector on the device of ``like``: int64 if ``integer``, else floating; 0-dim if ``scalar``."""
    if t is None:
        return
    check_tensor(name, t)
    if t.shape != (size,) and not (scalar and t.dim() == 0):
        want = f"({size},)" + (" or ()" if scalar else "")
        raise ValueError(f"{name} must have shape {want}; got {tuple(t.shape)}")
    if integer and t.dtype != torch.int64:
        raise TypeError(f"{name} must be int64; got {t.dtype}. Use {name}.long()")
    if not integer and t.dtype not in FLOATS:
        raise TypeError(f"{name} must be a floating dtype; got {t.dtype}. Use {name}.float()")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device} and x on {like.device}; use {name}.to({str(like.device)!r})")


def check_members(x: Tensor, m: int, y: Tensor, c: Tensor | None, exclude: Tensor | None) -> None:
    """Checks y (N,), c (m,) and exclude (N,), int64, which determine the sets of each row among m columns."""
    check_vector("y", y, x.size(0), x, integer=True)
    check_vector("c", c, m, x, integer=True)
    check_vector("exclude", exclude, x.size(0), x, integer=True)


def check_bank(x: Tensor, w: Tensor | None) -> Tensor:
    """Checks rows and bank; returns the bank, which is x where w is None."""
    if w is None:
        check_matrix("x", x)
        return x
    check_pair(x, w)
    return w


def check_no_bank_labels(c: Tensor | None) -> None:
    """The batch as its own bank has the labels y already."""
    if c is not None:
        raise ValueError("c holds the labels of w; where w is None the bank is the batch, labelled y. Give w, or no c")


def check_comparison(
    x: Tensor, w: Tensor | None, y: Tensor | None, c: Tensor | None, exclude: Tensor | None, own: bool, metric: str,
    normalize: bool, eps: float, ignore_index: int, *, columns: int | None = None, plain_dot: bool = False,
    first_class: int | None = None,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """Checks the arguments that every comparison of rows with a bank takes; returns y, and the fields of all specs.

    ``columns`` (default: the rows of w) is the length of c. :func:`split_metric` explains ``plain_dot``. The field
    ``first_class`` is returned where it is given.
    """
    bank = check_bank(x, w)
    if y is None:
        raise TypeError("y is missing: the (N,) int64 labels of the rows, which say what is compared with what")
    if w is None:
        check_no_bank_labels(c)
    own = check_flag("own", own)
    if own and w is not None:
        raise ValueError("own=True keeps each row's own copy in the batch as its own bank: it needs w=None")
    m = bank.size(0) if columns is None else columns
    check_members(x, m, y, c, exclude)
    base, unit = split_metric(metric, normalize, plain_dot=plain_dot)
    first = {} if first_class is None else {"first_class": check_first_class(first_class, y if w is None else c, m)}
    return y, {
        **first,
        "metric": base, "normalize": unit, "eps": check_eps(eps), "own": own,
        "ignore_index": check_integer("ignore_index", ignore_index), "dtype": product_dtype(x, bank),
    }  # fmt: skip


def check_first_class(first_class: int, c: Tensor | None, m: int) -> int:
    """The label of the first of m columns, which have no labels c; every label is a number of 64 bits."""
    if c is not None:
        raise ValueError(
            "first_class says which classes the bank holds where each entry is a class of its own; c, or y where w is "
            "None, says it already. Use first_class=None"
        )
    first_class = check_integer("first_class", first_class, 0)
    if first_class > torch.iinfo(torch.int64).max - m:
        raise ValueError(f"first_class must be at most 2^63 - 1 - {m}, so that {m} classes follow; got {first_class}")
    return first_class


def with_labels(
    x: Tensor, w: Tensor | None, y: Tensor, c: Tensor | None, exclude: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor | None, int]:
    """The labels of rows and bank, and the label to ignore, which without ``c`` is not the index of a bank entry."""
    if w is None or c is not None:
        return y, apart(c, y), ignore_index
    if values_can_be_read(y):
        check_values(Bank(x, w, y, exclude=exclude), ignore_index)
    return torch.where(y == ignore_index, -1, y), torch.arange(w.size(0), device=x.device), -1


_Tensor = TypeVar("_Tensor", Tensor, Tensor | None)


def apart(t: _Tensor, other: Tensor | None) -> _Tensor:
    """t, but a new tensor where it is ``other`` (the batch as its own bank), because Dynamo requires that."""
    return t.view_as(t) if t is not None and t is other else t


def as_int64(name: str, values: Tensor, like: Tensor) -> Tensor:
    """The values as int64 on the device of ``like``; accepts any integer dtype, and values on the CPU."""
    if not isinstance(values, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor; got {type(values).__name__}. Use torch.as_tensor(numpy.asarray({name})); "
            f"where they are names, number them first: numpy.unique({name}, return_inverse=True)[1]"
        )
    check_tensor(name, values)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be integers; got {values.dtype}. Use {name}.long()")
    check_values_there(name, values, like)
    return values.to(device=like.device, dtype=torch.int64)


def check_labels(labels: Tensor, embeddings: Tensor, name: str = "labels") -> Tensor:
    """The labels as (N,) int64 on the embeddings' device; accepts any integer dtype, and labels on the CPU."""
    values = as_int64(name, labels, embeddings)
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({embeddings.shape[0]},), one for each embedding; got {tuple(labels.shape)}"
        )
    return values


def values_can_be_read(t: Tensor) -> bool:
    """Whether reading values needs no synchronisation and does not break a graph that is being traced."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def check_line(name: str, pair: Sequence[float] | None, *, optional: bool = False) -> list[float]:
    """Checks a set's (factor, offset). If ``optional``, None leaves the set out: (0, 0), whose terms are all 0."""
    wanted = "a pair (factor, offset)" + " or None" * optional
    if pair is None and optional:
        return [0.0, 0.0]
    if not isinstance(pair, Sequence):
        raise TypeError(f"{name} must be {wanted}; got {shown(pair)}")
    if len(pair) != 2:
        raise ValueError(f"{name} must be {wanted}; got {shown(pair)}")
    return [check_number(f"{name}[{i}]", value) for i, value in enumerate(pair)]


def check_eps(eps: float) -> float:
    """Checks the floor under a norm, a positive number."""
    return check_positive("eps", eps, "it guards a division")


def check_policy(policy: str, params: Sequence[float], x: Tensor, w: Tensor | None) -> tuple[str, list[float], int]:
    """The policy (``linear`` for a pool of one centre), its parameters, and the number of columns that the bank has
    under it.
    """
    names = POLICIES[check_choice("policy", policy, POLICIES)]
    if not isinstance(params, Sequence) or len(params) != len(names):
        raise ValueError(f"policy {policy!r} takes policy_params ({', '.join(names)}); got {shown(params)}")
    numbers = [check_number(f"policy_params[{i}] ({name})", v) for i, (name, v) in enumerate(zip(names, params))]
    if not policy.endswith("_pool"):
        return policy, numbers, (x if w is None else w).size(0)
    if w is None:
        raise ValueError(f"policy {policy!r} needs w: a batch that is its own bank holds no K centres of a class")
    centres = int(numbers[0])
    if centres != numbers[0] or centres < 1:
        raise ValueError(f"policy_params[0] (K, centres a class) must be a positive integer; got {shown(params[0])}")
    if policy == "softmax_pool" and not numbers[1] > 0:
        raise ValueError(f"policy_params[1] (gamma) must be positive: scores are divided by it; got {shown(params[1])}")
    if w.size(0) % centres:
        raise ValueError(f"w must have K rows a class; got {w.size(0)} rows, no multiple of K = {centres}")
    return ("linear", [], w.size(0)) if centres == 1 else (policy, numbers, w.size(0) // centres)


def _checked(t: Tensor) -> bool:
    """Whether the values of t are checked: always on the CPU, on CUDA under DML_CHECK=1."""
    return t.is_cpu or (t.is_cuda and os.environ.get("DML_CHECK", "0") == "1")


def _refuse(message: str, values: Tensor, bad: Tensor) -> None:
    wrong = values.expand(bad.shape)[bad]
    first = ", ".join(str(v) for v in wrong[:3].tolist())
    raise ValueError(f"{message}; got {first}" + (f" and {wrong.numel() - 3} more" if wrong.numel() > 3 else ""))


def _require_within(values: Tensor | None, low: int, high: int, also: int, message: str) -> None:
    """Checks that every value is in [low, high) or equal to ``also``; on CUDA by an asynchronous assertion."""
    if values is None or values.numel() == 0:
        return
    if EXTENSION and not values.is_cuda and torch.ops.dml_kernels_cpu.all_within(values, low, high, also):
        return
    bad = ((values < low) | (values >= high)) & (values != also)
    if values.is_cuda:
        torch._assert_async(~bad.any(), message)
    elif bad.any():
        _refuse(message, values, bad)


def _require_numbers(values: Tensor | None, minus_infinity: bool, message: str) -> None:
    """Checks that every value is finite, or -inf if ``minus_infinity``; on CUDA by an asynchronous assertion."""
    if values is None or values.numel() == 0:
        return
    bad = ~(values < math.inf) | ((values == -math.inf) & (not minus_infinity))
    if values.is_cuda:
        torch._assert_async(~bad.any(), message)
    elif bad.any():
        _refuse(message, values, bad)


def check_values(bank: Bank, ignore_index: int, centres: int = 1, first_class: int = -1) -> None:
    """Checks that labels and indices are in range and scales are finite. It runs inside the op, so that compiled
    graphs are checked too. With ``first_class`` from 0 on the bank holds a part of the classes, and any label is valid.
    """
    if first_class >= 0:
        check_first_class(first_class, bank.c, bank.w.size(0) // centres)
    if not _checked(bank.x):
        return
    m = bank.w.size(0) // centres
    if bank.c is None and first_class < 0:
        named = "a row of the bank" if centres == 1 else f"a class of {centres} centres"
        wanted = f"labels must be in [0, {m}) or ignore_index ({ignore_index}): each names {named}"
        _require_within(bank.y, 0, m, ignore_index, wanted)
    exclude = None if bank.exclude is None else bank.exclude.flatten()
    _require_within(exclude, 0, m, -1, f"exclude must be a bank index in [0, {m}), or -1 for none")
    _require_numbers(bank.scale, False, "scale must be finite")
    _require_numbers(bank.col_bias, True, "col_bias must be finite or -inf (which leaves a column out)")


def check_pair_indices(rows: Tensor, cols: Tensor, n: int, m: int) -> None:
    """Checks that listed pairs name existing rows. It runs inside the op, as check_values does."""
    if not _checked(rows):
        return
    _require_within(rows, 0, n, 0 if n else -1, f"anchors must be rows of the embeddings, in [0, {n})")
    _require_within(
        cols, 0, m, 0 if m else -1, f"positives and negatives must be rows of what is compared, in [0, {m})"
    )


def check_clusters(clusters: Tensor, classes: Tensor, variance: Tensor | None, ignore_index: int) -> None:
    """Checks that cluster ids are in range and that a given variance is at least 0. It runs inside the op, as
    check_values does.
    """
    if not _checked(clusters):
        return
    k = classes.numel()
    wanted = f"clusters must be in [0, {k}), the size of cluster_classes, or ignore_index ({ignore_index})"
    _require_within(clusters, 0, k, ignore_index, wanted)
    if variance is not None:
        _require_numbers(variance, False, "variance must be finite")
        if variance.is_cpu and bool(variance < 0):
            raise ValueError(f"variance must not be negative; got {variance.item()}")


def check_thresholds(*thresholds: Tensor | None) -> None:
    """Checks that thresholds are finite. It runs inside the op, as check_values does."""
    for t in thresholds:
        if t is not None and _checked(t):
            _require_numbers(t, False, "threshold must be finite")

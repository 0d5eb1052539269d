"""Reads labels by position from any common container: tensors, arrays, lists, pandas columns."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ops.checks import check_tensor

__all__ = ["integers_by_position"]

NUMBER_THEM = "number them first, as torch.from_numpy(numpy.unique(names, return_inverse=True)[1])"


def integers_by_position(name: str, values: Any, *, names: bool = False, booleans: bool = False) -> Tensor:
    """Convert labels or indices to int64, in their order; the index of a pandas column does not matter.

    Args:
        name: the name of the argument, for messages.
        values: a tensor (kept on its device), a numpy array, a list or tuple, a pandas Series, Index or Categorical, or
            anything else with ``to_numpy()`` or ``__array__()``; of any integer dtype, or Python integers.
        names: whether strings are accepted, for callers that only compare labels. They are numbered from 0 in sorted
            order.
        booleans: whether False and True are accepted, as 0 and 1.

    Returns:
        An int64 tensor of the same shape, on the device of a tensor, else on the CPU.

    Raises:
        TypeError: another container, or values that are not integers.
        ValueError: missing values, strings where they are not accepted, or integers beyond int64. The message names the
            argument and the fix.
    """
    if isinstance(values, Tensor):
        return _of_tensor(name, values, booleans)
    array = _to_array(name, values)
    if array.size == 0:
        return torch.empty(array.shape, dtype=torch.int64)
    if array.dtype.kind in "Of":
        _refuse_missing(name, array)
    if array.dtype.kind == "O":
        array = _of_objects(name, array)
    if array.dtype.kind in "US":
        if not names:
            raise ValueError(f"{name} must be integers; got names such as {str(array.flat[0])!r}: {NUMBER_THEM}")
        return torch.from_numpy(np.unique(array, return_inverse=True)[1].reshape(array.shape).astype(np.int64))
    if array.dtype.kind not in ("iub" if booleans else "iu"):
        raise TypeError(f"{name} must be integers; got {array.dtype}. Use an array of int64: .astype('int64')")
    if array.dtype == np.uint64 and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must fit int64; got {int(array.max())}")
    return torch.from_numpy(np.array(array, dtype=np.int64))  # a copy: the caller's array may change


def _of_tensor(name: str, values: Tensor, booleans: bool) -> Tensor:
    check_tensor(name, values)
    if values.is_meta:
        raise TypeError(f"{name} must hold values; got a tensor on meta")
    if values.is_floating_point() or values.is_complex() or (values.dtype == torch.bool and not booleans):
        raise TypeError(f"{name} must be integers; got {values.dtype}. Use {name}.long()")
    out = values.detach().to(torch.int64)
    if values.dtype == torch.uint64 and bool((out < 0).any()):
        raise ValueError(f"{name} must fit int64; got values over {torch.iinfo(torch.int64).max}")
    return out


def _to_array(name: str, values: Any) -> np.ndarray[Any, Any]:
    if hasattr(values, "to_numpy"):
        values = values.to_numpy()
    elif isinstance(values, (str, bytes)) or not (isinstance(values, Sequence) or hasattr(values, "__array__")):
        raise TypeError(f"{name} must be a tensor, an array, a list or a pandas column; got {type(values).__name__}")
    try:
        array = np.asarray(values)
    except (ValueError, RuntimeError, TypeError) as error:
        raise TypeError(f"{name} must be a vector of integers; got one that numpy cannot read: {error}") from None
    # numpy turns a list of strings and numbers into strings: look at the values as they were given.
    mixed = array.dtype.kind in "US" and not isinstance(values, np.ndarray)
    return np.asarray(values, dtype=object) if mixed else array


def _refuse_missing(name: str, array: np.ndarray[Any, Any]) -> None:
    """Refuse None, NaN, pandas.NA and NaT."""
    if array.dtype.kind == "f":
        missing = np.isnan(array)
    else:
        missing = np.array([_is_missing(value) for value in array.flat])
    if missing.any():
        raise ValueError(
            f"{name} hold a missing value, at position {int(missing.argmax())}: leave such rows out, or fill in "
            "ignore_index (-100)"
        )


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and value != value


def _of_objects(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Convert an array of Python objects to one of integers or of strings."""
    for kind, dtype in ((numbers.Integral, np.int64), (str, np.str_), (bytes, np.bytes_)):
        if all(isinstance(value, kind) and not isinstance(value, bool) for value in array.flat):
            try:
                return array.astype(dtype)
            except OverflowError:
                raise ValueError(f"{name} must fit int64; got {max(array.flat, key=abs)}") from None
    kinds = sorted({type(value).__name__ for value in array.flat})
    raise TypeError(f"{name} must be all integers, or all names (strings); got {', '.join(kinds)}")

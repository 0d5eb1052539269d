"""Checks of arguments: numbers, integers, choices, flags, and the layout of a tensor.

Each check takes the argument's name and its value, and returns the value as plain Python. An error names the argument,
what it got, and the fix.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

INT64 = 1 << 63


def shown(value: object) -> str:
    """A short text for any value, for messages; Python itself refuses to print an integer of very many digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(name: str, value: Any, wanted: str) -> Any:
    """The value that a () tensor, a numpy scalar or a () array holds; any other value unchanged."""
    if getattr(value, "ndim", None) != 0:
        return value
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise TypeError(f"{name} must be {wanted} here, and would get no gradient; use {name}.detach()")
        if value.device.type == "meta":
            raise TypeError(f"{name} must be {wanted}; got a tensor on meta, which holds no value")
    return value.item()


def check_number(name: str, value: Any) -> float:
    """Checks for a finite number: Python's, numpy's, or a () tensor that needs no gradient. A boolean is none."""
    if isinstance(value, bool) or not isinstance(value, (float, int)):
        value = _plain(name, value, "a number")
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number; got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite as a float; got {shown(value)}") from None
    if number - number != 0:  # infinite or NaN
        raise ValueError(f"{name} must be finite; got {number}")
    return number


def check_sequence(name: str, values: Any, of: str) -> tuple[Any, ...]:
    """Checks for an iterable, such as a list or an array, that is neither a text nor a single number."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"{name} must be a sequence of {of}; got {shown(values)}")
    return tuple(values)


def check_positive(name: str, value: Any, why: str = "") -> float:
    """Checks for a finite number above 0. ``why`` says in the message what the number is for."""
    number = check_number(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be positive{why and ', ' + why}; got {number}")
    return number


def check_momentum(value: Any) -> float:
    """Checks the share of the newest value in a running mean, a number in (0, 1]."""
    share = check_number("momentum", value)
    if not 0 < share <= 1:
        raise ValueError(f"momentum must be in (0, 1]; got {share}")
    return share


def check_integer(name: str, value: Any, least: int | None = None) -> int:
    """Checks for a 64-bit integer of at least ``least``: Python's, numpy's, or a () integer tensor; no boolean."""
    if isinstance(value, bool) or not isinstance(value, int):
        value = _plain(name, value, "an integer")
        if isinstance(value, bool) or hasattr(value, "ndim") or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be {_wanted(least)}; got {shown(value)}")
        value = operator.index(value)
    if not -INT64 <= value < INT64:
        raise ValueError(f"{name} must be an integer of 64 bits; got {shown(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be {_wanted(least)}; got {value}")
    return value


def _wanted(least: int | None) -> str:
    if least is None:
        return "an integer"
    return "a positive integer" if least == 1 else f"an integer of at least {least}"


def check_flag(name: str, value: Any) -> bool:
    """Checks for True or False: Python's, numpy's, a () tensor's, or 0 and 1. A text is refused."""
    if value is True or value is False:
        return value
    plain = _plain(name, value, "True or False")
    if not isinstance(plain, int) or plain not in (0, 1):
        raise TypeError(f"{name} must be True or False; got {shown(value)}")
    return bool(plain)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """Checks that the value is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {shown(value)}")
    return value


def check_tensor(name: str, t: Tensor) -> None:
    """Checks for a strided tensor whose values are in memory, which is what every kernel reads."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(t).__name__}")
    if t.layout is not torch.strided or t.is_nested:
        if t.is_nested:
            got, fix = "a nested tensor", f"torch.cat({name}.unbind())"
        else:
            got, fix = f"layout {t.layout}", f"{name}.to_dense()"
        raise TypeError(f"{name} must be a dense tensor; got {got}. Use {fix}")


def check_values_there(name: str, t: Tensor, like: Tensor) -> None:
    """Refuses a tensor on meta where ``like`` is on a real device: it has no values that could be moved there."""
    if t.device.type == "meta" and like.device.type != "meta":
        raise ValueError(f"{name} is on meta, which holds no values, and the embeddings on {like.device}")

"""Checks of a saved state before it is loaded: its structure is that of the loading object, its numbers are finite."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from torch import Tensor

__all__ = ["check_count", "check_keys", "check_like"]


def check_like(what: str, found: Any, like: Any) -> None:
    """Check that a value has the structure of another one.

    Dicts must have the same keys, at every depth; tensors the same shape and dtype; everything else the same type.
    Floating point numbers must be finite, in tensors too. The contents of lists are not checked.

    Args:
        what: the name of the value, for messages.
        found: the value.
        like: a value with the required structure.

    Raises:
        ValueError: the structures differ, or a number is not finite; the message names the place.
    """
    if isinstance(like, dict):
        check_keys(what, found, like)
        for key in like:
            check_like(f"{what}.{key}", found[key], like[key])
    elif isinstance(like, Tensor):
        _check_tensor(what, found, like)
    elif type(found) is not type(like):
        raise ValueError(f"{what} is of type {type(found).__name__}, expected {type(like).__name__}")
    elif isinstance(like, float) and not math.isfinite(found):
        raise ValueError(f"{what} is {found}")


def check_keys(what: str, found: Any, keys: Collection[Any] | None = None) -> None:
    """Raise ValueError unless ``found`` is a dict that has exactly these keys; None: any keys."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} is of type {type(found).__name__}, expected dict")
    if keys is not None and found.keys() != set(keys):
        missing = ", ".join(str(key) for key in keys if key not in found) or "nothing"
        unknown = ", ".join(str(key) for key in found if key not in keys) or "nothing"
        raise ValueError(f"{what} lacks {missing} and has {unknown} that is unknown")


def check_count(what: str, found: Any, least: int, most: int) -> int:
    """Return ``found`` if it is an int in [least, most]; else raise ValueError."""
    if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= most:
        raise ValueError(f"{what} must be an integer from {least} to {most}; got {found!r}")
    return found


def _check_tensor(what: str, found: Any, like: Tensor) -> None:
    if not isinstance(found, Tensor):
        raise ValueError(f"{what} is of type {type(found).__name__}, expected Tensor")
    if found.shape != like.shape or found.dtype != like.dtype or found.layout != like.layout:
        raise ValueError(
            f"{what} is {found.dtype} {tuple(found.shape)}, expected {like.dtype} {tuple(like.shape)}".replace(
                "torch.", ""
            )
        )
    if not bool(found.isfinite().all()):
        raise ValueError(f"{what} holds NaN or infinity")

"""The library that the ops are registered in, and the one way to register an op with its fake kernel."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import build_info

# Loaded once, here, where the ops are: Dynamo cannot trace an import.
EXTENSION = build_info.load()
LIBRARY = torch.library.Library("dml_kernels", "DEF")


_TYPES = {
    "Tensor": "Tensor", "Tensor | None": "Tensor?", "torch.dtype": "ScalarType", "list[float]": "float[]",
    "list[bool]": "bool[]", "str": "str", "bool": "bool", "int": "int", "float": "float",
}  # fmt: skip


def schema(*tuples: type) -> str:
    """The fields of NamedTuples as an op's schema names them."""
    fields = (field for t in tuples for field in t.__annotations__.items())
    return ", ".join(f"{_TYPES[kind.__forward_arg__]} {name}" for name, kind in fields)


def register(
    name: str, inputs: type, spec: type, results: int, implementation: Callable[..., Any], fake: Callable[..., Any],
    before: str = "",
) -> Any:  # fmt: skip
    """Define ``dml_kernels::name`` and return the callable overload.

    The implementation chooses among backends itself, so it serves every device. Derivatives are the business of the
    ``torch.autograd.Function`` around the op: a formula registered here would silently give zero under jvp.

    Args:
        name: the op's name.
        inputs, spec: the NamedTuples of the op's tensors and numbers. The schema lists their fields, one by one.
        results: the number of tensors that the op returns.
        implementation, fake: functions called with the arguments in ``before``, the tuple of tensors, and the tuple of
            numbers.
        before: the schema of the arguments that a derivative takes in front of these fields.

    Returns:
        The op's default overload.
    """
    first = before.count(",") + 1 if before else 0
    second = first + len(inputs._fields)  # type: ignore[attr-defined]

    def gathered(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: function(*args[:first], inputs(*args[first:second]), spec(*args[second:]))

    returned = "Tensor" if results == 1 else "(" + ", ".join(["Tensor"] * results) + ")"
    fields = ", ".join(filter(None, (before, schema(inputs, spec))))
    LIBRARY.define(f"{name}({fields}) -> {returned}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, gathered(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dml_kernels::{name}", gathered(fake), lib=LIBRARY)
    return getattr(torch.ops.dml_kernels, name).default


class _Bound:
    """What ``Signature.bind`` returns for arguments that are complete and in order."""

    def __init__(self, args: tuple[Any, ...]):
        self.args = args
        self.kwargs: dict[str, Any] = {}

    def apply_defaults(self) -> None:
        """Does nothing, because no argument has a default."""


class _Positional(inspect.Signature):
    """The signature of a function that gets every argument by position: there is nothing to bind."""

    def bind(self, /, *args: Any) -> Any:
        """Returns the arguments unchanged; the function itself refuses a wrong number of them."""
        return _Bound(args)


def known_signature(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Determines the signature of ``forward`` once. ``apply`` binds its arguments to the signature on every call, and
    binding twenty arguments takes longer than a small kernel.
    """
    parameters = inspect.signature(function.forward).parameters.values()
    function.forward.__signature__ = _Positional(list(parameters))  # type: ignore[attr-defined]
    return function


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast: inside an op the product dtype is settled, and autocast must not change it again."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def gradients_like(tensors: Iterable[Tensor | None], needs: Iterable[bool], like: Tensor) -> tuple[Tensor, ...]:
    """A contiguous buffer for each gradient that is needed, and a new empty tensor for each of the others."""
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if need and t is not None else like.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    )


def filled(gradients: Iterable[Tensor | None], like: Tensor, number: int) -> tuple[Tensor, ...]:
    """The gradients, with a new empty tensor in place of each None, because an op returns tensors.

    Raises:
        ValueError: the number of gradients differs from the op's schema, where the dispatcher would end the process.
    """
    out = tuple(like.new_empty(0) if g is None else g for g in gradients)
    if len(out) != number:
        raise ValueError(f"needs must say of {number} tensors whether their gradients are wanted; got {len(out)}")
    return out


class Choices(dict[str, Any]):
    """A table by name. Looking up a name that it does not hold raises an error that lists the names it holds."""

    def __init__(self, what: str, table: Mapping[str, Any]):
        super().__init__(table)
        self.what = what

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.what} must be one of {', '.join(self)}; got {key!r}")

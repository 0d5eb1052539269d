"""The backends that tests run on, and what must be there for them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from dml_kernels import build_info
from dml_kernels.losses import LossEntry
from dml_kernels.ops import choice as backends
from tests.support.dtypes import Dtype

# Each backend, and the marks of the tests that run on it.
MARKS: dict[str, Any] = {"torch": (), "cpu": pytest.mark.cpp}
BACKENDS = tuple(pytest.param(name, marks=marks) for name, marks in MARKS.items())
on_backends = pytest.mark.parametrize("backend", BACKENDS)


def missing(what: str) -> None:
    """Skips, because something that the tests need is missing; fails if DML_REQUIRE_CPU=1 requires it."""
    if os.environ.get("DML_REQUIRE_CPU", "0") == "1":
        pytest.fail(f"{what} (DML_REQUIRE_CPU=1 makes this a failure)")
    pytest.skip(what)


def require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing(f"{module} is a test requirement: {error}")


def on_backends_and(dtypes: tuple[Dtype, ...]) -> Any:
    """Parametrises over `dtype` and `backend`, the backend fastest."""
    pairs = [(d, b) for d in dtypes for b in MARKS]
    return pytest.mark.parametrize(
        ("dtype", "backend"), [pytest.param(d, b, marks=MARKS[b], id=f"{d.name}-{b}") for d, b in pairs]
    )


def backends_of(entry: LossEntry, dtype: torch.dtype = torch.float32) -> list[Any]:
    """The backends that have a loss's op and policy; without the extension all of them, where the mark `cpp` skips."""
    device = torch.device("cpu")
    absent = {"cpu"} if not build_info.load() else set()
    return [
        pytest.param(name, marks=mark)
        for name, mark in MARKS.items()
        if name in absent or backends.refusal(name, entry.op, device, dtype, entry.asked) is None
    ]


def on_losses(names: Mapping[str, LossEntry], *, options: bool = True, **only: Any) -> Any:
    """Parametrises over `name`, with `options` also `which` of its options, and every `backend` that runs the loss.

    `only`: fields that the entry must have, such as by_row=True.
    """
    rows = []
    for name, entry in names.items():
        if all(getattr(entry, key) == value for key, value in only.items()):
            for i in range(len(entry.options) if options else 1):
                for backend in backends_of(entry):
                    case = (name, i, *backend.values) if options else (name, *backend.values)
                    label = f"-{entry.options[i] or 'defaults'}" if options else ""
                    rows.append(pytest.param(*case, marks=backend.marks, id=f"{name}{label}-{backend.values[0]}"))
    return pytest.mark.parametrize(("name", "which", "backend") if options else ("name", "backend"), rows)

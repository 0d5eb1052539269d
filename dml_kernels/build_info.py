"""Loads the compiled extension ``dml_kernels._C`` once, or says in words why it cannot be loaded.

All code that needs the compiled ops calls :func:`load`. A failed load gives a message, neither silence nor a crash: the
``torch`` backend needs nothing compiled.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # noqa: F401  its libraries must be loaded before those of the extension

NAME = "dml_kernels._C"
BUILD = "pip install -r requirements/build.txt && pip install -e . --no-build-isolation, in the repository"


@dataclass(frozen=True)
class Extension:
    """The outcome of loading the extension; true where it is loaded.

    Attributes:
        module: the extension module, or None.
        reason: one line: what was loaded, or why nothing was and what to do about it.
        built: whether a file for this Python exists, loaded or not.
        info: ``module.build_info()`` (compiler, flags, instruction sets, CUDA, sanitizers, torch), or {}.
    """

    module: ModuleType | None
    reason: str
    built: bool
    info: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.module is not None


def _not_built() -> str:
    others = sorted(p.name for p in Path(__file__).parent.glob("_C*.so"))
    if others:
        this = sys.implementation.cache_tag
        return f"not built for this Python ({this}), only {', '.join(others)}: {BUILD}"
    return f"not built, as this is the pure-Python package: {BUILD}"


@functools.cache
def load() -> Extension:
    """Import the extension, which registers its ops. Every call returns the same object."""
    spec = importlib.util.find_spec(NAME)
    if spec is None:
        return Extension(None, _not_built(), built=False)
    try:
        module = importlib.import_module(NAME)
        info = module.build_info()
    except Exception as error:  # a library that cannot be loaded, or has another version
        what = f"{type(error).__name__}: {error}"
        return Extension(None, f"{spec.origin} cannot be loaded ({what}); rebuild: {BUILD}", built=True)
    built = f"compiled by {info['compiler']} for torch {info['torch_version']}"
    return Extension(module, f"{built}, running as {module.cpu_capability()}", built=True, info=info)

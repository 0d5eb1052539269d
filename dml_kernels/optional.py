"""Optional packages: imported when they are first needed, or an error that says how to install them."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["how_to_install", "import_optional"]

# The names of packages on an index, where they differ from the names of their modules.
PACKAGES = {"faiss": "faiss-cpu", "sklearn": "scikit-learn"}


def how_to_install(*modules: str) -> str:
    """How to get these modules, for messages.

    The message names the packages themselves, or the extra of a checkout. It never names this package alone: no index
    holds it, and anyone who registered that name could run code on every machine that follows the message.
    """
    names = " ".join(PACKAGES.get(module, module) for module in modules)
    return f"pip install {names} (in a checkout of this repository, pip install --no-build-isolation -e '.[demo]')"


def import_optional(module: str, purpose: str) -> Any:
    """The module by its full name; ImportError says that ``purpose`` needs it, and how to install it."""
    top = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {top}, which cannot be imported ({error}): {how_to_install(top)}"
        ) from error

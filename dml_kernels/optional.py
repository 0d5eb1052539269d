"""Imports optional packages when they are first needed; the error for a missing one says how to install it."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["how_to_install", "import_optional"]

# The names of packages on an index, where these differ from the names of the modules.
PACKAGES = {"faiss": "faiss-cpu", "sklearn": "scikit-learn"}


def how_to_install(*modules: str) -> str:
    """The command that installs these modules, for messages.

    It names the packages themselves, or the extra of a checkout. It never names this package alone: no index holds it,
    and anyone who registered that name could run code on every machine that follows the message.
    """
    names = " ".join(PACKAGES.get(module, module) for module in modules)
    return f"pip install {names} (in a checkout of this repository, pip install --no-build-isolation -e '.[demo]')"


def import_optional(module: str, purpose: str) -> Any:
    """Import a module that may be missing.

    Args:
        module: its full name.
        purpose: what needs it, for the message.

    Raises:
        ImportError: the module cannot be imported; the message says how to install it.
    """
    top = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {top}, which cannot be imported ({error}): {how_to_install(top)}"
        ) from error

"""Whole losses as ops: a backend's fused version where it has one, else the composition on its other ops."""

from __future__ import annotations

import importlib
from typing import Any

from . import choice


def composed(loss: str) -> Any:
    """The composition of a loss; imported late, as it is written on the ops and serves one of them."""
    return importlib.import_module(f"dml_kernels.backends.composed.{loss}")


def fused_or_composed(loss: str, name: str) -> Any:
    """What has ``LOSS_fwd`` and ``LOSS_bwd`` for the backend called ``name``."""
    chosen = choice.BACKENDS[name]
    return chosen if hasattr(chosen, f"{loss}_fwd") else composed(loss)

"""Recognises objects of pytorch-metric-learning by class and module: a name alone does not say what is computed."""

from __future__ import annotations

import sys
from typing import Any


def of_pml(thing: Any, part: str, name: str) -> bool:
    """Whether ``thing`` is ``pytorch_metric_learning.{part}.{name}``. This never imports that package."""
    return getattr(sys.modules.get(f"pytorch_metric_learning.{part}"), name, None) is thing


def pml_name(instance: Any, part: str) -> str | None:
    """The name of the instance's class if it is exactly a class of ``pytorch_metric_learning.{part}``, else None.

    A subclass, or another class of the same name, may compute anything.
    """
    kind = type(instance)
    return kind.__name__ if of_pml(kind, part, kind.__name__) else None

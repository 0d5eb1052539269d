"""What the measures take from a library that the package itself does not need: scikit-learn."""

from __future__ import annotations

from typing import Any

__all__ = ["load_sklearn_metrics"]


def load_sklearn_metrics() -> Any:
    """The module sklearn.metrics, imported when it is first needed; ImportError tells how to install it."""
    try:
        import sklearn.metrics  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError(
            f"this measure needs scikit-learn, which cannot be imported ({error}): pip install scikit-learn, "
            "or pip install 'dml_kernels[demo]'"
        ) from error
    return sklearn.metrics

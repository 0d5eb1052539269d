"""What the measures take from libraries that the package itself does not need: progress bars and scikit-learn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Progress", "load_sklearn_metrics", "reporter"]

# Called with the number of queries (or pairs, or episodes) just finished; True shows a tqdm bar; None or False nothing.
Progress = Callable[[int], object] | bool | None


@contextlib.contextmanager
def reporter(progress: Progress, total: int, what: str, unit: str) -> Iterator[Callable[[int], object]]:
    """What a measure calls with the number of units just finished."""
    if callable(progress):
        yield progress
    elif progress:
        try:
            from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
        except ImportError as error:
            raise ImportError("progress=True shows a tqdm bar: pip install tqdm, or pass a function") from error
        with tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=total > 100_000) as bar:
            yield bar.update
    else:
        yield lambda _: None


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

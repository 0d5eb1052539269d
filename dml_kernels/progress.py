"""How long jobs tell what they have done: a function of the caller's, or a bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

__all__ = ["Progress", "reporter"]

# Called with the number of units just finished (queries, examples, ...); True shows a tqdm bar; None or False nothing.
Progress = Callable[[int], object] | bool | None


@contextlib.contextmanager
def reporter(progress: Progress, total: int, what: str, unit: str) -> Iterator[Callable[[int], object]]:
    """What a job calls with the number of units just finished."""
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

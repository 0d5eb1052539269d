"""How long jobs report progress: a function of the caller, or a bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from .optional import import_optional

__all__ = ["Progress", "reporter"]

# Called with the number of units just finished (queries, examples, ...); True shows a tqdm bar; None or False shows
# nothing.
Progress = Callable[[int], object] | bool | None


@contextlib.contextmanager
def reporter(progress: Progress, total: int, what: str, unit: str) -> Iterator[Callable[[int], object]]:
    """The function that a job calls with the number of units just finished."""
    if callable(progress):
        yield progress
    elif progress:
        bar_of = import_optional("tqdm", "the bar of progress=True (pass a function to do without)").tqdm
        with bar_of(total=total, desc=what, unit=f" {unit}", unit_scale=total > 100_000) as bar:
            yield bar.update
    else:
        yield lambda _: None

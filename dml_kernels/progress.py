"""How long jobs report progress: to a function of the caller, or on a bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from .optional import import_optional

__all__ = ["Progress", "reporter"]

# A function is called with the number of units just finished (queries, examples, ...); True shows a tqdm bar; None or
# False shows nothing.
Progress = Callable[[int], object] | bool | None


@contextlib.contextmanager
def reporter(progress: Progress, total: int, what: str, unit: str) -> Iterator[Callable[[int], object]]:
    """Yield the function that a job calls with the number of units just finished.

    Args:
        progress: as the caller of the job gave it.
        total: the number of units of the job.
        what: the text on the bar.
        unit: the name of a unit.

    Raises:
        ImportError: ``progress=True``, and tqdm is missing.
    """
    if callable(progress):
        yield progress
    elif progress:
        bar_of = import_optional("tqdm", "the bar of progress=True (pass a function to do without)").tqdm
        with bar_of(total=total, desc=what, unit=f" {unit}", unit_scale=total > 100_000) as bar:
            yield bar.update
    else:
        yield lambda _: None

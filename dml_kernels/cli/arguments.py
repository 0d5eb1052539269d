"""What the options of all commands share: a parser whose errors are one line, and readers of values within a range."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from .. import profiling

__all__ = ["OptionError", "Parser", "folder", "integer", "number", "threads"]


class OptionError(ValueError):
    """The value of an option does not fit the data or the machine; the message names the option."""


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong and exits with status 2; it keeps the layout of the help text."""

    def __init__(self, **settings: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (`{self.prog} --help` lists the options)\n")


def integer(least: int, most: int, *, or_zero: bool = False) -> Callable[[str], int]:
    """Make a reader of a whole number from ``least`` to ``most``; with ``or_zero`` also 0."""
    allowed = f"a whole number from {least:,} to {most:,}" + (", or 0" if or_zero else "")

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise _refusal(allowed, text) from None
        if not (least <= value <= most or (or_zero and value == 0)):
            raise _refusal(allowed, text)
        return value

    return read


def number(least: float, most: float, *, above: bool = False) -> Callable[[str], float]:
    """Make a reader of a finite number from ``least`` to ``most``; with ``above``, greater than ``least``."""
    allowed = f"a number {f'above {least:g}' if above else f'from {least:g}'} {'and up ' if above else ''}to {most:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise _refusal(allowed, text) from None
        if not math.isfinite(value) or not least <= value <= most or (above and value == least):
            raise _refusal(allowed, text)
        return value

    return read


def threads() -> Callable[[str], int]:
    """Make a reader of a number of threads: up to four for each core, and up to 64 on any machine."""
    return integer(1, 4 * max(16, profiling.usable_cores()))


def folder(text: str) -> Path:
    """Read a path that is a folder or can become one."""
    path = Path(text)
    try:
        os.stat(text)  # unlike Path.exists it reports a null byte, a name that is too long, a forbidden parent
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text[:60]!a} cannot be a folder ({error})"[:300]) from None
    first = next((part for part in (path, *path.parents) if part.exists()), path)
    if not text or not first.is_dir():
        raise _refusal(f"a folder, there or to be made, and {str(first) if text else 'an empty name'} is none", text)
    return path


def _refusal(allowed: str, text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"must be {allowed}; got {text[:60]!a}")

"""What the commands' options share: a parser whose errors are one line, and readers of values that know their range."""

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
    """Says in one line what is wrong, and ends with status 2; shows help as it is laid out here."""

    def __init__(self, **settings: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (`{self.prog} --help` lists the options)\n")


def integer(least: int, most: int, *, or_zero: bool = False) -> Callable[[str], int]:
    """Reads a whole number from `least` to `most`, or 0 where that is allowed beside them."""
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
    """Reads a finite number from `least` to `most`; with `above`, greater than `least`."""
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
    """Reads a number of threads: up to four for each core, and up to 64 anywhere."""
    return integer(1, 4 * max(16, profiling.usable_cores()))


def folder(text: str) -> Path:
    """Reads a path that is a folder or can become one."""
    path = Path(text)
    try:
        os.stat(text)  # a null byte, a name too long, a parent that may not be entered: Path.exists hides some
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

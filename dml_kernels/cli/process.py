"""How a command lives with its process: output that may break, signals that ask it to end."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO

__all__ = ["Stopped", "exit_status", "steady_output", "stoppable"]

SIGNALS = ("SIGTERM", "SIGHUP")  # Ctrl-C is a KeyboardInterrupt already


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end; handled wherever Ctrl-C is."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_status(error: KeyboardInterrupt) -> int:
    """The shell's status for a command that a signal has ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped in the main thread on SIGTERM or SIGHUP, unless whoever started the process has them ignored."""

    def stop(number: int, _frame: FrameType | None) -> None:
        for one in installed:  # a second one must not break off what the first began
            signal.signal(one, signal.SIG_IGN)
        raise Stopped(number)

    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    installed = [one for one in numbers if signal.getsignal(one) is signal.SIG_DFL]
    for one in installed:
        signal.signal(one, stop)
    try:
        yield
    finally:
        for one in installed:
            signal.signal(one, signal.SIG_DFL)


class _Steady:
    """A text stream that goes silent where the one under it cannot be written any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._kept():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._kept():
            self._stream.flush()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: closed
            broken, self._stream = self._stream, open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
            with contextlib.suppress(OSError, ValueError):
                # What is still in its buffer is flushed at exit, and would fail again.
                os.dup2(self._stream.fileno(), broken.fileno())
            if not isinstance(error, BrokenPipeError) and broken is not sys.__stderr__:
                print(f"standard output cannot be written ({error}): going on without it", file=sys.stderr)


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Within it no print can end the command, be the output closed, full, without a reader, or ASCII only."""
    kept = sys.stdout, sys.stderr
    for descriptor in (0, 1, 2):  # else the next file to be opened becomes the standard output
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Steady(stream))
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = kept

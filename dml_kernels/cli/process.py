"""What every command does about its process: output that may break, signals that end it."""

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
    """The process received a signal to end; it is handled wherever Ctrl-C is."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_status(error: KeyboardInterrupt) -> int:
    """The status that a shell gives to a command that a signal has ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped in the main thread on SIGTERM or SIGHUP, unless the process was started with the signal ignored."""

    def stop(number: int, _frame: FrameType | None) -> None:
        for one in installed:  # a second signal must not interrupt what the first one began
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
    """A text stream that goes silent once the stream under it can no longer be written."""

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
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            broken, self._stream = self._stream, open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
            with contextlib.suppress(OSError, ValueError):
                # The rest of its buffer is flushed at exit, and would fail again.
                os.dup2(self._stream.fileno(), broken.fileno())
            if not isinstance(error, BrokenPipeError) and broken is not sys.__stderr__:
                print(f"standard output cannot be written ({error}): going on without it", file=sys.stderr)


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Keep prints from ending the command where the output is closed, full, without a reader, or ASCII only."""
    kept = sys.stdout, sys.stderr
    for descriptor in (0, 1, 2):  # if one were closed, the next file to be opened would take its place
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

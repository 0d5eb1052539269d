"""A lock on a folder, so that only one run writes into it at a time."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderInUseError", "hold"]

NAME = ".dml_kernels.lock"


class FolderInUseError(RuntimeError):
    """Another run writes into the folder."""


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make the folder if it does not exist, and hold it; the system releases it when the process ends in any way.

    Where the operating system or the file system has no locks, nothing is held.

    Args:
        folder: the folder to hold.

    Raises:
        FolderInUseError: another run holds the folder; the message says which.
        OSError: nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    file = _locked(path)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}".encode())
        file.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: see _locked
        with contextlib.suppress(OSError):
            file.close()


def _locked(path: Path) -> IO[bytes]:
    while True:
        file = path.open("a+b")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).decode(errors="replace").strip() or "another process"
            file.close()
            raise FolderInUseError(f"{path.parent} is in use by another run ({holder})") from None
        except OSError:  # no locks on this file system
            return file
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the holder has removed the file meanwhile: try again

"""Files that are either whole or do not exist: they are written under another name and then renamed.

A checkpoint is a file as ``torch.save`` writes it, followed by a line with its SHA-256; ``torch.load`` reads it too. So
a flipped bit is found anywhere; PyTorch would load it silently.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

__all__ = ["CheckpointError", "atomic", "load_checkpoint", "remove_leftovers", "save_checkpoint", "write_json"]

FORMAT = "dml_kernels demo checkpoint 3"
SEAL = b"\nsha256 "  # then 64 hexadecimal digits and a line feed
SEAL_LENGTH = len(SEAL) + 65
START_ANEW = "delete it and start anew"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another run."""


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that replaces ``path`` in one step, once it is safely on disk. After an error ``path`` is untouched.

    Args:
        path: the file to replace or make; its folder is made if it does not exist.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; the message names it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())  # mkstemp makes it private
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        kept = "the file of that name is as it was" if path.exists() else "no file of that name is left"
        raise OSError(f"{path} cannot be written ({error.strerror or error}); {kept}") from error
    _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing. Call it only while no other run writes into the folder."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        path: the file.
        state: tensors, numbers, strings, and lists and dicts of them.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    # Through memory, because torch.save turns the OSError of a file into a RuntimeError about its own positions.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    content = buffer.getvalue()
    with atomic(path) as file:
        file.write(content + _seal(content))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what ``save_checkpoint`` wrote; only plain data is unpickled.

    Raises:
        CheckpointError: the file is missing, damaged or no checkpoint; the message says what to do.
    """
    try:
        sealed = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint at {path}: run once without --resume") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({error.strerror}): {START_ANEW}") from error
    content, seal = sealed[:-SEAL_LENGTH], sealed[-SEAL_LENGTH:]
    if seal != _seal(content):
        if not seal.startswith(SEAL) and zipfile.is_zipfile(io.BytesIO(sealed)):
            raise CheckpointError(f"{path} is damaged, or not a checkpoint of this version: {START_ANEW}")
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint (its SHA-256 is not the one it was written with): {START_ANEW}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a foreign pickle: the error says enough
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # the content of the file decides what is raised
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({reason}): {START_ANEW}") from error
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version: {START_ANEW}")
    return state


def _seal(content: bytes) -> bytes:
    return SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n"


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically. NaN and infinity, which are not JSON, raise a ValueError."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic(path) as file:
        file.write(text.encode() + b"\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable. Where the file system does not allow it, only durability is lost."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

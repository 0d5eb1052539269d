"""Files that are either whole or not there: written under another name and then renamed.

A checkpoint is PyTorch's own file, which `torch.load` reads, with a line after it: the SHA-256 of all before. A flipped
bit anywhere, which PyTorch would load without a word, is found.
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
    """A checkpoint is missing, damaged, or of another run."""


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that replaces `path` in one step once it is safely on disk; on any error `path` is untouched.

    An OSError, such as a full disk's, is raised again with the name of the file.
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
    """Remove what a killed run was writing. Only while no other run writes into the folder."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them). Raises OSError that names the file."""
    # Through memory: torch.save turns a failing file's OSError into a RuntimeError about its own positions.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    content = buffer.getvalue()
    with atomic(path) as file:
        file.write(content + _seal(content))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; only plain data is unpickled.

    Raises CheckpointError, with the way out in its message, for a file that is missing, damaged or something else.
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
            warnings.simplefilter("ignore")  # of a foreign pickle: the error says enough
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # the file says what is unpickled, and so what is raised
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({reason}): {START_ANEW}") from error
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version: {START_ANEW}")
    return state


def _seal(content: bytes) -> bytes:
    return SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n"


def write_json(path: Path, content: Any) -> None:
    """Write JSON, indented, atomically. NaN and infinity are refused: they are not JSON."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic(path) as file:
        file.write(text.encode() + b"\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; some file systems do not allow it, and nothing is lost but durability."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Out-of-bounds accesses, and races between programs, in interpreted kernels: ``with sanitized(): kernel[grid](...)``.

Every load and store must stay within the elements of the tensors passed to the launch: the gaps between the rows of a
strided view are as forbidden as the memory beyond its end. The programs of a launch may run in any order, so an element
that one of them writes must be neither read nor written by another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

NOBODY = -1
SEVERAL = -2


class Violation(RuntimeError):
    """An access that no kernel may make."""


class Shadow:
    """One storage: which of its bytes belong to a tensor of the launch, and which program wrote or read each."""

    def __init__(self, t: torch.Tensor):
        storage = t.untyped_storage()
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.legal = np.zeros(self.size, bool)
        self.writer = np.full(self.size, NOBODY, np.int64)
        self.reader = np.full(self.size, NOBODY, np.int64)
        self.admit(t)

    def admit(self, t: torch.Tensor) -> None:
        elements = torch.zeros(self.size // t.element_size(), dtype=torch.bool)
        if t.numel():
            elements.as_strided(t.size(), t.stride(), t.storage_offset()).fill_(True)
        of_view = elements.numpy().repeat(t.element_size())
        self.legal[: of_view.size] |= of_view


class Checked:
    """Triton's native interpreter with a check of every access."""

    def __init__(self, native: Any):
        self._native = native
        self.shadows: dict[int, Shadow] = {}
        self.accesses = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def begin(self, arguments: list[Any]) -> None:
        """Starts a launch: notes its tensors, which no program has touched yet."""
        self.shadows = {}
        for t in arguments:
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes():
                key = t.untyped_storage().data_ptr()
                if key in self.shadows:
                    self.shadows[key].admit(t)
                else:
                    self.shadows[key] = Shadow(t)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._check(pointers, mask, np.dtype(dtype).itemsize, self._read)
        return self._native.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self._check(pointers, mask, value.dtype.itemsize, self._write)
        return self._native.store(pointers, value, mask)

    def atomic_rmw(self, *_: Any) -> Any:
        raise Violation("an atomic operation: results would differ from run to run")

    atomic_cas = atomic_rmw

    def _check(self, pointers: Any, mask: Any, size: int, access: Any) -> None:
        address = np.asarray(pointers).ravel()[np.asarray(mask).ravel().astype(bool)].astype(np.int64)
        self.accesses += address.size
        outside = np.ones(address.shape, bool)
        for shadow in self.shadows.values():
            inside = (address >= shadow.start) & (address + size <= shadow.start + shadow.size)
            if inside.any():
                access(shadow, address[inside] - shadow.start)
                outside &= ~inside
        if outside.any():
            raise Violation(f"{int(outside.sum())} of {address.size} lanes out of bounds, program {self._program()}")

    def _program(self) -> int:
        (x, y, z), (_, gy, gz) = interpreter.interpreter_builder.grid_idx, interpreter.interpreter_builder.grid_dim
        return (x * gy + y) * gz + z

    def _legal(self, shadow: Shadow, at: np.ndarray) -> int:
        if not shadow.legal[at].all():
            wrong = int((~shadow.legal[at]).sum())
            raise Violation(f"{wrong} lanes between the elements of a tensor, program {self._program()}")
        return self._program()

    def _read(self, shadow: Shadow, at: np.ndarray) -> None:
        program = self._legal(shadow, at)
        if ((shadow.writer[at] != NOBODY) & (shadow.writer[at] != program)).any():
            raise Violation(f"race: program {program} reads what another has written")
        reader = shadow.reader[at]
        shadow.reader[at] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)

    def _write(self, shadow: Shadow, at: np.ndarray) -> None:
        program = self._legal(shadow, at)
        if np.unique(at).size != at.size:
            raise Violation(f"race: two lanes of program {program} write one element")
        for what, others in (("written", shadow.writer[at]), ("read", shadow.reader[at])):
            if ((others != NOBODY) & (others != program)).any():
                raise Violation(f"race: program {program} writes what another has {what}")
        shadow.writer[at] = program


@contextlib.contextmanager
def sanitized() -> Iterator[Checked]:
    """Checks every interpreted launch inside the ``with``."""
    native, prepare = interpreter._interpreter, interpreter.GridExecutor._init_args_hst
    checked = Checked(native)

    def prepared(self: Any, arguments: Any, named: Any) -> Any:
        out = prepare(self, arguments, named)
        checked.begin([*out[0], *out[1].values()])
        return out

    interpreter._interpreter, interpreter.GridExecutor._init_args_hst = checked, prepared
    try:
        yield checked
    finally:
        interpreter._interpreter, interpreter.GridExecutor._init_args_hst = native, prepare

"""64-bit indices: the last program of each launch on matrices of more than 2^31 elements, at addresses without memory.

The host code runs on tensors without data; the kernels run in the interpreter on made-up addresses. Each must stay
inside its tensors and reach their ends. An index cut to 32 bits does neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from dml_kernels.backends.triton import collect, configs, logsumexp
from dml_kernels.backends.triton import distance as matrices
from dml_kernels.backends.triton.launch import recorded
from dml_kernels.ops.signatures import Bank, DistanceSpec, Matrices, NormalizeSpec, Rows, Spec

N, M, D = 2048, 10_000_000, 512
APART = 1 << 44


class Phantom:
    """A tensor's place in an address space of its own."""

    def __init__(self, t: torch.Tensor, start: int):
        self.dtype, self.start, self.item = t.dtype, start, t.element_size()
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
        self.size = (last + 1) * self.item if t.numel() else 0
        self.reached = 0

    def data_ptr(self) -> int:
        return self.start


class NoMemory:
    """Replaces Triton's native interpreter: loads give 0 (flags 1), stores do nothing, addresses are checked."""

    def __init__(self, native: Any, tensors: list[Phantom]):
        self._native, self._tensors = native, tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> np.ndarray:
        self._visit(pointers, mask)
        kind = np.dtype(dtype)
        return np.ones(pointers.shape, kind) if kind == np.int32 else np.zeros(pointers.shape, kind)

    def store(self, pointers: Any, value: Any, mask: Any) -> None:
        self._visit(pointers, mask)

    def _visit(self, pointers: Any, mask: Any) -> None:
        at = np.asarray(pointers).ravel()[np.asarray(mask).ravel().astype(bool)].astype(np.int64)
        for t in self._tensors:
            mine = at[(at >= t.start - APART // 2) & (at < t.start + APART // 2)]
            if mine.size:
                offset = mine - t.start
                assert offset.min() >= 0, f"{offset.min()} bytes before the start"
                assert offset.max() + t.item <= t.size, f"byte {offset.max()} of {t.size}"
                t.reached = max(t.reached, int(offset.max()) + t.item)


def last_program(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], patch: Any) -> dict[str, Phantom]:
    phantoms = {
        name: Phantom(t, APART * (1 + i))
        for i, (name, t) in enumerate(arguments.items())
        if isinstance(t, torch.Tensor)
    }
    where = [g - 1 for g in grid] + [0] * (3 - len(grid))
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    set_index, set_dim = builder.set_grid_idx, builder.set_grid_dim
    dims = [*grid] + [1] * (3 - len(grid))
    with patch.context() as p:
        p.setattr(interpreter, "_interpreter", NoMemory(interpreter._interpreter, list(phantoms.values())))
        p.setattr(executor, "_init_args_hst", lambda self, args, named: (list(args), dict(named)))
        p.setattr(executor, "_restore_args_dev", lambda *_: None)
        p.setattr(builder, "set_grid_dim", lambda *_: set_dim(*dims), raising=False)
        p.setattr(builder, "set_grid_idx", lambda *_: set_index(*where), raising=False)
        kernel[(1,)](**{**arguments, **phantoms})
    return phantoms


Found = dict[str, tuple[Any, ...]]


@contextlib.contextmanager
def largest(monkeypatch: Any, most_splits: int) -> Iterator[Found]:
    """Records launches of the host code on tensors without data; for each kernel, the one over the most memory."""
    monkeypatch.setattr(collect, "BUFFER_BYTES", 1 << 60)
    monkeypatch.setattr(logsumexp, "BUFFER_BYTES", 1 << 60)
    monkeypatch.setattr(collect, "ROWS_AT_ONCE", 1 << 40)
    monkeypatch.setattr(configs, "splits", lambda n_tiles, m_tiles, cores: min(m_tiles, most_splits))
    found: Found = {}

    def keep(kernel: Any, grid: Any, arguments: Any, options: Any) -> None:
        rows = max(arguments.get(k, 0) for k in ("R", "A", "N"))
        if kernel.__name__ != "merge_kernel" and rows >= found.get(kernel.__name__, (0,))[0]:
            found[kernel.__name__] = (rows, kernel, grid, arguments)

    with FakeTensorMode(), recorded(keep):
        yield found


def launches(metric: str, monkeypatch: Any) -> Found:
    """The launches of forward and backward in a single chunk."""
    with largest(monkeypatch, M) as found:
        x, w = torch.empty(N, D, dtype=torch.bfloat16), torch.empty(M, D, dtype=torch.bfloat16)
        n, m, y, c = torch.empty(N), torch.empty(M), *(torch.empty(k, dtype=torch.int64) for k in (N, M))
        bank = Bank(x, w, y, c, y, n, m)
        shared = {"metric": metric, "normalize": True, "eps": 1e-12, "dtype": torch.bfloat16, "backend": "triton"}
        spec = Spec(logit=[2.0, 0.1, 3.0, 0.2], ignore_index=-100, sums=True, **shared)
        lse = logsumexp.masked_logsumexp_fwd(bank, spec)
        logsumexp.masked_logsumexp_bwd(lse, lse[:2], None, [True] * 4, bank, spec)
        pair, distance = Matrices(x, w), DistanceSpec(**shared)
        out = matrices.normalized_distance_fwd(pair, distance)
        matrices.normalized_distance_bwd(out, [True, True], pair, distance)
        unit = NormalizeSpec(eps=1e-12, backend="triton")
        matrices.normalize_bwd(matrices.normalize_fwd(Rows(w), unit), Rows(w), unit)
    return found


def owned_launches(monkeypatch: Any) -> Found:
    """The launches of forward and backward in the owned form, with and without the kept mean, and with parts of more
    than 2^31 elements.
    """
    n, m, d = 1 << 16, 20_000_000, 128
    with largest(monkeypatch, 300) as found, configs.take_form("owned"):
        x, w = torch.empty(n, d, dtype=torch.bfloat16), torch.empty(m, d, dtype=torch.bfloat16)
        bank = Bank(x, w, torch.empty(n, dtype=torch.int64))
        spec = Spec(
            metric="dot", normalize=True, logit=[2.0, 0, 3.0, 0], eps=1e-12, ignore_index=-100, dtype=torch.bfloat16,
            backend="triton", keep=True,
        )  # fmt: skip
        same, different, *sums, mean = logsumexp.masked_logsumexp_fwd(bank, spec)
        for kept in (None, mean):
            grads, needs = (same, different, *sums), [True, True, False, False]
            logsumexp.masked_logsumexp_bwd(grads, (same, different), kept, needs, bank, spec)
    assert found["forward_kernel"][3]["KEEP"]
    return found


def test_owners_reach_the_end_of_matrices_past_32_bits(monkeypatch):
    found = owned_launches(monkeypatch)
    assert {"merge_means_kernel", "owned_means_kernel", "owned_rows_kernel", "owned_bank_kernel"} < found.keys()
    for name, (_, kernel, grid, arguments) in found.items():
        tensors = last_program(kernel, grid, arguments, monkeypatch)
        large = [k for k, t in tensors.items() if t.size > 1 << 32]
        assert large, name
        for k in large:  # the positives' entries are gathered, and every label that is read is 0
            assert tensors[k].reached == tensors[k].size or (name, k) == ("owned_means_kernel", "w_ptr"), f"{name}: {k}"


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_the_last_program_reaches_the_end_of_matrices_past_32_bits(metric, monkeypatch):
    found = launches(metric, monkeypatch)
    assert len(found) == (7 if metric == "dot" else 8)
    for name, (_, kernel, grid, arguments) in found.items():
        tensors = last_program(kernel, grid, arguments, monkeypatch)
        large = [k for k, t in tensors.items() if t.size > 1 << 32]
        assert large, name
        for k in large:
            # A near pair's buffer is written in marked tiles only, and no pair of zeros is near.
            if k != "near_ptr" and not (name == "distance_gradient_kernel" and metric == "dot" and k == "w_ptr"):
                assert tensors[k].reached == tensors[k].size, f"{name}: {k}"


def test_an_index_of_32_bits_is_seen(monkeypatch):
    name, (_, kernel, grid, arguments) = next(iter(launches("dot", monkeypatch).items()))
    assert name == "norms_kernel"
    with pytest.raises((InterpreterError, AssertionError), match="byte"):
        last_program(kernel, grid, {**arguments, "stride": arguments["stride"] + 1}, monkeypatch)
    wrapped = {**arguments, "R": arguments["R"] % (1 << 22)}
    tensors = last_program(kernel, grid, wrapped, monkeypatch)
    assert tensors["t_ptr"].reached < tensors["t_ptr"].size

"""The sanitizer finds violated bounds, gaps, races, colliding lanes and atomics, and lets a clean kernel pass."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.backends.triton.sanitizer import Violation, sanitized

ROWS, WIDTH = 20, 24


@triton.jit
def sums(x_ptr, index_ptr, out_ptr, total_ptr, N, stride, D: tl.constexpr, BLOCK: tl.constexpr, BUG: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    offs_d = tl.arange(0, 32)
    inside = mask[:, None] & (offs_d < D)[None, :]
    at = x_ptr + offs[:, None] * stride + offs_d[None, :]
    if BUG == "rows unmasked":
        x = tl.load(at, mask=(offs_d < D)[None, :])
    elif BUG == "columns unmasked":
        x = tl.load(at, mask=mask[:, None])
    else:
        x = tl.load(at, mask=inside, other=0.0)
    total = tl.sum(tl.where(inside, x, 0.0), 1)
    total += tl.load(x_ptr + tl.load(index_ptr + offs, mask=mask, other=0) * stride)
    if BUG == "store unmasked":
        tl.store(out_ptr + offs, total)
    elif BUG == "all programs store here":
        tl.store(out_ptr + offs, total, mask=mask)
        tl.store(total_ptr, tl.sum(total, 0))
    elif BUG == "lanes collide":
        tl.store(out_ptr + offs // 2, total, mask=mask)
    elif BUG == "reads a neighbour's result":
        tl.store(out_ptr + offs, total, mask=mask)
        total = tl.load(out_ptr + tl.maximum(offs - BLOCK, 0), mask=mask)
    elif BUG == "overwrites what a neighbour reads":
        tl.store(x_ptr + (N - 1 - offs) * stride, total, mask=mask)
    elif BUG == "atomic":
        tl.atomic_add(out_ptr + offs, total, mask=mask)
    else:
        tl.store(out_ptr + offs, total, mask=mask)


def launch(bug: str, index: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(ROWS, WIDTH + 5)[:, :WIDTH]  # with a gap after each row
    out = torch.zeros(ROWS)
    with sanitized() as checked:
        sums[(3,)](x, torch.full((ROWS,), index), out, torch.zeros(1), ROWS, x.stride(0), WIDTH, 8, bug)
    assert checked.accesses > ROWS * WIDTH
    return out, x.sum(1) + x[index, 0]


def test_a_clean_kernel_passes_and_computes():
    torch.testing.assert_close(*launch("none"))


@pytest.mark.parametrize(
    ("bug", "found"),
    [
        ("rows unmasked", "out of bounds"),
        ("columns unmasked", "between the elements"),
        ("store unmasked", "out of bounds"),
        ("all programs store here", "race"),
        ("lanes collide", "two lanes"),
        ("reads a neighbour's result", "reads what another has written"),
        ("overwrites what a neighbour reads", "race"),
        ("atomic", "atomic"),
    ],
)
def test_every_planted_bug_is_found(bug, found):
    with pytest.raises((Violation, InterpreterError), match=found):
        launch(bug)


def test_an_index_from_memory_is_checked():
    with pytest.raises((Violation, InterpreterError), match="out of bounds"):
        launch("none", index=ROWS)

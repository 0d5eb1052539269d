"""The floor: the bare matrix products that every exact method needs, by torch.mm at its best tile.

Training both sides takes 8NMD: the scores X W_t^T in the forward and again in the backward, dX += dS W_t and
dW_t = dS^T X. Here they run on tiles of the bank, with the scores in place of dS and nothing between the products: no
norm, no exponential. Outputs are allocated beforehand.
"""

from __future__ import annotations

import functools
import itertools

import torch

from dml_kernels.profiling import interleaved_times

from .case import Case, Contender, Outputs, Step
from .problem import Problem, Size

TILES = (256, 512, 1024, 2048, 4096)
# The search for the best tile runs on a part of the bank, at least two tiles.
SEARCH_FLOP = 20e9
SEARCH_ROUNDS = 3


def four_products(problem: Problem, tile: int, transposed: bool) -> Step:
    """Make a step of 8NMD on tiles (N, tile), or (tile, N) if transposed.

    dX is summed over tiles in fp32, because a bf16 sum stops growing after some hundred tiles. PyTorch's product of two
    bf16 matrices on the CPU gives bf16, so there it goes through an (N, D) buffer.
    """
    x, w, (n, m, d) = problem.x, problem.w, problem.size
    tile = min(tile, m)
    buffer = x.new_empty(n * tile)
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    part = None if x.dtype == accumulate else x.new_empty(n, d)
    grad_x, grad_w = x.new_empty((n, d), dtype=accumulate), torch.empty_like(w)

    def step() -> Outputs:
        grad_x.zero_()
        for start in range(0, m, tile):
            w_t = w[start : start + tile]
            _scores(x, w_t, buffer, transposed)
        for start in range(0, m, tile):
            w_t = w[start : start + tile]
            s = _scores(x, w_t, buffer, transposed)
            if part is None:
                torch.addmm(grad_x, s, w_t, out=grad_x)
            else:
                grad_x.add_(torch.mm(s, w_t, out=part))
            torch.mm(s.T, x, out=grad_w[start : start + tile])
        return grad_x, grad_w

    return step


def one_product(problem: Problem, tile: int, transposed: bool) -> Step:
    """Make a step of 2NMD: the scores alone, which are not kept. It returns the last column."""
    x, w, (n, m, _) = problem.x, problem.w, problem.size
    tile = min(tile, m)
    buffer = x.new_empty(n * tile)

    def step() -> Outputs:
        for start in range(0, m, tile):
            s = _scores(x, w[start : start + tile], buffer, transposed)
        return (s[:, -1],)

    return step


def _scores(x: torch.Tensor, w_t: torch.Tensor, buffer: torch.Tensor, transposed: bool) -> torch.Tensor:
    """x w_t^T as (N, tile), in either memory order."""
    n, columns = x.size(0), w_t.size(0)
    out = buffer[: n * columns]
    if transposed:
        return torch.mm(w_t, x.T, out=out.view(columns, n)).T
    return torch.mm(x, w_t.T, out=out.view(n, columns))


@functools.cache
def _best(make, size: Size, dtype: torch.dtype) -> tuple[int, bool]:
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(rows, size.d, generator=generator).to(dtype) for rows in (size.n, size.m))
    problem = Problem(size, x, w, torch.zeros(size.n, dtype=torch.int64), torch.zeros(size.m, dtype=torch.int64))
    choices = itertools.product(sorted({min(t, size.m) for t in TILES}), (False, True))
    steps = {choice: make(problem, *choice) for choice in choices}
    repeat = max(1, int(SEARCH_FLOP / 10 / (8 * size.n * size.m * size.d)))
    variants = {choice: (lambda s=step: [s() for _ in range(repeat)]) for choice, step in steps.items()}
    times = interleaved_times(variants, SEARCH_ROUNDS)
    return min(times, key=lambda choice: min(times[choice]))  # the load of a neighbour only ever adds time


def best(make, problem: Problem) -> tuple[int, bool]:
    """The fastest (tile, transposed) for these sizes and this dtype; all are tried once a process."""
    n, m, d = problem.size
    rows = max(2 * max(TILES), int(SEARCH_FLOP / (8 * n * d)))
    return _best(make, Size(n, min(m, rows), d), problem.dtype)


def _note(make, problem: Problem) -> str:
    tile, transposed = best(make, problem)
    return f"tile {tile}{', S^T' if transposed else ''}"


def four_contender() -> Contender:
    """The floor of training: its dX is X (W^T W) and its dW is W (X^T X)."""
    truth = Case("four products", lambda p: (p.x @ (p.w.T @ p.w), p.w @ (p.x.T @ p.x)))
    return _contender("floor", truth, four_products, passes=4)


def one_contender() -> Contender:
    return _contender("bare product", Case("one product", lambda p: (p.x @ p.w[-1],)), one_product, passes=1)


def _contender(name: str, case: Case, make, passes: int) -> Contender:
    return Contender(
        name,
        case,
        make=lambda problem: make(problem, *best(make, problem)),
        kind="floor",
        passes=passes,
        note=lambda problem: _note(make, problem),
        warm=lambda contender, problem: best(make, problem),
    )

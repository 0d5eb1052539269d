"""``python -m bench.gpu.crossover``: the size from which Triton's kernels should beat the C++ ones, by a model.

The time of a step (forward and backward of the fused loss, both gradients) is that of its launches, plus the largest of
the times of its instructions, its reads from the level-2 cache and its matrix products. Every input is stated below,
and none is measured; `python -m bench.gpu --stages small` measures what this predicts. `ops.choice.SMALL` comes from
the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from dml_kernels.ops.choice import SMALL


class Chip(NamedTuple):
    """Datasheet rates: multiprocessors, Hz; per second flops of bf16, flops of fp32 (as three tf32), bytes of cache."""

    processors: int
    clock: float
    bf16: float
    fp32: float
    cache: float


CHIPS = {
    "A100": Chip(108, 1.41e9, 312e12, 156e12 / 3, 4.0e12),
    "H100": Chip(132, 1.83e9, 989e12, 494e12 / 3, 5.5e12),
    "B200": Chip(148, 1.92e9, 2250e12, 1125e12 / 3, 9.0e12),
}
LANES = 128  # instructions a clock and multiprocessor
# Launches of a step. C++: one each way. Triton: norms of both sides twice, forward, merge, gradient, two projections,
# two products.
CPP_LAUNCHES, TRITON_LAUNCHES = 2, 11
# Seconds a launch: replayed in a graph; from Python through the C++ of the op; from Python through Triton's launcher.
GRAPH, FROM_CPP, FROM_TRITON = 3e-6, 5e-6, 20e-6
# Instructions a product, from the inner loops (subtract and multiply-add, and the loads of 16 bytes from shared memory
# that feed them): scores of 2 x 2 pairs forward; scores of 1 x 2 and sums of 8 rows backward, once for either side.
FORWARD, BACKWARD = (32 + 4) / 16, 2 * ((16 + 3) / 8 + (16 + 3) / 8)
FORWARD_ROWS, BACKWARD_ROWS, BANK_TILE = 16, 8, 32  # rows a block owns; entries of a tile
PRODUCTS = 8  # flops of N M D in a step: 2 forward, 6 backward


def cpp(chip: Chip, n: int, m: int, d: int, size: int) -> float:
    """Seconds of a step of the C++ kernels on the device; one block fills the issue slots of its multiprocessor."""
    nmd = n * m * d
    slices = min(-(-m // BANK_TILE), max(2 * chip.processors // -(-n // FORWARD_ROWS), 1), 32)
    parts = (
        (FORWARD * nmd, -(-n // FORWARD_ROWS) * slices, size * nmd / FORWARD_ROWS),
        (BACKWARD * nmd, -(-n // BACKWARD_ROWS) + -(-m // BACKWARD_ROWS), 2 * size * nmd / BACKWARD_ROWS),
    )
    return sum(
        max(instructions / (min(blocks, chip.processors) * LANES * chip.clock), read / chip.cache)
        for instructions, blocks, read in parts
    )


def triton(chip: Chip, n: int, m: int, d: int, size: int) -> float:
    """Seconds of a step of the Triton kernels on the device."""
    return PRODUCTS * n * m * d / (chip.bf16 if size == 2 else chip.fp32)


def step(chip: Chip, n: int, m: int, d: int, size: int, graph: bool) -> tuple[float, float]:
    """(C++, Triton) seconds. From Python the CPU spends the time of a launch, and the device works at the same time."""
    by_cpp, by_triton = cpp(chip, n, m, d, size), triton(chip, n, m, d, size)
    if graph:
        return by_cpp + CPP_LAUNCHES * GRAPH, by_triton + TRITON_LAUNCHES * GRAPH
    return max(by_cpp, CPP_LAUNCHES * FROM_CPP), max(by_triton, TRITON_LAUNCHES * FROM_TRITON)


def crossover(chip: Chip, d: int, size: int, graph: bool) -> int:
    """The smallest N M D, with N = M in steps of 8 rows, at which Triton is faster."""
    n = 8
    while (times := step(chip, n, n, d, size, graph))[0] <= times[1]:
        n += 8
    return n * n * d


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.crossover", description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=CHIPS, default="H100", help="default %(default)s")
    name = parser.parse_args(argv).chip
    print(f"{name}, modelled, microseconds a step      graph: C++  Triton      Python: C++  Triton")
    for n, m, d in ((128, 100, 128), (512, 512, 128), (512, 1000, 128), (512, 1000, 512), (512, 4000, 512)):
        times = [1e6 * t for graph in (True, False) for t in step(CHIPS[name], n, m, d, 4, graph)]
        print(f"N {n:4} M {m:5} D {d:4} fp32 {n * m * d / SMALL:8.3f} x 2^26 {times[0]:8.1f}{times[1]:8.1f}"
              f"{times[2]:17.1f}{times[3]:8.1f}")  # fmt: skip
    print(f"\nTriton ahead from N M D (N = M), in units of ops.choice.SMALL = {SMALL:,}:   graph  Python")
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        for d in (64, 128, 512):
            found = [crossover(CHIPS[name], d, size, graph) / SMALL for graph in (True, False)]
            print(f"{dtype} D {d:4} {found[0]:49.2f}{found[1]:8.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

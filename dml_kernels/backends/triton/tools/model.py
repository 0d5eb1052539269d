"""The cost model: time, bytes and launches of forward and backward in bf16, for each form of the gradients.

The time of a kernel is the longest of the times of its products, its exponentials, and its bytes from memory and
through the cache that all cores share; launches are added. The rates are from datasheets, so the results are bounds to
compare measurements with and not measurements. ``configs.form`` says which form is faster here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .. import configs
from ..collect import BUFFER_BYTES, LARGE_BUFFER_BYTES, WIDE


class Rates(NamedTuple):
    """Rates in a second: dense bf16 products, bytes of memory and of the shared cache, and exponentials (16 for each
    clock and core).
    """

    products: float
    bytes: float
    cache: float
    exponentials: float
    launch: float = 4e-6  # seconds


# Of the cache: 5,120 bytes a clock, NVIDIA's figure for the A100, also for later GPUs; AMD's for the Infinity Cache.
RATES = {
    "sm_80": Rates(312e12, 2.0e12, 5120 * 1.41e9, 108 * 16 * 1.41e9),
    "sm_90": Rates(989e12, 3.35e12, 5120 * 1.83e9, 132 * 16 * 1.83e9),
    "sm_100": Rates(2250e12, 8.0e12, 5120 * 1.92e9, 148 * 16 * 1.92e9),
    "gfx942": Rates(1307e12, 5.3e12, 17.2e12, 304 * 16 * 2.1e9),
}
# M, D, N
SHAPES = (
    (1_000_000, 512, 4096),
    (1_000_000, 512, 512),
    (1_000_000, 128, 4096),
    (1_000_000, 128, 512),
    (1_000_000, 64, 4096),
    (10_000_000, 512, 4096),
)
SIDES = ("both", "rows", "bank")  # which gradients are needed


class Cost(NamedTuple):
    """The cost of one pass: arithmetic in NMD, bytes through memory and through the cache, launches, seconds."""

    nmd: int
    memory: float
    cache: float
    launches: int
    seconds: float

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


def _kernel(arch: str, n: int, m: int, d: int, nmd: int, exponentials: bool, memory: float, cache: float) -> Cost:
    """The cost of one kernel, or of one kernel run for each chunk, without its launches."""
    rate = RATES[arch]
    busy = (nmd * n * m * d / rate.products, exponentials * n * m / rate.exponentials, memory / rate.bytes,
            cache / rate.cache)  # fmt: skip
    return Cost(nmd, memory, cache, 0, max(busy))


def _launches(arch: str, count: int) -> Cost:
    return Cost(0, 0.0, 0.0, count, count * RATES[arch].launch)


def _tile(kernel: str, arch: str, d: int) -> configs.Config:
    return configs.pick(kernel, arch, torch.bfloat16, d, "dot", torch.bfloat16)


def norms(arch: str, n: int, m: int, d: int) -> Cost:
    return _kernel(arch, n, m, d, 0, False, 2 * d * (n + m), 0) + _launches(arch, 2)


def forward(arch: str, n: int, m: int, d: int) -> Cost:
    tile = _tile("forward", arch, d)
    operands = 2 * d * n * m * (1 / tile.block_n + (d > tile.block_d) / tile.block_m)
    return norms(arch, n, m, d) + _kernel(arch, n, m, d, 2, True, 2 * m * d, operands) + _launches(arch, 2)


def kept_forward(arch: str, n: int, m: int, d: int) -> Cost:
    """The cost of the forward that keeps the rows' gradient; its tile of the bank serves both products."""
    tile = _tile("kept", arch, d)
    parts = configs.splits(math.ceil(n / tile.block_n), math.ceil(m / tile.block_m), configs.CHIPS[arch].cores)
    memory, operands = 2 * m * d + 8 * parts * n * d, 2 * d * n * m / tile.block_n
    return norms(arch, n, m, d) + _kernel(arch, n, m, d, 4, True, memory, operands) + _launches(arch, 3)


def chunks(arch: str, n: int, m: int, d: int) -> int:
    """The number of chunks that ``collect.Gradients`` cuts the bank into."""
    tile = _tile("gradient", arch, d)
    budget = max(BUFFER_BYTES, min(48 * n * d, LARGE_BUFFER_BYTES)) if d >= WIDE else BUFFER_BYTES
    return math.ceil(m / max(budget // (2 * n + 4 * d) // tile.block_m * tile.block_m, tile.block_m))


def chunk_backward(arch: str, n: int, m: int, d: int, side: str = "both") -> Cost:
    """The cost of the chunk form: dS goes through the cache once to be written and once for each product, and the
    operands of the products once for each 128 of D.
    """
    tile, count = _tile("gradient", arch, d), chunks(arch, n, m, d)
    pairs = n * m
    operands = 2 * d * pairs * (1 / tile.block_n + 1 / tile.block_m)
    total = norms(arch, n, m, d) + _kernel(arch, n, m, d, 2, True, 2 * m * d, operands + 2 * pairs)
    through = 2 * pairs * math.ceil(d / 256) + 2 * d * pairs / 128
    if side != "bank":  # every chunk reads and writes grad_x in fp32
        total += _kernel(arch, n, m, d, 2, False, 2 * m * d, through + 12 * count * n * d)
        total += _launches(arch, 2 * count)
    if side != "rows":  # grad_w is written to the cache in fp32, and from there in the bank's dtype
        total += _kernel(arch, n, m, d, 2, False, 2 * m * d, through + 8 * m * d) + _launches(arch, 2 * count)
    return total + _launches(arch, count + 1)


def owned_backward(arch: str, n: int, m: int, d: int, side: str = "both") -> Cost:
    """The cost of the owned form: each owning kernel recomputes the scores, 4NMD a side. The owned tile stays in
    registers, and the other matrix passes through the cache.
    """
    total, cores = norms(arch, n, m, d), configs.CHIPS[arch].cores
    if side != "bank":
        tile = _tile("rows", arch, d)
        walk = math.ceil(m / tile.block_m)
        parts = configs.splits(math.ceil(n / tile.block_n), walk, cores)
        total += _kernel(arch, n, m, d, 4, True, 2 * m * d + 8 * parts * n * d, 2 * d * n * m / tile.block_n)
        total += _launches(arch, 3)
    if side != "rows":
        tile = _tile("bank", arch, d)
        total += _kernel(arch, n, m, d, 4, True, 4 * m * d, 2 * d * n * m / tile.block_m) + _launches(arch, 1)
    return total


def chunk_step(arch: str, n: int, m: int, d: int, side: str = "both") -> Cost:
    return forward(arch, n, m, d) + chunk_backward(arch, n, m, d, side)


def owned_step(arch: str, n: int, m: int, d: int, side: str = "both") -> Cost:
    """A step with bank labels: the forward keeps nothing."""
    return forward(arch, n, m, d) + owned_backward(arch, n, m, d, side)


def kept_step(arch: str, n: int, m: int, d: int, side: str = "both") -> Cost:
    """A step where the labels of the bank are its indices: the rows' gradient takes one small kernel over N x D, and
    the norms are computed again.
    """
    if side == "bank":
        return owned_step(arch, n, m, d, side)
    total = kept_forward(arch, n, m, d) + _kernel(arch, n, m, d, 0, False, 12 * n * d, 0) + _launches(arch, 1)
    return total + (owned_backward(arch, n, m, d, "bank") if side == "both" else norms(arch, n, m, d))


# Forward and backward. "kept" is the owned form where labels are indices.
FORMS = {"chunk": chunk_step, "owned": owned_step, "kept": kept_step}


def forms(arch: str, d: int) -> list[str]:
    """The forms that have tiles for this width."""
    return [form for form in FORMS if form == "chunk" or configs.has_owned(arch, torch.bfloat16, d, "dot")]


def faster(arch: str, n: int, m: int, d: int, side: str = "both", *, labels: bool = False) -> str:
    """ "chunk" or "owned", as ``configs.form`` returns it. ``labels`` says that the bank has labels."""
    owned = "owned" if labels else "kept"
    if owned not in forms(arch, d):
        return "chunk"
    return min(
        ("chunk", "owned"), key=lambda form: FORMS[form if form == "chunk" else owned](arch, n, m, d, side).seconds
    )

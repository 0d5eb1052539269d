"""The table of tile shapes by architecture, kernel, product dtype and width; nothing is searched at run time.

``python -m dml_kernels.backends.triton.tools.report`` compiles every entry ahead of time and prints registers, spills,
shared memory and instructions. Tests require that no entry spills in bf16 or exceeds the chip's shared memory.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """A tile of block_n rows by block_m bank entries, block_d columns at a time.

    With ``tma`` the forward loads its tiles by tensor descriptors, on sm_90 and later where the matrices allow it. With
    ``specialize`` some warps load what others multiply, on sm_100 and from Triton 3.7 on. Both compile and give the
    right results in the interpreter, but neither has been timed, so no entry of the table uses them yet.
    """

    block_n: int
    block_m: int
    block_d: int
    num_warps: int
    num_stages: int
    tma: bool = False
    specialize: bool = False


class Chip(NamedTuple):
    """An architecture: ``target`` is Triton's name for it, ``shared`` the bytes of shared memory of a block."""

    target: tuple[str, int | str, int]
    shared: int
    cores: int  # streaming multiprocessors or compute units of the usual part


CHIPS = {
    "sm_80": Chip(("cuda", 80, 32), 166912, 108),
    "sm_90": Chip(("cuda", 90, 32), 232448, 132),
    "sm_100": Chip(("cuda", 100, 32), 232448, 148),
    "gfx942": Chip(("hip", "gfx942", 64), 65536, 304),
    "interpreter": Chip(("cpu", 0, 1), 1 << 40, 2),
}

HALF, FP32, FP64 = "half", "fp32", "fp64"
KINDS = {torch.bfloat16: HALF, torch.float16: HALF, torch.float32: FP32, torch.float64: FP64}
# A width class holds every D up to its number; None stands for any larger D.
WIDTHS = (64, 128, 256, None)


def _wide(*configs: Config) -> tuple[Config, ...]:
    """One Config for each width class; the last one given serves the remaining classes."""
    return configs + (configs[-1],) * (len(WIDTHS) - len(configs))


# (kernel, dtype kind, whether the scores are distances): one Config for each width class. Distances hold a second tile,
# for the direct sums of near pairs, so their tiles are smaller.
_HOPPER = {
    ("forward", HALF, False): _wide(
        Config(128, 128, 64, 8, 3), Config(128, 128, 128, 8, 3), Config(128, 128, 64, 8, 3), Config(128, 128, 64, 8, 4)
    ),
    ("forward", HALF, True): _wide(Config(128, 64, 64, 8, 3), Config(128, 64, 128, 8, 3), Config(128, 64, 64, 8, 4)),
    ("gradient", HALF, False): _wide(
        Config(128, 128, 64, 8, 3), Config(128, 128, 128, 8, 3), Config(128, 128, 64, 8, 3), Config(128, 128, 64, 8, 4)
    ),
    ("gradient", HALF, True): _wide(Config(64, 64, 64, 8, 3), Config(64, 64, 128, 8, 3), Config(64, 64, 64, 8, 4)),
    ("rows", HALF, False): _wide(Config(128, 64, 128, 8, 3)),
    ("bank", HALF, False): _wide(Config(64, 128, 128, 8, 3)),
    **{(kernel, FP32, False): _wide(Config(64, 64, 32, 8, 3)) for kernel in ("forward", "gradient")},
    **{(kernel, FP32, True): _wide(Config(64, 32, 32, 8, 3)) for kernel in ("forward", "gradient")},
    **{(kernel, FP64, d): _wide(Config(32, 32, 32, 4, 2)) for kernel in ("forward", "gradient") for d in (False, True)},
    # Draws need 64 bits of noise for each entry, and logarithms in fp64.
    **{("draw", kind, d): _wide(Config(32, 16, 32, 4, 2)) for kind in (HALF, FP32, FP64) for d in (False, True)},
    ("draw", HALF, False): _wide(Config(32, 32, 32, 4, 2)),
}
_AMPERE = {
    **_HOPPER,
    **{(kernel, HALF, False): _wide(Config(128, 64, 64, 8, 3), Config(128, 64, 128, 8, 3), Config(128, 64, 64, 8, 4))
       for kernel in ("forward", "gradient")},
    **{(kernel, HALF, True): _wide(Config(64, 64, 64, 8, 3), Config(64, 64, 128, 8, 3), Config(64, 64, 64, 8, 4))
       for kernel in ("forward", "gradient")},
    ("rows", HALF, False): _wide(Config(128, 32, 64, 8, 3), Config(64, 64, 128, 8, 3)),
    ("bank", HALF, False): _wide(Config(64, 64, 128, 8, 3)),
}  # fmt: skip
_BLACKWELL = {
    **_HOPPER,
    ("forward", HALF, True): _wide(Config(64, 64, 64, 8, 3), Config(64, 64, 128, 8, 3), Config(64, 64, 64, 8, 4)),
    ("gradient", HALF, False): _wide(Config(128, 64, 64, 8, 3), Config(128, 64, 128, 8, 3), Config(128, 64, 64, 8, 4)),
    **{(kernel, FP32, False): _wide(Config(64, 32, 32, 8, 3)) for kernel in ("forward", "gradient")},
    ("gradient", FP64, True): _wide(Config(32, 16, 32, 4, 2)),
    ("bank", HALF, False): _wide(Config(128, 64, 128, 8, 3)),
    ("kept", HALF, False): _wide(Config(128, 32, 128, 8, 3)),
}
_CDNA3 = {
    **_HOPPER,
    ("draw", HALF, False): _wide(Config(32, 16, 32, 4, 2)),
    **{(kernel, HALF, False): _wide(Config(128, 64, 64, 8, 2)) for kernel in ("forward", "gradient")},
    **{(kernel, HALF, True): _wide(Config(64, 64, 64, 8, 2)) for kernel in ("forward", "gradient")},
    **{(kernel, HALF, False): _wide(Config(64, 64, 128, 4, 2)) for kernel in ("rows", "bank")},
    ("kept", HALF, False): _wide(Config(64, 32, 128, 4, 2)),
}
_INTERPRETER = {
    (kernel, kind, distance): _wide(Config(32, 64, 64, 1, 1), Config(32, 64, 128, 1, 1), Config(32, 64, 64, 1, 1))
    for kernel in ("forward", "gradient", "rows", "bank", "draw")
    for kind in (HALF, FP32, FP64)
    for distance in (False, True)
}

# Kernels that use the tiles of another kernel where the table has none for them. They have the same products and masks,
# and do less with a score. "kept" is the forward that keeps the rows' gradient.
ALIKE = {"kept": "rows", "hinge": "forward", "hinge_gradient": "gradient", "argmax": "gradient"}
_Table = dict[tuple[str, str, bool], tuple[Config, ...]]


def _completed(table: _Table) -> _Table:
    alike = {(new, *key[1:]): tiles for new, old in ALIKE.items() for key, tiles in table.items() if key[0] == old}
    return {**alike, **table}


TABLE = {
    "sm_80": _completed(_AMPERE), "sm_90": _completed(_HOPPER), "sm_100": _completed(_BLACKWELL),
    "gfx942": _completed(_CDNA3), "interpreter": _completed(_INTERPRETER),
}  # fmt: skip

# Rows, bank entries and stages with which owning kernels do not spill although they hold extras, or a bank in fp32 with
# products in 16 bits. All other kernels, and owning kernels not named here, then take 64 x 64.
OWNERS_WITH_EXTRAS = {
    ("sm_80", "rows"): (32, 64, 2), ("sm_80", "bank"): (64, 32, 2), ("sm_90", "rows"): (64, 32, 3),
    ("sm_100", "rows"): (64, 32, 2), ("sm_100", "bank"): (64, 32, 2),
    ("gfx942", "rows"): (64, 32, 2), ("gfx942", "bank"): (64, 32, 2), ("gfx942", "kept"): (32, 32, 2),
}  # fmt: skip
OWNERS_OF_WIDER = {("sm_80", "rows"): (32, 64, 2), ("gfx942", "kept"): (64, 32, 2)}

# The tile of the kernels over single matrices.
ROWS = Config(16, 0, 128, 8, 2)
# The tile of the near pairs' gradients: owned rows, the other side of the tile of pairs, columns.
NEAR = Config(32, 32, 64, 4, 2)

_forced: list[str] = []
_forced_forms: list[str] = []
_trials: dict[str, Config] = {}


@contextlib.contextmanager
def compile_for(arch: str) -> Iterator[None]:
    """Uses the table of another architecture, to compile for it on a machine without one."""
    _forced.append(arch)
    try:
        yield
    finally:
        _forced.pop()


@contextlib.contextmanager
def take_form(name: str) -> Iterator[None]:
    """Uses one form of the backward, "owned" or "chunk", in place of the table's, to compile, test or time it."""
    _forced_forms.append(name)
    try:
        yield
    finally:
        _forced_forms.pop()


@contextlib.contextmanager
def trial(kernel: str, config: Config) -> Iterator[None]:
    """Launches one kernel with this tile in place of the table's."""
    _trials[kernel] = config
    try:
        yield
    finally:
        del _trials[kernel]


@functools.cache
def _of_device(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return "gfx942"
    return "sm_80" if properties.major < 9 else "sm_90" if properties.major == 9 else "sm_100"


@functools.cache
def _cores_of_device(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def arch_of(device: torch.device) -> str:
    if _forced:
        return _forced[-1]
    if device.type == "cpu":
        return "interpreter"
    return _of_device(torch.cuda.current_device() if device.index is None else device.index)


def cores_of(device: torch.device) -> int:
    if _forced or device.type == "cpu":
        return CHIPS[arch_of(device)].cores
    return _cores_of_device(torch.cuda.current_device() if device.index is None else device.index)


# Beyond this width the registers do not hold both the scores and the accumulators of the owned form.
OWNED_WIDTH = 128


def aligned(d: int) -> bool:
    """Whether Triton sees that rows of this width are aligned; else addresses take registers that owners need."""
    return d % 16 == 0


def pick(
    kernel: str, arch: str, dtype: torch.dtype, d: int, metric: str, bank: torch.dtype, extras: bool = False
) -> Config:
    """The tile of a kernel ("forward", "kept", "gradient", "rows", "bank") for products of ``dtype`` over width ``d``.

    ``extras`` says that bank labels, exclusions or column biases are present. They take registers for every column of a
    tile, and so do the addresses of a narrow matrix whose rows are not aligned.
    """
    if kernel in _trials:
        return _trials[kernel]
    width = next(i for i, limit in enumerate(WIDTHS) if limit is None or d <= limit)
    config = TABLE[arch][kernel, KINDS[dtype], metric != "dot"][width]
    if d <= config.block_d:
        smallest = 32 if dtype == torch.float32 else 16
        config = config._replace(block_d=max(smallest, 1 << (d - 1).bit_length()))
    wider = bank.itemsize > dtype.itemsize
    owner = ALIKE.get(kernel, kernel)
    extras = extras or (d <= OWNED_WIDTH and not aligned(d))
    # Owning kernels cast a tile of a wider bank, and turn a tile of fp16 into unit vectors.
    crowded = extras or ((wider or dtype == torch.float16) and owner in ("rows", "bank"))
    if crowded and kernel != "draw" and KINDS[dtype] == HALF and arch != "interpreter":
        few = OWNERS_WITH_EXTRAS if extras else OWNERS_OF_WIDER
        n, m, stages = few.get((arch, kernel), few.get((arch, owner), (64, 64, config.num_stages)))
        config = config._replace(block_n=n, block_m=m, num_stages=stages)
    if wider:  # the bank is cast in the tile, so each stage holds it in the bank's dtype
        config = config._replace(num_stages=min(config.num_stages, 2))
    return config


def for_policy(tile: Config, arch: str, pad: int) -> Config:
    """A smaller tile for logit policies, which hold weights, or pooled scores in addition to those of the centres."""
    if arch == "interpreter":
        return tile
    if pad == 1:
        return tile._replace(block_n=min(tile.block_n, 64))
    return tile._replace(block_n=min(tile.block_n, 64), block_m=max(32, pad), num_warps=8 if pad > 32 else 4)


def has_owned(arch: str, dtype: torch.dtype, d: int, metric: str) -> bool:
    return d <= OWNED_WIDTH and aligned(d) and ("rows", KINDS[dtype], metric != "dot") in TABLE[arch]


def form(arch: str, dtype: torch.dtype, d: int, metric: str) -> str:
    """ "owned" or "chunk": how the backward computes its second products.

    Where the table has tiles for the owned form, that form is the faster one by the cost model, for the gradient of
    either matrix and of both; a test compares this with ``model.faster``.
    """
    if _forced_forms and d <= OWNED_WIDTH:
        return _forced_forms[-1]
    # The interpreter has tiles for everything; it takes the form that a GPU would.
    return "owned" if has_owned("sm_90" if arch == "interpreter" else arch, dtype, d, metric) else "chunk"


def splits(n_tiles: int, m_tiles: int, cores: int) -> int:
    """The number of ranges the bank is cut into, so that few rows fill the chip and many leave no half-empty wave."""
    slots = 2 * cores
    if n_tiles * m_tiles <= slots:
        return m_tiles
    best, best_use = 1, 0.0
    for candidate in range(1, min(m_tiles, max(16, slots // n_tiles)) + 1):
        programs = n_tiles * candidate
        use = programs / (-(-programs // slots) * slots)
        if use > best_use + 0.03:
            best, best_use = candidate, use
    return best


def ranges(tile: Config, n: int, m: int, device: torch.device, most: int | None = None) -> tuple[int, int, int]:
    """(row tiles, ranges of the bank, at most ``most`` of them, bank entries in a range); a program walks one range."""
    n_tiles, m_tiles = -(-n // tile.block_n), -(-m // tile.block_m)
    count = splits(n_tiles, m_tiles, cores_of(device))
    per_split = -(-m_tiles // (count if most is None else min(most, count)))
    return n_tiles, -(-m_tiles // per_split), per_split * tile.block_m

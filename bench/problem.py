"""What the contenders are measured on: sizes, dtypes, and the tensors of a problem."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
FEW_CLASSES = 10
UNITS = {"": 1, "k": 1_000, "M": 1_000_000}


class Size(NamedTuple):
    """A size: N rows, M bank entries, D dimensions; written 512x100kx128."""

    n: int
    m: int
    d: int

    @staticmethod
    def parse(text: str) -> Size:
        parts = [re.fullmatch(r"(\d+)([kM]?)", part) for part in text.strip().split("x")]
        if len(parts) != 3 or not all(parts):
            raise ValueError(f"a size is NxMxD, such as 512x100kx128; got {text!r}")
        size = Size(*(int(part[1]) * UNITS[part[2]] for part in parts if part))
        if min(size) < 1:
            raise ValueError(f"a size needs at least 1 of everything; got {text!r}")
        return size

    def __str__(self) -> str:
        return "x".join(_short(count) for count in self)


def _short(count: int) -> str:
    for unit in ("M", "k"):
        if count % UNITS[unit] == 0:
            return f"{count // UNITS[unit]}{unit}"
    return str(count)


SIZES = tuple(Size.parse(s) for s in ("512x100kx128", "256x1Mx128", "1024x20kx512", "128x100x128"))
QUICK_SIZES = tuple(Size.parse(s) for s in ("128x2kx64", "128x100x128"))
OP_SIZES = tuple(Size.parse(s) for s in ("512x20kx128", "128x100x128"))
# Examples x clusters x D: batches of 12 x 4 (the paper's), 64 x 16 and 512 x 8; and 4,096 clusters given.
CLUSTER_SIZES = tuple(Size.parse(s) for s in ("48x12x64", "48x12x512", "1024x64x128", "4096x512x128", "4096x512x512"))
GIVEN_SIZES = tuple(Size.parse(s) for s in ("512x4096x64", "512x4096x512"))
# A batch compared with itself.
BATCH_SIZES = tuple(Size.parse(s) for s in ("128x128x128", "512x512x128", "2048x2048x128", "8192x8192x128"))


@dataclass(frozen=True)
class Problem:
    """The tensors of a problem.

    A row is the bank entry of its label plus noise of the same size: at scale 8 and 100 thousand entries the softmax is
    then neither flat nor one-hot, as half-way through training.

    Attributes:
        size: N, M and D.
        x: (N, D) rows.
        w: (M, D) bank.
        y: (N,) labels, the bank entry of each row.
        c: (M,) labels of the bank entries, of a few classes.
    """

    size: Size
    x: Tensor
    w: Tensor
    y: Tensor
    c: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def gradient_bytes(self) -> int:
        return self.x.nbytes + self.w.nbytes

    def part(self, n: int, m: int) -> Problem:
        """The problem of the first n rows and m bank entries; all of them where there are fewer."""
        size = Size(min(n, self.size.n), min(m, self.size.m), self.size.d)
        x, w = self.x[: size.n].clone(), self.w[: size.m].clone()
        return Problem(size, x, w, self.y[: size.n] % size.m, self.c[: size.m])

    def double(self) -> Problem:
        return replace(self, x=self.x.double(), w=self.w.double())


def make(size: Size, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Make a problem; its numbers are the same for every dtype, rounded to it."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(size.m, size.d, generator=generator)
    y = torch.randint(size.m, (size.n,), generator=generator)
    x = w[y] + torch.randn(size.n, size.d, generator=generator)
    return Problem(size, x.to(dtype), w.to(dtype), y, torch.arange(size.m) % FEW_CLASSES)

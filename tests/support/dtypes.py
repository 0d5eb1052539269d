"""The dtypes of rows, bank and vectors that may meet in one call."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Dtype(NamedTuple):
    """The dtypes of rows, bank and further vectors; matrix products run in `product`."""

    name: str
    x: torch.dtype
    w: torch.dtype
    vectors: torch.dtype
    product: torch.dtype

    @property
    def accumulated(self) -> torch.dtype:
        """The dtype of sums and losses."""
        return torch.float64 if self.product == torch.float64 else torch.float32


FP32 = Dtype("fp32", torch.float32, torch.float32, torch.float32, torch.float32)
FP64 = Dtype("fp64", torch.float64, torch.float64, torch.float64, torch.float64)
BF16 = Dtype("bf16", torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16)
MIXED = Dtype("bf16_with_fp32", torch.bfloat16, torch.float32, torch.float32, torch.bfloat16)
FP16 = Dtype("fp16", torch.float16, torch.float16, torch.float32, torch.float16)
DTYPES = (FP32, FP64, BF16, MIXED, FP16)
# Every other pair that may meet, in both orders where one is wider.
MIXES = (
    Dtype("fp64_with_fp32", torch.float64, torch.float32, torch.float32, torch.float64),
    Dtype("fp32_with_fp64", torch.float32, torch.float64, torch.float32, torch.float64),
    Dtype("fp16_with_fp32", torch.float16, torch.float32, torch.float32, torch.float16),
    Dtype("fp32_with_bf16", torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),
    Dtype("fp16_with_bf16", torch.float16, torch.bfloat16, torch.float32, torch.float32),
    Dtype("fp64_with_fp16", torch.float64, torch.float16, torch.float32, torch.float64),
    Dtype("bf16_with_fp64", torch.bfloat16, torch.float64, torch.float32, torch.float64),
)
EVERY_DTYPE = (*DTYPES, *MIXES)

"""Which tensor-core arithmetic serves fp32 products: PyTorch's own settings decide, old API and new."""

from __future__ import annotations

import torch


def tf32_allowed() -> bool:
    """Whether PyTorch may multiply float32 matrices in TF32.

    The settings per backend come first: ``torch.get_float32_matmul_precision()`` raises once one of them is used.
    """
    asked = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if asked in (None, "none"):
        asked = getattr(torch.backends, "fp32_precision", None)
    if asked in (None, "none"):
        return torch.get_float32_matmul_precision() != "highest"
    return asked == "tf32"


def fp32_products(device: torch.device, dtype: torch.dtype) -> str:
    """Triton's input precision for products of ``dtype``: "tf32" where PyTorch allows it, else "ieee"."""
    if dtype == torch.float32 and tf32_allowed() and not torch.version.hip:
        return "tf32"
    return "ieee"

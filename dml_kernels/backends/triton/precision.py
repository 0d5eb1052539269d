"""The tensor-core arithmetic of fp32 products, as PyTorch's settings determine it, by the old API or the new."""

from __future__ import annotations

import torch

# `torch.set_float32_matmul_precision`: "high" promises TF32 or better, and three TF32 products keep all digits of fp32.
# "highest" stays with plain fp32 until the error of these products has been measured on tensor cores.
OF_SETTING = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


def asked_of_backends() -> str | None:
    """The settings for each PyTorch backend, "ieee" or "tf32", or None where they leave it open.

    They are read first, because ``torch.get_float32_matmul_precision()`` raises once one of them has been used.
    """
    for place in (torch.backends.cuda.matmul, torch.backends):
        asked = getattr(place, "fp32_precision", None)
        if asked not in (None, "none"):
            return asked
    return None


def fp32_products(arch: str, dtype: torch.dtype) -> str:
    """Triton's input precision for products of ``dtype``: "ieee", "tf32x3" or "tf32"; always "ieee" on AMD."""
    asked = asked_of_backends()
    if dtype != torch.float32 or arch.startswith("gfx") or asked == "ieee":
        return "ieee"
    try:
        setting = torch.get_float32_matmul_precision()
    except RuntimeError:  # the new settings say nothing, or "tf32" in a way that the old one could not
        return "ieee" if asked is None else "tf32"
    return OF_SETTING[setting]

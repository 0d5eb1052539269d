"""The ops' home: one torch.library.Library, one way to register an op with its fake kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("dml_kernels", "DEF")


def register(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define ``dml_kernels::name`` and return the callable overload.

    The implementation chooses among backends itself, so it serves every device; autograd stays with the
    ``torch.autograd.Function`` around the op, as a formula registered here would give a silent zero under jvp.
    """
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dml_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.dml_kernels, name).default

"""The machine of a run, as a dictionary and in one line."""

from __future__ import annotations

import os
from pathlib import Path

import dml_kernels
from dml_kernels import build_info, profiling

from .harness import available_memory

BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # bf16: on aarch64


def describe() -> dict[str, str | int | float]:
    """Processor, cores, threads, versions, memory, instruction sets, and how busy the machine was at the start."""
    extension = build_info.load()
    free = available_memory()
    found = {
        **profiling.machine(),
        "bf16_instructions": ", ".join(_bf16_instructions()) or "none",
        "dml_kernels": dml_kernels.__version__,
        "extension": extension.reason,
        "memory_available_gib": round(free / 2**30, 1) if free else 0,
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else -1.0,
    }
    if extension.module is not None:
        found["extension_isa"] = extension.module.cpu_capability()
        found["extension_products"] = extension.module.cpu_products()
    return found


def _bf16_instructions() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [flag for flag in BF16_FLAGS if flag in flags]


def line(machine: dict[str, str | int | float]) -> str:
    text = (
        f"{machine['cpu']}, {machine['cores']} cores, torch threads {machine['threads']}, torch {machine['torch']} "
        f"({machine['torch_cpu_capability']}, bf16 by {machine['bf16_instructions']}), "
        f"load {machine['load_before']} at the start"
    )
    isa = machine.get("extension_isa")
    return text + (f"; extension runs as {isa}" if isa else f"; extension {machine['extension']}")

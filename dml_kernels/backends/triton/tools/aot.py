"""Ahead-of-time compilation without a GPU or driver: the registers, memory and instructions that a kernel takes.

The launches of the host code are recorded, so the compiled kernels are those that would run: with the same arguments,
types, alignments and options.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .. import configs

TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8",
}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# The instructions that Triton writes in PTX, and those that the assembler makes of them.
PTX = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma": r"\bmma\.sync", "cp_async": r"cp\.async\.c[ag]",
       "tma": r"cp\.async\.bulk\.tensor"}  # fmt: skip
SASS = ("HGMMA", "HMMA", "DMMA", "UTCHMMA", "FFMA", "STL", "LDL")
AMD = {"mfma": r"v_mfma", "ds_read": r"ds_read", "buffer_load": r"(?:buffer|global)_load"}


@dataclass
class Build:
    """One compiled kernel: registers of a thread, bytes of shared memory and of spills, instruction counts."""

    kernel: str
    arch: str
    registers: int
    shared: int
    spill_bytes: int
    num_warps: int
    counts: dict[str, int] = field(default_factory=dict)

    as_dict = asdict


def signature(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[tuple[int], Any], dict[Any, Any]]:
    """The types, constants and alignments of the arguments, as Triton's launcher would derive them."""
    types: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[Any, Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            types[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[parameter.name] = parameter.annotation_type or "fp32"
        else:
            types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def build(kernel: Any, arguments: dict[str, Any], options: dict[str, Any], arch: str) -> Build:
    types, constants, attributes = signature(kernel, arguments)
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    target = configs.CHIPS[arch].target
    compiled = triton.compile(source, target=GPUTarget(*target), options=dict(options))
    of = _amd if target[0] == "hip" else _nvidia
    registers, spills, counts = of(compiled, target)
    return Build(kernel.__name__, arch, registers, compiled.metadata.shared, spills, options["num_warps"], counts)


def _amd(compiled: Any, target: tuple[Any, ...]) -> tuple[int, int, dict[str, int]]:
    assembly = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    counts = {name: len(re.findall(pattern, assembly)) for name, pattern in AMD.items()}
    return number("vgpr_count"), 4 * number("vgpr_spill_count"), counts


def _nvidia(compiled: Any, target: tuple[Any, ...]) -> tuple[int, int, dict[str, int]]:
    """The resources, from cuobjdump, and the spills: bytes of loads and stores, from assembling the PTX with -v."""
    ptx = compiled.asm["ptx"]
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in PTX.items()}
    with tempfile.TemporaryDirectory() as folder:
        cubin, text = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        text.write_text(ptx)
        usage = _run(TOOLS / "cuobjdump", "--dump-resource-usage", cubin)
        registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
        sass = _run(TOOLS / "cuobjdump", "-sass", cubin)
    counts |= {name: len(re.findall(rf"\b{name}\b", sass)) for name in SASS}
    spills = max(4 * (counts["STL"] + counts["LDL"]), stack if counts["STL"] + counts["LDL"] else 0)
    return registers, spills, counts


def _run(*command: Any) -> str:
    env = {**os.environ, "PATH": f"{TOOLS}:{os.environ.get('PATH', '')}"}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True, env=env).stdout

"""Compiles the CUDA sources for the emulator: as a library of torch ops, or as a program that a sanitizer watches."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_emulator"
FLAGS = ("-std=c++20", "-fPIC", "-DDML_CUDA_EMULATOR", f"-I{HERE}", "-Wall", "-Wno-unknown-pragmas")
TORCH_FLAGS = ("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY")


def compiler() -> str | None:
    """The C++ compiler, or None where there is none or the machine is not the emulator's (x86-64)."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    return found if found and os.uname().machine == "x86_64" else None


def sources(csrc: Path) -> list[Path]:
    return sorted(csrc.glob("cuda/*.cu"))


def digest(*parts: object) -> str:
    """A name for a build, made of everything that goes into it."""
    files = [*sorted(CSRC.glob("c*/*")), *sorted(CSRC.glob("register_cuda*")), *sorted(HERE.glob("*.[hc]*"))]
    text = b"".join(f.read_bytes() for f in files if f.is_file()) + repr((parts, torch.__version__)).encode()
    return hashlib.sha256(text).hexdigest()[:16]


def run(command: Sequence[object]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"


def compile_objects(csrc: Path, files: Sequence[Path], to: Path, flags: Sequence[str]) -> list[Path]:
    to.mkdir(parents=True, exist_ok=True)
    objects = [to / (f.name + ".o") for f in files]
    for file, out in zip(files, objects, strict=True):
        run((compiler(), *FLAGS, *flags, f"-I{csrc}", "-x", "c++", "-c", file, "-o", out))
    return objects


def library() -> Path:
    """The ops as torch.ops.dml_kernels_cuda_emulated; compiled again only when a source has changed."""
    out = BUILD / digest("ops") / "ops.so"
    if out.exists():
        return out
    torch_dir = Path(torch.__file__).parent
    headers = (f"-isystem{torch_dir}/include", f"-isystem{torch_dir}/include/torch/csrc/api/include")
    files = [*sources(CSRC), CSRC / "register_cuda.cpp", HERE / "counter.cpp"]
    objects = compile_objects(CSRC, files, out.parent, ("-O2", *TORCH_FLAGS, *headers))
    unfinished = out.with_suffix(f".{os.getpid()}")  # several test processes may build the same
    run((compiler(), "-shared", *objects, f"-L{torch_dir}/lib", "-ltorch", "-ltorch_cpu", "-lc10", "-o", unfinished))
    unfinished.replace(out)
    return out


def program(file: str, flags: Sequence[str], csrc: Path = CSRC, keep: Path | None = None) -> Path:
    """Compiles driver.cpp with csrc/cuda/<file>.cu of a source tree, into ``keep`` or among the cached builds."""
    folder = keep or BUILD / digest(file, flags)
    out = folder / file
    if out.exists():
        return out
    files = [csrc / "cuda" / f"{file}.cu", HERE / "driver.cpp"]
    objects = compile_objects(csrc, files, folder / "objects", (*flags, f"-DDRIVE_{file}"))
    unfinished = out.with_suffix(f".{os.getpid()}")
    run((compiler(), *flags, *objects, "-o", unfinished))
    unfinished.replace(out)
    return out

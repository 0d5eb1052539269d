"""Every CUDA source compiles for every architecture, without spills and under its kernels' register bounds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.backends.cuda_emulator import building

pytestmark = pytest.mark.cuda_emulator

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120a")
THREADS = 128
REGISTERS = 65536  # of a multiprocessor
# Blocks of THREADS that a multiprocessor must hold, as the launch bounds say: for float, for double.
BLOCKS = {
    "lse_forward": (4, 3), "lse_backward": (4, 3), "distance": (4, 3), "normalize": (6, 6), "magnet_forward": (4, 4),
    "magnet_backward": (4, 4),
}  # fmt: skip
STATIC_SHARED = 16384  # launchers leave this much of the limit to static arrays


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def kernels(report: str):
    """(name, stack bytes, spill bytes, registers, static shared bytes) of each kernel in ptxas's report."""
    for part in report.split("Compiling entry function")[1:]:
        stack, stores, loads = map(int, re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups())  # fmt: skip
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        yield part.split("'")[1], stack, stores + loads, registers, int(shared[1]) if shared else 0


def compiled(source: str, architecture: str, *flags: str) -> str:
    """The messages of nvcc when it compiles csrc/cuda/<source>.cu."""
    compiler = nvcc()
    if compiler is None:
        pytest.skip("nvcc was not found (set CUDA_HOME or PATH)")
    file = str(building.CSRC / "cuda" / f"{source}.cu")
    command = [compiler, "-std=c++20", "-O3", f"-arch={architecture}", "-Werror", "all-warnings", *flags, file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted(BLOCKS))
def test_no_spills_and_few_enough_registers(source, architecture, tmp_path):
    report = compiled(source, architecture, "-cubin", "-Xptxas", "-v", "-o", str(tmp_path / "out.cubin"))
    found = list(kernels(report))
    assert found
    for name, stack, spills, registers, shared in found:
        blocks = BLOCKS[source]["Id" in name]  # a template over double, as the compiler writes it
        assert (stack, spills) == (0, 0), f"{name}: {stack} bytes of stack, {spills} of spills"
        assert registers <= REGISTERS // (THREADS * blocks), f"{name}: {registers} registers"
        assert shared <= STATIC_SHARED, f"{name}: {shared} bytes of static shared memory"


# How PTX spells the loads of 16 bytes: four floats, eight halves (as four words), two doubles.
WIDE_LOADS = {"float": ("ld.global.v4.f32", "ld.global.v4.u32"), "double": ("ld.global.v2.f64",)}


def loads_left_narrow(name: str, body: str) -> list[str]:
    """The loads of 16 bytes that a kernel should have but does not."""
    wanted = WIDE_LOADS["double" if "Id" in name else "float"]
    if "normalize_kernel" in name:  # there is one kernel for each width
        width = int(re.search(r"ELi(\d)E", name)[1])
        wanted = () if width == 1 else wanted[-1:] if width == 8 else wanted[:1]
    return [load for load in wanted if load not in body]


@pytest.mark.parametrize("source", sorted(BLOCKS))
def test_rows_are_read_in_loads_of_16_bytes(source, tmp_path):
    compiled(source, "sm_80", "-ptx", "-o", str(tmp_path / "out.ptx"))
    entries = (tmp_path / "out.ptx").read_text().split(".entry ")[1:]
    assert entries
    for entry in entries:
        assert not loads_left_narrow(entry.split("(")[0], entry)
        stripped = re.sub(r"ld\.global\.v[24]", "ld.global", entry)  # as if no load were wide
        assert loads_left_narrow(entry.split("(")[0], stripped) or "ELi1E" in entry.split("(")[0]


def test_every_source_has_a_gate():
    assert {f.stem for f in building.sources(building.CSRC)} == set(BLOCKS)


def test_the_report_is_read_as_ptxas_writes_it():
    report = (Path(__file__).parent / "ptxas_report.txt").read_text()
    assert list(kernels(report)) == [("_ZN3fooIfEvv", 8, 12, 72, 1184)]

"""The emulated kernels under AddressSanitizer (overruns) and ThreadSanitizer (races), and the checkers themselves."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess

import pytest

from tests.backends.cuda_emulator import building

pytestmark = pytest.mark.cuda_emulator

SANITIZERS = {
    "address": ("-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer"),
    "thread": ("-O1", "-g", "-fsanitize=thread"),
}
CASES = {
    "lse_forward": ("euclidean", "dot", "proxy_nca", "narrow"),
    "lse_backward": ("euclidean", "dot", "proxy_nca", "narrow"),
    "distance": ("forward", "dot backward", "narrow backward"),
    "normalize": ("forward", "backward", "narrow backward"),
    "magnet_forward": ("means", "given"),
    "magnet_backward": ("means", "given", "wide"),
}
DTYPES = ("f32", "f64", "bf16")
# Each bug changes a line: (file, line, line with the bug, the sanitizer that must find it, words of its report).
BUGS = {
    "a tile staged one row too far": (
        "tiles.cuh", "at < rows * runs;", "at <= rows * runs;", "address", "heap-buffer-overflow"),
    "a row read past the end of the matrix": (
        "tiles.cuh", "if (first + row < m.rows) run", "if (first + row <= m.rows) run", "address",
        "heap-buffer-overflow"),
    "a shared array too short": (
        "lse_forward.cu", "DML_SHARED(A, row_norms, rows_per_block)", "DML_SHARED(A, row_norms, rows_per_block - 1)",
        "address", "heap-buffer-overflow"),
    "no barrier before a tile is overwritten": (
        "lse_forward.cu", "__syncthreads();  // the previous tile has been read", "", "thread", "data race"),
    "no barrier before shared sums are reused": (
        "platform.cuh", "__syncthreads();  // parts of an earlier sum have been read", "", "thread", "data race"),
    "no fence between a block's results and its ticket": (
        "last_block.cuh", "__threadfence();\n    *last", "*last", "thread", "data race"),
    "two blocks write the same row": (
        "lse_forward.cu", "if (tx != 0 || row >= n) continue;", "if (tx != 0 || row >= n) continue;\n    "
        "static_cast<A*>(out.same)[0] = A(blockIdx.x);", "thread", "data race"),
    "no barrier of all blocks between distances and gradients": (
        "magnet_backward.cu", "  grid_barrier(ticket, gridDim.x);\n", "", "thread", "data race"),
    "no fence after the other blocks have been waited for": (
        "grid_barrier.cuh", "    }\n    __threadfence();", "    }", "thread", "data race"),
    "a barrier of all blocks that not all reach": (
        "magnet_backward.cu", "grid_barrier(ticket, gridDim.x);", "if (blockIdx.x) grid_barrier(ticket, gridDim.x);",
        "address", "none arrives"),
    "a barrier of all blocks in a launch that is not cooperative": (
        "magnet_backward.cu", "DML_LAUNCH_COOPERATIVE", "DML_LAUNCH", "address", "not cooperative"),
    "a barrier for some threads only": (
        "lse_forward.cu", "RowState<A> states[owned_count];", "RowState<A> states[owned_count];\n  "
        "if (threadIdx.x < 7) __syncthreads();", "address", "__syncthreads"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _compiler_is_there():
    if building.compiler() is None:
        pytest.skip("the emulator needs g++ on x86-64")


@functools.cache
def program(file: str, sanitizer: str):
    return building.program(file, SANITIZERS[sanitizer])


def run(executable, case: str, dtype: str):
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "exitcode=66",
    }
    command = [executable, case, dtype]
    # Without address randomisation, because older runtimes of TSan fail at the addresses that newer kernels choose.
    if shutil.which("setarch"):
        command = ["setarch", os.uname().machine, "-R", *command]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("file", CASES)
def test_kernels_are_clean(file, sanitizer):
    executable = program(file, sanitizer)
    for case in CASES[file]:
        for dtype in DTYPES:
            code, text = run(executable, case, dtype)
            assert code == 0, f"{file}, {case}, {dtype}:\n{text[:4000]}"
            assert "clean after" in text


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, tmp_path):
    name, line, wrong, sanitizer, words = BUGS[bug]
    csrc = tmp_path / "csrc"
    for part in ("core", "cuda"):
        shutil.copytree(building.CSRC / part, csrc / part)
    text = (csrc / "cuda" / name).read_text()
    assert text.count(line) == 1, f"{name} holds {line!r} {text.count(line)} times: the plant must follow the source"
    (csrc / "cuda" / name).write_text(text.replace(line, wrong))
    file, case = ("magnet_backward", "means") if name in ("magnet_backward.cu", "grid_barrier.cuh") else (
        "lse_forward", "proxy_nca")  # fmt: skip
    executable = building.program(file, SANITIZERS[sanitizer], csrc, keep=tmp_path)
    code, text = run(executable, case, "f32")
    assert code != 0
    assert words in text

"""Registered ops called directly: no argument that Python can pass ends the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def attack(*arguments: str) -> None:
    """Runs the attack in a separate process, whose report must list no fault."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.support.raw_op_attack", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, f"ended with {done.returncode} after: {done.stderr[-500:]}"
    *faults, total = done.stdout.splitlines()
    assert not faults, "\n".join(faults)
    assert int(total.split()[0]) > 1000


@pytest.mark.cpp
@pytest.mark.slow
@pytest.mark.parametrize(("namespace", "backend"), [("dml_kernels_cpu", "cpu"), ("dml_kernels", "cpu")])
def test_the_compiled_ops_survive(namespace, backend):
    attack(namespace, backend)


@pytest.mark.slow
def test_the_ops_survive_on_the_torch_backend():
    attack("dml_kernels", "torch")


@pytest.mark.cpp
@pytest.mark.parametrize("value", ["nonsense", "AVX2"])
def test_an_unknown_instruction_set_is_an_error(value):
    command = [sys.executable, "-c", "import dml_kernels.functional"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "DML_CPU_ISA": value}
    )
    assert done.returncode
    assert f"ValueError: DML_CPU_ISA must be default, avx2 or avx512; got '{value}'" in done.stderr

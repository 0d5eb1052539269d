"""Every kernel and configuration, compiled ahead of time for each chip in another process, without the interpreter.

This needs no GPU and no driver. The compiled kernels are those that the host code launches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dml_kernels.backends.triton.configs import CHIPS

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "mfma"}
HALVES = ("bfloat16", "float16")
# Kernels that multiply matrices. The gradient of a dot product's matrix takes no product.
MULTIPLY = (
    "forward_kernel", "gradient_kernel", "distance_kernel", "owned_rows_kernel", "owned_bank_kernel", "hinge_kernel",
    "hinge_gradient_kernel",
)  # fmt: skip


def report(*arguments: str) -> list[dict]:
    command = [sys.executable, "-m", "dml_kernels.backends.triton.tools.report", "--json", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["quick", pytest.param("full", marks=pytest.mark.slow)])
def builds(request):
    return report(*(["--quick"] if request.param == "quick" else []))


def failures(builds, wrong):
    return [{k: b[k] for k in ("arch", "kernel", "case", "metric", "d", "dtype", "spill_bytes", "shared", "counts")}
            for b in builds if wrong(b)]  # fmt: skip


def test_every_kernel_was_compiled_for_every_chip(builds):
    for arch in ARCHS:
        kernels = {b["kernel"] for b in builds if b["arch"] == arch}
        assert len(kernels) == 17, kernels


def test_no_configuration_for_half_precision_spills(builds):
    assert not failures(builds, lambda b: b["dtype"] in HALVES and b["spill_bytes"] > 0)


def test_shared_memory_fits_the_chip(builds):
    assert not failures(builds, lambda b: b["shared"] > CHIPS[b["arch"]].shared)


def test_products_run_on_tensor_cores(builds):
    used = [b for b in builds if b["kernel"] in MULTIPLY and b["dtype"] in HALVES]
    assert len(used) > 20
    assert not failures(used, lambda b: b["counts"].get(TENSOR_CORES[b["arch"]], 0) == 0)


def test_fp32_products_run_on_tensor_cores_where_the_precision_setting_lets_them(builds):
    for name, wanted in (("fp32", False), ("fp32 high", True), ("fp32 medium", True)):
        used = [b for b in builds if b["kernel"] in MULTIPLY and b["case"] == name and b["arch"] != "gfx942"]
        assert used or name == "fp32 medium"
        counts = {sum(b["counts"].get(k, 0) for k in ("HMMA", "HGMMA", "UTCHMMA")) > 0 for b in used}
        assert counts <= {wanted}, name


def test_a_tile_too_large_is_seen_to_spill():
    # The check must be able to fail: the same kernel with four times the tile.
    code = """
import json
from dml_kernels.backends.triton import configs
from dml_kernels.backends.triton.tools import aot, report
real = configs.pick
configs.pick = lambda *a: configs.Config(256, 256, 64, 8, 3)
case = report.CASES[1]
launches = [l for l in report.launches(case, "sm_90") if l[0].__name__ == "forward_kernel"]
build = aot.build(*launches[0], "sm_90")
print(build.spill_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "TRITON_INTERPRET": "0"})  # fmt: skip
    assert int(done.stdout) > 1000

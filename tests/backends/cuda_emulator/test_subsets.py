"""Gradients of the CUDA kernels, emulated, for any subset of inputs that need one."""

from __future__ import annotations

import pytest

from dml_kernels.backends import cuda as cuda_backend
from tests.support import subsets

pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), pytest.mark.cuda_emulator]

CASES = {
    name: case
    for name, case in {**subsets.ops(), **subsets.losses()}.items()
    if case.op in cuda_backend.OPS and "pool" not in name and "quadratic" not in name
}


@pytest.mark.parametrize("name", CASES)
def test_any_subset(name):
    subsets.assert_any_subset_gives_the_same(CASES[name], "cuda")

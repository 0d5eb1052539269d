"""The CUDA ops called directly on the emulator: no argument that Python can pass ends the process."""

from __future__ import annotations

import pytest

from tests.backends.cuda_emulator import building
from tests.ops.test_raw_ops import attack

pytestmark = [pytest.mark.cuda_emulator]


def test_the_cuda_ops_survive():
    attack("dml_kernels_cuda_emulated", "cuda", str(building.library()))

"""Fixtures for every test. Without the extension, a test marked `cpp` is skipped, or fails where it is required."""

from __future__ import annotations

import os

# Threads sleep as soon as their share is done. Spinning, the default, starves the tests on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from dml_kernels import build_info
from tests.support.backends import missing, require


@pytest.fixture(autouse=True)
def _extension_is_there(request):
    if request.node.get_closest_marker("cpp") and not (extension := build_info.load()):
        missing(f"the extension is {extension.reason}")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def nan_filled_memory():
    """New tensors hold NaN (integers: the largest value), so that an element that no kernel has written shows."""
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def any_threads():
    """Restores the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pml():
    package = require("pytorch_metric_learning")
    for part in ("losses", "distances", "reducers", "regularizers", "miners"):
        require(f"pytorch_metric_learning.{part}")
    assert package.__version__ == "2.9.0"
    return package

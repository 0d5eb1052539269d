"""Gradients of the Triton kernels, interpreted, for any subset of inputs that need one, in both forms."""

from __future__ import annotations

import pytest

from dml_kernels.backends.triton import configs
from tests.support import subsets

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

NAMES = ("normalize", "normalized_distance", "masked_hinge_sum", "masked_logsumexp")
CASES = {name: case for name, case in subsets.ops().items() if case.op in NAMES}


def slowly(name: str) -> bool:
    """31 subsets of five inputs: a minute each in the interpreter."""
    return name.startswith("masked_logsumexp") and name != "masked_logsumexp-one scale"


@pytest.mark.parametrize("form", ["chunk", "owned"])
@pytest.mark.parametrize("name", [pytest.param(k, marks=pytest.mark.slow) if slowly(k) else k for k in CASES])
def test_any_subset(name, form):
    with configs.take_form(form):
        subsets.assert_any_subset_gives_the_same(CASES[name], "triton")

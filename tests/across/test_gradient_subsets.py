"""Gradients are right for any subset of inputs that need one: every op, every loss, both derivatives."""

from __future__ import annotations

import pytest

from dml_kernels.losses import REGISTRY
from dml_kernels.ops import choice as backends
from tests.support import subsets
from tests.support.backends import on_backends

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

OPS, LOSSES = subsets.ops(), subsets.losses()


def sometimes(name: str) -> bool:
    """Whether a case is a further option of a loss, which uses the same ops."""
    return not name.startswith("Magnet") and name.split("-")[1] not in ("0", "softmax_scale", "scale", "temperature")


@on_backends
@pytest.mark.parametrize("name", OPS)
def test_ops(name, backend):
    subsets.assert_any_subset_gives_the_same(OPS[name], backend)


@on_backends
@pytest.mark.parametrize("name", [pytest.param(k, marks=pytest.mark.slow) if sometimes(k) else k for k in LOSSES])
def test_losses(name, backend):
    subsets.assert_any_subset_gives_the_same(LOSSES[name], backend)


def test_every_op_and_every_loss_is_there():
    without_gradient = {"masked_argmax"}
    assert {case.op for case in (*OPS.values(), *LOSSES.values()) if case.op} == {*backends.OPS} - without_gradient
    assert {name.split("-")[0] for name in LOSSES} == set(REGISTRY)

"""The batch as its own bank on the Triton backend; every launch under the sanitizer."""

from __future__ import annotations

import pytest
import torch

from tests.ops import test_own_bank as promises

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "launched")
B = "triton"
OPS = (promises.logsumexp, promises.circle, promises.hinge, promises.argmax)


@pytest.mark.parametrize("excluded", ["the own copy", "nothing", "one"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_equals_what_is_left_out_by_hand(op, excluded):
    promises.test_equals_what_is_left_out_by_hand(op, excluded, B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS[:3], ids=lambda op: op.__name__)
def test_both_gradients_are_added_in_the_dtype_of_x(op, dtype):
    promises.test_both_gradients_are_added_in_the_dtype_of_x(op, B, dtype)


@pytest.mark.parametrize("op", [promises.logsumexp, promises.hinge], ids=lambda op: op.__name__)
def test_derivatives_of_both_orders(op):
    promises.test_derivatives_of_both_orders(op, B)

"""Whole losses on the Triton backend, against fp64 truth or plain PyTorch; every launch under the sanitizer."""

from __future__ import annotations

import pytest
import torch

from dml_kernels import functional as F
from dml_kernels.losses import family
from tests.losses import test_losses as loss_promises
from tests.support.dtypes import FP32, FP64, MIXED
from tests.support.problems import randn

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "launched")
B = "triton"
LOSSES = [(name, i) for name, entry in family("proxies").items() for i in range(len(entry.options))]


@pytest.mark.parametrize(("name", "which"), LOSSES, ids=str)
def test_losses_on_proxies_are_accurate(name, which):
    shape, dtype = ((31, 70, 24), (12, 3, 64))[which % 2], (FP32, MIXED, FP64)[which % 3]
    loss_promises.test_value_and_gradient_are_accurate(name, which, shape, dtype, B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_magnet_agrees_with_plain_pytorch(dtype):
    classes = torch.arange(6) % 3
    found = []
    for backend in (B, "torch"):
        x = randn(24, 9, seed=1).to(dtype).requires_grad_()
        loss = F.magnet_loss(x, torch.arange(24) % 6, classes, backend=backend)
        found.append((loss, *torch.autograd.grad(loss, x)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)

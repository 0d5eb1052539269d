"""The CUDA kernels on CPU tensors: `backend="cuda"` means the emulated ops in every test of this folder."""

from __future__ import annotations

import functools

import pytest
import torch

from dml_kernels.backends import cuda as cuda_backend
from tests.backends.cuda_emulator import building
from tests.support.backends import missing


@functools.cache
def _load() -> None:
    torch.ops.load_library(str(building.library()))


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    if building.compiler() is None:
        missing("the emulator needs g++ on x86-64")
    _load()
    monkeypatch.setattr(cuda_backend, "namespace", "dml_kernels_cuda_emulated")
    monkeypatch.setattr(cuda_backend, "device_type", "cpu")

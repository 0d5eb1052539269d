"""The CUDA kernels on CPU tensors: `backend="cuda"` means the emulated ops in every test of this folder."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import helpers
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import building

from dml_kernels.backends import cuda as cuda_backend


@functools.cache
def _load() -> None:
    torch.ops.load_library(str(building.library()))


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    if building.compiler() is None:
        helpers.missing("the emulator needs g++ on x86-64")
    _load()
    monkeypatch.setattr(cuda_backend, "namespace", "dml_kernels_cuda_emulated")
    monkeypatch.setattr(cuda_backend, "device_type", "cpu")

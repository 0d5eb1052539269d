"""Problems shared by the tests of evaluation, and formulas written out one pair at a time, in numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dml_kernels.profiling import run_in_child


def clustered(count, classes, width, *, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    return centres[labels] + spread * torch.randn(count, width, generator=generator), labels


def all_scores(queries, gallery, metric="cosine"):
    """(N, M) fp32 from fp64 by numpy alone, cosines (of a dot product, too) to multiples of 2^-40."""
    queries, gallery = queries.double().numpy(), gallery.double().numpy()
    if metric == "euclidean":
        return -np.linalg.norm(queries[:, None] - gallery[None], axis=2).astype(np.float32)
    if metric == "cosine":
        queries, gallery = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, gallery))
    products = np.einsum("nd,md->nm", queries, gallery)
    sizes = 1.0
    if metric == "dot":
        sizes = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(gallery, axis=1)
        sizes = np.where(sizes > 0, sizes, 1.0)
    return (np.round(products / sizes * 2.0**40) / 2.0**40 * sizes).astype(np.float32)


class LargestResult(TorchDispatchMode):
    """Counts the entries of the largest tensor that any operator returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.entries = max(self.entries, result.numel())
        return result


def probe(what, *arguments):
    """Peak extra bytes and the like, from a fresh process."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    return json.loads(run_in_child("tests.support.evaluation_probe", what, *map(str, arguments)))

"""Results have the same bits on every run, and on the CPU at any number of threads."""

from __future__ import annotations

import pytest
import torch

from dml_kernels import functional as F
from tests.support.backends import on_backends_and
from tests.support.dtypes import BF16, FP32, FP64
from tests.support.problems import METRICS, randint, randn
from tests.support.tolerance import assert_same_bits

# Rows, bank, width: fewer columns than a tile, fewer tiles than slices, many more; one row, more rows than a block.
SHAPES = ((7, 1, 5), (7, 3, 5), (64, 100, 33), (5, 513, 64), (300, 1000, 17), (1500, 130, 9), (33, 9001, 24))


def outputs(shape, dtype, backend, metric, normalize):
    n, m, d = shape
    x, w = randn(n, d, seed=1).to(dtype.x).requires_grad_(), randn(m, d, seed=2).to(dtype.w).requires_grad_()
    vectors = [randn(size, seed=3).to(dtype.vectors).requires_grad_() for size in (n, m)]
    out = F.masked_logsumexp(
        x, w, randint(0, 5, n, seed=4), randint(0, 5, m, seed=5), metric=metric, normalize=normalize, scale=vectors[0],
        same=(-2.0, 0.1), different=(3.0, 0.2), col_bias=vectors[1],
        exclude=randint(-1, m, n, seed=6), sums=True, backend=backend,
    )  # fmt: skip
    kept = (out.different > -torch.inf) & (out.same > -torch.inf)
    grads = torch.autograd.grad(sum(torch.where(kept, v, 0).sum() for v in out), (x, w, *vectors))
    distance = F.normalized_distance(x, w, metric, normalize=normalize, backend=backend)
    both = torch.autograd.grad(distance.sum(), (x, w))
    unit = F.normalize(x, backend=backend)
    return *out, *grads, distance, *both, unit, *torch.autograd.grad(unit, x, x.detach())


@on_backends_and((FP32, BF16))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_run_gives_the_same_bits(shape, dtype, backend):
    metric = METRICS[SHAPES.index(shape) % len(METRICS)]
    first = outputs(shape, dtype, backend, *metric)
    for _ in range(2):
        assert_same_bits(outputs(shape, dtype, backend, *metric), first)


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=lambda d: d.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape, dtype, any_threads):
    for metric in (METRICS[SHAPES.index(shape) % 6], METRICS[(SHAPES.index(shape) + 3) % 6]):
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(outputs(shape, dtype, "cpu", *metric))
        for other in results[1:]:
            assert_same_bits(other, results[0])


@pytest.mark.cpp
def test_the_double_backward_too_where_it_is_ours_alone(any_threads):
    """It is plain PyTorch, so only runs at one number of threads can be compared."""
    x, w = randn(33, 8, seed=1).float().requires_grad_(), randn(2000, 8, seed=2).float().requires_grad_()

    def second():
        out = F.masked_logsumexp(x, w, torch.arange(33), metric="sqeuclidean", normalize=True, scale=5.0, backend="cpu")
        grads = torch.autograd.grad((out.different - out.same).sum(), (x, w), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), (x, w))

    assert_same_bits(second(), second())

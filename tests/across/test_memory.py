"""The peak memory of a step, and the number of M x D allocations in it: one, the gradient of the proxies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._C._profiler import _EventType

from dml_kernels import functional as F
from dml_kernels import losses
from dml_kernels.losses import REGISTRY, family
from dml_kernels.profiling import run_in_child
from tests.support.backends import backends_of, on_backends, on_losses

MB = 1 << 20


def large_allocations(function, size):
    """Bytes and op of every allocation of at least `size` bytes by PyTorch's allocator while function() runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    found, stack = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.typed[0] == _EventType.Allocation and event.typed[1].alloc_size >= size:
            found.append((event.typed[1].alloc_size, event.parent.name if event.parent else None))
    return found


def test_the_count_sees_a_large_allocation():
    tensor = torch.ones(1000, 100)
    assert len(large_allocations(lambda: (tensor * 2 + tensor).sum(), 400_000)) == 2
    assert large_allocations(lambda: tensor[:500] * 2, 400_000) == []


@on_losses(family("proxies"), options=False)
@pytest.mark.parametrize("n", [16, 200])
def test_a_step_allocates_the_proxies_gradient_and_nothing_else_of_its_size(name, n, backend):
    m, d = 20_001, 128
    x = torch.randn(n, d, requires_grad=True)
    proxies, y = torch.randn(m, d, requires_grad=True), torch.randint(0, m // REGISTRY[name].centres, (n,))
    for options in REGISTRY[name].options:

        def step(options=options):
            REGISTRY[name].function(x, proxies, y, **options, backend=backend).sum().backward()

        x.grad = proxies.grad = None
        found = large_allocations(step, 0.9 * m * d * 4)
        expected = [m * d * 4] * REGISTRY[name].bank_sized
        assert [size for size, _ in found] == expected, f"{options}: {found}"


@on_backends
def test_a_frozen_bank_allocates_nothing_of_its_size(backend):
    m, d = 20_000, 128
    x, w, y = torch.randn(16, d, requires_grad=True), torch.randn(m, d), torch.arange(16)
    step = lambda: F.proxy_nca_loss(x, w, y, backend=backend).backward()  # noqa: E731
    assert large_allocations(step, 0.9 * m * d * 4) == []


@on_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rows_of_another_dtype_make_no_copy_of_fp32_proxies(dtype, backend):
    m, d = 20_000, 128
    loss = losses.ProxyNCALoss(m, d)
    x, y = torch.randn(200, d, dtype=dtype, requires_grad=True), torch.arange(200)

    def step():
        F.proxy_nca_loss(x, loss.proxies, y, backend=backend).backward()

    assert [size for size, _ in large_allocations(step, 0.9 * m * d * 2)] == [m * d * 4]


@on_backends
def test_an_expanded_gradient_of_the_distance_matrix_is_not_copied(backend):
    x, w = torch.randn(300, 8, requires_grad=True), torch.randn(20_000, 8, requires_grad=True)
    out = F.normalized_distance(x, w, "sqeuclidean", backend=backend)
    assert (
        large_allocations(
            lambda: torch.autograd.grad(out, (x, w), torch.ones(()).expand_as(out)), 0.9 * 300 * 20_000 * 4
        )
        == []
    )


def probe(what, *arguments):
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    return json.loads(run_in_child("tests.support.memory_probe", what, *map(str, arguments)))


@on_backends
@pytest.mark.parametrize(
    ("n", "m", "d", "dtype"),
    [
        (256, 300_000, 64, "fp32"),
        (8, 200_000, 128, "fp32"),
        pytest.param(256, 300_000, 64, "bf16", marks=pytest.mark.slow),
        pytest.param(256, 300_000, 64, "fp16", marks=pytest.mark.slow),
        pytest.param(4096, 20_000, 64, "fp32", marks=pytest.mark.slow),
        pytest.param(1024, 20_000, 512, "fp32", marks=pytest.mark.slow),
        pytest.param(64, 1_000_000, 128, "fp32", marks=pytest.mark.slow),
    ],
)
def test_peak_memory_is_the_gradients_plus_64_mb(n, m, d, dtype, backend):
    found = probe("step", backend, n, m, d, dtype)
    extra = (found["peak"] - found["gradients"]) / MB
    assert extra <= 64, f"{extra:.0f} MB beside the gradients"


@on_backends
def test_points_that_have_collapsed_take_no_more_memory(backend):
    """Then every distance is small and computed from differences."""
    found = probe("step", backend, 256, 20_000, 64, "fp32", "collapsed")
    extra = (found["peak"] - found["gradients"]) / MB
    assert extra <= 64, f"{extra:.0f} MB beside the gradients"


@on_backends
@pytest.mark.parametrize("policy", ["max_pool", "softmax_pool"])
def test_pooling_builds_no_matrix_of_rows_and_classes_or_centres(policy, backend):
    """256 x 100,000 fp32 would be 102 MB once, and three times that with a class's 3 centres."""
    found = probe("pooled", backend, policy, 256, 100_000, 3, 16)
    extra = (found["peak"] - found["gradients"]) / MB
    assert extra <= 64, f"{extra:.0f} MB beside the gradients"


@on_backends
@pytest.mark.parametrize("given", [0, 1], ids=["batch means", "given centres"])
def test_magnet_builds_no_matrix_of_examples_and_clusters(given, backend):
    """8,192 x 4,096 fp32 would be 134 MB, once."""
    found = probe("magnet", backend, 8192, 4096, 16, given)
    extra = (found["peak"] - found["gradients"]) / MB
    assert extra <= 64, f"{extra:.0f} MB beside the gradients"


@on_backends
def test_no_loss_on_proxies_builds_the_matrix(backend):
    """512 x 40,000 fp32 would be 82 MB, once. All losses run in one child: a loss's peak is measured above what the
    loss before it has left.
    """
    names = [
        name
        for name, entry in family("proxies").items()
        if name != "ProxyNCALoss" and any(p.values == (backend,) for p in backends_of(entry))
    ]
    assert len(names) >= 4
    for name, found in probe("proxies", ",".join(names), backend, 512, 40_000, 8).items():
        extra = (found["peak"] - found["gradients"]) / MB
        assert extra <= 64, f"{name}: {extra:.0f} MB beside the gradients"

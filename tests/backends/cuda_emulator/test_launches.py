"""A fused loss is one launch forward and one backward; what these kernels do not compute is refused."""

from __future__ import annotations

import pytest
import torch

from dml_kernels import functional as F
from dml_kernels.ops import choice as backends
from dml_kernels.ops.contract import POLICIES
from tests.support.magnet import problem
from tests.support.problems import randint, randn

pytestmark = pytest.mark.cuda_emulator


def launches(function) -> int:
    before = torch.ops.dml_kernels_cuda_emulated.launches()
    function()
    return torch.ops.dml_kernels_cuda_emulated.launches() - before


def each_way(loss, *leaves) -> tuple[int, int]:
    """Launches of loss(*leaves) and of its backward."""
    leaves = [t.requires_grad_() for t in leaves]
    values = []
    forward = launches(lambda: values.append(loss(*leaves)))
    return forward, launches(lambda: torch.autograd.grad(values[0], leaves))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_proxy_nca_is_one_launch_each_way(smoothing):
    y = randint(0, 400, 50, seed=3)  # several blocks of rows, several slices of the bank

    def loss(x, w):
        return F.proxy_nca_loss(x, w, y, label_smoothing=smoothing, backend="cuda")

    assert each_way(loss, randn(50, 24, seed=1).float(), randn(400, 24, seed=2).float()) == (1, 1)


@pytest.mark.parametrize("given", [False, True], ids=["means", "given centres"])
@pytest.mark.parametrize("shape", [(48, 12, 64), (33, 9, 200)], ids=str)
def test_magnet_is_one_launch_each_way(shape, given):
    x, clusters, classes, centers = (t.float() if t.is_floating_point() else t for t in problem(*shape))

    def loss(x, *centers):
        return F.magnet_loss(x, clusters, classes, centers=centers[0] if given else None, backend="cuda")

    assert each_way(loss, x, *([centers] if given else [])) == (1, 1)


def test_every_launch_is_counted():
    x = randn(5, 8, seed=1)
    assert launches(lambda: [F.normalize(x, backend="cuda") for _ in range(3)]) == 3
    assert launches(lambda: None) == 0


@pytest.mark.parametrize("policy", sorted({*POLICIES, "quadratic", "max_pool", "softmax_pool"} - {"linear"}))
def test_logit_policies_are_refused_when_the_backend_is_chosen(policy):
    for dtype in (torch.float32, torch.float64):
        choice = {"op": "masked_logsumexp", "device": torch.device("cpu"), "dtype": dtype, "policy": policy}
        with pytest.raises(RuntimeError, match=f"cuda: policy '{policy}' is not implemented here"):
            backends.choose(**choice, argument="cuda")
        (verdict,) = [v for v in backends.explain(**choice) if v.backend == "cuda"]
        assert not verdict.ok
        assert policy in verdict.reason
    assert backends.choose("masked_logsumexp", torch.device("cpu"), torch.float32, "cuda") == "cuda"


def test_the_modelled_crossover_is_where_the_choice_changes():
    crossover = pytest.importorskip("bench.gpu.crossover", reason="the benchmarks are not installed with these tests")
    chip, at = crossover.CHIPS["H100"], {}
    for d in (64, 128, 512):
        at[d] = crossover.crossover(chip, d, 4, graph=True)
        assert backends.SMALL / 2 < at[d] < 2 * backends.SMALL
        n = round((backends.SMALL / d) ** 0.5)
        ahead = [times[0] < times[1] for m in (n // 4, 4 * n) for times in [crossover.step(chip, n, m, d, 4, True)]]
        assert ahead == [True, False]
    assert crossover.main([]) == 0

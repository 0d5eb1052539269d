"""What a step costs: the comparison with plain PyTorch, and the measuring of time and memory under it."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from dml_kernels import losses, profiling
from dml_kernels.demo import step_cost
from dml_kernels.losses.proxy_nca import proxy_nca_reference


@pytest.mark.parametrize("exclude_positive", [False, True])
def test_plain_pytorch_is_the_papers_loss(exclude_positive):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (9, 14))
    y = torch.randint(14, (9,), generator=generator)
    options = {"softmax_scale": 3.0, "exclude_positive": exclude_positive}
    plain = step_cost.plain_proxy_nca(x, w, y, **options)
    torch.testing.assert_close(plain, proxy_nca_reference(x, w, y, **options))
    torch.testing.assert_close(plain, losses.proxy_nca.proxy_nca_loss(x, w, y, **options))


def test_step_cost_sees_the_dense_buffers():
    """10 MB a dense buffer here, of which plain PyTorch holds several; the fused loss none."""
    cost = step_cost.measure(256, 10_000, 32, rounds=1)
    dense = 4 * 256 * 10_000
    fused, plain = cost.variants["fused"], cost.variants["plain"]
    assert plain.peak_bytes > 3 * dense
    assert cost.gradient_bytes <= fused.peak_bytes < cost.gradient_bytes + dense
    assert len(fused.samples) == len(plain.samples) == 1
    assert fused.seconds > 0


def test_each_step_has_gradients_of_its_own():
    """Left to add up, fused and plain would be compared with their own sum."""
    problem = step_cost._Problem(8, 20, 4, 8.0, False)
    first, second = problem.step("fused"), problem.step("fused")
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert first[1].data_ptr() != second[1].data_ptr()


@pytest.mark.parametrize("bug", ["loss", "gradient", "nan"])
def test_different_numbers_are_not_timed(monkeypatch, bug):
    right = step_cost.VARIANTS["fused"]

    def wrong(embeddings, proxies, labels, **options):
        loss = right(embeddings, proxies, labels, **options)
        if bug == "nan":
            return loss * float("nan")
        return loss * 1.001 if bug == "loss" else loss + (1.001 * loss - (1.001 * loss).detach())

    monkeypatch.setitem(step_cost.VARIANTS, "fused", wrong)
    with pytest.raises(step_cost.ComparisonError, match="not timed"):
        step_cost.measure(16, 100, 8, rounds=1)


def test_peak_sees_memory_that_is_not_pytorchs_and_is_freed_again():
    """A numpy temporary of 64 MB, gone when the function returns."""
    peak = profiling.peak_extra_bytes(lambda: float(np.ones(8_000_000).sum()), gc.collect)
    assert 63e6 <= peak < 72e6
    assert profiling.peak_extra_bytes(lambda: None) < 4e6


def test_peak_refuses_to_guess_where_it_cannot_be_reset(monkeypatch, tmp_path):
    float(np.ones(30_000_000).sum())  # an earlier, higher peak
    monkeypatch.setattr(profiling, "CLEAR_REFS", tmp_path / "no" / "such")
    with pytest.raises(RuntimeError, match="fresh process"):
        profiling.peak_extra_bytes(lambda: np.ones(1000))


def test_interleaved_times_turn_the_order_and_drop_the_warmup():
    calls = []
    times = profiling.interleaved_times({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert [len(samples) for samples in times.values()] == [3, 3, 3]
    assert gc.isenabled()
    assert profiling.interleaved_medians({"a": lambda: None}, rounds=2, warmup=0)["a"] >= 0
    ticks = iter(range(100))
    assert profiling.interleaved_times({"a": lambda: next(ticks)}, 2, clock=lambda: next(ticks)) == {"a": [2, 2]}
    with pytest.raises(ValueError, match="round"):
        profiling.interleaved_times({}, 3)


def test_run_in_child_reports_the_childs_error():
    with pytest.raises(RuntimeError, match="--peak-of"):
        profiling.run_in_child("dml_kernels.demo.step_cost", "--peak-of", "nothing")

"""masked_argmax on the Triton backend: choices, bounds, ties and draws; every launch under the sanitizer."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from dml_kernels import noise
from dml_kernels.backends.triton import argmax, configs
from dml_kernels.backends.triton.kernels import noise as kernel_noise
from tests.ops import test_masked_argmax as promises
from tests.support.dtypes import BF16, DTYPES, FP32, FP64, MIXED
from tests.support.features import FEATURES
from tests.support.problems import METRICS, Problem, on_metrics, randint, randn
from tests.support.tolerance import assert_same_bits

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "checked")
B = "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("which", range(3))
def test_every_metric_and_dtype(which, dtype):
    metric = METRICS[(2 * which + DTYPES.index(dtype)) % 6]
    p = Problem.random(41, 139, 40, *metric, seed=3)
    p.options["c"], p.y = randint(0, 3, 139, seed=5), randint(0, 3, 41, seed=6)
    p.options["exclude"] = randint(-1, 139, 41, seed=7)
    largest_same, largest_different = promises.LARGEST[which]
    promises.assert_right(p, dtype, B, largest_same=largest_same, largest_different=largest_different)


SHAPES = ((1, 1, 3), (1, 2, 64), (2, 1, 127), (32, 64, 65), (33, 65, 130), (3, 700, 17), (130, 3, 5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape):
    which = SHAPES.index(shape)
    p = Problem.random(*shape, *METRICS[which % 6], seed=sum(shape))
    n, _, m = p.sizes
    p.options["c"], p.y = randint(0, 3, m, seed=5), randint(0, 3, n, seed=6)
    promises.assert_right(p, (BF16, FP32, FP64)[which % 3], B)


@pytest.mark.parametrize("name", promises.NAMES)
def test_every_option(name):
    which = promises.NAMES.index(name)
    p = Problem.random(34, 70, 20, *METRICS[which % 6], seed=which)
    FEATURES[name](p)
    p.options.pop("scale", None)
    largest_same, largest_different = promises.LARGEST[which % 3]
    promises.assert_right(
        p, (FP32, MIXED)[which // 6 % 2], B, largest_same=largest_same, largest_different=largest_different
    )


@on_metrics
def test_bounds(metric, normalize):
    p = Problem.random(37, 150, 17, metric, normalize, seed=3)
    p.options["c"], p.y = randint(0, 5, 150, seed=5), randint(0, 5, 37, seed=6)
    # This differs from every score by more than rounding.
    middle = promises.choices(p, FP64, "reference").same.score + 1e-7
    low, high = (None, middle) if normalize else (middle - 0.3, middle + 0.3)
    found = promises.assert_right(p, FP64, B, bounds=(low, high))
    assert (found.different.index >= 0).any()


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("metric", "splits"), [("cosine", 1), ("sqeuclidean", 100), ("euclidean", 3)])
def test_of_equal_scores_the_lowest_index_is_chosen(metric, splits, largest, monkeypatch):
    """Within a tile, over tiles and over ranges, because all bank entries are the same vector."""
    monkeypatch.setattr(configs, "splits", lambda tiles, walk, cores: min(splits, walk))
    n, m = 34, 700
    x, w = randn(1, 8, seed=1).expand(n, 8).float(), randn(1, 8, seed=2).expand(m, 8).float()
    y, c = torch.arange(n) % 2, (torch.arange(m) + 1) // 2 % 2
    found = promises.F.masked_argmax(x, w, y, c, metric=metric, largest_same=largest, largest_different=largest,
                                     backend=B)  # fmt: skip
    assert torch.equal(found.same.index, y)
    assert torch.equal(found.different.index, 1 - y)


COSINE, RAW = {"metric": "cosine", "normalize": False}, {"metric": "euclidean", "normalize": False}
PROMISES = [
    (promises.test_bounds_are_open_and_nan_leaves_nothing, [{}]),
    (promises.test_an_empty_set_is_minus_one_and_infinitely_bad, [{}]),
    (promises.test_nan_is_no_candidate, [COSINE, RAW]),
    (promises.test_choices_carry_no_gradient, [{}]),
    (promises.test_another_seed_draws_anew_and_the_same_one_again, [{}]),
    (promises.test_a_row_draws_the_same_whatever_rows_come_after, [{}]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("promise", "arguments"),
    [pytest.param(p, a, id=f"{p.__name__}-{i}") for p, calls in PROMISES for i, a in enumerate(calls)],
)
def test_the_promise_holds(promise, arguments):
    promise(**arguments, backend=B)


# ---------------------------------------------------------------------------------------------------------------------
# Draws


@triton.jit
def noise_kernel(bits_ptr, noise_ptr, row_ptr, column_ptr, stream, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    rows, columns = tl.load(row_ptr + index), tl.load(column_ptr + index)
    streams = kernel_noise.row_streams(stream, rows)
    at = index[:, None] * BLOCK + index[None, :]
    tl.store(bits_ptr + at, kernel_noise.mix(streams[:, None] + ((columns + 1) * kernel_noise.GAMMA)[None, :]))
    tl.store(noise_ptr + at, kernel_noise.gumbel(streams, columns))


@pytest.mark.parametrize("seed", promises.SEEDS)
def test_the_generator_has_the_bits_of_pytorchs(seed):
    rows = torch.arange(16) * 0x1234567
    columns = torch.arange(16) ** 9
    bits, found = torch.empty(16, 16, dtype=torch.int64), torch.empty(16, 16, dtype=torch.float64)
    noise_kernel[(1,)](bits, found, rows, columns, argmax.stream_of(seed), 16)
    assert torch.equal(bits, noise.bits(seed, rows, columns))
    torch.testing.assert_close(found, noise.gumbel(seed, rows, columns), rtol=1e-14, atol=1e-15)


@triton.jit
def log1p_kernel(t_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, kernel_noise.log1p_of_minus(tl.load(t_ptr + index)))


def test_the_logarithm_keeps_its_last_places_near_0():
    t = torch.cat((torch.logspace(-300, 0, 255, dtype=torch.float64), torch.tensor([1.5]).double()))
    found = torch.empty_like(t)
    log1p_kernel[(1,)](t, found, 256)
    torch.testing.assert_close(found, torch.log1p(-t), rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.parametrize("d", [1, 3, 8])
@promises.DRAWS
def test_a_draw_is_the_dense_draw(metric, d):
    given = {"metric": metric, "d": d, "n": 70, "m": 301}
    found, dense = (promises.drawn_from(backend=b, **given) for b in (B, "reference"))
    for ours, true in zip(found, dense, strict=True):
        assert torch.equal(ours.index, true.index)
        assert torch.equal(ours.count, true.count)
        torch.testing.assert_close(ours.score, true.score)
    assert found.different.index.unique().numel() > 25


def test_every_backend_draws_alike_and_in_any_number_of_ranges(monkeypatch):
    found = [promises.drawn_from("cosine", b, n=40, m=501).different for b in (B, "torch")]
    assert_same_bits(*([f.index] for f in found))
    monkeypatch.setattr(configs, "splits", lambda tiles, walk, cores: walk)
    again = promises.drawn_from("cosine", B, n=40, m=501).different
    assert_same_bits(again, found[0])

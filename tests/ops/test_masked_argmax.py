"""masked_argmax: choices compared with a dense search, bounds, ties; the bits, repeatability and law of draws."""

from __future__ import annotations

import math

import pytest
import torch

from dml_kernels import functional as F
from dml_kernels import noise, reference
from tests.support.backends import on_backends, on_backends_and
from tests.support.dtypes import BF16, EVERY_DTYPE, FP32, FP64, MIXED
from tests.support.features import FEATURES
from tests.support.problems import METRICS, Problem, on_metrics, randint, randn
from tests.support.tolerance import assert_same_bits  # fmt: skip

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

SHAPES = (
    (1, 1, 3), (1, 2, 64), (127, 1, 2), (1, 507, 252), (507, 2, 252), (16, 61, 1030), (2, 5003, 127), (252, 127, 64),
    (9, 20011, 3), (611, 79, 48),
)  # fmt: skip
LARGEST = ((False, True), (True, False), (True, True))


def choices(p: Problem, dtype, backend, **more):
    tensors = {k: p.layout(k, t.to(getattr(dtype, k))) for k, t in p.tensors.items() if k in ("x", "w")}
    options = {k: p.layout(k, v) if isinstance(v, torch.Tensor) else v for k, v in p.options.items()}
    return F.masked_argmax(tensors["x"], tensors["w"], p.layout("y", p.y), **options, **more, backend=backend)


def assert_right(p: Problem, dtype, backend, **more):
    """Scores and counts are those of the dense search in fp64, and the chosen entry has that score. Of nearly equal
    scores a rounded search may choose another one.
    """
    found = choices(p, dtype, backend, **more)
    rounded = Problem(
        {k: t.to(getattr(dtype, k)).double() for k, t in p.tensors.items() if k in ("x", "w")}, p.y, p.options
    )
    truth = choices(rounded, FP64, "reference", **more)
    s = reference.scores(
        rounded.tensors["x"], rounded.tensors["w"], p.options["metric"], p.options["normalize"]
    )  # fmt: skip
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-5}.get(dtype.product, 0.02) * max(1.0, s.abs().max().item())
    for ours, true in zip(found, truth, strict=True):
        assert ours.index.dtype == ours.count.dtype == torch.int64
        assert ours.score.dtype == (torch.float64 if dtype.product == torch.float64 else torch.float32)
        assert torch.equal(ours.count, true.count)
        some = true.index >= 0
        assert torch.equal(ours.index >= 0, some)
        assert torch.equal(ours.score.isinf(), ~some)
        torch.testing.assert_close(ours.score[some].double(), true.score[some], rtol=0, atol=tolerance)
        torch.testing.assert_close(
            s.gather(1, ours.index.clamp_min(0)[:, None]).squeeze(1)[some], true.score[some], rtol=0, atol=tolerance
        )
    return found


@on_backends_and((FP32, BF16))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, dtype, backend):
    which = SHAPES.index(shape) + 3 * (dtype == BF16)
    p = Problem.random(*shape, *METRICS[which % len(METRICS)], seed=sum(shape))
    n, _, m = p.sizes
    p.options["c"], p.y = randint(0, 3, m, seed=5), randint(0, 3, n, seed=6)
    largest_same, largest_different = LARGEST[which % 3]
    assert_right(p, dtype, backend, largest_same=largest_same, largest_different=largest_different)


@on_backends_and(EVERY_DTYPE)
@on_metrics
def test_every_metric_and_dtype(metric, normalize, dtype, backend):
    p = Problem.random(61, 509, 48, metric, normalize, seed=3)
    p.options["c"], p.y = randint(0, 3, 509, seed=5), randint(0, 3, 61, seed=6)
    p.options["exclude"] = randint(-1, 509, 61, seed=7)
    assert_right(p, dtype, backend)


NAMES = (
    "many_positives_per_row", "all_of_one_class", "rows_without_positive", "no_row_with_a_positive",
    "row_without_negative", "labels_beyond_32_bits", "negative_bank_labels", "ignored_rows", "all_rows_ignored",
    "another_ignore_index", "ignored_bank_entries", "whole_bank_ignored", "exclude", "exclude_the_only_positive",
    "identical_rows", "nearly_identical_rows", "far_from_the_origin", "transposed", "rows_with_a_gap",
    "offset_into_storage",
)  # fmt: skip


@on_backends_and((FP32, MIXED))
@pytest.mark.parametrize("name", NAMES)
def test_every_option(name, dtype, backend):
    which = NAMES.index(name) + 2 * (dtype == MIXED)
    p = Problem.random(
        *((331, 67, 12) if which % 3 == 0 else (37, 131, 24)), *METRICS[which % len(METRICS)], seed=which
    )
    FEATURES[name](p)
    p.options.pop("scale", None)
    largest_same, largest_different = LARGEST[which % 3]
    assert_right(p, dtype, backend, largest_same=largest_same, largest_different=largest_different)


@on_backends
@on_metrics
def test_semi_hard_negatives_lie_beyond_the_positive(metric, normalize, backend):
    """As FaceNet chooses: the nearest negative that is farther than the positive, and within the margin."""
    p = Problem.random(300, 1000, 17, metric, normalize, seed=3)
    p.options["c"], p.y = randint(0, 30, 1000, seed=5), randint(0, 30, 300, seed=6)
    positive = choices(p, FP32, backend, which="same").same.score
    semi = choices(p, FP32, backend, which="different", bounds=(positive - 0.05, positive)).different
    s = reference.scores(*(p.tensors[k].float() for k in "xw"), metric, normalize)
    inside = (p.y[:, None] != p.options["c"]) & (s < positive[:, None] - 1e-5) & (s > positive[:, None] - 0.05 + 1e-5)
    assert 0 < (semi.index >= 0).sum() < 300 or inside.any(1).all()
    assert (semi.index[inside.any(1)] >= 0).all()
    assert (semi.score[inside.any(1)] >= torch.where(inside, s, -math.inf).amax(1)[inside.any(1)] - 1e-5).all()
    some = semi.index >= 0
    assert ((semi.score < positive) & (semi.score > positive - 0.05))[some].all()
    assert_right(p, FP64, backend, bounds=(None, positive.double()))
    assert_right(p, FP64, backend, bounds=(positive.double(), None))


@on_backends
def test_bounds_are_open_and_nan_leaves_nothing(backend):
    x, w = torch.ones(4, 1), torch.tensor([[1.0], [2.0], [3.0]])
    low, high = torch.tensor([1.0, 0.0, 2.0, math.nan]), torch.tensor([3.0, 9.0, 3.0, 9.0])
    found = F.masked_argmax(
        x, w, torch.full((4,), 7), torch.zeros(3, dtype=torch.int64), metric="dot", bounds=(low, high), backend=backend
    )
    assert found.different.index.tolist() == [1, 2, -1, -1]
    assert found.different.count.tolist() == [1, 3, 0, 0]
    assert found.different.score.tolist() == [2, 3, -math.inf, -math.inf]


@on_backends
@on_metrics
@pytest.mark.parametrize("largest", [True, False])
def test_of_equal_scores_the_lowest_index_is_chosen(largest, metric, normalize, backend, monkeypatch):
    """Over chunks, tiles and slices, because all bank entries are the same vector."""
    monkeypatch.setattr("dml_kernels.backends.torch.tiles.CHUNK_ELEMENTS", 10_000)
    n, m = (40, 9001) if largest else (1500, 130)
    x, w = randn(1, 8, seed=1).expand(n, 8).float(), randn(1, 8, seed=2).expand(m, 8).float()
    y, c = torch.arange(n) % 2, (torch.arange(m) + 1) // 2 % 2
    found = F.masked_argmax(
        x, w, y, c, metric=metric, normalize=normalize, largest_same=largest, largest_different=largest, backend=backend
    )
    assert torch.equal(found.same.index, y)
    assert torch.equal(found.different.index, 1 - y)


@on_backends
def test_an_empty_set_is_minus_one_and_infinitely_bad(backend):
    x, w, y = randn(3, 4, seed=1), randn(5, 4, seed=2), torch.tensor([9, -100, 0])
    c = torch.zeros(5, dtype=torch.int64)
    found = F.masked_argmax(x, w, y, c, backend=backend)
    assert found.same.index[:2].tolist() == [-1, -1]
    assert found.same.score[:2].tolist() == [math.inf, math.inf]
    assert found.different.index[1:].tolist() == [-1, -1]
    assert found.different.score[1:].tolist() == [-math.inf, -math.inf]
    assert found.same.count.tolist() == [0, 0, 5]
    assert found.different.count.tolist() == [5, 0, 0]
    only = F.masked_argmax(x, w, y, c, which="different", backend=backend)
    assert only.same is None
    assert_same_bits(only.different, found.different)
    assert F.masked_argmax(x[:0], w, y[:0], c, backend=backend).same.index.shape == (0,)


@on_backends
@on_metrics
def test_nan_is_no_candidate(metric, normalize, backend):
    x, w = randn(9, 6, seed=1).float(), randn(700, 6, seed=2).float()
    w[100:120], x[4] = math.nan, math.nan
    found = F.masked_argmax(x, w, torch.full((9,), -1), torch.zeros(700, dtype=torch.int64), metric=metric,
                            normalize=normalize, backend=backend).different  # fmt: skip
    assert found.index[4] == -1
    others = torch.arange(9) != 4
    assert (found.count[others] == 680).all()
    assert found.score[others].isfinite().all()


@on_backends
def test_choices_carry_no_gradient(backend):
    x, w = randn(9, 6, seed=1).requires_grad_(), randn(70, 6, seed=2).requires_grad_()
    found = F.masked_argmax(x, w, torch.arange(9), backend=backend)
    assert not any(t.requires_grad for choice in found for t in choice)


# ---------------------------------------------------------------------------------------------------------------------
# Draws


def splitmix64(h: int) -> int:
    mask = (1 << 64) - 1
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 & mask
    h = (h ^ (h >> 27)) * 0x94D049BB133111EB & mask
    return h ^ (h >> 31)


SEEDS = (0, 1, 12345, (1 << 63) - 1)
ROWS, COLUMNS = (0, 1, 2**31 + 5), (0, 1, 511, 2**31, 2**40 + 3)


def in_plain_python(seed: int, row: int, column: int) -> int:
    mask, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15
    start = splitmix64((splitmix64(seed) + row * gamma) & mask)
    return splitmix64((start + (column + 1) * gamma) & mask)


def test_the_generator_in_pytorch_is_splitmix64():
    for seed in SEEDS:
        found = noise.bits(seed, torch.tensor(ROWS), torch.tensor(COLUMNS))
        for i, row in enumerate(ROWS):
            for j, column in enumerate(COLUMNS):
                assert found[i, j].item() % (1 << 64) == in_plain_python(seed, row, column)


@pytest.mark.cpp
def test_the_generator_in_cpp_has_the_same_bits():
    for seed in SEEDS:
        for row in ROWS:
            for column in COLUMNS:
                found = torch.empty(3, 50, dtype=torch.int64)
                torch.ops.dml_kernels_cpu.noise_bits(found, seed, row, column)
                expected = noise.bits(seed, torch.arange(row, row + 3), torch.arange(column, column + 50))
                assert torch.equal(found, expected)


def test_uniform_bits_and_gumbel_noise():
    """Each bit is set half the time, neighbours are unrelated, and the noise has the law exp(-exp(-g))."""
    bits = noise.bits(3, torch.arange(300), torch.arange(300))
    ones = torch.stack([(bits >> b & 1).double().mean() for b in range(64)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 300
    g = noise.gumbel(3, torch.arange(300), torch.arange(300))
    u = torch.exp(-torch.exp(-g))
    ordered = u.flatten().sort().values
    assert (ordered - (torch.arange(90_000) + 0.5) / 90_000).abs().max() < 1.95 / 300  # Kolmogorov-Smirnov at 0.1%
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        assert torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].abs() < 5 / 300


DRAWS = pytest.mark.parametrize("metric", ["cosine", "sqeuclidean", "euclidean"])


def drawn_from(metric, backend, d=8, seed=11, n=211, m=3001, **more):
    x, w = randn(n, d, seed=1), randn(m, d, seed=2)
    y, c = randint(0, 40, n, seed=3), randint(0, 40, m, seed=4)
    exclude = randint(-1, m, n, seed=5)
    return F.masked_argmax(x, w, y, c, metric=metric, noise_seed=seed, exclude=exclude, backend=backend, **more)


@on_backends
@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 300])
@DRAWS
def test_a_draw_is_the_dense_draw(metric, d, backend):
    m = 300 if d > 8 else 3001
    # High dimensions have no pair within 1.4 of each other: look a little farther.
    more = {"nonzero_loss_cutoff": 1.45 if d > 8 else 1.4}
    found, dense = (drawn_from(metric, b, d, m=m, **more) for b in (backend, "reference"))
    for ours, true in zip(found, dense, strict=True):
        assert torch.equal(ours.index, true.index)
        assert torch.equal(ours.count, true.count)
        torch.testing.assert_close(ours.score, true.score)
    assert found.different.index.unique().numel() > 50


@pytest.mark.cpp
@DRAWS
def test_every_backend_draws_alike(metric):
    assert_same_bits(*((drawn_from(metric, b).different[0],) for b in ("torch", "cpu")))


@on_backends
def test_another_seed_draws_anew_and_the_same_one_again(backend):
    # Far from the cutoff all weights are similar, so that two seeds seldom choose the same entry.
    first, again, other = (drawn_from("cosine", backend, seed=s, cutoff=1.2).different.index for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first != other).float().mean() > 0.99


@on_backends
def test_a_row_draws_the_same_whatever_rows_come_after(backend):
    x, w = randn(40, 8, seed=1), randn(500, 8, seed=2)
    y, c = torch.zeros(40).long(), torch.ones(500).long()
    whole, part = (F.masked_argmax(x[:n], w, y[:n], c, noise_seed=5, backend=backend).different.index for n in (40, 7))
    assert torch.equal(whole[:7], part)


@on_backends
def test_draws_follow_the_weights(backend):
    """A chi-squared test of 20,000 draws of one anchor among 12 candidates against their weights."""
    n, d = 20_000, 8
    x, w = randn(1, d, seed=1).expand(n, d), randn(12, d, seed=2)
    w[:3] = x[0] + 0.2 * w[:3]  # some nearer than the cutoff
    found = F.masked_argmax(x, w, torch.zeros(n).long(), torch.ones(12).long(), noise_seed=7,
                            backend=backend).different  # fmt: skip
    distance = F.normalized_distance(x[:1], w, backend="reference")[0]
    log_w = reference.distance_log_weight(distance, d, 0.5, 1.4)
    expected = n * log_w.softmax(0)
    counts = torch.bincount(found.index, minlength=12).double()
    assert torch.equal(counts > 0, expected > 0) or expected[counts == 0].max() < 10
    used = expected > 5
    chi2 = ((counts - expected)[used].square() / expected[used]).sum()
    assert used.sum() >= 5
    assert chi2 < 2 * used.sum() + 20
    assert (found.count == (log_w > -math.inf).sum()).all()


def test_the_weights_are_those_of_pytorch_metric_learning():
    """DistanceWeightedMiner 2.9 computes 1/q(d) with both cutoffs, zero where it is not finite."""
    for d in (2, 3, 8, 128):
        distance = torch.linspace(0, 2, 400, dtype=torch.float64)
        mat = distance.clamp(min=0.5)
        log_weights = (2.0 - d) * mat.log() - ((d - 3) / 2) * torch.log(1.0 - 0.25 * mat**2)
        weights = log_weights.exp() * (mat < 1.4)
        weights[~log_weights.isfinite()] = 0
        for ours in (
            reference.distance_log_weight(distance, d, 0.5, 1.4),
            noise.distance_log_weight(distance**2, d, 0.5, 1.4),
        ):
            torch.testing.assert_close(ours.exp(), weights, rtol=1e-9, atol=0)


@on_backends_and((FP32, FP64, BF16))
@pytest.mark.parametrize("shape", [(5, 3, 7), (17, 130, 67), (33, 517, 64), (40, 1100, 3)], ids=str)
def test_of_equal_scores_anywhere_in_the_bank_the_lowest_index_is_chosen(shape, dtype, backend):
    """Products of small integers are exact in any order, so that copies of a row have equal scores in every block."""
    n, m, d = shape
    base = randint(-2, 3, max(2, m // 7) * d, seed=1).view(-1, d)
    x, copy = randint(-2, 3, n * d, seed=2).view(n, d), randint(0, len(base), m, seed=3)
    w, c = base[copy], randint(0, 2, m, seed=4)
    y = torch.zeros(n, dtype=torch.int64)
    found = F.masked_argmax(x.to(dtype.x), w.to(dtype.w), y, c, metric="dot", normalize=False, backend=backend)
    s = x @ w.T
    assert torch.equal(found.same.index, s.masked_fill(c != 0, 1 << 40).argmin(1))
    assert torch.equal(found.different.index, s.masked_fill(c == 0, -1 << 40).argmax(1))


@on_backends_and((FP32, FP64))
@pytest.mark.parametrize("largest", [False, True])
def test_an_infinite_score_that_nothing_can_be_worse_than_is_no_candidate(largest, dtype, backend):
    big = torch.finfo(dtype.x).max
    x = torch.tensor([[big, 1.0]], dtype=dtype.x)
    w = torch.tensor([[-4.0, 0.0], [4.0, 0.0]], dtype=dtype.w)  # scores of -inf and inf
    for label in (0, 1):
        found = F.masked_argmax(
            x, w, torch.tensor([label]), torch.tensor([0, 1]), metric="dot", normalize=False, largest_same=largest,
            largest_different=largest, backend=backend,
        )  # fmt: skip
        best = int(largest)
        for choice, entry in ((found.same, label), (found.different, 1 - label)):
            assert choice.index.tolist() == [entry if entry == best else -1]
            assert choice.count.tolist() == [int(entry == best)]
            assert choice.score.tolist() == [math.inf if largest == (entry == best) else -math.inf]

"""Every option of masked_logsumexp, and every kind of awkward input, as a change to a random Problem."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.support.problems import Problem, randint, randn

FEATURES: dict[str, Callable[[Problem], None]] = {}


def feature(change: Callable[[Problem], None]) -> Callable[[Problem], None]:
    FEATURES[change.__name__] = change
    return change


def bank_labels(p: Problem, classes: int) -> None:
    n, _, m = p.sizes
    p.options["c"], p.y = randint(0, classes, m, seed=p.seed + 11), randint(0, classes, n, seed=p.seed + 12)


# --- labels


@feature
def many_positives_per_row(p: Problem) -> None:
    bank_labels(p, 4)


@feature
def all_of_one_class(p: Problem) -> None:
    bank_labels(p, 1)


@feature
def rows_without_positive(p: Problem) -> None:
    bank_labels(p, 5)
    p.y[::3] = 77


@feature
def no_row_with_a_positive(p: Problem) -> None:
    bank_labels(p, 5)
    p.y += 5


@feature
def row_without_negative(p: Problem) -> None:
    # Two classes, one of which no counted bank entry but the row's own has.
    bank_labels(p, 1)
    p.y[::2] = 1


@feature
def labels_beyond_32_bits(p: Problem) -> None:
    bank_labels(p, 4)
    # These differ only in their upper halves.
    p.options["c"], p.y = p.options["c"] << 33, p.y << 33


@feature
def negative_bank_labels(p: Problem) -> None:
    bank_labels(p, 4)
    p.options["c"], p.y = -p.options["c"] - 1, -p.y - 1


@feature
def ignored_rows(p: Problem) -> None:
    p.y[1::3] = -100


@feature
def all_rows_ignored(p: Problem) -> None:
    p.y[:] = -100


@feature
def another_ignore_index(p: Problem) -> None:
    bank_labels(p, 6)
    p.options["ignore_index"] = 3
    p.y[0] = 3


@feature
def ignored_bank_entries(p: Problem) -> None:
    bank_labels(p, 4)
    p.options["c"][::3] = -100
    p.y[0] = -100


@feature
def whole_bank_ignored(p: Problem) -> None:
    bank_labels(p, 4)
    p.options["c"][:] = -100


@feature
def exclude(p: Problem) -> None:
    n, _, m = p.sizes
    bank_labels(p, 3)
    p.options["exclude"] = randint(-1, m, n, seed=p.seed + 13)
    p.options["exclude"][:2] = torch.tensor([0, m - 1])


@feature
def exclude_the_only_positive(p: Problem) -> None:
    p.options["exclude"] = torch.where(torch.arange(p.y.numel()) % 2 == 0, p.y, -1)


# --- factors, scales, offsets


@feature
def scale_tenth(p: Problem) -> None:
    p.options["scale"] = 0.1


@feature
def scale_hundred(p: Problem) -> None:
    p.options["scale"] = 100.0


@feature
def scale_ten_thousand(p: Problem) -> None:
    p.options["scale"] = 1e4


@feature
def scale_tensor_scalar(p: Problem) -> None:
    p.tensors["scale"] = torch.tensor(7.0, dtype=torch.float64)


@feature
def scale_per_row(p: Problem) -> None:
    p.tensors["scale"] = randn(p.sizes[0], seed=p.seed + 14).exp() * 3


@feature
def scale_of_either_sign_per_row(p: Problem) -> None:
    p.tensors["scale"] = randn(p.sizes[0], seed=p.seed + 14) * 3
    p.tensors["scale"][0] = 0


@feature
def proxy_anchor_factors(p: Problem) -> None:
    bank_labels(p, 4)
    p.options.update(same=(-32.0, 0.1), different=(32.0, -0.1))


@feature
def factors_and_offsets(p: Problem) -> None:
    bank_labels(p, 4)
    p.options.update(same=(-1.5, 0.3), different=(2.5, -0.7))
    p.tensors["scale"] = randn(p.sizes[0], seed=p.seed + 14).exp()


@feature
def equal_offsets(p: Problem) -> None:
    bank_labels(p, 4)
    p.options.update(same=(2.0, 0.5), different=(2.0, 0.5), scale=3.0)


@feature
def one_factor_zero(p: Problem) -> None:
    p.options.update(same=(0.0, 1.0), different=(2.0, 0.0))


# --- columns


@feature
def column_bias(p: Problem) -> None:
    p.tensors["col_bias"] = randn(p.sizes[2], seed=p.seed + 16) * 2


@feature
def columns_left_out_by_bias(p: Problem) -> None:
    bank_labels(p, 4)
    p.tensors["col_bias"] = torch.where(
        torch.arange(p.sizes[2]) % 3 == 1, -math.inf, randn(p.sizes[2], seed=p.seed + 16)
    )


@feature
def all_columns_left_out_by_bias(p: Problem) -> None:
    p.tensors["col_bias"] = torch.full((p.sizes[2],), -math.inf, dtype=torch.float64)


@feature
def everything_at_once(p: Problem) -> None:
    n, _, m = p.sizes
    bank_labels(p, 5)
    factors_and_offsets(p)
    columns_left_out_by_bias(p)
    p.options["c"][::7] = -100
    p.y[::5] = -100
    p.options["exclude"] = randint(-1, m, n, seed=p.seed + 13)


# --- points


@feature
def identical_rows(p: Problem) -> None:
    p.tensors["w"][: p.sizes[0]] = p.tensors["x"][: p.sizes[2]]
    p.tensors["x"][1] = p.tensors["x"][0]


@feature
def nearly_identical_rows(p: Problem) -> None:
    n, d, m = p.sizes
    k = min(n, m)
    p.tensors["w"][:k] = p.tensors["x"][:k] + 1e-2 * randn(k, d, seed=p.seed + 17) / math.sqrt(d)


@feature
def antipodal_rows(p: Problem) -> None:
    p.tensors["w"][: p.sizes[0]] = -p.tensors["x"][: p.sizes[2]]
    p.options["scale"] = 32.0


@feature
def far_from_the_origin(p: Problem) -> None:
    # Raw squared distances of points whose norms dwarf them: expanding cancels.
    offset = randn(p.sizes[1], seed=p.seed + 18)
    for name in ("x", "w"):
        p.tensors[name] = p.tensors[name] * 0.5 + offset


# --- layouts: the same values at other strides, with NaN or wrong labels in the gaps


def every_other(t: Tensor) -> Tensor:
    """The same values with a gap after each."""
    gap = torch.full_like(t, math.nan) if t.is_floating_point() else torch.full_like(t, 1 << 40)
    return torch.stack((t, gap), -1)[..., 0]


@feature
def strided_everything(p: Problem) -> None:
    everything_at_once(p)
    p.layout = lambda name, t: every_other(t) if t.dim() else t


@feature
def transposed(p: Problem) -> None:
    p.layout = lambda name, t: t.t().contiguous().t()


@feature
def rows_with_a_gap(p: Problem) -> None:
    def gap(name: str, t: Tensor) -> Tensor:
        return torch.cat((t, torch.full_like(t, math.nan)), 1)[:, : t.size(1)] if t.dim() == 2 else t

    p.layout = gap


@feature
def offset_into_storage(p: Problem) -> None:
    p.layout = lambda name, t: torch.cat((torch.full_like(t[:1], 3), t))[1:] if t.dim() else t


@feature
def expanded_rows(p: Problem) -> None:
    def expand(name: str, t: Tensor) -> Tensor:
        return t[:1].expand_as(t) if name in ("x", "y", "scale", "grad") else t

    p.tensors["scale"] = randn(p.sizes[0], seed=p.seed + 14).exp()
    for name in ("x", "scale"):
        p.tensors[name][:] = p.tensors[name][:1].clone()
    p.y[:] = p.y[:1].clone()
    for g in p.grads.values():
        g[:] = g[:1].clone()
    p.layout = expand


@feature
def expanded_bank(p: Problem) -> None:
    def expand(name: str, t: Tensor) -> Tensor:
        return t[:1].expand_as(t) if name in ("w", "col_bias", "c") else t

    bank_labels(p, 1)
    p.y[::2] = 1
    column_bias(p)
    for t in (p.tensors["w"], p.tensors["col_bias"], p.options["c"]):
        t[:] = t[:1].clone()
    p.layout = expand


@feature
def expanded_embedding(p: Problem) -> None:
    # Stride 0 along D: every component of a row is the same. Raw, as normalising leaves such rows nothing to learn.
    p.options["normalize"] = False
    p.options["metric"] = "dot" if p.options["metric"] == "cosine" else p.options["metric"]
    p.tensors["x"] = p.tensors["x"][:, :1].expand(-1, p.sizes[1]).clone()
    p.layout = lambda name, t: t[:, :1].expand_as(t) if name == "x" else t


@feature
def incoming_gradient_of_stride_0(p: Problem) -> None:
    for g in p.grads.values():
        g[:] = 1
    p.layout = lambda name, t: t[:1].expand_as(t) if name == "grad" else t

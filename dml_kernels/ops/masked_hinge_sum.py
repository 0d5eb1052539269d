"""masked_hinge_sum: each row's sum of relu(k s + o + t) over the bank entries of its label, and of all other labels.

As for masked_logsumexp, there are three registered ops and two autograd Functions. The indicator of a positive term is
constant, so the gradient on a score is g k where the term is positive, and the second derivative is that of the scores
alone. ``relative`` is handled here for all backends: the score of the row's positive becomes part of the row's offset,
and its gradient, minus k g times the count of positive terms, is put at the positive's place in the tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import choice, own_bank
from .checks import check_flag, shown
from .contract import (
    accumulate_dtype,
    apart,
    check_comparison,
    check_line,
    check_thresholds,
    check_values,
    check_vector,
)
from .library import filled, gradients_like, known_signature, register, without_autocast
from .signatures import Bank, Hinged, HingeSpec, Lines, Slopes

TensorTuple = tuple[Tensor, ...]


_KEPT = "Tensor grad_same, Tensor grad_different, Tensor count_same, Tensor count_different, Tensor positive"
# Positions of the tensors that may need a gradient: x, w, and both thresholds.
DIFFERENTIABLE = (0, 1, 5, 6)


def _lines(inputs: Hinged, spec: HingeSpec, positive: Tensor) -> Lines:
    k_same, o_same, k_different, o_different = spec.hinge
    acc, n = accumulate_dtype(spec.dtype), inputs.x.size(0)

    def offset(o: float, t: Tensor | None) -> Tensor:
        base = inputs.x.new_full((n,), o, dtype=acc)
        return base if t is None else base + t.to(acc)

    same, different = offset(o_same, inputs.t_same), offset(o_different, inputs.t_different)
    if spec.relative:  # k (s_iy - s_iy) is exactly 0
        k_same, different = 0.0, different - k_different * positive
    return Lines(*inputs[:5], (k_same, k_different), (same, different))


def _slopes(grads: TensorTuple, counts: TensorTuple, lines: Lines, relative: bool) -> Slopes:
    acc = lines.offset[0].dtype
    same, different = (g.to(acc) * k for g, k in zip(grads, lines.k, strict=True))
    return Slopes(same, different, -different * counts[1] if relative else None)


def _fwd(inputs: Hinged, spec: HingeSpec) -> TensorTuple:
    inputs = own_bank.spelled_out(inputs, spec.own)
    check_values(Bank(*inputs[:5]), spec.ignore_index, first_class=spec.first_class)
    check_thresholds(inputs.t_same, inputs.t_different)
    with without_autocast(inputs.x.device.type):
        if spec.relative:
            positive = choice.BACKENDS["torch"].positive_scores(inputs, spec)
        else:
            positive = inputs.x.new_empty(0, dtype=accumulate_dtype(spec.dtype))
        out = choice.BACKENDS[spec.backend].masked_hinge_sum_fwd(_lines(inputs, spec, positive), spec)
    return (*out, positive)


def _fwd_fake(inputs: Hinged, spec: HingeSpec) -> TensorTuple:
    acc, n = accumulate_dtype(spec.dtype), inputs.x.size(0)
    dtypes = (acc, acc, torch.int64, torch.int64)
    out = tuple(inputs.x.new_empty(n, dtype=dtype) for dtype in dtypes)
    return (*out, inputs.x.new_empty(n if spec.relative else 0, dtype=acc))


def _threshold_grad(grad: Tensor, count: Tensor, t: Tensor | None, need: bool) -> Tensor | None:
    if t is None or not need:
        return None
    per_row = grad.to(accumulate_dtype(grad.dtype)) * count
    return (per_row.sum() if t.dim() == 0 else per_row).to(t.dtype)


def _bwd(g1, g2, n1, n2, positive, needs, inputs: Hinged, spec: HingeSpec) -> TensorTuple:
    grads, counts = (g1, g2), (n1, n2)
    g_x = g_w = None
    with without_autocast(inputs.x.device.type):
        if needs[0] or needs[1]:
            lines = _lines(own_bank.spelled_out(inputs, spec.own), spec, positive)
            slopes, both = _slopes(grads, counts, lines, spec.relative), own_bank.needs_of_both(needs[:2], inputs)
            found = choice.BACKENDS[spec.backend].masked_hinge_sum_bwd(slopes, both, lines, spec)
            g_x, g_w = own_bank.added(found, inputs)
    thresholds = (inputs.t_same, inputs.t_different)
    g_t = [_threshold_grad(*v) for v in zip(grads, counts, thresholds, needs[2:], strict=True)]
    return filled((g_x, g_w, *g_t), inputs.x, 4)


def _bwd_fake(g1, g2, n1, n2, positive, needs, inputs: Hinged, spec: HingeSpec) -> TensorTuple:
    return gradients_like([inputs[i] for i in DIFFERENTIABLE], needs, inputs.x)


def _dbl(v_x, v_w, v_t1, v_t2, g1, g2, n1, n2, positive, inputs: Hinged, spec: HingeSpec) -> TensorTuple:
    grads, counts = (g1, g2), (n1, n2)
    with without_autocast(inputs.x.device.type):
        lines = _lines(own_bank.spelled_out(inputs, spec.own), spec, positive)
        slopes = _slopes(grads, counts, lines, spec.relative)
        directions = own_bank.directions_of_both((v_x, v_w), inputs)
        # All backends share this implementation, a chunk loop in plain PyTorch with bounded memory.
        along, d_x, d_w = choice.BACKENDS["torch"].masked_hinge_sum_dbl(directions, slopes, lines, counts, spec)
    d_grads = []
    for grad, count, d, v in zip(grads, counts, along, (v_t1, v_t2), strict=True):
        d_grads.append((d if v.numel() == 0 else d + v.to(d.dtype) * count).to(grad.dtype))
    return filled((*d_grads, *own_bank.added((d_x, d_w), inputs)), inputs.x, 4)


def _dbl_fake(v_x, v_w, v_t1, v_t2, g1, g2, n1, n2, positive, inputs: Hinged, spec: HingeSpec) -> TensorTuple:
    return gradients_like((g1, g2, inputs.x, inputs.w), [True] * 4, inputs.x)


_V = "Tensor v_x, Tensor v_w, Tensor v_t_same, Tensor v_t_different"
fwd = register("masked_hinge_sum_fwd", Hinged, HingeSpec, 5, _fwd, _fwd_fake)
bwd = register("masked_hinge_sum_bwd", Hinged, HingeSpec, 4, _bwd, _bwd_fake, f"{_KEPT}, bool[] needs")
dbl = register("masked_hinge_sum_dbl", Hinged, HingeSpec, 4, _dbl, _dbl_fake, f"{_V}, {_KEPT}")


@known_signature
class _Backward(torch.autograd.Function):
    """The first derivative as a differentiable function of the incoming gradients and the inputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g1, g2, n1, n2, positive, needs, x, w, y, c, exclude, t_same, t_different, spec):
        return bwd(g1, g2, n1, n2, positive, needs, x, w, y, c, exclude, t_same, t_different, *spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *before, _needs, x, w, y, c, exclude, t_same, t_different, ctx.spec = inputs
        ctx.save_for_backward(*before, x, w, y, c, exclude, t_same, t_different)

    @staticmethod
    def backward(ctx, *directions):
        g_same, g_different, x, w = dbl(*directions, *ctx.saved_tensors, *ctx.spec)
        w = None if ctx.saved_tensors[6] is None else w
        return g_same, g_different, None, None, None, None, x, w, *(None,) * 6


@known_signature
class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, y, c, exclude, t_same, t_different, spec):
        return fwd(x, w, y, c, exclude, t_same, t_different, *spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.spec = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*output[2:], *tensors)

    @staticmethod
    def backward(ctx, g_same, g_different, _n1, _n2, _positive):
        n1, n2, positive, *tensors = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE]
        before = (g_same, g_different, n1, n2, positive, needs)
        # The Function costs as much as a small kernel, so it is used only if there may be another derivative.
        if torch.is_grad_enabled():
            found = _Backward.apply(*before, *tensors, ctx.spec)
        else:
            found = bwd(*before, *tensors, *ctx.spec)
        x, w, t_same, t_different = (g if need else None for g, need in zip(found, needs, strict=True))
        return x, w, None, None, None, t_same, t_different, None


def differentiable(inputs: Hinged, spec: HingeSpec) -> TensorTuple:
    """(same, different, count_same, count_different) for checked arguments, on the backend that the spec names."""
    return _Forward.apply(*inputs, spec)[:4]


Threshold = Tensor | None | tuple[Tensor | None, Tensor | None]


class MaskedHingeSum(NamedTuple):
    """The result of masked_hinge_sum, (N,) each."""

    same: Tensor
    different: Tensor
    count_same: Tensor
    count_different: Tensor


def masked_hinge_sum(
    x: Tensor,
    w: Tensor | None = None,
    y: Tensor | None = None,
    c: Tensor | None = None,
    *,
    metric: str = "euclidean",
    normalize: bool = True,
    same: tuple[float, float] | None = None,
    different: tuple[float, float] | None = None,
    threshold: Threshold = None,
    relative: bool = False,
    exclude: Tensor | None = None,
    own: bool = False,
    ignore_index: int = -100,
    first_class: int | None = None,
    eps: float = 1e-12,
    backend: str | None = None,
) -> MaskedHingeSum:
    """Each row's sum of hinges over the bank entries of its label, and over all others, in one pass.

    With the score s_ij of ``metric`` (larger is closer: u.p, -|u - p|^2, -|u - p|; unit vectors if ``normalize``), and
    a factor k and an offset o for each set::

        same_i      = sum_{j: c_j  = y_i} relu(k_same s_ij + o_same + t_same_i)
        different_i = sum_{j: c_j != y_i} relu(k_different s_ij + o_different + t_different_i)

    With ``relative``, s_ij - s_{i,y_i} replaces s_ij. A contrastive loss (Hadsell et al. 2006) of distances -s is
    ``same=(-1, -pos_margin), different=(1, neg_margin)``; a margin loss (Wu et al. 2017) learns its boundary through
    ``threshold``; triplets of a row, its proxy and every other proxy are ``different=(1, margin), relative=True``.
    The forward, the backward and the double backward build nothing of size N x M.

    Args:
        x: (N, D) rows.
        w: (M, D) bank, whose dtype may differ from that of x; None: x.
        y: (N,) int64 labels of the rows. Without ``c`` they must be bank rows, or ``ignore_index``.
        c: (M,) int64 labels of the bank; None: each entry's index, or y if ``w`` is None.
        metric: ``cosine``, ``dot``, ``sqeuclidean`` or ``euclidean``.
        normalize: compare unit vectors (``cosine`` always does, ``dot`` never).
        same, different: (k, o) of each set; None leaves the set out: its sum and count are 0.
        threshold: t, a () or (N,) tensor for both sets, or a pair of these (each may be None); it gets a gradient.
        relative: subtract the score of the row's positive; needs ``c=None``. The same pass computes the positive's
            gradient, so the caller need not gather rows of ``w``.
        exclude: (N,) int64 bank index that is in neither set of the row, -1 for none.
        own: where ``w`` is None, keep the row's own copy, which is left out otherwise, in addition to ``exclude``.
        ignore_index: rows with this label, and bank entries with this label in ``c``, are in no set.
        first_class: as in :func:`masked_logsumexp`. A row whose class is not in the bank has an empty ``same``, and the
            sums over all parts add up to those of the whole. Not with ``relative``, because the bank may lack the
            positive whose score is subtracted.
        eps: the floor under a norm.
        backend: overrides the choice of backend for this call.

    Returns:
        MaskedHingeSum of (N,) tensors: both sums in fp32 (fp64 where either input is fp64), differentiable twice, and
        the numbers of their positive terms in int64. The slope is 0 where a hinge is exactly 0, and at zero Euclidean
        distance.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value; the message names the fix.
        RuntimeError: no backend, or not the requested one, runs this combination.
    """
    y, numbers = check_comparison(
        x, w, y, c, exclude, own, metric, normalize, eps, ignore_index, plain_dot=True, first_class=first_class
    )
    if same is None and different is None:
        raise ValueError("neither set is asked for: give same=(k, o), different=(k, o) or both")
    relative = check_flag("relative", relative)
    if relative and (w is None or c is not None):
        raise ValueError("relative=True compares with the row's own bank entry: it needs c=None, and w")
    if relative and first_class is not None:
        raise ValueError(
            "relative=True compares with the row's own bank entry, which a part of the classes need not hold: it needs "
            "first_class=None"
        )
    t_same, t_different = _thresholds(threshold)
    t_same, t_different = (None if s is None else t for s, t in ((same, t_same), (different, t_different)))
    for t in (t_same, t_different):
        check_vector("threshold", t, x.size(0), x, integer=False, scalar=True)
    lines = (("same", same), ("different", different))
    hinge = [number for name, line in lines for number in check_line(name, line, optional=True)]
    inputs = Hinged(x, w, y, c, exclude, t_same, t_different)
    spec = HingeSpec(**numbers, hinge=hinge, relative=relative)
    return hinge_sum_of(inputs, choice.settle("masked_hinge_sum", inputs, spec, backend))


def _thresholds(threshold: Threshold) -> tuple[Tensor | None, Tensor | None]:
    if threshold is None or isinstance(threshold, Tensor):
        return threshold, threshold
    if not isinstance(threshold, Sequence) or len(threshold) != 2:
        raise TypeError(
            f"threshold must be a tensor, a pair of tensors (same, different) or None; got {shown(threshold)}"
        )
    return threshold[0], threshold[1]


def hinge_sum_of(inputs: Hinged, spec: HingeSpec) -> MaskedHingeSum:
    """:func:`masked_hinge_sum` for checked arguments and a chosen backend, for losses, which check their arguments
    under the losses' names.
    """
    if spec.backend == choice.REFERENCE:
        return MaskedHingeSum(*choice.reference.masked_hinge_sum(own_bank.spelled_out(inputs, spec.own), spec))
    inputs = inputs._replace(
        w=apart(inputs.w, inputs.x), c=apart(inputs.c, inputs.y), t_different=apart(inputs.t_different, inputs.t_same)
    )
    return MaskedHingeSum(*differentiable(inputs, spec))

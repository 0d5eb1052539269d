"""masked_logsumexp: log-sum-exp over the bank entries of a row's label, and of all other labels, in one pass.

There are three registered ops and two autograd Functions. ``_Forward`` wraps ``fwd``; its backward calls ``_Backward``,
which wraps ``bwd``; the backward of ``_Backward`` calls ``dbl``. Both log-sum-exps are differentiable inputs of
``bwd``, so ``dbl`` is a closed form over bank chunks, and nothing N x M is ever kept.

A backend may return one more output of ``fwd`` that ``bwd`` then gets: ``mean`` (N, D), the part of the gradient in x
that comes from `different`, computed early. It is not differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..pairs.dense import circle_logit
from . import choice, own_bank
from .checks import check_flag, check_number
from .contract import (
    accumulate_dtype,
    apart,
    check_bank,
    check_comparison,
    check_line,
    check_policy,
    check_values,
    check_vector,
)
from .library import filled, gradients_like, known_signature, register, without_autocast
from .signatures import Bank, Spec

_GRADS = "Tensor grad_same, Tensor grad_different, Tensor grad_sum_same, Tensor grad_sum_different"
_LSE = "Tensor same, Tensor different"
_DIRECTIONS = "Tensor v_x, Tensor v_w, Tensor v_scale, Tensor v_col_bias"
# Positions in the bank of the tensors that may need a gradient: x, w, scale, col_bias.
DIFFERENTIABLE = (0, 1, 5, 6)

TensorTuple = tuple[Tensor, ...]


def _fwd(bank: Bank, spec: Spec) -> TensorTuple:
    bank = own_bank.spelled_out(bank, spec.own)
    check_values(bank, spec.ignore_index, spec.centres, spec.first_class)
    with without_autocast(bank.x.device.type):
        out = choice.BACKENDS[spec.backend].masked_logsumexp_fwd(bank, spec)
    return tuple(out) if len(out) == 5 else (*out, out[0].new_empty(0, 0))


def _fwd_fake(bank: Bank, spec: Spec) -> TensorTuple:
    n = bank.x.size(0)
    acc = accumulate_dtype(spec.dtype)
    sizes = (n, n, n, n) if spec.sums else (n, n, 0, 0)
    out = [bank.x.new_empty(size, dtype=acc) for size in sizes]
    kept = choice.keeps_mean(own_bank.spelled_out(bank, spec.own), spec)
    return (*out, bank.x.new_empty((n, bank.x.size(1)) if kept else (0, 0), dtype=acc))


def _bwd(g1, g2, g3, g4, same, different, mean, needs, bank: Bank, spec: Spec) -> TensorTuple:
    mean = None if mean is None or mean.numel() == 0 else mean
    with without_autocast(bank.x.device.type):
        grads, lse, both = (g1, g2, g3, g4), (same, different), own_bank.needs_of_both(needs, bank)
        inputs = own_bank.spelled_out(bank, spec.own)
        out = choice.BACKENDS[spec.backend].masked_logsumexp_bwd(grads, lse, mean, both, inputs, spec)
    return filled(own_bank.added(out, bank), bank.x, len(DIFFERENTIABLE))


def _bwd_fake(g1, g2, g3, g4, same, different, mean, needs, bank: Bank, spec: Spec) -> TensorTuple:
    return gradients_like([bank[i] for i in DIFFERENTIABLE], needs, bank.x)


def _dbl(v_x, v_w, v_t, v_b, g1, g2, g3, g4, same, different, bank: Bank, spec: Spec) -> TensorTuple:
    with without_autocast(bank.x.device.type):
        # All backends share this implementation, a chunk loop in plain PyTorch with bounded memory.
        directions = own_bank.directions_of_both((v_x, v_w, v_t, v_b), bank)
        grads, lse, inputs = (g1, g2, g3, g4), (same, different), own_bank.spelled_out(bank, spec.own)
        out = choice.BACKENDS["torch"].masked_logsumexp_dbl(directions, grads, lse, inputs, spec)
    return filled((*out[:6], *own_bank.added(out[6:], bank)), bank.x, 6 + len(DIFFERENTIABLE))


def _dbl_fake(v_x, v_w, v_t, v_b, g1, g2, g3, g4, same, different, bank: Bank, spec: Spec) -> TensorTuple:
    inputs = (bank.x.new_empty(0) if bank[i] is None else bank[i] for i in DIFFERENTIABLE)
    like = (g1, g2, g3, g4, same, different, *inputs)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in like)


fwd = register("masked_logsumexp_fwd", Bank, Spec, 5, _fwd, _fwd_fake)
bwd = register("masked_logsumexp_bwd", Bank, Spec, 4, _bwd, _bwd_fake, f"{_GRADS}, {_LSE}, Tensor? mean, bool[] needs")
dbl = register("masked_logsumexp_dbl", Bank, Spec, 10, _dbl, _dbl_fake, f"{_DIRECTIONS}, {_GRADS}, {_LSE}")


@known_signature
class _Backward(torch.autograd.Function):
    """The first derivative as a differentiable function of the incoming gradients, the inputs and both sums."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g1, g2, g3, g4, same, different, mean, needs, x, w, y, c, exclude, scale, col_bias, spec):
        bank = (x, w, y, c, exclude, scale, col_bias)
        return bwd(g1, g2, g3, g4, same, different, mean, needs, *bank, *spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *before, _mean, _needs, x, w, y, c, exclude, scale, col_bias, ctx.spec = inputs
        ctx.save_for_backward(*before, x, w, y, c, exclude, scale, col_bias)

    @staticmethod
    def backward(ctx, *directions):
        saved = ctx.saved_tensors
        *before, x, w, scale, col_bias = dbl(*directions, *saved, *ctx.spec)
        w_in, *_, scale_in, col_bias_in = saved[-6:]
        given = ((w, w_in), (scale, scale_in), (col_bias, col_bias_in))
        w, *of_vectors = (g if t is not None else None for g, t in given)
        return *before, None, None, x, w, None, None, None, *of_vectors, None


@known_signature
class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, y, c, exclude, scale, col_bias, spec):
        return fwd(x, w, y, c, exclude, scale, col_bias, *spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *bank, ctx.spec = inputs
        ctx.mark_non_differentiable(output[4])
        ctx.save_for_backward(*bank, *output[:2], output[4])

    @staticmethod
    def backward(ctx, g1, g2, g3, g4, _):
        *bank, same, different, mean = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE]
        before = (g1, g2, g3, g4, same, different, mean, needs)
        # The Function costs as much as a small kernel, so it is used only if there may be another derivative.
        if torch.is_grad_enabled():
            found = _Backward.apply(*before, *bank, ctx.spec)
        else:
            found = bwd(*before, *bank, *ctx.spec)
        x, w, *of_vectors = (g if need else None for g, need in zip(found, needs))
        return x, w, None, None, None, *of_vectors, None


def differentiable(bank: Bank, spec: Spec) -> TensorTuple:
    """(same, different, sum_same, sum_different) for checked arguments, on the backend that the spec names."""
    return _Forward.apply(*bank, spec)[:4]


class MaskedLogSumExp(NamedTuple):
    """The result of masked_logsumexp, (N,) each; the plain sums are None without ``sums=True``."""

    same: Tensor
    different: Tensor
    sum_same: Tensor | None
    sum_different: Tensor | None


def masked_logsumexp(
    x: Tensor,
    w: Tensor | None = None,
    y: Tensor | None = None,
    c: Tensor | None = None,
    *,
    metric: str = "cosine",
    normalize: bool = False,
    scale: float | Tensor = 1.0,
    same: tuple[float, float] = (1.0, 0.0),
    different: tuple[float, float] = (1.0, 0.0),
    col_bias: Tensor | None = None,
    exclude: Tensor | None = None,
    own: bool = False,
    ignore_index: int = -100,
    first_class: int | None = None,
    eps: float = 1e-12,
    sums: bool = False,
    policy: str = "linear",
    policy_params: Sequence[float] = (),
    backend: str | None = None,
) -> MaskedLogSumExp:
    """Log-sum-exp of each row's logits over the bank entries of its label, and over all others, in one pass.

    With the score s_ij of ``metric`` (larger is closer: u.p, -|u - p|^2, -|u - p|; unit vectors for ``cosine`` and if
    ``normalize``), and a factor k and an offset o for each set::

        z_ij   = k_set scale_i (s_ij - o_set) + col_bias_j
        same_i = log sum_{j: c_j = y_i} exp(z_ij)          different_i = log sum_{j: c_j != y_i} exp(z_ij)

    The forward, the backward and the double backward build nothing of size N x M.

    ``policy``, with its numbers in ``policy_params``, changes how z is computed:

    - ``linear``, (): as above.
    - ``max_pool``, (K,), and ``softmax_pool``, (K, gamma): each class has K centres. Row c K + k of w (M K, D) is
      centre k of class c, and every j above is a class: M = w.size(0) / K columns. The scores of a class's centres
      become one score before the logit::

          max_pool      S_ij = max_k s_ijk; gradient to the first maximum    (sub-centre ArcFace, Deng et al. 2020)
          softmax_pool  S_ij = sum_k softmax_k(s_ijk / gamma) s_ijk          (SoftTriple, Qian et al. 2019)

      Of equal scores the first counts. The scores of copies of a centre can differ in the last bit; see
      :func:`masked_argmax`.

    - ``quadratic``, (m,): Circle loss (Sun et al. 2020), whose gamma is ``scale``::

          same       z_ij = -k scale_i relu(1 + m - s_ij) (s_ij - (1 - m) - o) + col_bias_j
          different  z_ij =  k scale_i relu(s_ij + m)     (s_ij - m - o)       + col_bias_j

      The relu weights are detached, so they are constants in every derivative.

    Args:
        x: (N, D) rows.
        w: (M, D) bank, (M K, D) where pooled. None: the batch is its own bank, w = x and c = y, without each row's own
            copy. The dtypes of x and w may differ: the products are in fp64 if either is fp64, in fp32 for fp16 with
            bf16, and in the half-precision dtype with fp32 (fp16 is widened where a device would accumulate in fp16).
            Neither is cast as a whole, and each gets a gradient in its dtype.
        y: (N,) int64 labels of the rows. Without ``c`` they must be bank rows, or ``ignore_index``.
        c: (M,) int64 labels of the bank; None: each entry's index, or y if ``w`` is None.
        metric: ``cosine``, ``dot``, ``sqeuclidean`` or ``euclidean``.
        normalize: compare unit vectors. ``cosine`` always does; ``dot`` with it is ``cosine``.
        scale: a number, or a () or (N,) tensor, which gets a gradient.
        same, different: (k, o) of each set; k may be negative (Proxy-Anchor's positives).
        col_bias: (M,), gets a gradient. A bias of -inf leaves the column out.
        exclude: (N,) int64 bank index that is in neither set of the row, -1 for none.
        own: where ``w`` is None, keep the row's own copy, which is left out otherwise, in addition to ``exclude``.
        ignore_index: rows with this label, and bank entries with this label in ``c``, are in no set.
        first_class: the bank holds a part of all classes, so c_j is first_class + j; ``c`` must be None. Labels are
            then any integers. A row whose class is not in the bank has no positive: its ``same`` is -inf, and all
            columns are of other labels. Rows with ``ignore_index`` are ignored even if it is a class of the bank.
            ``exclude`` is still a bank index. The log-sum-exp over all parts is the logaddexp of the parts;
            ``logspace.logaddexp`` has a gradient also where both are -inf. None: the bank holds all classes.
        eps: the floor under a norm.
        sums: also return the plain sums of z over each set. For a row with one positive, ``sum_same`` and ``same``
            are both that positive's logit; ``sum_same + sum_different`` serves label smoothing.
        policy, policy_params: the logit policy and its numbers, as above.
        backend: overrides the choice of backend for this call.

    Returns:
        MaskedLogSumExp of (N,) tensors in fp32, or fp64 where either input is fp64, differentiable twice. The
        log-sum-exp of an empty set is -inf with a zero gradient, and its plain sum is 0.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value; the message names the fix.
        RuntimeError: no backend, or not the requested one, runs this combination.
    """
    check_bank(x, w)
    policy, params, m = check_policy(policy, policy_params, x, w)
    y, numbers = check_comparison(
        x, w, y, c, exclude, own, metric, normalize, eps, ignore_index, columns=m, first_class=first_class
    )
    check_vector("col_bias", col_bias, m, x, integer=False)
    logit = [*check_line("same", same), *check_line("different", different)]
    scale_tensor = None
    if isinstance(scale, Tensor):
        scale_tensor = scale
        check_vector("scale", scale, x.size(0), x, integer=False, scalar=True)
    else:
        factor = check_number("scale", scale)
        logit[0], logit[2] = logit[0] * factor, logit[2] * factor
    spec = Spec(**numbers, logit=logit, sums=check_flag("sums", sums), policy=policy, policy_params=params)
    bank = Bank(x, w, y, c, exclude, scale_tensor, col_bias)
    return logsumexp_of(bank, choice.settle("masked_logsumexp", bank, spec, backend))


def logsumexp_of(bank: Bank, spec: Spec) -> MaskedLogSumExp:
    """:func:`masked_logsumexp` for checked arguments and a chosen backend, for losses, which check their arguments
    under the losses' names. ``logit`` holds the factors and offsets as the caller states them, under every policy.
    """
    if spec.backend == choice.REFERENCE:
        out = choice.reference.masked_logsumexp(own_bank.spelled_out(bank, spec.own), spec)
    else:
        logit = spec.logit
        if spec.policy == "quadratic":
            (m,) = spec.policy_params
            logit = circle_logit(logit, m)
        keep = torch.is_grad_enabled() and bank.x.requires_grad
        bank = bank._replace(w=apart(bank.w, bank.x), c=apart(bank.c, bank.y))
        out = differentiable(bank, spec._replace(logit=logit, keep=keep))
    return MaskedLogSumExp(out[0], out[1], *(out[2:4] if spec.sums else (None, None)))

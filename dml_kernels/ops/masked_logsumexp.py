"""masked_logsumexp: log-sum-exp over the bank entries of a row's label, and of all other labels, in one pass.

Three registered ops and two autograd Functions. ``_Forward`` wraps ``fwd``; its backward calls ``_Backward``, which
wraps ``bwd``; that one's backward calls ``dbl``. Both log-sum-exps enter ``bwd`` as differentiable inputs, so ``dbl``
is a closed form over bank chunks and nothing N x M is ever kept.

A backend may return one more output of ``fwd``, which ``bwd`` then gets back: ``mean`` (N, D), the part of the gradient
in x that comes from `different`, worked out early. No derivative is taken of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import choice
from .contract import accumulate_dtype, check_values
from .library import filled, gradients_like, known_signature, register, without_autocast
from .signatures import Bank, Spec

_GRADS = "Tensor grad_same, Tensor grad_different, Tensor grad_sum_same, Tensor grad_sum_different"
_LSE = "Tensor same, Tensor different"
_DIRECTIONS = "Tensor v_x, Tensor v_w, Tensor v_scale, Tensor v_col_bias"
# Positions in the bank of the tensors that may need a gradient: x, w, scale, col_bias.
DIFFERENTIABLE = (0, 1, 5, 6)

TensorTuple = tuple[Tensor, ...]


def _fwd(bank: Bank, spec: Spec) -> TensorTuple:
    check_values(bank, spec.ignore_index, spec.centres)
    with without_autocast(bank.x.device.type):
        out = choice.BACKENDS[spec.backend].masked_logsumexp_fwd(bank, spec)
    return tuple(out) if len(out) == 5 else (*out, out[0].new_empty(0, 0))


def _fwd_fake(bank: Bank, spec: Spec) -> TensorTuple:
    n = bank.x.size(0)
    acc = accumulate_dtype(spec.dtype)
    sizes = (n, n, n, n) if spec.sums else (n, n, 0, 0)
    out = [bank.x.new_empty(size, dtype=acc) for size in sizes]
    kept = choice.keeps_mean(bank, spec)
    return (*out, bank.x.new_empty((n, bank.x.size(1)) if kept else (0, 0), dtype=acc))


def _bwd(g1, g2, g3, g4, same, different, mean, needs, bank: Bank, spec: Spec) -> TensorTuple:
    kept = {} if mean is None or mean.numel() == 0 else {"mean": mean}
    with without_autocast(bank.x.device.type):
        grads, lse = (g1, g2, g3, g4), (same, different)
        out = choice.BACKENDS[spec.backend].masked_logsumexp_bwd(grads, lse, needs, bank, spec, **kept)
    return filled(out, bank.x, len(DIFFERENTIABLE))


def _bwd_fake(g1, g2, g3, g4, same, different, mean, needs, bank: Bank, spec: Spec) -> TensorTuple:
    return gradients_like([bank[i] for i in DIFFERENTIABLE], needs, bank.x)


def _dbl(v_x, v_w, v_t, v_b, g1, g2, g3, g4, same, different, bank: Bank, spec: Spec) -> TensorTuple:
    with without_autocast(bank.x.device.type):
        # One implementation for all backends: a chunk loop in plain PyTorch, in bounded memory as they are.
        directions, grads, lse = (v_x, v_w, v_t, v_b), (g1, g2, g3, g4), (same, different)
        out = choice.BACKENDS["torch"].masked_logsumexp_dbl(directions, grads, lse, bank, spec)
    return filled(out, bank.x, 6 + len(DIFFERENTIABLE))


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
        of_vectors = (g if t is not None else None for g, t in zip((scale, col_bias), saved[-2:]))
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
        # The Function costs as much as a small kernel: only where somebody may differentiate again.
        if torch.is_grad_enabled():
            found = _Backward.apply(*before, *bank, ctx.spec)
        else:
            found = bwd(*before, *bank, *ctx.spec)
        x, w, *of_vectors = (g if need else None for g, need in zip(found, needs))
        return x, w, None, None, None, *of_vectors, None


def masked_logsumexp(bank: Bank, spec: Spec) -> TensorTuple:
    """(same, different, sum_same, sum_different) for checked arguments; see functional.masked_logsumexp."""
    return _Forward.apply(*bank, spec)[:4]

"""masked_logsumexp: log-sum-exp over the bank entries of a row's label, and of all other labels, in one pass.

Three registered ops and two autograd Functions. ``_Forward`` wraps ``fwd``; its backward calls ``_Backward``, which
wraps ``bwd``; that one's backward calls ``dbl``. Both log-sum-exps enter ``bwd`` as differentiable inputs, so ``dbl``
is a closed form over bank chunks and nothing N x M is ever kept. Arguments are spelled out: Dynamo needs that.

A backend may return one more output of ``fwd``, which ``bwd`` then gets back: ``mean`` (N, D), what the gradient in x
needs of `different`. It is no input of that gradient in the sense of ``dbl``, but a part of it worked out early.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend
from .contract import Bank, Spec, accumulate_dtype, check_values
from .library import filled, gradients_like, known_signature, register, without_autocast

_BANK = "Tensor x, Tensor w, Tensor y, Tensor? c, Tensor? exclude, Tensor? scale, Tensor? col_scale, Tensor? col_bias"
_SPEC = (
    "str metric, bool normalize, float[] logit, float eps, int ignore_index, ScalarType dtype, bool sums, bool keep, "
    "str policy, float[] policy_params, str backend"
)
_GRADS = "Tensor grad_same, Tensor grad_different, Tensor grad_sum_same, Tensor grad_sum_different"
_LSE = "Tensor same, Tensor different"
_KEPT = "Tensor? mean, bool[] needs"
_DIRECTIONS = "Tensor v_x, Tensor v_w, Tensor v_scale, Tensor v_col_scale, Tensor v_col_bias"
N_BANK, N_SPEC = 8, 11
# Positions in the bank of the tensors that may need a gradient: x, w, scale, col_scale, col_bias.
DIFFERENTIABLE = (0, 1, 5, 6, 7)

TensorTuple = tuple[Tensor, ...]


def _split(args: tuple[Any, ...]) -> tuple[Bank, Spec]:
    return Bank(*args[:N_BANK]), Spec(*args[N_BANK:])


def _fwd(*args: Any) -> TensorTuple:
    bank, spec = _split(args)
    check_values(bank, spec.ignore_index, spec.centres)
    with without_autocast(bank.x.device.type):
        out = backend.BACKENDS[spec.backend].masked_logsumexp_fwd(bank, spec)
    return tuple(out) if len(out) == 5 else (*out, out[0].new_empty(0, 0))


def _fwd_fake(*args: Any) -> TensorTuple:
    bank, spec = _split(args)
    n = bank.x.size(0)
    acc = accumulate_dtype(spec.dtype)
    sizes = (n, n, n, n) if spec.sums else (n, n, 0, 0)
    out = [bank.x.new_empty(size, dtype=acc) for size in sizes]
    kept = backend.keeps_mean(bank, spec)
    return (*out, bank.x.new_empty((n, bank.x.size(1)) if kept else (0, 0), dtype=acc))


def _bwd(*args: Any) -> TensorTuple:
    grads, lse, mean, needs = args[:4], args[4:6], args[6], args[7]
    bank, spec = _split(args[8:])
    kept = {} if mean is None or mean.numel() == 0 else {"mean": mean}
    with without_autocast(bank.x.device.type):
        out = backend.BACKENDS[spec.backend].masked_logsumexp_bwd(grads, lse, needs, bank, spec, **kept)
    return filled(out, bank.x, len(DIFFERENTIABLE))


def _bwd_fake(*args: Any) -> TensorTuple:
    needs = args[7]
    bank, _ = _split(args[8:])
    return gradients_like([bank[i] for i in DIFFERENTIABLE], needs, bank.x)


def _dbl(*args: Any) -> TensorTuple:
    directions, grads, lse = args[:5], args[5:9], args[9:11]
    bank, spec = _split(args[11:])
    with without_autocast(bank.x.device.type):
        # One implementation for all backends: a chunk loop in plain PyTorch, bounded like theirs.
        out = backend.BACKENDS["torch"].masked_logsumexp_dbl(directions, grads, lse, bank, spec)
    return filled(out, bank.x, 6 + len(DIFFERENTIABLE))


def _dbl_fake(*args: Any) -> TensorTuple:
    grads, lse = args[5:9], args[9:11]
    bank, _ = _split(args[11:])
    inputs = (bank.x.new_empty(0) if bank[i] is None else bank[i] for i in DIFFERENTIABLE)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*grads, *lse, *inputs))


def _tensors(n: int) -> str:
    return "(" + ", ".join(["Tensor"] * n) + ")"


fwd = register("masked_logsumexp_fwd", f"({_BANK}, {_SPEC}) -> {_tensors(5)}", _fwd, _fwd_fake)
bwd = register(
    "masked_logsumexp_bwd", f"({_GRADS}, {_LSE}, {_KEPT}, {_BANK}, {_SPEC}) -> {_tensors(5)}", _bwd, _bwd_fake
)
dbl = register(
    "masked_logsumexp_dbl", f"({_DIRECTIONS}, {_GRADS}, {_LSE}, {_BANK}, {_SPEC}) -> {_tensors(11)}", _dbl, _dbl_fake
)


@known_signature
class _Backward(torch.autograd.Function):
    """The first derivative as a differentiable function of the incoming gradients, the inputs and both sums."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_same, grad_different, grad_sum_same, grad_sum_different, same, different, mean, needs,
        x, w, y, c, exclude, scale, col_scale, col_bias,
        metric, normalize, logit, eps, ignore_index, dtype, sums, keep, policy, policy_params, backend,
    ):  # fmt: skip
        return bwd(
            grad_same, grad_different, grad_sum_same, grad_sum_different, same, different, mean, needs,
            x, w, y, c, exclude, scale, col_scale, col_bias,
            metric, normalize, logit, eps, ignore_index, dtype, sums, keep, policy, policy_params, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6], *inputs[8 : 8 + N_BANK])
        ctx.spec = inputs[8 + N_BANK :]

    @staticmethod
    def backward(ctx, v_x, v_w, v_scale, v_col_scale, v_col_bias):
        saved = ctx.saved_tensors
        out = dbl(v_x, v_w, v_scale, v_col_scale, v_col_bias, *saved, *ctx.spec)
        g1, g2, g3, g4, same, different, x, w, scale, col_scale, col_bias = out
        _, _, _, _, _, s, q, b = saved[6:]
        scale = None if s is None else scale
        col_scale = None if q is None else col_scale
        col_bias = None if b is None else col_bias
        nones = (None,) * N_SPEC
        return g1, g2, g3, g4, same, different, None, None, x, w, None, None, None, scale, col_scale, col_bias, *nones


@known_signature
class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x, w, y, c, exclude, scale, col_scale, col_bias,
        metric, normalize, logit, eps, ignore_index, dtype, sums, keep, policy, policy_params, backend,
    ):  # fmt: skip
        return fwd(
            x, w, y, c, exclude, scale, col_scale, col_bias,
            metric, normalize, logit, eps, ignore_index, dtype, sums, keep, policy, policy_params, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[4])
        ctx.save_for_backward(*inputs[:N_BANK], *output[:2], output[4])
        ctx.spec = inputs[N_BANK:]

    @staticmethod
    def backward(ctx, grad_same, grad_different, grad_sum_same, grad_sum_different, _):
        x, w, y, c, exclude, scale, col_scale, col_bias, same, different, mean = ctx.saved_tensors
        metric, normalize, logit, eps, ignore_index, dtype, sums, keep, policy, policy_params, backend = ctx.spec
        need = ctx.needs_input_grad
        needs = [need[0], need[1], need[5], need[6], need[7]]
        # The Function costs as much as a small kernel: only where somebody may differentiate again.
        first_derivative = _Backward.apply if torch.is_grad_enabled() else bwd
        g_x, g_w, g_scale, g_col_scale, g_col_bias = first_derivative(
            grad_same, grad_different, grad_sum_same, grad_sum_different, same, different, mean, needs,
            x, w, y, c, exclude, scale, col_scale, col_bias,
            metric, normalize, logit, eps, ignore_index, dtype, sums, keep, policy, policy_params, backend,
        )  # fmt: skip
        return (
            g_x if needs[0] else None,
            g_w if needs[1] else None,
            None,
            None,
            None,
            g_scale if needs[2] else None,
            g_col_scale if needs[3] else None,
            g_col_bias if needs[4] else None,
            *(None,) * N_SPEC,
        )


def masked_logsumexp(bank: Bank, spec: Spec) -> TensorTuple:
    """(same, different, sum_same, sum_different) for checked arguments; see functional.masked_logsumexp."""
    return _Forward.apply(*bank, *spec)[:4]

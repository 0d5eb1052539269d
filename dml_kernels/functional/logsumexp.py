"""Both log-sum-exps of a row in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..ops import choice as backends
from ..ops import contract
from ..ops import masked_logsumexp as _lse
from ..ops.checks import check_flag, check_integer, check_number
from ..ops.signatures import Bank, Spec


class MaskedLogSumExp(NamedTuple):
    """What masked_logsumexp returns: (N,) each; the sums are None unless asked for."""

    same: Tensor
    different: Tensor
    sum_same: Tensor | None
    sum_different: Tensor | None


def masked_logsumexp(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    c: Tensor | None = None,
    *,
    metric: str = "cosine",
    normalize: bool = False,
    scale: float | Tensor = 1.0,
    same: tuple[float, float] = (1.0, 0.0),
    different: tuple[float, float] = (1.0, 0.0),
    col_bias: Tensor | None = None,
    exclude: Tensor | None = None,
    ignore_index: int = -100,
    eps: float = 1e-12,
    sums: bool = False,
    policy: str = "linear",
    policy_params: Sequence[float] = (),
    backend: str | None = None,
) -> MaskedLogSumExp:
    """Log-sum-exp of each row's logits over the bank entries of its own label, and over all others, in one pass.

    With the score s_ij of ``metric`` (larger is closer: u.p, -|u - p|^2, -|u - p|; unit vectors for ``cosine`` and
    wherever ``normalize``), each set has its own factor k and offset o::

        z_ij   = k_set scale_i (s_ij - o_set) + col_bias_j
        same_i = log sum_{j: c_j = y_i} exp(z_ij)          different_i = log sum_{j: c_j != y_i} exp(z_ij)

    Nothing of size N x M is built, in the forward, the backward or the double backward.

    ``policy`` changes what z is made of; with ``policy_params``:

    - ``linear``, (): as above.
    - ``max_pool``, (K,), and ``softmax_pool``, (K, gamma): K centres a class. w is (M K, D), row c K + k the k-th
      centre of class c, and every j above is a class: M = w.size(0) / K columns. Before the logit a class's centre
      scores become one::

          max_pool      S_ij = max_k s_ijk; gradient to the first maximum    (sub-centre ArcFace, Deng et al. 2020)
          softmax_pool  S_ij = sum_k softmax_k(s_ijk / gamma) s_ijk          (SoftTriple, Qian et al. 2019)

      Of equal scores the first counts; copies of a centre can differ in the last bit of theirs, as in
      :func:`masked_argmax`.

    - ``quadratic``, (m,): Circle loss (Sun et al. 2020), ``scale`` its gamma::

          same       z_ij = -k scale_i relu(1 + m - s_ij) (s_ij - (1 - m) - o) + col_bias_j
          different  z_ij =  k scale_i relu(s_ij + m)     (s_ij - m - o)       + col_bias_j

      The relu weights are detached: constants in every derivative.

    Args:
        x: (N, D) rows. w: (M, D) bank, (M K, D) where pooled. Each may have a dtype of its own: fp64 with anything is
            computed in fp64, fp16 with bf16 in fp32, half with fp32 in the half (fp16 is widened: where a device adds
            up in fp16, nothing is multiplied in it). Neither is cast as a whole, and each gets a gradient in its dtype.
        y: (N,) int64 labels of the rows. Without ``c`` they must be bank rows, or ``ignore_index``.
        c: (M,) int64 labels of the bank; None: each entry's own index.
        metric: ``cosine``, ``dot``, ``sqeuclidean`` or ``euclidean``.
        normalize: compare unit vectors; implied by ``cosine``, and ``dot`` with it is ``cosine``.
        scale: a number, or a () or (N,) tensor, which gets a gradient.
        same, different: (k, o) of each set; k may be negative (Proxy-Anchor's positives).
        col_bias: (M,), gets a gradient. A bias of -inf leaves the column out.
        exclude: (N,) int64 bank index left out of both of the row's sets (its own copy), -1 for none.
        ignore_index: rows with this label, and bank entries whose ``c`` is it, are in no set.
        eps: guards the division by the norm.
        sums: also return the plain sums of z over each set. For a row with one positive, ``sum_same`` and ``same``
            are both that positive's logit; ``sum_same + sum_different`` serves label smoothing.
        policy, policy_params: the logit policy and its numbers, see above.
        backend: overrides the choice of backend for this call.

    Returns:
        MaskedLogSumExp of (N,) tensors in fp32, fp64 where either input is. An empty set is -inf with a zero gradient,
        its sum 0.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value; the message names the fix.
        RuntimeError: no backend, or not the one asked for, runs this combination.
    """
    contract.check_pair(x, w)
    policy, params, m = contract.check_policy(policy, policy_params, w)
    n = x.size(0)
    contract.check_members(x, m, y, c, exclude)
    contract.check_vector("col_bias", col_bias, m, x, integer=False)
    ignore_index, sums = check_integer("ignore_index", ignore_index), check_flag("sums", sums)
    base, unit = contract.split_metric(metric, normalize)
    eps = contract.check_eps(eps)
    logit = [*contract.check_line("same", same), *contract.check_line("different", different)]
    scale_tensor = None
    if isinstance(scale, Tensor):
        scale_tensor = scale
        contract.check_vector("scale", scale, n, x, integer=False, scalar=True)
    else:
        factor = check_number("scale", scale)
        logit[0], logit[2] = logit[0] * factor, logit[2] * factor
    dtype = contract.product_dtype(x, w)
    chosen = backends.choose(
        "masked_logsumexp", x.device, dtype, policy, backend, (n, *w.shape), w.size(0) // max(m, 1)
    )
    bank = Bank(x, w, y, c, exclude, scale_tensor, col_bias)
    spec = Spec(
        metric=base, normalize=unit, logit=logit, eps=eps, ignore_index=ignore_index, dtype=dtype, backend=chosen,
        sums=sums, policy=policy, policy_params=params,
    )  # fmt: skip
    return logsumexp_of(bank, spec)


def logsumexp_of(bank: Bank, spec: Spec) -> MaskedLogSumExp:
    """:func:`masked_logsumexp` of arguments that are checked, on the backend that is chosen: for losses, which check
    theirs under their own names. ``logit`` holds factors and offsets as they are stated, whatever the policy.
    """
    if spec.backend == backends.REFERENCE:
        out = _reference_lse(bank, spec)
    else:
        logit = spec.logit
        if spec.policy == "quadratic":
            (m,) = spec.policy_params
            logit = [-logit[0], logit[1] + 1 - m, logit[2], logit[3] + m]
        keep = torch.is_grad_enabled() and bank.x.requires_grad
        bank = bank._replace(w=contract.apart(bank.w, bank.x), c=contract.apart(bank.c, bank.y))
        out = _lse.masked_logsumexp(bank, spec._replace(logit=logit, keep=keep))
    return MaskedLogSumExp(out[0], out[1], *(out[2:4] if spec.sums else (None, None)))


def _reference_lse(bank: Bank, spec: Spec) -> tuple[Tensor, ...]:
    return reference.masked_logsumexp(
        *bank[:4],
        metric=spec.metric,
        normalized=spec.normalize,
        scale=torch.ones((), dtype=bank.x.dtype) if bank.scale is None else bank.scale,
        same=(spec.logit[0], spec.logit[1]),
        different=(spec.logit[2], spec.logit[3]),
        col_bias=bank.col_bias,
        exclude=bank.exclude,
        ignore_index=spec.ignore_index,
        eps=spec.eps,
        policy=spec.policy,
        policy_params=spec.policy_params,
    )

"""masked_logsumexp on the ``torch`` backend: the logits of a chunk, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.signatures import Bank, Spec
from ...pairs.dense import circle_weight
from ...pairs.sets import sets_of
from . import tiles
from .policies import Pooled
from .tiles import Gradients, Side


class ChunkLogits(NamedTuple):
    """The logits z of one chunk, and everything that their derivative needs. A masked entry has z = -inf."""

    z: Tensor
    same: Tensor  # (N, chunk) bool: in the row's same set
    used: Tensor  # (N, chunk) bool: in either set
    k: Tensor | float  # the factor of the set, one for each entry where the sets differ
    o: Tensor | float
    t: Tensor  # (N, 1) scale


def class_chunks(bank: Bank, spec: Spec) -> Iterator[tuple[slice, slice]]:
    """The columns of each chunk, and their bank rows; without pooling these are the same."""
    for rows in tiles.chunks(bank.x.size(0), *bank.w.shape, spec.centres):
        yield slice(rows.start // spec.centres, rows.stop // spec.centres), rows


def row_scale(bank: Bank, acc: torch.dtype) -> Tensor:
    n = bank.x.size(0)
    return bank.x.new_ones((n, 1), dtype=acc) if bank.scale is None else bank.scale.to(acc).reshape(-1, 1).expand(n, 1)


def logits(s: Tensor, k: slice, t: Tensor, bank: Bank, spec: Spec) -> ChunkLogits:
    same, different, _ = sets_of(bank.y, bank.c, bank.exclude, spec.ignore_index, k, spec.first_class)
    used = same | different
    k_same, o_same, k_diff, o_diff = spec.logit
    factor = k_same if k_same == k_diff else torch.where(same, *s.new_tensor((k_same, k_diff)))
    offset = o_same if o_same == o_diff else torch.where(same, *s.new_tensor((o_same, o_diff)))
    if spec.policy == "quadratic":
        factor = factor * circle_weight(s, same, spec.policy_params[0])
    z = factor * t * (s - offset)
    if bank.col_bias is not None:
        z = z + bank.col_bias[k].to(s.dtype)
        used = used & (z != -math.inf)
    return ChunkLogits(z.masked_fill_(~used, -math.inf), same & used, used, factor, offset, t)


def masked_logsumexp_fwd(bank: Bank, spec: Spec) -> tuple[Tensor, ...]:
    rows = Side.of(bank.x, spec.normalize, spec.eps, spec.dtype)
    acc, n = rows.full.dtype, bank.x.size(0)
    t = row_scale(bank, acc)
    lse = [bank.x.new_full((n,), -math.inf, dtype=acc) for _ in range(2)]
    sums = [bank.x.new_zeros(n if spec.sums else 0, dtype=acc) for _ in range(2)]
    for k, entries in class_chunks(bank, spec):
        s = tiles.scores(rows, Side.of(bank.w[entries], spec.normalize, spec.eps, spec.dtype), spec.metric).s
        chunk = logits(Pooled(s, spec).s, k, t, bank, spec)
        for i, members in enumerate((chunk.same, chunk.used & ~chunk.same)):
            z = chunk.z.masked_fill(~members, -math.inf)
            lse[i] = torch.logaddexp(lse[i], torch.logsumexp(z, 1))
            if spec.sums:
                sums[i] += z.masked_fill_(~members, 0).sum(1)
    return (*lse, *sums)


def entry(per_row: tuple[Tensor, Tensor], same: Tensor) -> Tensor:
    """For each entry, the row's value for the set of the entry."""
    return torch.where(same, per_row[0][:, None], per_row[1][:, None])


def weights(chunk: ChunkLogits, lse: tuple[Tensor, ...]) -> Tensor:
    """p_ij = exp(z_ij - lse_i) with the log-sum-exp of the entry's set; 0 for masked entries."""
    closed = tuple(torch.where(v == -math.inf, math.inf, v) for v in lse)
    return torch.exp(chunk.z - entry(closed, chunk.same))


def row_grads(grads: tuple[Tensor, ...], chunk: ChunkLogits, p: Tensor, sums: bool) -> Tensor:
    """dz = g p, plus the gradient of the plain sum if ``sums``."""
    acc = p.dtype
    dz = p * entry((grads[0].to(acc), grads[1].to(acc)), chunk.same)
    if sums:
        dz = dz + torch.where(chunk.used, entry((grads[2].to(acc), grads[3].to(acc)), chunk.same), 0)
    return dz


def masked_logsumexp_bwd(grads, lse, mean, needs, bank: Bank, spec: Spec) -> tuple[Tensor | None, ...]:
    need_x, need_w, need_t, need_b = needs
    rows = Side.of(bank.x, spec.normalize, spec.eps, spec.dtype)
    acc, n, m = rows.full.dtype, bank.x.size(0), bank.w.size(0) // spec.centres
    t = row_scale(bank, acc)
    collect = Gradients(rows, spec.metric, need_x, need_w)
    g_w = torch.empty_like(bank.w, memory_format=torch.contiguous_format) if need_w else None
    g_t = t.new_zeros(n) if need_t else None
    g_b = bank.x.new_empty(m if need_b else 0, dtype=acc)
    for k, entries in class_chunks(bank, spec):
        b = Side.of(bank.w[entries], spec.normalize, spec.eps, spec.dtype)
        scores = tiles.scores(rows, b, spec.metric)
        pooled = Pooled(scores.s, spec)
        chunk = logits(pooled.s, k, t, bank, spec)
        dz = row_grads(grads, chunk, weights(chunk, lse), spec.sums)
        if need_b:
            g_b[k] = dz.sum(0)
        dz = dz * chunk.k
        if g_t is not None:
            g_t += (dz * (pooled.s - chunk.o)).sum(1)
        if need_x or need_w:
            part = collect.chunk(b, scores, pooled.spread(dz.mul_(chunk.t)))
            if g_w is not None:
                g_w[entries] = part.to(bank.w.dtype)
    g_x = collect.finish()
    return (
        None if g_x is None else g_x.to(bank.x.dtype),
        g_w,
        None if g_t is None else scale_grad(g_t, bank),
        g_b.to(bank.col_bias.dtype) if need_b else None,
    )


def scale_grad(per_row: Tensor, bank: Bank) -> Tensor:
    """The gradient of the scale in the scale's shape, () or (N,), and dtype."""
    assert bank.scale is not None
    return (per_row.sum() if bank.scale.dim() == 0 else per_row).to(bank.scale.dtype)

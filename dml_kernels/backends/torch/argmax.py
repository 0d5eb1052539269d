"""masked_argmax on the ``torch`` backend: a running best over bank chunks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import noise
from ...ops.signatures import ArgmaxSpec, Search
from ...pairs.sets import sets_of
from . import tiles


def squared_distances(s: Tensor, metric: str) -> Tensor:
    """The squared distances of unit vectors, from their scores."""
    if metric == "dot":
        return 2 - 2 * s
    return -s if metric == "sqeuclidean" else s * s


def log_weights(s: Tensor, spec: ArgmaxSpec, d: int) -> Tensor:
    """log w of each score, in fp64."""
    return noise.distance_log_weight(squared_distances(s.double(), spec.metric), d, *spec.cutoffs)


def draw_keys(s: Tensor, k: slice, spec: ArgmaxSpec, d: int) -> Tensor:
    """log w + Gumbel noise of one chunk, in fp64; some rows at a time, because it takes several temporaries."""
    key = torch.empty_like(s, dtype=torch.float64)
    columns = torch.arange(k.start, k.stop, device=s.device)
    rows = torch.arange(s.size(0), device=s.device)
    step = max(1, tiles.CHUNK_ELEMENTS // 8 // columns.numel())
    for start in range(0, s.size(0), step):
        part = slice(start, start + step)
        torch.add(log_weights(s[part], spec, d), noise.gumbel(spec.seed, rows[part], columns), out=key[part])
    return key


def masked_argmax_fwd(inputs: Search, spec: ArgmaxSpec) -> list[Tensor]:
    rows = tiles.Side.of(inputs.x, spec.normalize, spec.eps, spec.dtype)
    (n, d), device = inputs.x.shape, inputs.x.device
    acc = rows.full.dtype
    best = [torch.full((n,), -math.inf, dtype=torch.float64 if spec.noise else acc, device=device) for _ in range(2)]
    index = [torch.full((n,), -1, dtype=torch.int64, device=device) for _ in range(2)]
    score = [torch.full((n,), spec.empty_score(i), dtype=acc, device=device) for i in range(2)]
    count = [torch.zeros(n, dtype=torch.int64, device=device) for _ in range(2)]
    low, high = (None if t is None else t.to(acc)[:, None] for t in (inputs.low, inputs.high))
    for k in tiles.chunks(n, *inputs.w.shape):
        s = tiles.scores(rows, tiles.Side.of(inputs.w[k], spec.normalize, spec.eps, spec.dtype), spec.metric).s
        usable = s == s
        if low is not None:
            usable &= s > low
        if high is not None:
            usable &= s < high
        sets = sets_of(*inputs[2:5], spec.ignore_index, k, spec.first_class)
        if spec.noise:
            key = draw_keys(s, k, spec, d)
        for i in range(2):
            if not spec.wanted[i]:
                continue
            if not spec.noise:
                key = s if spec.largest[i] else -s
            kept = key.masked_fill(~(sets[i] & usable), -math.inf)
            count[i] += (kept > -math.inf).sum(1)
            value, at = kept.max(1)
            better = value > best[i]
            best[i] = torch.where(better, value, best[i])
            index[i] = torch.where(better, at + k.start, index[i])
            score[i] = torch.where(better, s.gather(1, at[:, None]).squeeze(1), score[i])
    out = [t for found in zip(index, score, count, strict=True) for t in found]
    return [t if spec.wanted[i // 3] else t[:0].clone() for i, t in enumerate(out)]

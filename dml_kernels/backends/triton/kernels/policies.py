"""Logit policies inside a tile, as in ``backends/torch/policies.py``: Circle's weights, and pooling over centres.

Where K centres are pooled, a class takes PAD bank rows: K rounded up to a power of two. The rows beyond K are left out.
A tile of BLOCK_M bank rows then has BLOCK_M / PAD columns, and everything after the pool works on columns.
"""

import triton
import triton.language as tl

from .tiles import INF


@triton.jit
def circle_weights(s, m, SAME: tl.constexpr, ACC: tl.constexpr):
    """relu(1 + m - s) in the same set, relu(s + m) in the other. NaN stays NaN."""
    if SAME:
        weight = tl.cast(1 + m, ACC) - s
    else:
        weight = s + tl.cast(m, ACC)
    return tl.where(weight < 0, 0.0, weight)


@triton.jit
def by_class(s, PAD: tl.constexpr):
    """(BLOCK_N, BLOCK_M) -> (BLOCK_N, columns, PAD)."""
    return tl.reshape(s, (s.shape[0], s.shape[1] // PAD, PAD))


@triton.jit
def softmax_parts(each, real, gamma, ACC: tl.constexpr):
    """The softmax over the centres of each class: (p, s_k minus the largest, the pooled score minus it, the largest).

    Scores are relative to the largest, because a difference of two scores is divided by gamma, which may be small.
    """
    largest = tl.max(tl.where(real, each, -INF), 2)
    off = tl.where(real, each - largest[:, :, None], 0.0)
    e = tl.where(real, tl.exp(off / tl.cast(gamma, ACC)), 0.0)
    p = e / tl.sum(e, 2)[:, :, None]
    return p, off, tl.sum(p * off, 2), largest


@triton.jit
def pooled(s, gamma, POLICY: tl.constexpr, CENTRES: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr):
    """Scores of bank rows -> one score for each class. A NaN among the centres makes the class's score NaN."""
    each = by_class(s, PAD)
    real = (tl.arange(0, PAD) < CENTRES)[None, None, :]
    if POLICY == "max_pool":
        largest = tl.max(tl.where(real, each, -INF), 2)
        broken = tl.max((each != each).to(tl.int32), 2) > 0
        out = tl.where(broken, float("nan"), largest)
    else:
        _, _, above, largest = softmax_parts(each, real, gamma, ACC)
        out = largest + above
    return out


@triton.jit
def spread(ds, s, v, gamma, POLICY: tl.constexpr, CENTRES: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr):
    """The gradient in a tile's scores s from that in v = pooled(s), multiplied by dv/ds; 0 for rows beyond K."""
    each = by_class(s, PAD)
    place = tl.arange(0, PAD)[None, None, :]
    real = place < CENTRES
    if POLICY == "max_pool":
        first = tl.min(tl.where(real & (each == v[:, :, None]), place, PAD), 2)
        slope = (place == first[:, :, None]).to(ACC)
    else:
        p, off, above, _ = softmax_parts(each, real, gamma, ACC)
        slope = p * (1 + (off - above[:, :, None]) / tl.cast(gamma, ACC))
    return tl.reshape(slope * ds[:, :, None], s.shape)

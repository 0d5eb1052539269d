"""The counter-based noise of ``dml_kernels.noise``, bit for bit, in kernels: int64 arithmetic modulo 2^64.

The bits are processed in fp64, where the functions of a device agree with PyTorch's to the last few digits. A choice
could differ only between two keys that are as close as that.
"""

import triton
import triton.language as tl

from .tiles import INF

GAMMA = tl.constexpr(-7046029254386353131)
FIRST_FACTOR = tl.constexpr(-4658895280553007687)
SECOND_FACTOR = tl.constexpr(-7723592293110705685)


@triton.jit
def shifted(h, BY: tl.constexpr):
    """Logical shift right of int64."""
    return (h >> BY) & ((1 << (64 - BY)) - 1)


@triton.jit
def mix(h):
    h = (h ^ shifted(h, 30)) * FIRST_FACTOR
    h = (h ^ shifted(h, 27)) * SECOND_FACTOR
    return h ^ shifted(h, 31)


@triton.jit
def row_streams(stream, rows):
    """The state in which each row's stream starts; ``stream`` is the mixed seed."""
    return mix(stream + rows * GAMMA)


@triton.jit
def log1p_of_minus(t):
    """log(1 - t) in fp64, accurate for any t, because the rounding error of 1 - t is divided out."""
    u = 1.0 - t
    gone = u - 1.0
    return tl.where(gone == 0, -t, tl.log(u) * (-t / tl.where(gone == 0, 1.0, gone)))


@triton.jit
def gumbel(streams, columns):
    """-log(-log(1 - t)) for rows x columns, where t is the number in (0, 1) that the upper 53 bits make."""
    bits = mix(streams[:, None] + ((columns + 1) * GAMMA)[None, :])
    t = (shifted(bits, 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16
    return -tl.log(-log1p_of_minus(t))


@triton.jit
def distance_log_weights(s, cutoff2, beyond2, of_log, of_log1p, METRIC: tl.constexpr):
    """log w of scores of unit vectors: of_log log(d2) + of_log1p log(1 - d2 / 4), d2 at least cutoff2.

    It is -inf, so never drawn, from ``beyond2`` on and where the weight is not finite.
    """
    if METRIC == "dot":
        d2 = 2 - 2 * s
    elif METRIC == "sqeuclidean":
        d2 = -s
    else:
        d2 = s * s
    d2 = tl.where(d2 < cutoff2, cutoff2, d2)
    weight = tl.log(d2) * of_log + log1p_of_minus(0.25 * d2) * of_log1p
    usable = (d2 < beyond2) & (weight == weight) & (tl.abs(weight) != INF)
    return tl.where(usable, weight, -INF)

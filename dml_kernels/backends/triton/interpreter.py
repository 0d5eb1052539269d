"""Corrections to Triton's interpreter (TRITON_INTERPRET=1): kernels then give on CPU tensors what they give on a GPU.

Versions 3.6 to 3.7 keep bfloat16 as raw 16-bit integers, so that products are off by 1e12 and sums are garbage. They
truncate float32 to bfloat16, keep the full precision of a float argument whatever its annotation says, and ignore the
precision of a product, so that TF32 looks exact. :func:`mend` corrects these. It also refuses bfloat16 arithmetic
outside products and casts; no kernel here has any, because sums are kept in fp32.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

_TF32_DROPPED_BITS = 13


def active() -> bool:
    """Whether kernels are interpreted. Triton reads the variable when a kernel is defined, so it must not change."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds to nearest even, as the hardware does; a NaN stays NaN."""
    bits = np.ascontiguousarray(values.astype(np.float32)).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FC0), rounded)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """Rounds float32 to the 10 mantissa bits that the tensor cores read."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    half = np.uint64(1 << (_TF32_DROPPED_BITS - 1))
    kept = (bits + half) & ~np.uint64((1 << _TF32_DROPPED_BITS) - 1)
    return np.where(np.isfinite(values), kept.astype(np.uint32).view(np.float32), values)


def _product(a: np.ndarray, b: np.ndarray, dtype: Any, precision: Any) -> np.ndarray:
    """A product of float32 operands in the requested precision; for 3xTF32 a few products are summed exactly."""
    if a.dtype != np.float32 or precision == ir.INPUT_PRECISION.IEEE:
        return np.matmul(a, b, dtype=dtype)
    a_high, b_high = to_tf32(a), to_tf32(b)
    out = np.matmul(a_high, b_high, dtype=dtype)
    if precision == ir.INPUT_PRECISION.TF32x3:
        with np.errstate(invalid="ignore"):  # inf - inf occurs only where the full product is not finite either
            a_low, b_low = (to_tf32(np.nan_to_num(f - h)) for f, h in ((a, a_high), (b, b_high)))
        out += np.matmul(a_low, b_high, dtype=dtype) + np.matmul(a_high, b_low, dtype=dtype)
    return out


def _widened(handle: Any) -> Any:
    """A bfloat16 handle as float32; any other handle unchanged."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle(to_float32(handle.data), tl.float32)


def _create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    narrow = a.dtype.scalar != tl.float32
    a, b = _widened(a), _widened(b)
    precision = ir.INPUT_PRECISION.IEEE if narrow else input_precision
    total = _product(a.data, b.data, d.data.dtype, precision) + d.data
    return interpreter.TensorHandle(total, d.dtype.scalar)


def _cast(original: Any) -> Any:
    @functools.wraps(original)
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return src
        src = _widened(src)
        if target == tl.bfloat16:
            return interpreter.TensorHandle(to_bfloat16(src.data), tl.bfloat16)
        if target == tl.float32 and source == tl.bfloat16:
            return src
        return original(self, src, dst_type)

    return cast_impl


def _refuse_bfloat16(name: str, original: Any) -> Any:
    @functools.wraps(original)
    def checked(self: Any, first: Any, *rest: Any) -> Any:
        if first.dtype.scalar == tl.bfloat16:
            raise TypeError(f"bfloat16 {name} in the interpreter: the kernel must widen to fp32 first")
        return original(self, first, *rest)

    return checked


def _argument(original: Any) -> Any:
    @functools.wraps(original)
    def implicit_cvt(arg: Any) -> Any:
        if isinstance(arg, float):  # every float parameter of our kernels is annotated "fp64", as a test checks
            return tl.tensor(interpreter.TensorHandle(np.array([arg], np.float64), tl.float64), tl.float64)
        return original(arg)

    return implicit_cvt


@functools.cache
def mend() -> None:
    """Corrects the interpreter, once in a process."""
    builder = interpreter.InterpreterBuilder
    builder.create_dot = _create_dot
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_fp_to_fp = lambda self, src, dst_type, rounding_mode: self.cast_impl(src, dst_type)
    for name in ("binary_op", "unary_op"):
        setattr(builder, name, _refuse_bfloat16(name, getattr(builder, name)))
    interpreter._implicit_cvt = _argument(interpreter._implicit_cvt)

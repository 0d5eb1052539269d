"""The mended interpreter gives what the hardware gives: bfloat16, TF32, and float arguments by their annotation."""

import importlib
import inspect

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from dml_kernels.backends.triton import interpreter

interpreter.mend()
KERNEL_MODULES = ("logsumexp", "gradients", "near", "logsumexp_owned", "rows", "distance", "hinge", "argmax")
AWKWARD = torch.tensor([1.0, -2.5, 1 + 2**-8, 1 + 2**-9, 3.1415927, 1e-30, 3e38, 0.0, -0.0, float("inf"), float("nan"),
                        1e-40, 65504.0, -1e-7, 2**-126, 7.0])  # fmt: skip


@triton.jit
def cast(x_ptr, out_ptr):
    offs = tl.arange(0, 16)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_casts_round_as_pytorch_does(source, target):
    x = AWKWARD.to(source)
    out = torch.zeros(16, dtype=target)
    cast[(1,)](x, out)
    expected = x.to(target)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@triton.jit
def multiply(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr):
    offs = tl.arange(0, 16)
    at = offs[:, None] * 16 + offs[None, :]
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION)
    tl.store(out_ptr + at, product)


def multiplied(dtype: torch.dtype, precision: str) -> float:
    """Largest error of a product relative to its largest value."""
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (1, 2))
    out = torch.zeros(16, 16)
    multiply[(1,)](a, b, out, precision)
    truth = a.double() @ b.double()
    return ((out - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_accumulate_in_fp32(dtype):
    assert multiplied(dtype, "ieee") < 3e-7


def test_tf32_loses_digits_and_three_of_it_keep_them():
    assert 1e-5 < multiplied(torch.float32, "tf32") < 1e-3
    assert multiplied(torch.float32, "tf32x3") < 3e-7
    # What is no float32 knows no TF32.
    assert multiplied(torch.bfloat16, "tf32") < 3e-7


@triton.jit
def add(x_ptr, out_ptr):
    offs = tl.arange(0, 16)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) + tl.load(x_ptr + offs))


def test_bfloat16_arithmetic_is_refused():
    with pytest.raises(InterpreterError, match="widen"):
        add[(1,)](AWKWARD.bfloat16(), torch.zeros(16, dtype=torch.bfloat16))


@triton.jit
def scale(out_ptr, number: "fp64"):  # noqa: F821
    offs = tl.arange(0, 16)
    tl.store(out_ptr + offs, tl.zeros((16,), out_ptr.dtype.element_ty) + tl.cast(number, out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_float_argument_has_all_its_digits(dtype):
    out = torch.zeros(16, dtype=dtype)
    scale[(1,)](out, 1 / 3)
    assert torch.equal(out, torch.full((16,), 1 / 3, dtype=dtype))


def kernels() -> dict[str, inspect.Signature]:
    found = {}
    for name in KERNEL_MODULES:
        module = importlib.import_module(f"dml_kernels.backends.triton.kernels.{name}")
        for attribute, value in vars(module).items():
            if attribute.endswith("_kernel"):
                found[attribute] = inspect.signature(value.fn)
    return found


NUMBERS = {
    "eps", "peak", "k_same", "o_same", "k_different", "o_different", "number", "cutoff2", "beyond2", "of_log",
    "of_log1p",
}  # fmt: skip


def test_every_number_of_every_kernel_is_fp64():
    # A plain float argument is fp32 on a GPU: it would cost a float64 gradcheck its digits there, and there alone.
    found = kernels()
    assert len(found) == 17
    annotated = {p for s in found.values() for p, v in s.parameters.items() if v.annotation == "fp64"}
    assert annotated == NUMBERS
    for signature in found.values():
        for name, parameter in signature.parameters.items():
            assert (name in NUMBERS) == (parameter.annotation == "fp64"), name


def test_bfloat16_bits_round_to_nearest_even():
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 2**-8 + 2**-20], np.float32)
    assert interpreter.to_float32(interpreter.to_bfloat16(values)).tolist() == [1.0, 1 + 2**-6, -1.0, 1 + 2**-7]

"""The CUDA kernels, emulated, over the cases of the other backends' tests: accuracy, promises, derivatives."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

from dml_kernels.backends import cuda as cuda_backend
from dml_kernels.losses import REGISTRY
from tests.across import test_autograd
from tests.losses import test_magnet, test_proxy_nca
from tests.ops import test_masked_logsumexp, test_normalize, test_normalized_distance, test_own_bank
from tests.support.problems import Problem
from tests.support.tolerance import assert_same_bits

pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), pytest.mark.cuda_emulator]

# Left out are large shapes, which take the emulator minutes, and promises that only other backends make.
LEFT_OUT = {
    "test_wide_shapes_are_accurate",
    "test_compiled_whole_equals_eager",
    "test_functional_transforms",
    "test_autocast_multiplies_in_bf16_and_keeps_the_rest",  # this backend multiplies in fp32 for any dtype
    "test_the_same_bits_at_any_number_of_threads",
}
LARGEST = 1_500_000  # N M D of a shape


def _parameters(function):
    """The values of each parametrize mark: lists of dicts, `backend` always "cuda" (once)."""
    for mark in getattr(function, "pytestmark", []):
        if mark.name != "parametrize":
            continue
        names, values = mark.args[:2]
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        found = []
        for value in values:
            value = value.values if hasattr(value, "values") and hasattr(value, "marks") else value
            value = value if len(names) > 1 or (isinstance(value, tuple) and type(value) is not tuple) else (value,)
            value = value[0] if len(names) == 1 and len(value) == 1 else value
            row = dict(zip(names, value, strict=True)) if len(names) > 1 else {names[0]: value}
            row |= {"backend": "cuda"} if "backend" in row else {}
            if row not in found:
                found.append(row)
        yield found


def _fits(case) -> bool:
    shape = case.get("shape", ())
    size = 1
    for n in shape:
        size *= max(n, 1)
    return size <= LARGEST


def _runs_here(case) -> bool:
    """Whether the backend has the ops of the loss that a case names."""
    entry = REGISTRY.get(str(case.get("name", "")))
    return entry is None or (entry.policy == "linear" and entry.op in cuda_backend.OPS)


def cases(module):
    """Every (function, arguments) of a test module that takes a backend."""
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if not name.startswith("test_") or name in LEFT_OUT or "backend" not in inspect.signature(function).parameters:
            continue
        for rows in itertools.product(*_parameters(function)):
            case = {k: v for row in rows for k, v in row.items()}
            if _fits(case) and _runs_here(case):
                yield function, case


def _label(value) -> str:
    return str(getattr(value, "name", value)).replace(" ", "")


def borrowed(module, *, every: int = 1):
    """Parametrises over a module's cases and marks all but each `every`-th as slow."""
    found = []
    for number, (function, case) in enumerate(cases(module)):
        label = "-".join([function.__name__[5:], *(_label(v) for k, v in case.items() if k != "backend")])
        marks = [pytest.mark.slow] if number % every else []
        found.append(pytest.param(function, case, marks=marks, id=label))
    assert found
    return pytest.mark.parametrize(("function", "case"), found)


@borrowed(test_masked_logsumexp, every=3)
def test_masked_logsumexp_as_the_other_backends(function, case):
    function(**case)


@borrowed(test_normalize)
def test_normalize_as_the_other_backends(function, case):
    function(**case)


@borrowed(test_normalized_distance, every=3)
def test_normalized_distance_as_the_other_backends(function, case):
    function(**case)


@borrowed(test_autograd, every=5)
def test_derivatives_as_the_other_backends(function, case):
    function(**case)


@pytest.mark.parametrize("excluded", ["the own copy", "nothing", "one"])
def test_the_batch_as_its_own_bank(excluded):
    test_own_bank.test_equals_what_is_left_out_by_hand(test_own_bank.logsumexp, excluded, "cuda")
    test_own_bank.test_both_gradients_are_added_in_the_dtype_of_x(test_own_bank.logsumexp, "cuda", torch.float32)
    test_own_bank.test_derivatives_of_both_orders(test_own_bank.logsumexp, "cuda")


@borrowed(test_proxy_nca)
def test_proxy_nca_as_the_other_backends(function, case):
    function(**case)


@borrowed(test_magnet, every=4)
def test_magnet_as_the_other_backends(function, case):
    function(**case)


def test_the_order_of_blocks_and_lanes_does_not_matter():
    from tests.support.dtypes import FP32

    problem = Problem.random(40, 300, 24, "sqeuclidean", True)  # several slices: the last block merges
    first, second = (tuple(problem.run(FP32, "cuda").values()) for _ in range(2))
    assert_same_bits(first, second)


def test_a_bank_wider_than_shared_memory():
    from tests.support.dtypes import FP32, FP64
    from tests.support.tolerance import assert_all_accurate

    for dtype in (FP32, FP64):
        problem = Problem.random(9, 40, 1700, "euclidean", True)
        assert_all_accurate(problem.run(dtype, "cuda"), problem.yardsticks(dtype))


def test_addresses_that_no_wide_load_may_use():
    """Rows whose start is not aligned to the 16 bytes of a vector load, or whose stride is not a multiple of four."""
    from tests.support.dtypes import BF16, FP16, FP32, FP64, MIXED
    from tests.support.tolerance import assert_all_accurate

    def shifted(by, row):
        """Rows that begin `by` values into a buffer whose rows have `row` values more than the matrix."""

        def layout(name, t):
            if t.dim() != 2:
                return t
            room = torch.full((t.size(0), t.size(1) + row), float("nan"), dtype=t.dtype)
            room[:, by : by + t.size(1)] = t
            return room[:, by : by + t.size(1)]

        return layout

    # Loads of 8 halves are possible, of 4 halves, or neither because of the address or of the stride.
    for by, row in ((8, 8), (4, 8), (8, 12), (5, 8), (8, 13)):
        for dtype in (FP32, FP64, MIXED, BF16, FP16):
            problem = Problem.random(19, 45, 40, "dot", False)
            problem.layout = shifted(by, row)
            assert_all_accurate(problem.run(dtype, "cuda"), problem.yardsticks(dtype))


def test_two_dtypes():
    """D is also larger than a chunk of shared memory, and vector loads of the narrower dtype would be aligned."""
    from tests.support.dtypes import MIXES
    from tests.support.problems import METRICS
    from tests.support.tolerance import assert_all_accurate

    for which, dtype in enumerate(MIXES):
        for d in (40, 1700):
            problem = Problem.random(9, 21, d, *METRICS[which % len(METRICS)])
            assert_all_accurate(problem.run(dtype, "cuda"), problem.yardsticks(dtype))


def test_a_half_that_ends_within_a_load():
    """40 columns are 5 loads of 8 halves, 36 nine of 4; 1,028 are more than a chunk of shared memory."""
    from tests.support.dtypes import BF16, FP16
    from tests.support.tolerance import assert_all_accurate

    for d in (36, 40, 1028):
        for dtype in (BF16, FP16):
            problem = Problem.random(19, 45, d, "sqeuclidean", True)
            assert_all_accurate(problem.run(dtype, "cuda"), problem.yardsticks(dtype))

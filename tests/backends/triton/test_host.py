"""What the host does around the kernels: no synchronisation, bounded memory, 64-bit addresses, who runs what."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dml_kernels.backends.triton import argmax, collect, configs, hinge, logsumexp
from dml_kernels.backends.triton import distance as matrices
from dml_kernels.backends.triton.launch import recorded
from dml_kernels.backends.triton.tools import model
from dml_kernels.ops.signatures import (
    ArgmaxSpec,
    Bank,
    DistanceSpec,
    HingeSpec,
    Lines,
    Matrices,
    NormalizeSpec,
    Rows,
    Search,
    Slopes,
    Spec,
)  # fmt: skip


def test_no_fixed_offset_where_the_span_is_unknown():
    x, ones = torch.zeros(2, 3), torch.ones(2)
    plain = Bank(x, x, torch.arange(2))
    kind = Spec(
        metric="dot", normalize=True, logit=[1.0, 0, 1.0, 0], eps=1e-12, ignore_index=-100, dtype=torch.float32,
        backend="triton",
    )  # fmt: skip
    assert logsumexp.fixed_peak(plain, kind) == pytest.approx(math.log2(math.e))
    assert logsumexp.fixed_peak(plain, kind._replace(normalize=False)) is None
    for name in ("scale", "col_bias"):
        assert logsumexp.fixed_peak(plain._replace(**{name: ones}), kind) is None


def test_the_memory_of_a_chunk_is_bounded_for_every_shape():
    for n, _m, d, metric in (
        (4096, 10**7, 512, "dot"),
        (8, 10**7, 512, "dot"),
        (10**6, 512, 128, "euclidean"),
        (2, 3, 8192, "dot"),
    ):
        rows = min(n, collect.ROWS_AT_ONCE)
        call = collect.Gradients.__new__(collect.Gradients)
        call.w = collect.Operand(torch.empty(0, d, dtype=torch.float32), None, None, None)
        call.metric, call.dtype, call.acc, call.need_w = metric, torch.bfloat16, torch.float32, True
        call.tile = configs.pick("gradient", "sm_90", torch.bfloat16, d, metric, torch.bfloat16)
        width = call.chunk_width(rows)
        bytes_ = width * (rows * (2 + 4 * (metric != "dot")) + d * 6)
        assert width % call.tile.block_m == 0
        # One bounded chunk of 64 MB, or 16 slices of N x D in fp32.
        assert bytes_ <= max(64 << 20, 16 * rows * d * 4)


# ---------------------------------------------------------------------------------------------------------------------
# The host's part alone, on tensors without data, where reading a value would raise


def calls(dtype: torch.dtype, metric: str, n: int, m: int, d: int) -> int:
    """Runs forward and backward of every op with every option, and returns the number of launches."""
    x, w = torch.empty(n, d, dtype=dtype), torch.empty(m, d)
    rows, columns = torch.empty(n), torch.empty(m)
    y, c = torch.empty(n, dtype=torch.int64), torch.empty(m, dtype=torch.int64)
    bank = Bank(x, w, y, c, y, rows, columns)
    distance = DistanceSpec(metric=metric, normalize=True, eps=1e-12, dtype=dtype, backend="triton")
    shared = {**distance._asdict(), "ignore_index": -100}
    spec = Spec(logit=[2.0, 0.1, 3.0, 0.2], sums=True, **shared)
    launches = []
    with recorded(lambda *launch: launches.append(launch)):
        lse = logsumexp.masked_logsumexp_fwd(bank, spec)
        logsumexp.masked_logsumexp_bwd(lse, lse[:2], None, [True] * 4, bank, spec)
        pair = Matrices(x[:9], w[:9])
        matrices.normalized_distance_fwd(pair, distance)
        matrices.normalized_distance_bwd(torch.empty(9, 9, dtype=dtype), [True, True], pair, distance)
        unit = NormalizeSpec(eps=1e-12, backend="triton")
        matrices.normalize_bwd(matrices.normalize_fwd(Rows(x), unit), Rows(x), unit)
        lines = Lines(x, w, y, c, y, (-1.0, 1.0), (rows, rows))
        hinges = HingeSpec(hinge=[], relative=False, **shared)
        hinge.masked_hinge_sum_fwd(lines, hinges)
        hinge.masked_hinge_sum_bwd(Slopes(rows, rows, rows), (True, True), lines, hinges)
        draw = ArgmaxSpec(
            wanted=[True, True], largest=[True, True], noise=True, seed=7, cutoffs=[0.5, 1.4],
            **shared,
        )  # fmt: skip
        argmax.masked_argmax_fwd(Search(x, w, y, c, y, rows, rows), draw)
        few = m // 5
        pools = bank._replace(w=w[: 5 * few], c=c[:few], col_bias=columns[:few])
        pooled = spec._replace(policy="softmax_pool", policy_params=[5.0, 0.1])
        lse = logsumexp.masked_logsumexp_fwd(pools, pooled)
        logsumexp.masked_logsumexp_bwd(lse, lse[:2], None, [True] * 4, pools, pooled)
    return len(launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("metric", ["dot", "sqeuclidean", "euclidean"])
def test_nothing_waits_for_a_value(metric, dtype):
    with FakeTensorMode():
        assert calls(dtype, metric, 700, 9000, 64) > 10


def test_reading_a_value_would_be_seen():
    with FakeTensorMode(), pytest.raises(Exception, match="local_scalar"):
        torch.empty(3).sum().item()


def test_the_host_takes_ten_million_entries():
    # M D = 5e9 elements: sizes and offsets past 32 bits in every expression of the host code.
    with FakeTensorMode():
        assert calls(torch.bfloat16, "dot", 300, 10**7, 512) > 100


# ---------------------------------------------------------------------------------------------------------------------
# How the bank is cut


@pytest.mark.parametrize("n_tiles", [1, 2, 31, 32, 100, 132, 133, 264, 265, 5000])
@pytest.mark.parametrize("m_tiles", [1, 7, 1000, 100_000])
def test_the_programs_fill_the_chip_whatever_the_shape(n_tiles, m_tiles):
    cores = 132
    splits = configs.splits(n_tiles, m_tiles, cores)
    assert 1 <= splits <= m_tiles
    programs = n_tiles * splits
    if m_tiles >= 1000:  # enough to choose from
        waves = -(-programs // (2 * cores))
        assert programs / (waves * 2 * cores) > 0.8
    assert splits <= 2 * cores  # partial results stay O(N x splits)


# ---------------------------------------------------------------------------------------------------------------------
# Who runs what, in processes of their own


def run(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, "TRITON_INTERPRET": "0", **env})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


ASK = """
import torch, sys
{before}
from dml_kernels.ops import choice as backend
for device in ("cpu", "cuda"):
    verdicts = backend.explain("masked_logsumexp", device, torch.float32)
    print(device, [v.reason for v in verdicts if v.backend == "triton"])
print(backend.choose("masked_logsumexp", torch.device("cpu"), torch.float32))
"""


def test_cpu_tensors_are_refused_with_a_reason_outside_the_interpreter():
    out = run(ASK.format(before=""))
    assert "TRITON_INTERPRET=1" in out
    assert out.strip().splitlines()[-1] != "triton"


def test_without_triton_the_reason_says_how_to_install_it():
    out = run(ASK.format(before="sys.modules['triton'] = None"), TRITON_INTERPRET="1")
    assert "not installed" in out or "cannot be imported" in out
    assert "requirements/triton.txt" in out
    assert out.strip().splitlines()[-1] != "triton"


def test_the_interpreter_is_never_chosen_unasked():
    out = run(
        """
import torch
from dml_kernels import use_backend
from dml_kernels.ops import choice as backend
ask = lambda dtype: backend.choose("masked_logsumexp", torch.device("cpu"), dtype)
print(*{ask(dtype) == "triton" for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)})
with use_backend("triton"):
    print(ask(torch.float16))
""",
        TRITON_INTERPRET="1",
    )
    assert out.splitlines() == ["False", "triton"]


def test_a_broken_triton_is_a_reason_and_no_crash(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise RuntimeError('broken on purpose')")
    out = run(ASK.format(before=f"sys.path.insert(0, {str(tmp_path)!r})"), TRITON_INTERPRET="1")
    assert "broken on purpose" in out


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic of fp32 products


def test_every_precision_setting_has_its_arithmetic():
    out = run("""
import torch
from dml_kernels.backends.triton.precision import fp32_products
say = lambda: print(fp32_products("sm_90", torch.float32), end=" ")
for old in ("highest", "high", "medium"):
    torch.set_float32_matmul_precision(old)
    say()
for new in ("ieee", "tf32"):
    torch.backends.cuda.matmul.fp32_precision = new
    say()
print(fp32_products("gfx942", torch.float32), fp32_products("sm_90", torch.bfloat16))
""")
    assert out.split() == ["ieee", "tf32x3", "tf32", "ieee", "tf32", "ieee", "ieee"]
    out = run("""
import torch
torch.backends.fp32_precision = "tf32"
from dml_kernels.backends.triton.precision import fp32_products
print(fp32_products("sm_90", torch.float32))
""")
    assert out.split() == ["tf32"]


# ---------------------------------------------------------------------------------------------------------------------
# Which form of the backward


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_table_takes_the_faster_form_by_the_cost_model(arch):
    more = ((1_000_000, 32, 8192), (100_000, 128, 256), (1_000_000, 100, 32))
    for m, d, n in (*model.SHAPES, *more):
        for side, labels in itertools.product(model.SIDES, (True, False)):
            chosen, faster = (
                configs.form(arch, torch.bfloat16, d, "dot"),
                model.faster(arch, n, m, d, side, labels=labels),
            )
            assert chosen == faster, (m, d, n, side, labels)


def test_the_cost_model_counts_what_each_form_does():
    n, m, d = 4096, 1_000_000, 128
    for side, *nmd in (("both", 8, 10, 8), ("rows", 6, 6, 4), ("bank", 6, 6, 6)):
        of = {form: cost("sm_90", n, m, d, side) for form, cost in model.FORMS.items()}
        assert [of[form].nmd for form in ("chunk", "owned", "kept")] == nmd
        assert of["kept"].cache <= of["owned"].cache < of["chunk"].cache * 0.6  # no dS
        assert of["kept"].seconds <= of["owned"].seconds
        assert max(of["owned"].launches, of["kept"].launches) < 15 < of["chunk"].launches
    # Launches as the host makes them, of the chunk form.
    assert model.chunks("sm_90", n, m, d) == 174


def test_the_memory_of_the_owned_form_is_bounded_for_every_shape():
    # Parts of the gradients: 16 slices of N x D in fp32 or one bounded buffer.
    for n, m, d in ((4096, 10**6, 128), (8, 10**6, 64), (10**6, 300, 128), (30_000, 40_000, 128), (2, 3, 1)):
        largest = 0

        def look(kernel, grid, arguments, options):
            nonlocal largest
            names = ("out_ptr", "own_ptr", "t_rows_ptr") if arguments.get("PARTS") else ("mean_ptr",)
            for t in (arguments.get(name) for name in names):
                if t is not None:
                    largest = max(largest, t.numel() * t.element_size())

        with FakeTensorMode(), configs.compile_for("sm_90"), configs.take_form("owned"), recorded(look):
            x, w, rows = torch.empty(n, d), torch.empty(m, d), torch.empty(n)
            bank = Bank(x, w, torch.empty(n, dtype=torch.int64))
            spec = Spec(
                metric="dot", normalize=True, logit=[2.0, 0, 3.0, 0], eps=1e-12, ignore_index=-100,
                dtype=torch.bfloat16, backend="triton",
            )  # fmt: skip
            needs = [True, True, False, False]
            logsumexp.masked_logsumexp_bwd((rows,) * 4, (rows,) * 2, None, needs, bank, spec)
            kept = logsumexp.masked_logsumexp_fwd(bank, spec._replace(keep=True))
            assert kept[4].shape == (n, d)
            logsumexp.masked_logsumexp_bwd((rows,) * 4, (rows,) * 2, kept[4], needs, bank, spec)
        assert largest <= max(64 << 20, 16 * n * d * 4)


def test_what_a_kernel_reads_by_address_is_checked_at_the_door():
    """A registered op can be called with any arguments, and a kernel would then read outside its memory."""
    x, w, y = torch.randn(4, 3), torch.randn(6, 3), torch.arange(4)
    ops = torch.ops.dml_kernels
    spec = Spec(
        metric="dot", normalize=True, logit=[1.0, 0.0, 1.0, 0.0], eps=1e-12, ignore_index=-100, dtype=torch.float32,
        backend="triton",
    )  # fmt: skip
    bank = (x, w, y, None, None, None, None)
    grad, nothing = torch.randn(4), torch.empty(0)
    needs = [True, True, False, False]
    with pytest.raises(ValueError, match="grad must be floating of shape"):
        ops.normalize_bwd(torch.randn(3, 4), x, 1e-12, "triton")
    with pytest.raises(ValueError, match="grad must be floating of shape"):
        ops.normalized_distance_bwd(torch.randn(6, 4), [True, True], x, w, "dot", True, 1e-12, torch.float32, "triton")
    with pytest.raises(ValueError, match="y must have shape"):
        ops.masked_logsumexp_fwd(x, w, y[:2], *bank[3:], *spec)
    with pytest.raises(ValueError, match="a vector must be floating"):
        ops.masked_logsumexp_bwd(grad[:2], grad, nothing, nothing, grad, grad, None, needs, *bank, *spec)
    out = ops.masked_logsumexp_fwd(*bank, *spec)
    ops.masked_logsumexp_bwd(grad, grad, nothing, nothing, *out[:2], None, needs, *bank, *spec)

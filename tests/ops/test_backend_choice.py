"""The choice of backend, by argument, `use_backend`, DML_BACKEND and preference; and refusals that state the reason."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading

import pytest
import torch

from dml_kernels import functional as F
from dml_kernels import use_backend
from dml_kernels.losses import ProxyNCALoss
from dml_kernels.ops import choice as backends
from tests.support.backends import on_backends
from tests.support.problems import randn

X, W, Y = randn(4, 3, seed=1).float(), randn(6, 3, seed=2).float(), torch.arange(4)
CALLS = {
    "normalize": lambda **k: F.normalize(X, **k),
    "normalized_distance": lambda **k: F.normalized_distance(X, W, **k),
    "masked_logsumexp": lambda **k: F.masked_logsumexp(X, W, Y, **k).different,
    "masked_hinge_sum": lambda **k: F.masked_hinge_sum(X, W, Y, different=(1.0, 0.5), **k).different,
    "masked_argmax": lambda **k: F.masked_argmax(X, W, Y, **k).different.index,
    "proxy_nca": lambda **k: F.proxy_nca_loss(X, W, Y, **k),
    "magnet": lambda **k: F.magnet_loss(X, Y, Y // 2, **k),
}


@pytest.fixture
def ran(monkeypatch):
    """The names of the backends whose forward ran, in order."""
    names = []
    for name, backend in backends.BACKENDS.items():
        for function in [f for f in dir(backend) if f.endswith("_fwd")]:
            original = getattr(backend, function)
            monkeypatch.setattr(
                backend, function, lambda *a, name=name, original=original: names.append(name) or original(*a)
            )
    return names


@on_backends
@pytest.mark.parametrize("op", CALLS)
def test_the_argument_decides(op, backend, ran):
    with use_backend("reference"):
        CALLS[op](backend=backend)
    assert ran == [backend]


@on_backends
@pytest.mark.parametrize("op", CALLS)
def test_use_backend_decides_for_its_block(op, backend, ran):
    with use_backend(backend):
        CALLS[op]()
    assert ran == [backend]


@pytest.mark.cpp
@pytest.mark.parametrize("op", CALLS)
def test_the_compiled_backend_is_preferred_on_the_cpu(op, ran, monkeypatch):
    monkeypatch.delenv("DML_BACKEND", raising=False)
    CALLS[op]()
    assert ran == ["cpu"]


def test_on_a_gpu_the_size_decides_between_one_launch_and_tensor_cores():
    gpu, fp32, fp64 = torch.device("cuda"), torch.float32, torch.float64
    small, large = (128, 100, 128), (512, 100_000, 128)
    assert [n for n in backends.order(gpu, fp32, small) if n in ("cuda", "triton")] == ["cuda", "triton"]
    assert [n for n in backends.order(gpu, fp32, large) if n in ("cuda", "triton", "torch")] == [
        "triton",
        "cuda",
        "torch",
    ]
    assert backends.order(gpu, fp64, large) == list(backends.BACKENDS)
    # On the CPU Triton is an interpreter, so it comes last.
    assert backends.order(torch.device("cpu"), fp32, large)[-2:] == ["torch", "triton"]


@pytest.mark.cpp
def test_blocks_nest_and_end(ran, monkeypatch):
    monkeypatch.delenv("DML_BACKEND", raising=False)
    with use_backend("torch"):
        with use_backend("cpu"):
            CALLS["normalize"]()
        CALLS["normalize"]()
        with pytest.raises(KeyError), use_backend("cpu"):
            raise KeyError
        CALLS["normalize"]()
    CALLS["normalize"]()
    assert ran == ["cpu", "torch", "torch", "cpu"]


def on_a_thread(function, *arguments):
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    thread.join()


@pytest.mark.cpp
def test_a_block_holds_on_another_thread_that_is_given_its_context(ran, monkeypatch):
    monkeypatch.delenv("DML_BACKEND", raising=False)
    with use_backend("torch"):
        on_a_thread(contextvars.copy_context().run, CALLS["normalize"])
        on_a_thread(CALLS["normalize"])
    assert ran == ["torch", "cpu"]


@pytest.mark.cpp
def test_overlapping_blocks_of_two_threads_do_not_touch_each_other(ran, monkeypatch):
    monkeypatch.delenv("DML_BACKEND", raising=False)
    opened, ended = threading.Event(), threading.Event()

    def other():
        with use_backend("cpu"):
            opened.set()
            assert ended.wait(10)
            CALLS["normalize"]()

    thread = threading.Thread(target=other)
    with use_backend("torch"):
        thread.start()
        assert opened.wait(10)  # the other's block is the newer one
        CALLS["normalize"]()
    CALLS["normalize"]()
    ended.set()
    thread.join()
    assert ran == ["torch", "cpu", "cpu"]
    with use_backend("torch"):
        CALLS["normalize"]()
    assert ran[-1] == "torch"


@pytest.mark.cpp
def test_overlapping_blocks_of_two_tasks_do_not_touch_each_other(ran, monkeypatch):
    monkeypatch.delenv("DML_BACKEND", raising=False)

    async def task(name, turns):
        with use_backend(name):
            for _ in range(turns):
                await asyncio.sleep(0)
                CALLS["normalize"]()

    async def both():
        await asyncio.gather(task("torch", 2), task("cpu", 3))

    asyncio.run(both())
    assert ran == ["torch", "cpu", "torch", "cpu", "cpu"]
    assert backends._blocks.names == []
    assert backends.requested() is None


@pytest.mark.cpp
@pytest.mark.parametrize("op", ["masked_logsumexp", "proxy_nca", "masked_hinge_sum"])
def test_the_backward_honours_the_block_of_its_forward(op, monkeypatch):
    seen = []
    x = X.clone().requires_grad_()
    with use_backend("torch"):
        out = {
            "masked_logsumexp": lambda: F.masked_logsumexp(x, W, Y).different.sum(),
            "proxy_nca": lambda: F.proxy_nca_loss(x, W, Y),
            "masked_hinge_sum": lambda: F.masked_hinge_sum(x, W, Y, different=(1.0, 0.5)).different.sum(),
        }[op]()
    for name, backend in backends.BACKENDS.items():
        for function in [f for f in dir(backend) if f.endswith("_bwd")]:
            original = getattr(backend, function)
            monkeypatch.setattr(
                backend, function, lambda *a, name=name, original=original, **k: seen.append(name) or original(*a, **k)
            )

    def backward():
        with use_backend("cpu"):
            out.backward()

    on_a_thread(backward)
    assert set(seen) == {"torch"}
    assert x.grad is not None


@pytest.mark.parametrize("name", ["gpu", None, 3, ["cpu"]])
def test_a_block_of_no_backend_is_refused(name):
    with pytest.raises(ValueError, match="unknown backend"), use_backend(name):
        pass


@on_backends
def test_the_environment_decides_and_a_block_overrides_it(backend, ran, monkeypatch):
    monkeypatch.setenv("DML_BACKEND", backend)
    CALLS["normalize"]()
    assert ran == [backend]
    with use_backend("torch"):
        CALLS["normalize"]()
    assert ran == [backend, "torch"]


def test_a_misspelt_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("DML_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"'gpu'.*cpu, .*torch, reference"):
        CALLS["normalize"]()


def test_a_misspelt_block_is_an_error_at_once():
    with pytest.raises(ValueError, match=r"'gpu'.*cpu, .*torch, reference"), use_backend("gpu"):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("op", CALLS)
def test_the_reference_is_available_by_name_and_agrees(op, ran):
    found = CALLS[op](backend="reference")
    assert ran == []
    torch.testing.assert_close(found, CALLS[op](backend="torch"))


def test_the_reference_is_never_chosen():
    for op in backends.OPS:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            assert backends.choose(op, torch.device("cpu"), dtype) in backends.BACKENDS


def test_a_refusal_says_which_backend_and_why():
    call = {"y": Y, "c": torch.arange(W.size(0)), "margin": 0.1}
    with pytest.raises(RuntimeError, match=r"triplet_sum.*float32.*cpu: triplet_sum is not implemented"):
        F.triplet_sum(X, W, **call, backend="cpu")
    with use_backend("cpu"), pytest.raises(RuntimeError, match="triplet_sum"):
        F.triplet_sum(X, W, **call)
    # Not asked for, it is passed over.
    assert F.triplet_sum(X, W, **call).total.dtype == X.dtype


@pytest.mark.parametrize("op", [op for op in backends.OPS if op != "masked_logsumexp"])
@pytest.mark.parametrize("policy", ["quadratic", "max_pool", "softmax_pool"])
def test_a_policy_nobody_implements_is_refused_by_all_with_reasons(op, policy):
    verdicts = backends.explain(op, "cpu", torch.float32, policy=policy)
    assert [v.backend for v in verdicts] == list(backends.BACKENDS)
    assert not any(v.ok for v in verdicts)
    assert all(policy in v.reason or "not built" in v.reason or f"{op} is not" in v.reason for v in verdicts)
    with pytest.raises(RuntimeError, match=policy):
        backends.choose(op, torch.device("cpu"), torch.float32, policy=policy)


def test_every_verdict_has_a_reason():
    for dtype in (torch.float32, torch.float16):
        for verdict in backends.explain("masked_logsumexp", "cpu", dtype):
            assert verdict.reason
            assert isinstance(verdict.ok, bool)


def test_the_loss_module_follows_the_block(ran):
    loss = ProxyNCALoss(6, 3)
    with use_backend("torch"):
        loss(X, Y).backward()
    assert ran == ["torch"]


WITHOUT_EXTENSION = """
import sys
sys.modules["dml_kernels._C"] = None  # as if it were not there
import torch, dml_kernels
from dml_kernels import functional as F
from dml_kernels.ops import choice as backend
x = torch.ones(2, 3)
print(F.normalize(x).sum().item())
print([v.reason for v in backend.explain("normalize", "cpu", torch.float32) if v.backend == "cpu"])
try:
    F.normalize(x, backend="cpu")
except RuntimeError as error:
    print(error)
"""


def test_without_the_extension_everything_works_and_the_reason_is_told():
    out = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert "3.46" in out.stdout
    assert "pip install" in out.stdout  # how to build it
    assert "no backend runs normalize" in out.stdout


@pytest.mark.parametrize("policy", ["max_pool", "softmax_pool", "quadratic"])
def test_a_backend_without_policies_refuses_with_the_reason(policy):
    verdicts = {v.backend: v for v in backends.explain("masked_logsumexp", "cuda", torch.float32, policy=policy)}
    assert not verdicts["cuda"].ok
    assert policy in verdicts["cuda"].reason
    assert verdicts["torch"].ok


def test_more_centres_than_a_tile_of_tritons_holds_go_to_another_backend():
    def pool(centres):
        return {"policy": "max_pool", "policy_params": [float(centres)]}

    triton = backends.BACKENDS["triton"]
    refusal = triton.can_run("masked_logsumexp", torch.device("cuda"), torch.float32, pool(65))
    assert "at most 64 centres" in refusal
    assert "at most 64 centres" not in str(
        triton.can_run("masked_logsumexp", torch.device("cuda"), torch.float32, pool(64))
    )
    assert backends.choose("masked_logsumexp", torch.device("cuda"), torch.float32, **pool(65)) == "torch"


def test_other_ops_have_no_policy():
    with pytest.raises(RuntimeError, match="normalized_distance has no option policy"):
        backends.choose("normalized_distance", torch.device("cpu"), torch.float32, policy="max_pool")

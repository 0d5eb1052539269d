"""The autotune script, as far as it goes without a GPU: candidates, what is dropped and why, the rows it writes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dml_kernels.backends.triton import configs
from dml_kernels.backends.triton.configs import Config
from dml_kernels.backends.triton.tools import autotune

BF16 = torch.bfloat16
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", autotune.KERNELS)
def test_candidates_fit_the_chip_and_hold_what_the_table_has(kernel, arch):
    for d in (64, 128, 256, 512):
        task = autotune.Task(kernel, BF16, False, d)
        found = autotune.candidates(task, arch)
        owner = kernel in autotune.OWNERS
        assert bool(found) == (d <= configs.OWNED_WIDTH or not owner)
        assert len(set(found)) == len(found) < 400
        for c in found:
            assert autotune.shared_bytes(task, c) <= configs.CHIPS[arch].shared
            assert c.block_d >= d or not owner
        if found:
            assert configs.pick(kernel, arch, BF16, d, "dot", BF16) in found


def test_a_candidate_out_of_shared_memory_is_dropped():
    task = autotune.Task("forward", BF16, False, 512)
    shared = {arch: max(autotune.shared_bytes(task, c) for c in autotune.candidates(task, arch)) for arch in ARCHS}
    assert shared["gfx942"] <= 65536 < shared["sm_80"] <= 166912


def test_the_fastest_of_the_right_candidates_wins():
    task = autotune.Task("gradient", BF16, False, 256)
    every = autotune.candidates(task, "sm_90")
    spilling, wrong, fastest = every[0], every[1], every[7]
    times = {spilling: 0.1, wrong: 0.2, fastest: 0.5}
    seen = []
    found = autotune.tune(
        task, "sm_90", 10, 20, progress=lambda c: seen.extend(c) or c, device="cpu",
        refuse=lambda t, c, a: "spills 8 bytes" if c == spilling else None,
        fails=lambda t, c, d: "grad w is off" if c == wrong else None,
        clock=lambda t, c, n, m: times.get(c, 1.0),
    )  # fmt: skip
    assert seen == every
    assert found == {"config": fastest, "seconds": 0.5, "tried": len(every) - 2,
                     "dropped": {"spills": 1, "grad w is off": 1}}  # fmt: skip


def test_rows_read_back_as_the_table_has_them():
    names = {**vars(configs)}
    for arch in ARCHS:
        for (kernel, kind, distance), entry in configs.TABLE[arch].items():
            dtype = next(t for t, k in configs.KINDS.items() if k == kind)
            written = autotune.row(kernel, dtype, distance, entry)
            assert eval("{" + written + "}", names) == {(kernel, kind, distance): entry}


@pytest.mark.parametrize("kernel", autotune.KERNELS)
def test_a_right_tile_agrees_with_fp64(kernel):
    task = autotune.Task(kernel, torch.float32, kernel in ("gradient", "rows"), 20)
    assert autotune.wrong(task, Config(16, 32, 32, 1, 1), "cpu") is None


@pytest.mark.parametrize("kernel", ["rows", "bank"])
def test_a_wrong_tile_is_seen(kernel):
    # An owner's tile narrower than D leaves columns out.
    task = autotune.Task(kernel, torch.float32, False, 40)
    assert "is off by" in autotune.wrong(task, Config(16, 16, 32, 1, 1), "cpu")


def test_interpreted_kernels_are_not_tuned(capsys):
    with pytest.raises(SystemExit) as stop:
        autotune.main([])
    assert stop.value.code == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_help_says_what_to_do_with_the_rows(capsys):
    with pytest.raises(SystemExit) as stop:
        autotune.main(["--help"])
    assert stop.value.code == 0
    assert "configs.py" in capsys.readouterr().out


def test_the_gpu_script_has_a_stage_of_every_entry():
    main, tiles = (pytest.importorskip(f"bench.gpu.{m}", reason="no benchmarks here") for m in ("__main__", "tiles"))
    cases = dict(tiles.tasks("cpu", dry=True))
    assert len(cases) == 2 * 4 * 2 + 2 * 2 * 2 + 2
    assert {run()["status"] for run in cases.values()} == {"skipped"}
    assert "autotune" in main.OPTIONAL
    assert "autotune" not in main.STAGES


# In other processes: nothing is interpreted.


def outside(*command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=env)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_the_script_says_so():
    done = outside("-m", "dml_kernels.backends.triton.tools.autotune")
    assert done.returncode == 2
    assert "sees no GPU" in done.stderr


def test_compiling_drops_what_spills_and_descriptors_become_tma_instructions():
    done = outside("-c", """
import torch
from dml_kernels.backends.triton import configs
from dml_kernels.backends.triton.tools import autotune
task = autotune.Task("rows", torch.bfloat16, False, 64)
own = configs.pick("rows", "sm_90", torch.bfloat16, 64, "dot", torch.bfloat16)
print(autotune.compiled(task, own, "sm_90"))
print(autotune.compiled(task, configs.Config(256, 128, 64, 4, 2), "sm_90"))
from dml_kernels.backends.triton.tools import aot, report
for tma in (False, True):
    tile = configs.pick("forward", "sm_90", torch.bfloat16, 512, "dot", torch.bfloat16)._replace(tma=tma)
    with configs.trial("forward", tile):
        found = report.launches(report.Case("tma", 512), "sm_90", ("chunk",))
    build = aot.build(*next(launch for launch in found if launch[0].__name__ == "forward_kernel"), "sm_90")
    print(build.spill_bytes, build.counts["tma"] > 0, build.counts["cp_async"] > 0)
tile = configs.Config(128, 64, 64, 4, 4, tma=True, specialize=True)
print(autotune.compiled(autotune.Task("forward", torch.bfloat16, False, 512), tile, "sm_100"))
""")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    kept, dropped, plain, described, specialized = done.stdout.splitlines()
    assert kept == "None"
    assert dropped.startswith("spills")
    assert (plain, described) == ("0 False True", "0 True False")
    assert specialized in ("None", "does not compile: RuntimeError")  # the latter from Triton 3.6

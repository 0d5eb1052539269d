"""The script for a GPU, on the CPU: every stage runs, goes on where it stopped, and reports what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

gpu = pytest.importorskip("bench.gpu.__main__", reason="the benchmarks are not beside these tests")
from bench.gpu import checks, store  # noqa: E402

pytestmark = pytest.mark.cpp
STAGES = "build,losses,same bits,sanitizer,ceilings,forward,small"


def run(folder, *options, stages=STAGES):
    status = gpu.main(["--dry-run", "--out", str(folder), "--stages", stages, *options])
    return status, json.loads((folder / "dry-run-on-the-cpu.json").read_text())


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_every_stage_runs_and_a_second_run_measures_nothing_again(tmp_path, capsys):
    status, first = run(tmp_path)
    assert status == 0
    assert set(first["stages"]) == set(STAGES.split(","))
    assert all(case["status"] in ("ok", "skipped") for cases in first["stages"].values() for case in cases.values())
    status, second = run(tmp_path)
    assert (status, second) == (0, first)
    assert "dry run on the CPU" in capsys.readouterr().out


def test_out_of_time_ends_with_75_and_the_next_run_goes_on(tmp_path):
    arguments = ["--dry-run", "--out", str(tmp_path), "--stages", "ceilings"]
    assert gpu.main([*arguments, "--budget", "-1"]) == 75
    status, found = run(tmp_path, stages="ceilings")
    assert status == 0
    assert len(found["stages"]["ceilings"]) == 3


def test_a_wrong_kernel_fails_the_run(tmp_path, monkeypatch, capsys):
    right = checks.lse_step

    def planted(problem, metric, backend, few):
        same, different, grad_x, grad_w = right(problem, metric, backend, few)
        return same, different, grad_x, grad_w.index_fill(0, torch.tensor([0]), 0) if backend == "cpu" else grad_w

    monkeypatch.setattr(checks, "lse_step", planted)
    monkeypatch.setattr(checks, "DRY_SIZES", ("5x7x3",))
    status, found = run(tmp_path, stages="correctness")
    assert status == 1
    wrong = {name for name, case in found["stages"]["correctness"].items() if case["status"] == "wrong"}
    assert wrong
    assert all(name.endswith("cpu") and name.startswith("lse") for name in wrong)
    assert "FAILED correctness: lse" in capsys.readouterr().out


def test_other_bits_fail_the_run(tmp_path, monkeypatch):
    calls = []
    right = checks.loss_step
    monkeypatch.setattr(checks, "loss_step", lambda *a: (right(*a)[0] + len(calls), calls.append(0))[:1])
    status, _ = run(tmp_path, stages="same bits")
    assert status == 1


def test_results_of_other_sources_are_dropped(tmp_path, monkeypatch):
    run(tmp_path, stages="ceilings")
    monkeypatch.setattr(store, "source_hash", lambda: "other")
    _, found = run(tmp_path, stages="forward")
    assert set(found["stages"]) == {"forward"}


def test_without_a_gpu_the_real_run_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "sees no GPU" in capsys.readouterr().err

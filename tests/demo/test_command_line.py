"""`python -m dml_kernels`: hostile options, outputs that break, signals, two runs in one folder."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dml_kernels import __main__ as entry
from dml_kernels.cli import process
from dml_kernels.demo import data, options, report, step_cost, train
from dml_kernels.demo.checkpoint import load_checkpoint
from dml_kernels.demo.lock import NAME, FolderInUseError, hold
from dml_kernels.demo.trainer import Trainer
from tests.demo.test_demo import TINY, assert_same_state

COMMAND = [sys.executable, "-m", "dml_kernels"]
PARSER = options.make_parser()
NUMBERS = [
    "-1",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "",
    " ",
    "x",
    "0x10",
    "None",
    str(2**70),
    "-" + "9" * 5000,
    "\0",
    "\udcff",
]
IN_RANGE_OF = {"--epochs": "0 1.5", "--batch-size": "0 1 1.5 20000", "--embedding-size": "0 9000 64.0", "--lr": "0 101"}
IN_RANGE_OF |= {
    "--seed": "1.5 4294967296",
    "--train-classes": "0 1 1000",
    "--held-out": "0 16",
    "--unseen-classes": "0 401",
}
IN_RANGE_OF |= {
    "--cost-classes": "-5 1 10000001",
    "--threads": "0 100000",
    "--softmax-scale": "0 1e5",
    "--alpha": "1e5",
}
IN_RANGE_OF |= {"--clusters-per-class": "0 14 100", "--examples-per-cluster": "0 3 15 128"}
NAMES = ["", "x", "CPU", "cpu ", "proxy-nca,magnet"]


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def refused(arguments, monkeypatch, capsys, names):
    """Checks for status 2, one line on standard error that names the option, and no work."""
    monkeypatch.setattr(train.Run, "everything", lambda *_: pytest.fail("work began"))
    try:
        status = train.main(arguments)
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2, said
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("error: ")
    assert names in said.err
    assert len(said.err) < 500


@pytest.mark.parametrize("action", PARSER._actions[1:], ids=lambda action: action.option_strings[0])
def test_every_option_refuses_nonsense_before_any_work(action, tmp_path, monkeypatch, capsys):
    """This goes through all options of the parser, so a new option needs values here."""
    (name,), out = action.option_strings, ["--out", str(tmp_path / "new")]
    if action.nargs == 0:
        refused([f"{name}=5", *out], monkeypatch, capsys, name)
    elif name == "--out":
        (tmp_path / "file").write_text("")
        for value in ("", "\0", "x" * 300, str(tmp_path / "file"), str(tmp_path / "file" / "below"), "/proc/none"):
            refused([name, value], monkeypatch, capsys, name)
    else:
        values = NAMES if action.choices else [*NUMBERS, *IN_RANGE_OF[name].split()]
        for value in values:
            refused([f"{name}={value}", *out], monkeypatch, capsys, name)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_backend_that_cannot_run_here_is_refused_with_its_reason(backend, by, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if by == "environment":
        monkeypatch.setenv("DML_BACKEND", backend)
        refused(["--out", str(tmp_path)], monkeypatch, capsys, "DML_BACKEND: no backend runs proxy_nca")
        monkeypatch.setenv("DML_BACKEND", "x")
        refused(["--out", str(tmp_path)], monkeypatch, capsys, "unknown backend 'x'")
    else:
        refused(
            ["--backend", backend, "--out", str(tmp_path)], monkeypatch, capsys, "argument --backend: no backend runs"
        )


def test_a_comparison_that_the_memory_cannot_hold_is_refused(tmp_path, monkeypatch, capsys):
    """Seven matrices of 512 by M, of 4 bytes: 14 kB a class, and the proxies."""
    assert step_cost.plain_bytes(100_000) == 4 * 100_000 * (7 * 512 + 3 * 128)
    monkeypatch.setattr(options, "_memory_bytes", lambda: 10**9)
    refused(["--cost-classes", "100000", "--out", str(tmp_path)], monkeypatch, capsys, "--cost-classes: plain PyTorch")


def test_a_sample_that_is_missing_or_broken_is_named(tmp_path, monkeypatch, capsys):
    path = tmp_path / "sample.npz"
    monkeypatch.setattr(data, "SAMPLE_PATH", path)
    refused(["--out", str(tmp_path)], monkeypatch, capsys, str(path))
    path.write_bytes(b"PK broken")
    refused(["--out", str(tmp_path)], monkeypatch, capsys, str(path))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_named(number, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number), str(tmp_path))

    sample = data.load_sample()
    monkeypatch.setattr(Path, "open", fail)
    monkeypatch.setattr(train, "load_sample", lambda: sample)
    refused(["--out", str(tmp_path)], monkeypatch, capsys, f"argument --out: [Errno {number}]")


def test_sizes_at_the_ends_of_their_ranges_are_taken():
    edges = {
        "train_classes": 999,
        "held_out": 14,
        "unseen_classes": 1,
        "clusters_per_class": 1,
        "examples_per_cluster": 1,
    }
    found = options.parse(["--batch-size", "999", "--seed", str(2**32 - 1)])
    for name, value in edges.items():
        setattr(found, name, value)
    options.fit(found, 1000, 16)
    quick = options.parse(["--quick", "--train-classes", "990"])
    options.fit(quick, 1000, 16)
    assert quick.unseen_classes == 10  # not the quick run's 60
    whole = options.parse([])
    options.fit(whole, 1000, 16)
    assert whole.unseen_classes == 400


def test_a_step_cost_that_fails_says_that_the_training_is_saved(tmp_path, monkeypatch, capsys):
    def no_memory(**_):
        raise RuntimeError("python -m x ended with status -9:\nDefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(train, "measure", no_memory)
    arguments = [*TINY, "--epochs", "1", "--loss", "proxy-nca", "--cost-classes", "100", "--out", str(tmp_path)]
    assert train.main(arguments) == 1
    said = capsys.readouterr().err
    assert "could not be measured (DefaultCPUAllocator: can't allocate memory)" in said
    assert "--resume" in said
    assert load_checkpoint(tmp_path / "proxy-nca.pt")["epoch"] == 1


def test_a_package_that_cannot_be_imported_is_named_before_the_training(tmp_path, monkeypatch, capsys):
    """The package is there but lacks its own requirements, or has another version."""
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    refused(["--out", str(tmp_path)], monkeypatch, capsys, "the demo needs sklearn, which cannot be imported")


@pytest.mark.parametrize("width", [20, 60, 200])
def test_no_number_of_a_table_is_cut_however_narrow_the_terminal(width):
    console = Console(width=width, file=io.StringIO())
    numbers = ["0.12345", "1,234,567", "0.5"]
    header = ["", "kNN error (nearest drawing)", "kNC error (soft nearest clusters)", "seconds"]
    report._print_table(console, "Title", header, [["Proxy-NCA, 64-d", *numbers], ["raw pixels, 1024-d", *numbers]])
    shown = console.file.getvalue()
    for word in (*numbers, "Proxy-NCA,", "1024-d", "drawing)", "seconds"):
        assert shown.count(word) >= 1 + (word in numbers)


# One run in a folder


def test_a_folder_is_held_by_one_run_and_let_go_when_it_ends(tmp_path, capsys):
    folder = tmp_path / "new" / "run"
    with hold(folder):
        with pytest.raises(FolderInUseError, match=rf"process {os.getpid()} on .*, since 2"), hold(folder):
            pass
        assert train.main([*TINY, "--out", str(folder)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: argument --out: {folder} is in use by another run (process {os.getpid()}")
        assert said.count("\n") == 1
    assert list(folder.iterdir()) == []
    with hold(folder):
        pass


def test_a_lock_of_a_killed_run_holds_nobody_up_and_what_it_was_writing_goes(tmp_path):
    code = "import os, pathlib, sys; from dml_kernels.demo.lock import hold\n"
    code += "with hold(pathlib.Path(sys.argv[1])): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    (tmp_path / ".magnet.pt.abc.tmp").write_text("half")
    assert (tmp_path / NAME).exists()
    assert train.main([*TINY, "--resume", "--out", str(tmp_path)]) == 1  # no checkpoint there
    assert list(tmp_path.iterdir()) == []


# Standard output


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.ENOSPC, "full"), ValueError("closed file")])
def test_a_print_that_fails_ends_no_run(error, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train.Run, "_plot", lambda *_: [])
    monkeypatch.setattr(sys, "stdout", Broken(error))
    arguments = ["train", *TINY, "--epochs", "1", "--loss", "proxy-nca", "--out", str(tmp_path)]
    assert entry.main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "proxy-nca.pt"]
    said = capsys.readouterr().err
    assert ("going on without it" in said) == (not isinstance(error, BrokenPipeError))


def test_without_standard_output_every_command_runs(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert entry.main(["info"]) == 0
    assert entry.main([]) == 2
    assert sys.stdout is None


def test_an_output_of_ascii_alone_is_given_ascii(monkeypatch, tmp_path):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(train.Run, "_plot", lambda *_: [])
    monkeypatch.setattr(sys, "stdout", output)
    folder = tmp_path / "Schön"
    assert entry.main(["train", *TINY, "--epochs", "1", "--loss", "proxy-nca", "--out", str(folder)]) == 0
    shown = output.buffer.getvalue().decode("ascii")
    assert "Sch\\xf6n" in shown
    assert "####" in shown  # Recall@1 by face
    assert "?" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&-", "| head -1", ">&- 2>&- <&-", "> /dev/full", "| (exec <&-; sleep 1)"])
def test_a_run_of_its_own_survives_its_output(redirection, tmp_path):
    command = " ".join([*COMMAND, "train", *TINY, "--loss proxy-nca --epochs 1 --out", str(tmp_path)])
    shell = f"set -o pipefail; {command} {redirection}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "metrics.json").exists()


# Signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_leaves_the_last_checkpoint_and_its_status(number, status, monkeypatch, tmp_path, capsys):
    run_epoch = Trainer.run_epoch

    def signalled(self, on_step=None, on_refresh=None):
        return run_epoch(self, (lambda _: os.kill(os.getpid(), number)) if self.epoch else on_step, on_refresh)

    monkeypatch.setattr(Trainer, "run_epoch", signalled)
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)]
    arguments = ["train", *TINY, "--loss", "proxy-nca", "--epochs", "2", "--out", str(tmp_path)]
    assert entry.main(arguments) == status
    said = capsys.readouterr()
    assert "proxy-nca.pt holds Proxy-NCA after epoch 1 of 2" in said.out
    assert said.err == ""
    assert load_checkpoint(tmp_path / "proxy-nca.pt")["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["proxy-nca.pt"]
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)] == handlers


def test_a_signal_outside_the_training_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(train, "load_sample", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert entry.main(["train"]) == 143
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_signal_that_is_ignored_stays_so():
    """A process under nohup ignores it."""
    kept = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with process.stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, kept)


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_the_bits_are_the_same(tmp_path):
    """SIGKILL after a time that grows: while importing, training, saving, judging and plotting."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [*COMMAND, "train", *TINY, "--epochs", "4", "--out"]
    start = time.monotonic()
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    length = time.monotonic() - start
    for turn in range(8):
        resume = ["--resume"] if any(cut.glob("*.pt")) else []
        child = subprocess.Popen([*command, str(cut), *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(length * (0.3 + 0.09 * turn))
        child.kill()
        assert b"Traceback" not in child.communicate()[1]
    subprocess.run([*command, str(cut), "--resume"], check=True, capture_output=True)
    for name in ("proxy-nca.pt", "magnet.pt"):
        assert_same_state(load_checkpoint(whole / name), load_checkpoint(cut / name))
    assert sorted(path.name for path in cut.iterdir()) == sorted(path.name for path in whole.iterdir())

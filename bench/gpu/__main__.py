"""`python -m bench.gpu`: every check and every figure that needs a GPU, in stages that can be resumed."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dml_kernels
from dml_kernels import build_info

from . import checks, every_loss, small, speed, tiles
from .store import ROOT, OutOfTime, Store

STAGES = {
    "build": lambda device, dry: iter([("extension", checks.built)]),
    "correctness": checks.correctness,
    "losses": every_loss.every_loss,
    "same bits": checks.same_bits,
    "sanitizer": checks.sanitizer,
    "ceilings": speed.ceilings,
    "forward": speed.forwards,
    "step": speed.steps,
    "small": small.cases,
}
# Run only on request: minutes of compiling, to change the table of tiles.
OPTIONAL = {"autotune": tiles.tasks}
EPILOG = """\
status: 0; 1 where a case of ours is wrong or raises; 75 where the time ran out: run the same command again to continue.
Results of older sources are dropped. Peers (cut-cross-entropy, liger-kernel, quack-kernels) take part where they are
installed. Figures of --dry-run say nothing about a GPU.
"""


def machine(device: str) -> dict[str, Any]:
    """The machine and versions behind the figures."""
    name = torch.cuda.get_device_name() if device == "cuda" else "dry run on the CPU"
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dml_kernels": dml_kernels.__version__,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the requested stages; EPILOG explains the status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0], epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--stages", default=",".join(STAGES), metavar="NAME,...", help="default: %(default)s; more: autotune"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results", metavar="DIR", help="default bench/results"
    )
    parser.add_argument(
        "--budget", type=float, default=540, metavar="SECONDS", help="of this call; default %(default)g"
    )
    parser.add_argument("--dry-run", action="store_true", help="the whole path at tiny sizes on the CPU")
    options = parser.parse_args(argv)
    wanted = [name.strip() for name in options.stages.split(",")]
    if unknown := [name for name in wanted if name not in STAGES | OPTIONAL]:
        parser.error(f"unknown stage {unknown[0]!r}; the stages are {', '.join(STAGES | OPTIONAL)}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --dry-run goes through the stages on the CPU")
    if build_info.load().module is None and "DML_GPU_BUILT" not in os.environ:
        checks.build()
        # A module is loaded once: on with a fresh interpreter, which finds the extension.
        command = [sys.executable, "-m", "bench.gpu", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "DML_GPU_BUILT": "1"}).returncode
    device = "cpu" if options.dry_run else "cuda"
    store = Store(options.out, machine(device), options.budget)
    status = 0
    try:
        for stage in wanted:
            for name, run in (STAGES | OPTIONAL)[stage](device, options.dry_run):
                store.case(stage, name, run)
    except OutOfTime:
        status = 75
    _table(store)
    failures = store.failures()
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"saved {store.path}" + ("; time ran out: run again to go on" if status else ""))
    return 1 if failures else status


def _table(store: Store) -> None:
    print(f"\n{store.content['machine']}")
    for stage, cases in store.content["stages"].items():
        ok = sum(case["status"] == "ok" for case in cases.values())
        print(f"{stage}: {ok} of {len(cases)} ok")
        for name, case in cases.items():
            if figures := [_figure(key, case[key]) for key in FIGURES if case.get(key) is not None]:
                print(f"  {name:<52} {'  '.join(figures)}")
            elif case["status"] in ("skipped", "wrong", "raises"):
                print(f"  {name:<52} {case['status']}: {case.get('reason', '')[:90]}")


FIGURES = {
    "seconds": lambda v: f"{v * 1e3:10.3f} ms", "graph_seconds": lambda v: f"graph {v * 1e3:.4f} ms",
    "launches": lambda v: f"{v} launches", "tflops": lambda v: f"{v:.1f} TFLOP/s", "gb_s": lambda v: f"{v:.0f} GB/s",
    "tflops_of_8nmd": lambda v: f"{v:6.1f} TFLOP/s of 8NMD", "tflops_of_2nmd": lambda v: f"{v:6.1f} TFLOP/s of 2NMD",
    "peak_bytes": lambda v: f"peak {v / 2**20:,.0f} MiB",
}  # fmt: skip


def _figure(key: str, value: float) -> str:
    return FIGURES[key](value)


if __name__ == "__main__":
    sys.exit(main())

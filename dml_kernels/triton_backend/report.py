"""``python -m dml_kernels.triton_backend.report``: what every kernel costs, compiled ahead of time for each chip.

Registers a thread, spilled bytes, shared memory and tensor-core instructions are the compilers' own; times are those
of the cost model alone (the largest of products, exponentials and bytes, launches added), at datasheet rates: a bound
to hold measurements against, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

from ..ops.contract import Bank, Spec

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")

from . import aot, configs, logsumexp, matrices
from .collect import BUFFER_BYTES, LARGE_BUFFER_BYTES, WIDE
from .launch import recorded

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


class Case(NamedTuple):
    """One call to compile: its dtypes, width and metric, and which of the optional arguments it has."""

    name: str
    d: int
    metric: str = "cosine"
    x: torch.dtype = torch.bfloat16
    w: torch.dtype = torch.bfloat16
    options: bool = False
    rows: int = 256
    columns: int = 4096


CASES = (
    *(Case("proxies", d, metric) for metric in ("cosine", "sqeuclidean") for d in (64, 128, 256, 512)),
    Case("fp32 proxies", 128, w=torch.float32),
    Case("fp32 proxies", 512, w=torch.float32),
    Case("every option", 128, options=True),
    Case("every option", 128, "euclidean", options=True),
    # Arguments that are 1 become constants, others of odd sizes lose their alignment.
    Case("ones", 1, "euclidean", options=True, rows=1, columns=1),
    Case("odd", 99, "sqeuclidean", rows=33, columns=777),
    Case("fp16", 512, "euclidean", torch.float16, torch.float16),
    Case("fp32", 128, "cosine", torch.float32, torch.float32),
    Case("fp32", 128, "sqeuclidean", torch.float32, torch.float32),
    Case("fp64", 128, "euclidean", torch.float64, torch.float64),
)
QUICK = tuple(c for c in CASES if c.d in (1, 128, 512) and c.name not in ("fp16", "fp64", "odd"))


Launch = tuple[Any, dict[str, Any], dict[str, Any]]  # kernel, arguments, options


def launches(case: Case, arch: str) -> list[Launch]:
    """Every launch of forward and backward of the ops, recorded from the host code."""
    found: list[Launch] = []
    x, w = torch.zeros(case.rows, case.d, dtype=case.x), torch.zeros(case.columns, case.d, dtype=case.w)
    acc = torch.float64 if case.x == torch.float64 else torch.float32
    n, m = torch.zeros(case.rows, dtype=acc), torch.zeros(case.columns, dtype=acc)
    y, c = torch.zeros(case.rows, dtype=torch.int64), torch.zeros(case.columns, dtype=torch.int64)
    base, normalize = ("dot", True) if case.metric == "cosine" else (case.metric, True)
    some = case.options
    bank = Bank(x, w, y, c if some else None, y if some else None, n if some else None, m if some else None,
                m if some else None)  # fmt: skip
    dtype = case.x
    spec = Spec(base, normalize, [64.0, 0.0, 64.0, 0.0], 1e-12, -100, dtype, some, "linear", [], "triton")
    with configs.compile_for(arch), recorded(lambda kernel, grid, *rest: found.append((kernel, *rest))):
        logsumexp.masked_logsumexp_fwd(bank, spec)
        logsumexp.masked_logsumexp_bwd((n,) * 4, (n, n), [True, True, some, some, some], bank, spec)
        if not some:
            matrices.normalized_distance_fwd(x, w, base, normalize, 1e-12, dtype)
            matrices.normalized_distance_bwd(x @ w.T.to(dtype), x, w, [True, True], base, normalize, 1e-12, dtype)
            matrices.normalize_fwd(x, 1e-12)
    return found


def _key(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> str:
    return repr((kernel.__name__, aot.signature(kernel, arguments), sorted(options.items())))


def _build(work: tuple[str, Case, int]) -> dict[str, Any]:
    arch, case, index = work
    kernel, arguments, options = launches(case, arch)[index]
    build = aot.build(kernel, arguments, options, arch)
    dtype = str(case.x).removeprefix("torch.")
    return {"case": case.name, "metric": case.metric, "d": case.d, "dtype": dtype, **build.as_dict()}


def _work(cases: Sequence[Case], archs: Sequence[str]) -> Iterator[tuple[str, Case, int]]:
    """Each distinct kernel once."""
    for arch in archs:
        seen: set[str] = set()
        for case in cases:
            for index, launch in enumerate(launches(case, arch)):
                key = _key(*launch)
                if key not in seen:
                    seen.add(key)
                    yield arch, case, index


def build_all(cases: Sequence[Case], archs: Sequence[str], jobs: int) -> list[dict[str, Any]]:
    work = list(_work(cases, archs))
    if jobs == 1:
        return [_build(w) for w in work]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(_build, work))


class Rates(NamedTuple):
    """Datasheet rates: dense bf16 products, bytes, exponentials (16 a clock and core) a second; seconds a launch."""

    products: float
    bytes: float
    exponentials: float
    launch: float = 4e-6


RATES = {
    "sm_80": Rates(312e12, 2.0e12, 108 * 16 * 1.41e9),
    "sm_90": Rates(989e12, 3.35e12, 132 * 16 * 1.83e9),
    "sm_100": Rates(2250e12, 8.0e12, 148 * 16 * 1.92e9),
    "gfx942": Rates(1307e12, 5.3e12, 304 * 16 * 2.1e9),
}
SHAPES = ((1_000_000, 512, 4096), (1_000_000, 512, 512), (1_000_000, 128, 4096), (10_000_000, 512, 4096))


def predict(arch: str, m: int, d: int, n: int) -> dict[str, Any]:
    """Seconds of forward and backward on bf16 in the chunk form, by the cost model alone."""
    rate = RATES[arch]
    tile = configs.pick("gradient", arch, torch.bfloat16, d, "dot", torch.bfloat16)
    column = 2 * n + 4 * d
    budget = max(BUFFER_BYTES, min(48 * n * d, LARGE_BUFFER_BYTES)) if d >= WIDE else BUFFER_BYTES
    step = max(budget // column // tile.block_m * tile.block_m, tile.block_m)
    chunks = math.ceil(m / step)
    norms = 2 * m * d / rate.bytes
    forward = max(2 * n * m * d / rate.products, n * m / rate.exponentials, 2 * m * d / rate.bytes)
    # dS is written once and read twice; grad_w is written in fp32 and cast; grad_x is read and written once a chunk.
    moved = m * d * 2 * 2 + m * d * (4 + 4 + 2) + chunks * n * d * 12
    backward = max(6 * n * m * d / rate.products, n * m / rate.exponentials, moved / rate.bytes)
    return {
        "arch": arch, "m": m, "d": d, "n": n, "chunks": chunks,
        "forward_ms": 1e3 * (norms + forward + 4 * rate.launch),
        "backward_ms": 1e3 * (norms + backward + (3 + 5 * chunks) * rate.launch),
    }  # fmt: skip


def show(builds: list[dict[str, Any]]) -> None:
    print(
        f"{'chip':8}{'kernel':26}{'case':14}{'metric':13}{'dtype':9}{'D':>5}{'regs':>6}{'spill':>7}{'shared':>8}  uses"
    )
    for b in builds:
        uses = " ".join(f"{k} {v}" for k, v in b["counts"].items() if v)
        print(
            f"{b['arch']:8}{b['kernel']:26}{b['case']:14}{b['metric']:13}{b['dtype']:9}{b['d']:5}{b['registers']:6}"
            f"{b['spill_bytes']:7}{b['shared']:8}  {uses}"
        )
    print("\nCost model, bf16, cosine, milliseconds (datasheet rates; not measured):")
    for arch in dict.fromkeys(b["arch"] for b in builds):
        for shape in SHAPES:
            p = predict(arch, *shape)
            print(f"{arch:8} M {p['m']:>9,} D {p['d']} N {p['n']:>5}: forward {p['forward_ms']:8.2f}, backward "
                  f"{p['backward_ms']:8.2f} in {p['chunks']} chunks")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dml_kernels.triton_backend.report", description=__doc__)
    parser.add_argument("--arch", action="append", choices=ARCHS, help="a chip; may be repeated (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer widths and dtypes")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--json", action="store_true", help="the builds as JSON")
    args = parser.parse_args(argv)
    builds = build_all(QUICK if args.quick else CASES, args.arch or ARCHS, args.jobs)
    if args.json:
        json.dump(builds, sys.stdout)
    else:
        show(builds)
    return 0


if __name__ == "__main__":
    sys.exit(main())

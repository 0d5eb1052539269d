"""``python -m dml_kernels.backends.triton.tools.report``: what every kernel costs, compiled ahead of time for each GPU.

The compilers report registers of a thread, spilled bytes, shared memory and tensor-core instructions. The cost model
(``model.py``) gives times, bytes and launches of each form of the gradients: bounds to compare measurements with.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

from ....ops.contract import accumulate_dtype
from ....ops.signatures import (
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

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")

from .. import argmax, configs, hinge, logsumexp
from .. import distance as matrices
from ..launch import recorded
from . import aot, model

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


class Case(NamedTuple):
    """One call to compile: its dtypes, width and metric, and which optional arguments it has."""

    name: str
    d: int
    metric: str = "cosine"
    x: torch.dtype = torch.bfloat16
    w: torch.dtype = torch.bfloat16
    options: bool = False
    labels: bool = True  # the options include the bank's labels and plain sums
    rows: int = 256
    columns: int = 4096
    precision: str = "highest"  # PyTorch's setting for fp32 products
    op: str = "logsumexp"  # or "hinge", "argmax", "draw"
    policy: str = "linear"
    centres: int = 1


_WIDE = {"d": 512, "metric": "euclidean", "w": torch.float32, "options": True}
POLICIES = (
    Case("quadratic", 128, policy="quadratic"),
    Case("quadratic", **_WIDE, policy="quadratic"),
    *(Case("quadratic", d, metric, policy="quadratic") for metric in ("cosine", "sqeuclidean") for d in (64, 256)),
    *(Case("quadratic", 128, "sqeuclidean", dtype, dtype, policy="quadratic") for dtype in
      (torch.float16, torch.float32, torch.float64)),
    Case("3 centres", 128, policy="max_pool", centres=3),
    Case("10 centres", **_WIDE, policy="softmax_pool", centres=10, columns=400),
    *(Case("64 centres", 256, metric, policy=policy, centres=64, columns=64) for metric in ("cosine", "sqeuclidean")
      for policy in ("max_pool", "softmax_pool")),
    *(Case("5 centres", 64, "sqeuclidean", dtype, dtype, policy="softmax_pool", centres=5, columns=800) for dtype in
      (torch.bfloat16, torch.float16, torch.float32, torch.float64)),
)  # fmt: skip

CASES = (
    *(Case("proxies", d, metric) for metric in ("cosine", "sqeuclidean") for d in (64, 128, 256, 512)),
    Case("proxies", 96),
    Case("fp32 proxies", 128, w=torch.float32),
    Case("fp32 proxies", 512, w=torch.float32),
    Case("every option", 128, options=True),
    Case("every option", 128, "euclidean", options=True),
    Case("no labels", 128, options=True, labels=False),
    Case("no labels", 128, w=torch.float32, options=True, labels=False),
    # Arguments that are 1 become constants; arguments of odd sizes lose their alignment.
    Case("ones", 1, "euclidean", options=True, rows=1, columns=1),
    Case("odd", 99, "sqeuclidean", rows=33, columns=777),
    Case("odd", 99, rows=33, columns=777),
    Case("fp16", 512, "euclidean", torch.float16, torch.float16),
    Case("fp16", 128, "cosine", torch.float16, torch.float16),
    Case("fp32", 128, "cosine", torch.float32, torch.float32),
    Case("fp32", 128, "sqeuclidean", torch.float32, torch.float32),
    *(
        Case(f"fp32 {p}", 128, metric, torch.float32, torch.float32, precision=p)
        for p in ("high", "medium")
        for metric in ("cosine", "sqeuclidean")
    ),
    Case("fp64", 128, "euclidean", torch.float64, torch.float64),
    *POLICIES,
    Case("pairs", 128, op="hinge"),
    Case("every option", 512, "euclidean", w=torch.float32, options=True, op="hinge"),
    *(Case("pairs", d, metric, op="hinge") for metric in ("cosine", "sqeuclidean") for d in (64, 256)),
    *(Case(name, 128, "euclidean", dtype, dtype, options=True, op="hinge") for name, dtype in
      (("fp16", torch.float16), ("fp32", torch.float32), ("fp64", torch.float64))),
    *(Case(name, 128, options=name != "pairs", op=op) for name in ("pairs", "every option") for op in
      ("argmax", "draw")),
    *(Case("every option", 512, "euclidean", w=torch.float32, options=True, op=op) for op in ("argmax", "draw")),
    *(Case("pairs", d, metric, op=op) for op in ("argmax", "draw") for metric in ("cosine", "sqeuclidean")
      for d in (64, 256)),
    *(Case(name, 128, "euclidean", dtype, dtype, options=True, op=op) for op in ("argmax", "draw") for name, dtype in
      (("fp16", torch.float16), ("fp32", torch.float32), ("fp64", torch.float64))),
)  # fmt: skip
QUICK = tuple(
    c
    for c in CASES
    if c.d in (1, 128, 512)
    and c.name not in ("fp16", "fp64", "odd", "fp32 medium")
    and (c.name, c.metric) != ("fp32 high", "sqeuclidean")
    and ((c.op, c.policy) == ("logsumexp", "linear") or (c.d == 512 and c.options) or c.name == "3 centres")
)


Launch = tuple[Any, dict[str, Any], dict[str, Any]]  # kernel, arguments, options


def launches(case: Case, arch: str, forms: Sequence[str] = ("chunk", "owned")) -> list[Launch]:
    """Every launch of the ops' forward and backward, recorded from the host code."""
    found: list[Launch] = []
    x, w = torch.zeros(case.rows, case.d, dtype=case.x), torch.zeros(case.columns * case.centres, case.d, dtype=case.w)
    acc = accumulate_dtype(case.x)
    n, m = torch.zeros(case.rows, dtype=acc), torch.zeros(case.columns, dtype=acc)
    y, c = torch.zeros(case.rows, dtype=torch.int64), torch.zeros(case.columns, dtype=torch.int64)
    base, normalize = ("dot", True) if case.metric == "cosine" else (case.metric, True)
    some, labels = case.options, case.options and case.labels
    bank = Bank(x, w, y, c if labels else None, *(t if some else None for t in (y, n, m)))
    dtype = case.x
    params = {"linear": [], "quadratic": [0.25], "max_pool": [case.centres], "softmax_pool": [case.centres, 0.1]}
    shared = {"metric": base, "eps": 1e-12, "dtype": dtype, "backend": "triton"}
    spec = Spec(
        normalize=normalize, logit=[64.0, 0.0, 64.0, 0.0], ignore_index=-100, sums=labels, policy=case.policy,
        policy_params=params[case.policy], **shared,
    )  # fmt: skip
    torch.set_float32_matmul_precision(case.precision)
    with configs.compile_for(arch), recorded(lambda kernel, grid, *rest: found.append((kernel, *rest))):
        if case.op != "logsumexp":
            _pairs(case, bank, spec)
            return found
        logsumexp.masked_logsumexp_fwd(bank, spec)
        for form in forms:
            if form == "owned" and case.policy != "linear":
                continue
            if form == "chunk" or len(forms) == 1 or configs.has_owned(arch, dtype, case.d, base):
                with configs.take_form(form):
                    needs = [True, True, some, some]
                    for part in _parts(bank, form):
                        r = n[: part.x.size(0)]
                        logsumexp.masked_logsumexp_bwd((r,) * 4, (r, r), None, needs, part, spec)
                    kept = logsumexp.masked_logsumexp_fwd(bank, spec._replace(keep=True))[4:]
                    if kept:
                        logsumexp.masked_logsumexp_bwd((n,) * 4, (n, n), *kept, needs, bank, spec)
        if not some and case.policy == "linear":
            pair, distance = Matrices(x, w), DistanceSpec(normalize=normalize, **shared)
            matrices.normalized_distance_fwd(pair, distance)
            matrices.normalized_distance_bwd(x @ w.T.to(dtype), [True, True], pair, distance)
            matrices.normalize_fwd(Rows(x), NormalizeSpec(eps=1e-12, backend="triton"))
    return found


def _pairs(case: Case, bank: Bank, spec: Spec) -> None:
    """Runs the forward, and the backward where there is one, of masked_hinge_sum or masked_argmax."""
    shared = {"metric": spec.metric, "normalize": True, "eps": 1e-12, "ignore_index": -100, "dtype": spec.dtype,
              "backend": "triton"}  # fmt: skip
    row = torch.zeros(case.rows, dtype=accumulate_dtype(spec.dtype))
    if case.op == "hinge":
        lines = Lines(*bank[:5], (-1.0, 1.0), (row, row))
        hinge.masked_hinge_sum_fwd(lines, HingeSpec(hinge=[], relative=not case.options, **shared))
        slopes = Slopes(row, row, None if case.options else row)
        hinge.masked_hinge_sum_bwd(slopes, (True, True), lines, HingeSpec(hinge=[], relative=False, **shared))
        return
    bounds = (row, row) if case.options else (None, None)
    search = ArgmaxSpec(wanted=[True, True], largest=[False, True], noise=case.op == "draw", seed=1,
                        cutoffs=[0.5, 1.4], **shared)  # fmt: skip
    argmax.masked_argmax_fwd(Search(*bank[:5], *bounds), search)


def _parts(bank: Bank, form: str) -> list[Bank]:
    """The bank; for the owned form also few rows and few columns, which take one split and finish the gradient."""
    few = 32

    def cut(n: int, m: int) -> Bank:
        sizes = (n, m, n, m, n, n, m)
        return Bank(*(None if t is None else t[:size] for t, size in zip(bank, sizes, strict=True)))

    n, m = bank.x.size(0), bank.w.size(0)
    return [bank] if form == "chunk" else [bank, cut(min(n, few), m), cut(n, min(m, few))]


def _key(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> str:
    return repr((kernel.__name__, aot.signature(kernel, arguments), sorted(options.items())))


def _build(work: tuple[str, Case, int]) -> dict[str, Any]:
    arch, case, index = work
    kernel, arguments, options = launches(case, arch)[index]
    build = aot.build(kernel, arguments, options, arch)
    dtype = str(case.x).removeprefix("torch.")
    return {"case": case.name, "metric": case.metric, "d": case.d, "dtype": dtype, **build.as_dict()}


def _work(cases: Sequence[Case], archs: Sequence[str]) -> Iterator[tuple[str, Case, int]]:
    """Yields each distinct kernel once."""
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
    # Spawned, because a fork of a process whose OpenMP threads have run hangs at its first parallel region.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_build, work))


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
    archs = list(dict.fromkeys(b["arch"] for b in builds))
    print(
        "\nCost model, bf16, cosine (datasheet rates; not measured). A step is forward and backward; "
        "* is the table's choice, of labels that are the bank's indices."
    )
    print(f"{'chip':8}{'M':>11}{'D':>5}{'N':>6} {'step with':12}{'form':7}{'NMD':>4}{'memory MB':>11}{'cache MB':>11}"
          f"{'launches':>9}{'registers':>10}{'ms':>9}")  # fmt: skip
    for arch in archs:
        for m, d, n in model.SHAPES:
            _show_cost(
                arch,
                m,
                d,
                n,
                "forward",
                "",
                model.forward(arch, n, m, d),
                _registers(builds, arch, d, "forward_kernel"),
            )
            for side in model.SIDES:
                for form in model.forms(arch, d):
                    chosen = form == ("kept" if configs.form(arch, torch.bfloat16, d, "dot") == "owned" else "chunk")
                    used = _registers(builds, arch, d, *KERNELS[form])
                    cost = model.FORMS[form](arch, n, m, d, side)
                    _show_cost(arch, m, d, n, side, form + "*" * chosen, cost, used)


KERNELS = {
    "chunk": ("gradient_kernel",), "owned": ("owned_rows_kernel", "owned_bank_kernel"),
    "kept": ("forward_kernel", "owned_bank_kernel"),
}  # fmt: skip


def _registers(builds: list[dict[str, Any]], arch: str, d: int, *kernels: str) -> str:
    """The most registers that any of these kernels takes, for bf16 and cosine at this width."""
    of = [b["registers"] for b in builds if (b["arch"], b["d"], b["dtype"], b["metric"], b["case"])
          == (arch, d, "bfloat16", "cosine", "proxies") and b["kernel"] in kernels]  # fmt: skip
    return str(max(of)) if of else "-"


def _show_cost(arch: str, m: int, d: int, n: int, what: str, form: str, cost: model.Cost, registers: str) -> None:
    print(f"{arch:8}{m:11,}{d:5}{n:6} {what:12}{form:7}{cost.nmd:4}{cost.memory / 1e6:11,.0f}{cost.cache / 1e6:11,.0f}"
          f"{cost.launches:9}{registers:>10}{1e3 * cost.seconds:9.2f}")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dml_kernels.backends.triton.tools.report", description=__doc__)
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

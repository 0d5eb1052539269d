"""``python -m dml_kernels.backends.triton.tools.autotune``: the fastest tiles on this GPU, as rows for ``configs.py``.

For each kernel, dtype, metric and width it compiles every candidate that fits into the chip's shared memory, drops
those that spill, and times the others once they agree with fp64. Nothing is searched when the package runs: a person
writes the results into the table, and the tests check the table.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .... import functional as F
from .. import INTERPRETED, configs
from ..configs import Config

KERNELS = {  # name in the table: name of the kernel, and the form that launches it
    "forward": ("forward_kernel", "chunk"),
    "kept": ("forward_kernel", "owned"),
    "gradient": ("gradient_kernel", "chunk"),
    "rows": ("owned_rows_kernel", "owned"),
    "bank": ("owned_bank_kernel", "owned"),
}
OWNERS = ("kept", "rows", "bank")  # they hold a gradient over all of D
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
KIND_NAMES = {configs.HALF: "HALF", configs.FP32: "FP32", configs.FP64: "FP64"}
BLOCKS_N, BLOCKS_M, BLOCKS_D, WARPS, STAGES = (32, 64, 128), (32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4)
# A wrong tile is far off. Dense PyTorch computes distances from differences, with a precision that no product reaches.
SLACK = 8
WIDEST = 512  # represents every width beyond the last class


class Task(NamedTuple):
    """One entry of the table: its kernel, product dtype, whether scores are distances, and a width of its class."""

    kernel: str
    dtype: torch.dtype
    distance: bool
    d: int

    @property
    def metric(self) -> str:
        return "sqeuclidean" if self.distance else "cosine"

    @property
    def exists(self) -> bool:
        """Whether the kernel exists: owners hold all of D, and a forward keeps only the gradient of products."""
        return self.kernel not in OWNERS or (
            self.d <= configs.OWNED_WIDTH and not (self.kernel == "kept" and self.distance)
        )

    def __str__(self) -> str:
        return f"{self.kernel} {str(self.dtype).removeprefix('torch.')} {self.metric} D {self.d}"


def shared_bytes(task: Task, config: Config) -> int:
    """A lower bound on the bytes of a tile's operands: each stage of those that stream, and those that stay."""
    item = task.dtype.itemsize
    n, m, d = config.block_n * config.block_d * item, config.block_m * config.block_d * item, config.block_d
    if task.d > d:
        return config.num_stages * (n + m)
    streams = n if task.kernel == "bank" else m
    return (config.num_stages - 1) * streams


def candidates(task: Task, arch: str) -> list[Config]:
    """Every tile that may fit the chip. D is in one block where it fits or an owning kernel must hold it, else in
    several.
    """
    owner = task.kernel in OWNERS
    whole = max(16, 1 << (task.d - 1).bit_length())
    if not task.exists:
        return []
    blocks_d = (whole,) if owner else sorted({min(b, whole) for b in BLOCKS_D})
    found = (Config(*c) for c in itertools.product(BLOCKS_N, BLOCKS_M, blocks_d, WARPS, STAGES))
    if task.kernel in ("forward", "kept") and arch in ("sm_90", "sm_100"):
        plain = [*found]
        large = [c._replace(tma=True) for c in plain if c.block_n * c.block_m >= 8192]
        # Triton 3.7 leaves a loop with branches, such as the forward's, in one piece for Hopper.
        specialized = [c._replace(specialize=True) for c in large if arch == "sm_100" and c.num_stages == 3]
        found = iter([*plain, *(c for c in large if c.num_warps == 8), *specialized])
    threads = configs.CHIPS[arch].target[2]
    return [
        c for c in found
        if shared_bytes(task, c) <= configs.CHIPS[arch].shared
        and c.block_n * c.block_m <= 128 * c.num_warps * threads  # else scores alone take half the registers
    ]  # fmt: skip


def compiled(task: Task, config: Config, arch: str) -> str | None:
    """Why ahead-of-time compilation rules a candidate out, or None."""
    from . import aot, report  # these modules refuse to be imported in the interpreter

    name, form = KERNELS[task.kernel]
    case = report.Case("autotune", task.d, task.metric, task.dtype, task.dtype)
    with configs.trial(task.kernel, config), configs.take_form(form):
        found = [launch for launch in report.launches(case, arch, (form,)) if launch[0].__name__ == name]
    launches = [launch for launch in found if launch[1].get("KEEP", False) == (task.kernel == "kept")]
    if not launches:
        return f"the host launches no {name}"
    for launch in launches:
        try:
            build = aot.build(*launch, arch)
        except Exception as error:
            return f"does not compile: {type(error).__name__}"
        if build.spill_bytes:
            return f"spills {build.spill_bytes} bytes"
        if build.shared > configs.CHIPS[arch].shared:
            return f"takes {build.shared} bytes of shared memory"
    return None


def _logsumexp(task: Task, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, backend: str) -> F.MaskedLogSumExp:
    # With bank labels the forward keeps nothing, so the kernel of the rows' gradient runs.
    c = torch.arange(w.size(0), device=w.device) if task.kernel == "rows" else None
    return F.masked_logsumexp(x, w, y, c, metric=task.metric, normalize=True, scale=8.0, backend=backend)


def _step(task: Task, n: int, m: int, device: str, backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Both log-sum-exps and both gradients in ``dtype``, of inputs rounded to the task's dtype."""
    generator = torch.Generator().manual_seed(n + m)
    x, w = (torch.randn(k, task.d, generator=generator) for k in (n, m))
    x, w = (t.to(device, task.dtype).to(dtype).requires_grad_() for t in (x, w))
    y = torch.randint(m, (n,), generator=generator).to(device)
    out = _logsumexp(task, x, w, y, backend)
    return out.same, out.different, *torch.autograd.grad(out.same.sum() + 2 * out.different.sum(), (x, w))


def wrong(task: Task, config: Config, device: str) -> str | None:
    """Why its results rule a candidate out, or None if its errors are at most SLACK times those of dense PyTorch."""
    n, m = 3 * config.block_n + 5, 3 * config.block_m + 7
    truth = _step(task, n, m, device, "reference", torch.float64)
    dense = _step(task, n, m, device, "reference", task.dtype)
    with configs.trial(task.kernel, config), configs.take_form(KERNELS[task.kernel][1]):
        ours = _step(task, n, m, device, "triton", task.dtype)
    for what, a, b, t in zip(("same", "different", "grad x", "grad w"), ours, dense, truth, strict=True):
        error, allowed = ((v.double() - t).abs().max() / t.abs().max() for v in (a, b))
        if not error <= max(SLACK * allowed, 4 * torch.finfo(a.dtype).eps):
            return f"{what} is off by {error:.2g}, dense PyTorch by {allowed:.2g}"
    return None


def seconds(task: Task, config: Config, n: int, m: int) -> float:
    """The median time on the GPU of the pass that launches the kernel."""
    from triton.testing import do_bench

    x, w = (torch.randn(k, task.d, device="cuda").to(task.dtype) for k in (n, m))
    x.requires_grad_(task.kernel != "bank"), w.requires_grad_(task.kernel in ("bank", "gradient"))
    y = torch.randint(m, (n,), device="cuda")
    leaves = [t for t in (x, w) if t.requires_grad]
    with configs.trial(task.kernel, config), configs.take_form(KERNELS[task.kernel][1]):
        call = lambda: _logsumexp(task, x, w, y, "triton").different.sum()  # noqa: E731
        if task.kernel in ("forward", "kept"):
            with torch.set_grad_enabled(task.kernel == "kept"):
                return 1e-3 * do_bench(call, return_mode="median")
        value = call()
        return 1e-3 * do_bench(lambda: torch.autograd.grad(value, leaves, retain_graph=True), return_mode="median")


def tune(
    task: Task, arch: str, n: int, m: int, *,
    progress: Callable[[Sequence[Config]], Iterable[Config]] = iter,
    refuse: Callable[[Task, Config, str], str | None] = compiled,
    fails: Callable[[Task, Config, str], str | None] = wrong,
    clock: Callable[[Task, Config, int, int], float] = seconds,
    device: str = "cuda",
) -> dict[str, Any]:  # fmt: skip
    """{"config": the fastest candidate or None, "seconds", "tried", "dropped": reasons by count}."""
    best, dropped, tried = (float("inf"), None), {}, 0
    for config in progress(candidates(task, arch)):
        reason = refuse(task, config, arch) or fails(task, config, device)
        if reason:
            kind = "spills" if reason.startswith("spills") else reason
            dropped[kind] = dropped.get(kind, 0) + 1
            continue
        tried += 1
        best = min(best, (clock(task, config, n, m), config))
    return {"config": best[1], "seconds": best[0], "tried": tried, "dropped": dropped}


def row(kernel: str, dtype: torch.dtype, distance: bool, found: Sequence[Config]) -> str:
    """One row of the table, a Config for each width class, as ``configs.py`` writes it."""
    shown = list(found)
    while len(shown) > 1 and shown[-1] == shown[-2]:
        shown.pop()  # the last one serves the remaining classes
    inside = ", ".join(f"Config({', '.join(map(str, c[: 7 if c.specialize else 6 if c.tma else 5]))})" for c in shown)
    return f'("{kernel}", {KIND_NAMES[configs.KINDS[dtype]]}, {distance}): _wide({inside}),'


def bar(configs_: Sequence[Config], label: str) -> Iterable[Config]:
    """A progress bar on stderr where tqdm is installed."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        print(f"{label}: {len(configs_)} candidates", file=sys.stderr)
        return configs_
    return tqdm(configs_, desc=label, unit=" tiles")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dml_kernels.backends.triton.tools.autotune", description=__doc__.split("\n\n")[1],
        epilog="Put the printed rows into the architecture's table in dml_kernels/backends/triton/configs.py, then run "
               "make test-triton. Status 2: no GPU, or bad arguments.",
    )  # fmt: skip
    listed = lambda names: lambda text: [names[names.index(t)] for t in text.split(",")]  # noqa: E731
    parser.add_argument("--kernels", type=listed([*KERNELS]), default=[*KERNELS], metavar="NAME,...",
                        help=f"default: {','.join(KERNELS)}")  # fmt: skip
    parser.add_argument("--dtypes", type=listed([*DTYPES]), default=["bf16"], metavar="NAME,...",
                        help=f"of {','.join(DTYPES)}; default: bf16, which fp16 shares its row with")  # fmt: skip
    parser.add_argument("--distances", action="store_true", help="tiles of distances, not of cosine and dot")
    parser.add_argument("--rows", type=int, default=4096, metavar="N", help="default: %(default)s")
    parser.add_argument("--bank", type=int, default=200_000, metavar="M", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows there too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("unset TRITON_INTERPRET: interpreted kernels have no speed worth tuning")
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here, and tiles are timed on the GPU that they are for")
    arch = configs.arch_of(torch.device("cuda"))
    rows = []
    for kernel, name in itertools.product(options.kernels, options.dtypes):
        found: list[Config] = []
        for width in (w or WIDEST for w in configs.WIDTHS):
            task = Task(kernel, DTYPES[name], options.distances, width)
            if not candidates(task, arch):
                break
            best = tune(task, arch, options.rows, options.bank, progress=lambda c, t=task: bar(c, str(t)))
            if best["config"] is None:
                print(f"{task}: nothing fits: {best['dropped']}", file=sys.stderr)
                break
            print(f"{task}: {1e3 * best['seconds']:.3f} ms, best of {best['tried']}; dropped: {best['dropped']}")
            found.append(best["config"])
        if found:
            rows.append(row(kernel, DTYPES[name], options.distances, found))
    text = f"# {arch}, {torch.cuda.get_device_name()}\n" + "\n".join(rows)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

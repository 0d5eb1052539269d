"""``python -m dml_kernels info``: what was built, what is missing, which backend runs what, and why."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

import dml_kernels
from dml_kernels import build_info, profiling
from dml_kernels.backends import triton as triton_backend
from dml_kernels.cli import tables
from dml_kernels.cli.arguments import Parser
from dml_kernels.ops import choice as backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _os_name() -> str:
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.system()} {platform.release()}"
    except (OSError, KeyError):
        return platform.platform()


def _versions() -> list[tuple[str, str]]:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    mkl = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    capability = torch.backends.cpu.get_cpu_capability()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        ("dml_kernels", f"{dml_kernels.__version__}, {Path(dml_kernels.__file__).parent}"),
        ("torch", f"{torch.__version__} ({cuda}, {mkl})"),
        ("Python", platform.python_version()),
        ("system", _os_name()),
        ("processor", f"{profiling.cpu_model()} ({platform.machine()}), torch uses {capability}"),
        ("threads", f"{torch.get_num_threads()} used by torch, {profiling.usable_cores()} cores usable"),
        ("GPU", ", ".join(gpus) or "none visible"),
        ("Triton kernels", triton_backend.status()),
    ]


def _built(extension: build_info.Extension) -> list[tuple[str, str]]:
    if not extension:
        return [
            ("CPU kernels", f"no: {extension.reason}"),
            ("CUDA kernels", "no: they are part of the same extension"),
        ]
    info, module = extension.info, extension.module
    assert module is not None
    cuda = f"yes, for {info['cuda']}" if info["cuda"] else f"no: {info['why_no_cuda']} (at build time)"
    rows = [
        ("CPU kernels", f"yes: {module.__file__}"),
        ("instruction set", f"{module.cpu_capability()}, of those compiled in: {', '.join(info['isas'])}"),
        ("matrix products", module.cpu_products()),
        ("CUDA kernels", cuda),
        ("compiler", f"{info['compiler']}, C++{info['cxx_standard'] // 100 % 100}, {info['machine']}"),
        ("flags", info["flags"]),
        (
            "torch",
            f"built against {info['torch_version']}, for {info['torch_target']} and newer (stable ABI)",
        ),
    ]
    return rows + ([("sanitizers", info["sanitizers"])] if info["sanitizers"] else [])


def _choice(op: str, device: str, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that runs an op, and why it runs there and not on a backend of higher priority."""
    why = []
    for name, ok, reason in backend.explain(op, device, dtype):
        why.append(reason if ok else f"not {name}: {reason}")
        if ok:
            return name, "; ".join(why)
    return "none", "; ".join(why)


def _choices() -> list[tuple[str, str, str, str, str]]:
    """One row for each device and choice; ops that agree on every dtype share their rows."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for device in ("cpu", "cuda") if torch.version.cuda else ("cpu",):
        for op in backend.OPS:
            dtypes: dict[tuple[str, str], list[str]] = {}
            for dtype in DTYPES:
                dtypes.setdefault(_choice(op, device, dtype), []).append(str(dtype).removeprefix("torch."))
            for (name, why), of in dtypes.items():
                rows.setdefault((device, ", ".join(of), name, why), []).append(op)
    return [(device, of, ", ".join(ops), name, why) for (device, of, name, why), ops in rows.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; return 1 if the extension exists but cannot be loaded, or is required and missing."""
    parser = Parser(
        prog="python -m dml_kernels info",
        description="Says what was built, what is missing, and which backend runs what, on which dtypes, and why.",
        epilog="example, in a build job: python -m dml_kernels info --require-compiled",
    )
    parser.add_argument(
        "--require-compiled",
        action="store_true",
        help="exit with status 1 when there are no compiled kernels",
    )
    args = parser.parse_args(argv)
    extension = build_info.load()
    tables.show("Versions", (), _versions())
    tables.show("Built", (), _built(extension))
    tables.show("Which backend runs what", ("device", "dtypes", "ops", "backend", "why"), _choices())
    asked = backend.requested()
    print(f"DML_BACKEND asks for {asked}." if asked else "To choose another: DML_BACKEND=name, or use_backend.")
    if not extension and (extension.built or args.require_compiled):
        print(f"error: the compiled extension: {extension.reason}")
        return 1
    return 0

"""``python -m dml_kernels bench``: runs the benchmarks, which live in the repository, not in the package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    if not (REPOSITORY / "bench" / "__main__.py").exists():
        print(
            "The benchmarks are in the repository's bench/ folder, which an installed package lacks: "
            "clone the repository and run `make bench` there.",
            file=sys.stderr,
        )
        return 2
    return subprocess.run([sys.executable, "-m", "bench", *(argv or ())], cwd=REPOSITORY).returncode

"""``python -m dml_kernels bench``: runs the benchmarks, which are in the repository, not in the package."""

from __future__ import annotations

import os
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
    # The import path finds the repository; a change of folder would change the meaning of --out.
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "bench", *(argv or ())]
    status = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode
    return status if status >= 0 else 128 - status  # the status that a shell gives where a signal ended the command

"""The program that compute-sanitizer watches: a step of each loss on each backend, with partly empty tiles."""

from __future__ import annotations

import sys

import torch

from .checks import DTYPES, METRICS, loss_step, lse_step, magnet_step, names, problem_on


def main() -> int:
    """Run all steps; the tool around this process reports what is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in DTYPES.values():
        for backend in names("masked_logsumexp", device, dtype):
            problem = problem_on("37x333x40", dtype, device)
            for metric in METRICS:
                lse_step(problem, metric, backend, few=True)
            loss_step(problem, backend)
            magnet_step(problem, backend)
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())

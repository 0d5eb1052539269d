"""The peak extra memory of one contender, in a fresh process: `python -m bench.peak SUITE NAME SIZE DTYPE THREADS`."""

from __future__ import annotations

import sys

import torch

from dml_kernels.profiling import peak_extra_bytes, run_in_child

from .problem import DTYPES, Size, make


def in_child(suite: str, name: str, size: Size, dtype: str, threads: int = 0) -> int:
    """The bytes that the step adds to the resident inputs at its peak: gradients, results and work space."""
    return int(run_in_child("bench.peak", suite, name, str(size), dtype, str(threads)).splitlines()[-1])


def main(suite: str, name: str, size: str, dtype: str, threads: str) -> int:
    from .harness import contenders

    if int(threads):
        torch.set_num_threads(int(threads))
    contender = next(c for c in contenders(suite) if c.name == name)
    problem = make(Size.parse(size), DTYPES[dtype])
    # What make() allocates counts, for example the outputs of the floor.
    print(peak_extra_bytes(lambda: contender.make(problem)(), warmup=lambda: contender.warm(contender, problem)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

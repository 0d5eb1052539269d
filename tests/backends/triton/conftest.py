"""The Triton backend in Triton's interpreter; `make test-triton` runs these tests in a process of their own.

Triton reads TRITON_INTERPRET when a kernel is defined, so the rest of the suite, and the ahead-of-time compiler, need
other processes. Without the flag, or without Triton, everything here is skipped.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is first imported


def _reason() -> str | None:
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "TRITON_INTERPRET=1 is not set: run `make test-triton`"
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "Triton is not installed: pip install -r requirements/triton.txt"
    return None


SKIPPED = _reason()
collect_ignore_glob = ["test_*.py"] if SKIPPED else []


def pytest_report_header() -> str | None:
    return f"Triton backend: not tested. {SKIPPED}" if SKIPPED else None


@pytest.fixture
def checked():
    """Checks that no launch of the test accesses memory outside a tensor, and that no two programs race."""
    from tests.backends.triton.sanitizer import sanitized  # imports Triton

    with sanitized() as accesses:
        yield accesses


@pytest.fixture
def launched(checked):
    """Checks as ``checked`` does, and that the test launched something."""
    yield
    assert checked.accesses > 0

"""One test for every contender of every group; conftest.py says where the times come from."""

from __future__ import annotations

import pytest

from .conftest import CLOCK, RUNNER


@pytest.mark.benchmark(timer=CLOCK, warmup=False)
def test_contender(benchmark, pytestconfig, group, name):
    record = pytestconfig.stash[RUNNER].record(group, name)
    if record.status == "skipped" or (record.status != "ok" and record.kind == "peer"):
        pytest.skip(f"{record.status}: {record.reason}")
    assert record.status == "ok", f"{record.status}: {record.reason}"
    benchmark.group = str(group)
    benchmark.extra_info.update(
        times_floor=record.ratio,
        peak_extra_bytes=record.peak_bytes,
        gradient_bytes=record.gradient_bytes,
        worst_value_error=record.errors[0],
        worst_row_error=record.errors[1],
    )
    CLOCK.recorded = iter(record.seconds)
    benchmark.pedantic(CLOCK.advance, rounds=len(record.seconds))

"""The results of a run, by stage and case, written after every case so that an interrupted run can continue."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dml_kernels.demo.checkpoint import write_json

ROOT = Path(__file__).resolve().parents[2]


class OutOfTime(Exception):
    """The time of this command is used up; what was measured is saved."""


def source_hash() -> str:
    """The hash of all that determines a result: Python, C++ and CUDA sources."""
    digest = hashlib.sha256()
    for folder in ("dml_kernels", "csrc", "bench/gpu"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """One JSON file for a device. Results of other sources are dropped, so that no figure outlives its code."""

    def __init__(self, folder: Path, machine: dict[str, Any], budget: float) -> None:
        name = re.sub(r"[^a-z0-9]+", "-", str(machine["device"]).lower()).strip("-")
        self.path = folder / f"{name}.json"
        self.deadline = time.monotonic() + budget
        self.content: dict[str, Any] = {"machine": machine, "source": source_hash(), "stages": {}}
        if self.path.exists():
            old = json.loads(self.path.read_text())
            if old.get("source") == self.content["source"] and old.get("machine") == machine:
                self.content = old

    def case(self, stage: str, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the saved result of a case, or run it and save the result; a failure is a result too.

        Raises:
            OutOfTime: the case is not saved, and the time is used up.
        """
        cases = self.content["stages"].setdefault(stage, {})
        if name in cases:
            return cases[name]
        if time.monotonic() > self.deadline:
            raise OutOfTime
        start = time.monotonic()
        try:
            found = {"status": "ok", **run()}
        except OutOfTime:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines()
            found = {"status": "raises", "reason": f"{type(error).__name__}: {lines[0][:200] if lines else ''}"}
        cases[name] = {**found, "took_s": round(time.monotonic() - start, 2)}
        write_json(self.path, self.content)
        print(f"{stage}: {name}: {cases[name]['status']} ({cases[name]['took_s']} s)", flush=True)
        return cases[name]

    def failures(self) -> list[str]:
        """The cases of this package that are wrong or raise; peers may fail."""
        return [
            f"{stage}: {name}: {case.get('reason', case['status'])}"
            for stage, cases in self.content["stages"].items()
            for name, case in cases.items()
            if case["status"] != "ok" and not case.get("peer")
        ]

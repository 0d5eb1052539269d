"""How much of the processor others used during a measurement: a neighbour slows some contenders more than others.

The floor waits for every thread after every product, so a neighbour delays it more than a method with one parallel
loop: on a busy machine a ratio to the floor says nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """Seconds of all cores together, since the start of the machine or of the process."""

    capacity: float
    busy: float
    own: float

    @staticmethod
    def now() -> Usage | None:
        """The usage so far; None where the system does not report it (on all systems but Linux)."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        ticks = [int(field) for field in fields]  # user nice system idle iowait irq softirq steal
        second = os.sysconf("SC_CLK_TCK")
        times = os.times()
        idle = ticks[3] + ticks[4]
        own = sum(times[:4])  # includes children that have ended, such as those that measure memory
        return Usage(sum(ticks) / second, (sum(ticks) - idle) / second, own)


def share_of_others(before: Usage | None, after: Usage | None) -> float | None:
    """The share of all cores' time that went to other processes, or to other guests of the machine."""
    if before is None or after is None or after.capacity <= before.capacity:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return min(1.0, max(0.0, others / (after.capacity - before.capacity)))

"""The bars: which are binding, which are expected, and whether a run met them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .harness import OPS, Record

OURS = "ours (cpu)"
BUSY = 0.1  # of the cores' time
MEMORY_SPARE = 64 * 2**20  # bytes in addition to the gradients
# (size, dtype) -> the most time that our step may take, in units of the floor's time.
TO_FLOOR = {("512x100kx128", "fp32"): 1.25, ("512x100kx128", "bf16"): 1.6}
# (peer, size) -> how many times faster than the peer our loss is expected to be, in fp32.
FASTER = {
    ("torch.compile", "512x100kx128"): 2,
    ("torch.compile", "256x1Mx128"): 4,
    ("torch.compile", "128x100x128"): 1,
    ("pytorch-metric-learning", "512x100kx128"): 5,
    ("pytorch-metric-learning", "256x1Mx128"): 10,
}


@dataclass(frozen=True)
class Verdict:
    """One bar: what it is about, the measured figure, the limit. ``met`` is None where nothing was measured."""

    what: str
    found: str
    limit: str
    met: bool | None
    binding: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def verdicts(records: Iterable[Record]) -> list[Verdict]:
    """The verdicts on all bars of the groups that were run."""
    records = [r for r in records if r.group.suite != OPS]
    found = []
    for ours in (r for r in records if r.name == OURS):
        peers = {r.name: r for r in records if r.group == ours.group}
        found += [*_binding(ours), *_expected(ours, peers)]
    return found


def is_busy(record: Record) -> bool:
    """Whether other processes took so much of the processor that times mean little; see busy."""
    return record.others is not None and record.others > BUSY


def _binding(ours: Record) -> list[Verdict]:
    label, key = f"{ours.group}: ", (str(ours.group.size), ours.group.dtype)
    found = []
    if ours.status != "ok":
        return [Verdict(f"{label}correct", f"{ours.status}: {ours.reason}", "runs", False, True)]
    if key in TO_FLOOR:
        limit, ratio = TO_FLOOR[key], ours.ratio
        met = None if ratio is None or is_busy(ours) else ratio <= limit
        found.append(Verdict(f"{label}time", "-" if ratio is None else f"{ratio:.2f}x floor", f"{limit}x", met, True))
    if ours.peak_failure:
        found.append(Verdict(f"{label}peak memory", ours.peak_failure, "measured", False, True))
    if ours.peak_bytes is not None:
        limit = ours.gradient_bytes + MEMORY_SPARE
        texts = f"{ours.peak_bytes / 2**20:.0f} MiB", f"{limit / 2**20:.0f} MiB (gradients + 64)"
        found.append(Verdict(f"{label}peak memory", *texts, ours.peak_bytes <= limit, True))
    return found


def _expected(ours: Record, peers: dict[str, Record]) -> list[Verdict]:
    found = []
    for (name, size), times in FASTER.items():
        peer = peers.get(name)
        if size != str(ours.group.size) or ours.group.dtype != "fp32" or peer is None or not peer.seconds:
            continue
        if ours.seconds:
            gain = statistics.median(other / own for other, own in zip(peer.seconds, ours.seconds, strict=False))
            met = None if is_busy(ours) else gain >= times
            found.append(Verdict(f"{ours.group}: {name}", f"{gain:.2f}x our time", f"{times}x", met, False))
    return found

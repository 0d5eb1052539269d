"""The losses, by the names people already use. Each is one file; this package finds them by itself.

A loss file defines its Module, its function, a dense reference from the paper, and ``ENTRY``, which the tests and
benchmarks walk.
"""

from __future__ import annotations

import importlib
import pkgutil

from .arcface import ArcFaceLoss
from .base import LossEntry
from .cosface import CosFaceLoss
from .large_margin_softmax import LargeMarginSoftmaxLoss
from .magnet import MagnetLoss
from .normalized_softmax import NormalizedSoftmaxLoss
from .proxy_anchor import ProxyAnchorLoss
from .proxy_nca import ProxyNCALoss
from .proxy_ranking import ProxyRankingLoss
from .soft_triple import SoftTripleLoss
from .sphereface import SphereFaceLoss
from .subcenter_arcface import SubCenterArcFaceLoss

REGISTRY: dict[str, LossEntry] = {}

for _info in pkgutil.iter_modules(__path__):
    _entry = getattr(importlib.import_module(f"{__name__}.{_info.name}"), "ENTRY", None)
    if _entry is not None:
        REGISTRY[_entry.loss.__name__] = _entry
        globals()[_entry.loss.__name__] = _entry.loss


def family(name: str) -> dict[str, LossEntry]:
    """The registered losses of one family: ``proxies`` or ``clusters``; see LossEntry."""
    return {loss: entry for loss, entry in REGISTRY.items() if entry.family == name}


__all__ = [
    "REGISTRY", "ArcFaceLoss", "CosFaceLoss", "LargeMarginSoftmaxLoss", "LossEntry", "MagnetLoss",
    "NormalizedSoftmaxLoss", "ProxyAnchorLoss", "ProxyNCALoss", "ProxyRankingLoss", "SoftTripleLoss", "SphereFaceLoss",
    "SubCenterArcFaceLoss", "family",
]  # fmt: skip

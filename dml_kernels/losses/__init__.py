"""The losses, under pytorch-metric-learning's names. Each is one file, which this package finds by itself.

A loss file defines its Module, its function, a dense reference from the paper, and ``ENTRY``, which the tests and
benchmarks walk.
"""

from __future__ import annotations

import importlib
import pkgutil

from ..elsewhere import explain
from .arcface import ArcFaceLoss
from .base import REGISTRY, LossEntry, family
from .circle import CircleLoss
from .combined import MultipleLosses, SelfSupervisedLoss
from .contrastive import ContrastiveLoss
from .cosface import CosFaceLoss
from .cross_batch_memory import CrossBatchMemory
from .generalized_lifted_structure import GeneralizedLiftedStructureLoss
from .large_margin_softmax import LargeMarginSoftmaxLoss
from .lifted_structure import LiftedStructureLoss
from .magnet import MagnetLoss
from .margin import MarginLoss
from .multi_similarity import MultiSimilarityLoss
from .n_pairs import NPairsLoss
from .nca import NCALoss
from .normalized_softmax import NormalizedSoftmaxLoss
from .ntxent import NTXentLoss
from .proxy_anchor import ProxyAnchorLoss
from .proxy_nca import ProxyNCALoss
from .proxy_ranking import ProxyRankingLoss
from .soft_triple import SoftTripleLoss
from .sphereface import SphereFaceLoss
from .subcenter_arcface import SubCenterArcFaceLoss
from .supcon import SupConLoss
from .triplet_margin import TripletMarginLoss

for _info in pkgutil.iter_modules(__path__):
    _entry = getattr(importlib.import_module(f"{__name__}.{_info.name}"), "ENTRY", None)
    if _entry is not None:
        REGISTRY[_entry.loss.__name__] = _entry
        globals()[_entry.loss.__name__] = _entry.loss


__all__ = [
    "REGISTRY", "ArcFaceLoss", "CircleLoss", "ContrastiveLoss", "CosFaceLoss", "CrossBatchMemory",
    "GeneralizedLiftedStructureLoss", "LargeMarginSoftmaxLoss", "LiftedStructureLoss", "LossEntry", "MagnetLoss",
    "MarginLoss", "MultiSimilarityLoss", "MultipleLosses", "NCALoss", "NPairsLoss", "NTXentLoss",
    "NormalizedSoftmaxLoss", "ProxyAnchorLoss", "ProxyNCALoss", "ProxyRankingLoss", "SelfSupervisedLoss",
    "SoftTripleLoss", "SphereFaceLoss", "SubCenterArcFaceLoss", "SupConLoss", "TripletMarginLoss", "family",
]  # fmt: skip

explain(__name__)

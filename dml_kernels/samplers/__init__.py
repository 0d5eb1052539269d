"""Samplers: they choose the examples that form a batch."""

from ..elsewhere import explain
from .balanced import MPerClassSampler, NPairsSampler
from .magnet import MagnetBatchSampler

__all__ = ["MPerClassSampler", "MagnetBatchSampler", "NPairsSampler"]

explain(__name__)

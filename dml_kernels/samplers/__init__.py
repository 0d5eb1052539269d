"""Which examples come together in a batch."""

from .balanced import MPerClassSampler, NPairsSampler
from .magnet import MagnetBatchSampler

__all__ = ["MPerClassSampler", "MagnetBatchSampler", "NPairsSampler"]

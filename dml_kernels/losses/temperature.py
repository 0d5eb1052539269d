"""The Module under the pair losses of similarities over a temperature."""

from __future__ import annotations

from typing import Any

from .. import distances
from ..ops.checks import check_number
from .metric_loss import MetricLoss


class TemperatureLoss(MetricLoss):
    """A loss of z = s / temperature; a subclass defines its ``terms``.

    Args:
        temperature: divides the similarity.
        options: those of :class:`MetricLoss`; the distance is CosineSimilarity.

    Raises:
        ValueError: temperature 0.
    """

    def __init__(self, temperature: float, **options: Any):
        super().__init__(**options)
        temperature = check_number("temperature", temperature)
        if temperature == 0:
            raise ValueError("temperature divides the similarity: it must not be 0")
        self.temperature = temperature

    def default_distance(self) -> distances.Distance:
        """The cosine."""
        return distances.CosineSimilarity()

    def extra_repr(self) -> str:
        """What ``print(loss)`` shows."""
        return f"temperature={self.temperature}"

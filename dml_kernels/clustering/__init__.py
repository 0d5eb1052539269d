"""Clusters within each class: the index (``index.py``), its refresh (``reclustering.py``), k-means (``kmeans.py``)."""

from .index import ClusterIndex
from .reclustering import RefreshReport

__all__ = ["ClusterIndex", "RefreshReport"]

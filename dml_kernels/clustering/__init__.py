"""Clusters within each class: the index (``index.py``), its refresh (``reclustering.py``), k-means (``kmeans.py``)."""

from .index import ClusterIndex, RefreshReport

__all__ = ["ClusterIndex", "RefreshReport"]

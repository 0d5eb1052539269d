"""The judgement of a representation: retrieval of unseen characters, classification of seen ones' held-out drawings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import evaluation
from .data import ImageSet
from .model import embed
from .objectives import Magnet
from .trainer import Trainer

__all__ = ["Judged", "JudgedSeen", "judge", "judge_seen"]

NEIGHBOURS = 8
DEPTHS = (1, 10)
KNC_CLUSTERS = 128  # the paper's largest number of clusters that vote


@dataclass(frozen=True)
class Judged:
    """One representation of the unseen drawings, judged: metrics, each query's nearest, seconds for it all."""

    name: str
    result: evaluation.RetrievalResult
    neighbours: Tensor  # (n, NEIGHBOURS) int64, nearest first
    face_recall: list[float]  # Recall@1 of the queries drawn by each face, against drawings by all faces
    seconds: float


@dataclass(frozen=True)
class JudgedSeen:
    """Errors in naming the character of a held-out drawing, fractions in [0, 1]; kNC where there are clusters."""

    name: str
    drawings: int
    references: int
    knn_error: float  # the one nearest training drawing, by cosine
    knc_error: float | None
    clusters: int | None  # that are not empty
    seconds: float


def judge(
    name: str,
    make: Callable[[], Tensor],
    labels: Tensor,
    faces: Tensor,
    progress: Callable[[int], object] | None = None,
) -> Judged:
    """Evaluate the embeddings that make() returns, its time included."""
    start = time.perf_counter()
    embeddings = make()
    depths = tuple(k for k in DEPTHS if k < len(labels))
    result = evaluation.evaluate(embeddings, labels, depths, progress=progress)
    _, neighbours = evaluation.nearest(embeddings, min(NEIGHBOURS, len(labels) - 1))
    hit = (labels[neighbours[:, 0]] == labels).double()
    face_recall = [hit[faces == face].mean().item() for face in range(int(faces.max()) + 1)]
    return Judged(name, result, neighbours, face_recall, time.perf_counter() - start)


def judge_seen(
    name: str, trainer: Trainer, held: ImageSet, progress: Callable[[int], object] | None = None
) -> JudgedSeen:
    """Classify held-out drawings by the training drawings, and by the clusters where the objective has some.

    Clusters, their centres and variance are those of the trained network: the index is refreshed once more.
    """
    start = time.perf_counter()
    images, labels = torch.from_numpy(held.images), torch.from_numpy(held.labels)
    queries, references = embed(trainer.model, images), embed(trainer.model, trainer.images)
    knn = evaluation.k_nearest_neighbours(queries, references, trainer.labels, progress=progress)
    knc_error = clusters = None
    if isinstance(trainer.objective, Magnet):
        index = trainer.objective.index
        index.refresh(references)
        clusters = int((index.sizes > 0).sum())
        knc = evaluation.k_nearest_clusters(
            queries,
            index.centers,
            index.cluster_classes,
            variance=index.variance,
            k=KNC_CLUSTERS,
            normalize=index.normalize,
            empty=index.sizes == 0,
        )
        knc_error = knc.error(labels)
    seconds = time.perf_counter() - start
    return JudgedSeen(name, len(labels), len(references), knn.error(labels), knc_error, clusters, seconds)

"""Evaluates a representation: retrieval of unseen characters, classification of held-out drawings of seen ones."""

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
KNC_CLUSTERS = 128  # the largest number of voting clusters in the paper


@dataclass(frozen=True)
class Judged:
    """The results of one representation on the unseen drawings.

    Attributes:
        name: the name of the representation.
        result: the metrics.
        neighbours: (n, NEIGHBOURS) int64, the nearest drawings of each query, nearest first.
        face_recall: Recall@1 of the queries drawn by each face, among drawings by all faces.
        seconds: how long the embedding and the evaluation took.
    """

    name: str
    result: evaluation.RetrievalResult
    neighbours: Tensor
    face_recall: list[float]
    seconds: float


@dataclass(frozen=True)
class JudgedSeen:
    """Errors in naming the character of a held-out drawing, fractions in [0, 1].

    Attributes:
        name: the name of the representation.
        drawings: how many held-out drawings there are.
        references: how many training drawings there are.
        knn_error: the error of the nearest training drawing, by cosine.
        knc_error: the error of the soft nearest clusters; None without clusters.
        clusters: how many clusters are not empty; None without clusters.
        seconds: how long the embedding and the evaluation took.
    """

    name: str
    drawings: int
    references: int
    knn_error: float
    knc_error: float | None
    clusters: int | None
    seconds: float


def judge(
    name: str,
    make: Callable[[], Tensor],
    labels: Tensor,
    faces: Tensor,
    progress: Callable[[int], object] | None = None,
) -> Judged:
    """Evaluate a representation of the unseen drawings.

    Args:
        name: of the representation.
        make: returns the embeddings (n, D); its time counts.
        labels: (n,) int64, the characters.
        faces: (n,) int64, the faces.
        progress: called with the number of queries just finished.
    """
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

    The index is refreshed once more, so that its clusters are those of the trained network.

    Args:
        name: of the representation.
        trainer: the trained network and its objective.
        held: the held-out drawings.
        progress: called with the number of drawings just finished.
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

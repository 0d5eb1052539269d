"""How well a k-means partition of the embeddings agrees with the classes: NMI and AMI.

With U the classes and V the clusters of the same N examples, entropies H and mutual information I(U, V),

    NMI = I(U, V) / ((H(U) + H(V)) / 2)                                     (Manning et al. 2008, section 16.3)
    AMI = (I(U, V) - E[I]) / ((H(U) + H(V)) / 2 - E[I])                     (Vinh, Epps and Bailey 2010)

E[I] is the expectation over random partitions of the same sizes. NMI grows with the number of clusters even for noise;
AMI corrects for that. Neither says much about an embedding (Musgrave et al. 2020, arXiv 2003.08505, section 2.3).
faiss computes k-means, started from greedy k-means++; scikit-learn computes the scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..clustering.kmeans import far_apart, load_faiss
from ..ops.checks import check_flag, check_integer
from ..optional import import_optional
from ..progress import Progress, reporter
from . import streaming

__all__ = ["ClusteringResult", "cluster_agreement"]

BLOCK = 1 << 20  # entries of embeddings that are converted and assigned at a time


@dataclass(frozen=True)
class ClusteringResult:
    """The agreement of classes and clusters.

    Attributes:
        nmi: in [0, 1].
        ami: at most 1, about 0 for noise; NaN unless requested.
        clusters: the number of clusters.
        assignments: (N,) int64 on the CPU: the cluster of each example.
    """

    nmi: float
    ami: float
    clusters: int
    assignments: Tensor


def cluster_agreement(
    embeddings: Tensor,
    labels: Tensor,
    *,
    clusters: int | None = None,
    normalize: bool = True,
    iterations: int = 20,
    seed: int = 0,
    adjusted: bool = True,
    training_rows: int = 1 << 18,
    progress: Progress = None,
) -> ClusteringResult:
    """Compute NMI and AMI (formulas at the top of the module) of the labels and a k-means partition of the embeddings.

    One class and one cluster agree fully: NMI and AMI are 1, by scikit-learn's convention. Extra memory: 4 D + 100
    bytes for each of min(N, training_rows) examples, the centroids, O(N) for the assignments, and blocks of a fixed
    size.

    Args:
        embeddings: (N, D) floating point, CPU or CUDA.
        labels: (N,) integers.
        clusters: the number of clusters; None: the number of classes among the labels.
        normalize: divide the embeddings by their norm first.
        iterations: the number of iterations of Lloyd's algorithm.
        seed: of k-means++ and of the sample.
        adjusted: compute AMI too. Its expectation takes time in proportion to classes x clusters, minutes at 10,000 of
            each.
        training_rows: the most examples that k-means is trained on, a sample without repeats; all N are assigned.
        progress: called with the number of examples just assigned; True: a tqdm bar.

    Returns:
        The scores and the assignments.

    Raises:
        ValueError: wrong shapes, an empty set, NaN or infinity, clusters out of [1, N] or above training_rows.
        TypeError: wrong dtypes.
        ImportError: faiss or scikit-learn is missing.
    """
    streaming.check_vectors("embeddings", embeddings)
    labels = streaming.check_integers("labels", labels, len(embeddings), torch.device("cpu"))
    count, width = embeddings.shape
    wanted = len(labels.unique()) if clusters is None else check_integer("clusters", clusters)
    if not 1 <= wanted <= count:
        raise ValueError(f"clusters must be an integer in [1, {count}], the number of embeddings; got {clusters}")
    normalize, adjusted = check_flag("normalize", normalize), check_flag("adjusted", adjusted)
    iterations, seed = check_integer("iterations", iterations, 1), check_integer("seed", seed, 0)
    training_rows = check_integer("training_rows", training_rows, 1)
    if min(count, training_rows) < wanted:
        raise ValueError(f"training_rows={training_rows} is fewer than the {wanted} clusters")
    scores, faiss = import_optional("sklearn.metrics", "cluster_agreement"), load_faiss()
    embeddings = embeddings.detach()

    generator = torch.Generator().manual_seed(seed)
    everyone = torch.arange(count)
    sample = everyone if count <= training_rows else torch.randperm(count, generator=generator)[:training_rows]
    # The mean is subtracted because single precision would lose the distances far from the origin.
    mean = torch.zeros(width, dtype=torch.float64, device=embeddings.device)
    for _, part in _blocks(embeddings, everyone, normalize):
        mean += part.sum(dim=0) / count
    training = np.empty((len(sample), width), dtype=np.float32)
    for start, part in _blocks(embeddings, sample, normalize):
        training[start : start + len(part)] = (part - mean).float().cpu().numpy()
    means = faiss.Kmeans(
        width,
        wanted,
        niter=iterations,
        seed=seed % (1 << 31),
        min_points_per_centroid=1,
        max_points_per_centroid=1 << 30,
    )
    means.train(training, init_centroids=training[far_apart(torch.from_numpy(training), wanted, seed).numpy()])
    del training
    assignments = torch.empty(count, dtype=torch.int64)
    with reporter(progress, count, "clusters", "examples") as report:
        for start, part in _blocks(embeddings, everyone, normalize):
            _, found = means.index.search((part - mean).float().cpu().numpy(), 1)
            assignments[start : start + len(part)] = torch.from_numpy(found[:, 0])
            report(len(part))
    given, made = labels.numpy(), assignments.numpy()
    return ClusteringResult(
        nmi=float(scores.normalized_mutual_info_score(given, made)),
        ami=float(scores.adjusted_mutual_info_score(given, made)) if adjusted else math.nan,
        clusters=wanted,
        assignments=assignments,
    )


def _blocks(embeddings: Tensor, rows: Tensor, unit: bool) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, fp64 vectors) of the requested rows, a bounded block at a time."""
    block = max(1, BLOCK // embeddings.shape[1])
    for start in range(0, len(rows), block):
        index = rows[start : start + block].to(embeddings.device)
        yield start, streaming.prepare(embeddings[index], unit)

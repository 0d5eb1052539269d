"""Few-shot classification: N ways, K shots, by the nearest class mean.

An episode draws N classes and of each K supports and Q queries, all different (Vinyals et al. 2016, arXiv 1606.04080).
With c_n the mean of class n's supports, its prototype (Snell, Swersky and Zemel 2017, arXiv 1703.05175), a query x is
given the class argmin_n |x - c_n|, or argmax_n cos(x, c_n). An episode's accuracy is over its N Q queries; reported are
the mean over E episodes and the half-width of its 95% confidence interval, 1.96 std / sqrt(E).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..ops.checks import check_choice, check_flag, check_integer
from ..progress import Progress, reporter
from . import streaming

__all__ = ["FewShotResult", "few_shot_accuracy"]


@dataclass(frozen=True)
class FewShotResult:
    """accuracy, mean over episodes in [0, 1]; confidence, half-width of its 95% interval (NaN for one episode).

    classes: how many were drawn from; skipped_classes: how many have fewer than shots + queries examples.
    """

    accuracy: float
    confidence: float
    episodes: int
    classes: int
    skipped_classes: int


def few_shot_accuracy(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 600,
    metric: str = "euclidean",
    normalize: bool = True,
    seed: int = 0,
    progress: Progress = None,
) -> FewShotResult:
    """Accuracy of N-way K-shot episodes by the nearest class mean (formulas at the top of the module).

    embeddings      (N, D) floating point, CPU or CUDA; labels (N,) integers
    ways, shots     N and K; queries: of each class, Q
    episodes        how many, drawn with `seed`: the same seed gives the same episodes for any embeddings
    metric          "euclidean" or "cosine"; equal distances go to the class drawn first
    normalize       unit embeddings before the means are taken; the means themselves stay as they are
    progress        called with the number of episodes just finished; True: a tqdm bar

    Classes with fewer than shots + queries examples are left out and counted. Memory: O(N), and one episode's vectors
    in fp64.

    Raises ValueError for wrong shapes, NaN or infinity, counts that are not positive (ways under 2), or when fewer
    than `ways` classes have enough examples; TypeError for wrong dtypes.
    """
    streaming.check_vectors("embeddings", embeddings)
    labels = streaming.check_integers("labels", labels, len(embeddings), torch.device("cpu"))
    check_choice("metric", metric, ("euclidean", "cosine"))
    ways, shots = check_integer("ways", ways, 2), check_integer("shots", shots, 1)
    queries, episodes = check_integer("queries", queries, 1), check_integer("episodes", episodes, 1)
    normalize, seed = check_flag("normalize", normalize), check_integer("seed", seed, 0)
    order = torch.argsort(labels, stable=True).numpy()
    _, sizes = np.unique(labels.numpy(), return_counts=True)
    starts = np.cumsum(sizes) - sizes
    (usable,) = np.nonzero(sizes >= shots + queries)
    if len(usable) < ways:
        raise ValueError(
            f"{ways} ways need as many classes with {shots} + {queries} examples; "
            f"{len(usable)} of {len(sizes)} have them"
        )
    random = np.random.default_rng(seed)
    embeddings = embeddings.detach()
    accuracies = np.empty(episodes)
    with reporter(progress, episodes, "few-shot", "episodes") as report:
        for episode in range(episodes):
            classes = random.choice(usable, ways, replace=False)
            drawn = [starts[c] + random.choice(sizes[c], shots + queries, replace=False) for c in classes]
            rows = torch.from_numpy(order[np.concatenate(drawn)]).to(embeddings.device)
            vectors = streaming.prepare(embeddings[rows], normalize).view(ways, shots + queries, -1)
            accuracies[episode] = _episode_accuracy(vectors, shots, metric)
            report(1)
    spread = accuracies.std(ddof=1) if episodes > 1 else math.nan
    return FewShotResult(
        accuracy=float(accuracies.mean()),
        confidence=float(1.96 * spread / math.sqrt(episodes)),
        episodes=episodes,
        classes=len(usable),
        skipped_classes=len(sizes) - len(usable),
    )


def _episode_accuracy(vectors: Tensor, shots: int, metric: str) -> float:
    """Of (ways, shots + queries, D) fp64, supports first."""
    ways = len(vectors)
    prototypes, queries = vectors[:, :shots].mean(dim=1), vectors[:, shots:].flatten(0, 1)
    if metric == "cosine":
        near = streaming.settle(streaming.prepare(queries, True) @ streaming.prepare(prototypes, True).T)
    else:
        near = -torch.cdist(queries, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    # Rounded, so that what is equal but for the order of its sums is equal; the first of equals is argmax's answer.
    found = near.float().argmax(dim=1).view(ways, -1)
    return (found == torch.arange(ways, device=found.device)[:, None]).double().mean().item()

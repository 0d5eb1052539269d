"""Few-shot classification: N ways, K shots, by the nearest class mean.

An episode draws N classes, and K supports and Q queries of each, all different (Vinyals et al. 2016, arXiv 1606.04080).
Let c_n be the prototype of class n, the mean of its supports (Snell, Swersky and Zemel 2017, arXiv 1703.05175). A query
x gets the class argmin_n |x - c_n|, or argmax_n cos(x, c_n). The accuracy of an episode is the fraction of its N Q
queries that get their own class. The result is the mean over E episodes, and the half-width of its 95% confidence
interval, 1.96 std / sqrt(E).
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
    """Few-shot accuracy.

    Attributes:
        accuracy: the mean over episodes, in [0, 1].
        confidence: the half-width of its 95% confidence interval, NaN for one episode.
        episodes: how many episodes were drawn.
        classes: from how many classes they were drawn.
        skipped_classes: how many classes have fewer than shots + queries examples.
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
    """Compute the accuracy of N-way K-shot episodes by the nearest class mean (formulas at the top of the module).

    Classes with fewer than shots + queries examples are left out and counted. Memory: O(examples), and the vectors of
    one episode in fp64.

    Args:
        embeddings: (examples, D) floating point, CPU or CUDA.
        labels: (examples,) integers.
        ways: N, the number of classes of an episode.
        shots: K, the number of supports of each class.
        queries: Q, the number of queries of each class.
        episodes: how many episodes are drawn.
        metric: ``euclidean`` or ``cosine``; equal distances go to the class that was drawn first.
        normalize: divide the embeddings by their norm before the means are computed; the means stay as they are.
        seed: the same seed gives the same episodes for any embeddings.
        progress: called with the number of episodes just finished; True: a tqdm bar.

    Returns:
        The mean accuracy and its confidence.

    Raises:
        ValueError: wrong shapes, NaN or infinity, counts that are not positive (ways under 2), or fewer than ``ways``
            classes with enough examples.
        TypeError: wrong dtypes.
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
    """The accuracy of one episode, from vectors (ways, shots + queries, D) fp64 with the supports first."""
    ways = len(vectors)
    prototypes, queries = vectors[:, :shots].mean(dim=1), vectors[:, shots:].flatten(0, 1)
    if metric == "cosine":
        near = streaming.settle(streaming.prepare(queries, True) @ streaming.prepare(prototypes, True).T)
    else:
        near = -torch.cdist(queries, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    # Rounding makes scores equal that differ only by the order of their sums; argmax returns the first of equals.
    found = near.float().argmax(dim=1).view(ways, -1)
    return (found == torch.arange(ways, device=found.device)[:, None]).double().mean().item()

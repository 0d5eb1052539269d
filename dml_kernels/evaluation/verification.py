"""Verification, 1:1: are two embeddings of one class? ROC-AUC, TAR at a FAR, EER, best threshold, cross-validation.

A pair is accepted where its score reaches a threshold t. Over the pairs of one class (mated) and of two classes
(other),

    TAR(t) = accepted mated pairs / mated pairs           (true accept rate, 1 - FRR)
    FAR(t) = accepted other pairs / other pairs           (false accept rate)
    TAR at FAR f    max {TAR(t) : FAR(t) <= f}: no interpolation
    ROC-AUC         the area under TAR over FAR: P(mated score > other score) + P(equal) / 2
    EER             where FAR = 1 - TAR, on the straight pieces of the ROC
    accuracy        max over t of (accepted mated + rejected other) / pairs; ``balanced``: of (TAR + 1 - FAR) / 2
    by folds        accuracy of each fold at the t that is best on all others; their mean, and std / sqrt(folds)

TAR at a FAR is defined as in IJB-A to IJB-C (Klare et al. 2015; Maze et al. 2018); accuracy by folds is the protocol of
LFW (Huang et al. 2007; Huang and Learned-Miller 2014). With fewer than 1 / f other pairs, FAR f allows no false accept:
the result is then NaN, with a warning. A figure that is right to about 30% needs about 30 allowed false accepts
(Doddington et al. 2000, "rule of 30").

The scores are those of retrieval: computed in fp64, rounded to fp32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.checks import check_flag, check_integer, check_number, check_sequence
from ..optional import import_optional
from ..progress import Progress, reporter
from . import streaming
from .pairs import check_pairs, pair_scores
from .streaming import GallerySearch

__all__ = [
    "FoldAccuracy",
    "VerificationResult",
    "check_far",
    "fold_accuracy",
    "verify",
    "verify_pairs",
    "verify_scores",
]

EXACT_PAIRS = 1 << 22  # up to this number all scores are kept and sorted, some 0.4 GB in scikit-learn
BINS = 1 << 16


@dataclass(frozen=True)
class VerificationResult:
    """Rates of verification, fractions in [0, 1] (formulas at the top of the module).

    Where scores were counted in bins, the three errors bound how far the figures are from their exact values. They are
    computed from the counts, not estimated. best_threshold is then the edge of a bin, and accuracy a lower bound.

    Attributes:
        roc_auc: the area under the ROC.
        tar_at_far: FAR -> TAR; NaN where there are too few other pairs.
        threshold_at_far: FAR -> the threshold of that TAR; NaN where there are too few other pairs.
        eer: the equal error rate.
        best_threshold: the threshold of the largest accuracy: half way between the lowest accepted score and the
            highest rejected one; inf where nothing should be accepted.
        accuracy: the accuracy at that threshold.
        mated: how many pairs are of one class.
        other: how many pairs are of two classes.
        bin_width: the width of a bin; 0 where every score was kept.
        roc_auc_error: a bound on the absolute error of roc_auc.
        eer_error: a bound on the absolute error of eer.
        tar_error: FAR -> a bound: the exact TAR lies in [tar, tar + tar_error].
    """

    roc_auc: float
    tar_at_far: dict[float, float]
    threshold_at_far: dict[float, float]
    eer: float
    best_threshold: float
    accuracy: float
    mated: int
    other: int
    bin_width: float = 0.0
    roc_auc_error: float = 0.0
    eer_error: float = 0.0
    tar_error: dict[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FoldAccuracy:
    """Accuracy of held-out folds, in [0, 1].

    Attributes:
        mean: the mean over folds.
        standard_error: the standard error of the mean.
        accuracies: the accuracy of each fold.
        thresholds: the threshold of each fold.
    """

    mean: float
    standard_error: float
    accuracies: tuple[float, ...]
    thresholds: tuple[float, ...]


def verify(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    far: Sequence[float] = (1e-3, 1e-2),
    metric: str = "cosine",
    balanced: bool = True,
    bins: int | None = None,
    tile: tuple[int, int] | None = None,
    progress: Progress = None,
) -> VerificationResult:
    """Verify every pair, streamed: all i < j, or with references all N x M.

    Extra memory: about 40 bytes per entry of a tile and 16 bytes per bin; where exact, about 100 bytes per pair.

    Args:
        embeddings, labels, ref_embeddings, ref_labels, metric, tile: as in :func:`evaluate`.
        far: false accept rates in (0, 1] at which TAR is computed.
        balanced: whether both kinds of pair count half in the accuracy. The plain accuracy over all pairs is near 1
            even if no pair is ever accepted.
        bins: the number of bins over the possible scores. None: all scores are kept up to 4,194,304 pairs; beyond that
            there are 65,536 bins (for cosine over [-1, 1]: 3.1e-5 wide).
        progress: called with the number of embeddings whose pairs are finished; True: a tqdm bar.

    Returns:
        The rates, and bounds on their errors where bins were used.

    Raises:
        ValueError: wrong shapes, NaN or infinity, ``far`` or ``bins`` out of range, or one kind of pair missing.
        TypeError: wrong dtypes.
        ImportError: scikit-learn is missing.
    """
    if (ref_embeddings is None) != (ref_labels is None):
        raise ValueError("ref_embeddings and ref_labels belong together: give both or neither")
    far, balanced = check_far(far), check_flag("balanced", balanced)
    problem = streaming.check(embeddings, labels, ref_embeddings, ref_labels, None, metric, tile)
    same_set, count = ref_embeddings is None, len(embeddings)
    pairs = count * (count - 1) // 2 if same_set else count * len(problem.gallery)
    if bins is None and pairs > EXACT_PAIRS:
        bins = BINS
    bins = None if bins is None else check_integer("bins", bins)
    if bins is not None and not 2 <= bins <= 1 << 24:
        raise ValueError(f"bins must be None or an integer in [2, {1 << 24}]; got {bins}")
    with reporter(progress, count, "pairs", "embeddings") as report:
        tiles = _pair_tiles(problem, same_set, report)
        if bins is None:
            scores, same = (torch.cat(part) for part in zip(*((s.cpu(), y.cpu()) for s, y in tiles)))
            return _summary(scores.double().numpy(), same.numpy(), None, far, balanced, 0.0)
        low, high = _range(problem)
        width = (high - low) / bins
        counts = torch.zeros(2 * bins, dtype=torch.int64, device=problem.queries.device)
        for scores, same in tiles:
            place = scores.double().sub_(low).div_(width).long().clamp_(0, bins - 1)
            counts += torch.bincount(place.add_(same.long(), alpha=bins), minlength=2 * bins)
    edges = low + width * np.arange(bins)
    is_mated = np.repeat([False, True], bins)
    return _summary(np.concatenate([edges, edges]), is_mated, counts.cpu().numpy(), far, balanced, width)


def verify_pairs(
    embeddings: Tensor,
    first: Tensor,
    second: Tensor,
    same: Tensor,
    *,
    ref_embeddings: Tensor | None = None,
    far: Sequence[float] = (1e-3, 1e-2),
    metric: str = "cosine",
    balanced: bool = False,
    progress: Progress = None,
) -> VerificationResult:
    """Verify listed pairs, such as those of a protocol or of :func:`sample_pairs`.

    Extra memory: O(P), and blocks of a fixed size.

    Args:
        embeddings, ref_embeddings, far, metric: as in :func:`verify`.
        first: (P,) integers: rows of ``embeddings``.
        second: (P,) integers: rows of ``ref_embeddings``, or of ``embeddings`` without it.
        same: (P,) bool or integers: whether the pair is of one class.
        balanced: whether both kinds of pair count half in the accuracy, however many there are of each.
        progress: called with the number of pairs just finished; True: a tqdm bar.

    Returns:
        The exact rates.

    Raises:
        ValueError, TypeError, ImportError: as :func:`verify`; ValueError also for an index out of range.
    """
    scores = pair_scores(embeddings, first, second, ref_embeddings=ref_embeddings, metric=metric, progress=progress)
    return verify_scores(scores, same, far=far, balanced=balanced)


def verify_scores(
    scores: Tensor, same: Tensor, *, far: Sequence[float] = (1e-3, 1e-2), balanced: bool = False
) -> VerificationResult:
    """Verify pairs by given scores.

    Args:
        scores: (P,) floating point, larger for pairs that are more likely of one class; for example minus a distance.
        same: (P,) bool or integers: whether the pair is of one class.
        far: as in :func:`verify`.
        balanced: as in :func:`verify_pairs`.

    Returns:
        The exact rates.

    Raises:
        ValueError, TypeError, ImportError: as :func:`verify`.
    """
    scores, same = check_pairs(scores, same)
    balanced = check_flag("balanced", balanced)
    return _summary(scores.double().numpy(), same.numpy(), None, check_far(far), balanced, 0.0)


def fold_accuracy(
    scores: Tensor, same: Tensor, *, folds: int = 10, fold_of: Tensor | None = None, seed: int = 0
) -> FoldAccuracy:
    """Compute the accuracy of held-out folds, each at the threshold that is best on the others (the protocol of LFW).

    Args:
        scores: (P,), as in :func:`verify_scores`.
        same: (P,), as in :func:`verify_scores`.
        folds: the number of folds that are drawn where ``fold_of`` is not given. Both kinds of pair are spread evenly
            over them. Such folds share identities, which makes the accuracy slightly too high.
        fold_of: (P,) integers: the fold of each pair, where a protocol lists them. Give it where folds must not share
            identities, as in LFW.
        seed: of the drawn folds.

    Returns:
        The accuracies, in ascending order of the folds.

    Raises:
        ValueError: wrong shapes, NaN, fewer than 2 folds, or only one kind of pair outside a fold.
        TypeError: wrong dtypes.
        ImportError: scikit-learn is missing.
    """
    scores, same = check_pairs(scores, same)
    if fold_of is None:
        folds, seed = check_integer("folds", folds), check_integer("seed", seed, 0)
        if not 2 <= folds <= len(scores):
            raise ValueError(f"folds must be an integer in [2, {len(scores)}], the number of pairs; got {folds}")
        shuffled = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
        by_kind = shuffled[torch.argsort(same[shuffled].long(), stable=True)]
        fold_of = torch.empty(len(scores), dtype=torch.int64)
        fold_of[by_kind] = torch.arange(len(scores)) % folds
    fold_of = streaming.check_integers("fold_of", fold_of, len(scores), scores.device)
    names = fold_of.unique()
    if len(names) < 2:
        raise ValueError("fold_of must name at least two folds")
    accuracies, thresholds = [], []
    for name in names:
        held_out = fold_of == name
        threshold = verify_scores(scores[~held_out], same[~held_out], far=()).best_threshold
        thresholds.append(threshold)
        accuracies.append(((scores[held_out].double() >= threshold) == same[held_out]).double().mean().item())
    found = torch.tensor(accuracies, dtype=torch.float64)
    return FoldAccuracy(
        mean=found.mean().item(),
        standard_error=found.std().item() / math.sqrt(len(found)),
        accuracies=tuple(accuracies),
        thresholds=tuple(thresholds),
    )


def check_far(far: Sequence[float]) -> tuple[float, ...]:
    """Check false accept (or alarm) rates; the error names the wrong one."""
    rates = tuple(check_number(f"far[{i}]", rate) for i, rate in enumerate(check_sequence("far", far, "rates")))
    for rate in rates:
        if not 0 < rate <= 1:
            raise ValueError(f"far must hold rates in (0, 1]; got {rate}")
    return rates


def _pair_tiles(problem: GallerySearch, same_set: bool, report: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (scores, same), flat, for tiles of the pairs; within one set only i < j."""
    rows_at_a_time, refs_at_a_time = problem.tile
    device = problem.queries.device
    for top in range(0, len(problem.queries), rows_at_a_time):
        rows = torch.arange(top, min(top + rows_at_a_time, len(problem.queries)), device=device)
        queries = problem.queries_of(rows)
        for start in range(top if same_set else 0, len(problem.gallery), refs_at_a_time):
            refs = problem.gallery_of(start)
            scores = problem.scores(queries, refs)
            same = problem.labels[rows, None] == problem.gallery_labels[start : start + len(refs)]
            if same_set and start < top + len(rows):
                upper = torch.arange(start, start + len(refs), device=device) > rows[:, None]
                yield scores[upper], same[upper]
            else:
                yield scores.flatten(), same.flatten()
        report(len(rows))


def _range(problem: GallerySearch) -> tuple[float, float]:
    """The range of possible scores."""
    if problem.metric == "cosine":
        return -1.0, 1.0
    largest = []
    for vectors in (problem.queries, problem.gallery):
        blocks = (vectors[start : start + 4096].double() for start in range(0, len(vectors), 4096))
        largest.append(max(torch.linalg.vector_norm(block, dim=1).max().item() for block in blocks))
    if problem.metric == "euclidean":
        return -max(sum(largest), 1e-30), 0.0
    reach = max(math.prod(largest), 1e-30)
    return -reach, reach


def _summary(
    scores: Any, same: Any, weights: Any, far: tuple[float, ...], balanced: bool, width: float
) -> VerificationResult:
    """Compute the result from fp64 scores, or from the lower edges of bins with their counts as weights."""
    counts = np.ones_like(same, dtype=np.int64) if weights is None else weights
    mated, other = int(counts[same].sum()), int(counts[~same].sum())
    if not mated or not other:
        raise ValueError(f"both kinds of pair are needed; got {mated} of one class and {other} of two")
    metrics = import_optional("sklearn.metrics", "verification")
    fpr, tpr, thresholds = metrics.roc_curve(same, scores, sample_weight=weights, drop_intermediate=False)

    tar, threshold, slack = {}, {}, {}
    for rate in far:
        if rate * other < 1:
            warnings.warn(f"FAR {rate:g} needs {math.ceil(1 / rate)} pairs of two classes; got {other}", stacklevel=3)
            tar[rate] = threshold[rate] = slack[rate] = math.nan
            continue
        last = int(np.searchsorted(fpr, rate, side="right")) - 1
        tar[rate], threshold[rate] = float(tpr[last]), float(thresholds[last])
        slack[rate] = float(tpr[min(last + 1, len(tpr) - 1)] - tpr[last]) if width else 0.0

    eer, eer_error = _equal_error(fpr, tpr)
    shares = (0.5, 0.5) if balanced else (mated / (mated + other), other / (mated + other))
    accuracy = shares[0] * tpr + shares[1] * (1 - fpr)
    best = int(np.argmax(accuracy))
    cut = float(thresholds[best])
    if not width and 0 < best < len(thresholds) - 1:
        cut = (cut + float(thresholds[best + 1])) / 2
    return VerificationResult(
        roc_auc=float(metrics.auc(fpr, tpr)),
        tar_at_far=tar,
        threshold_at_far=threshold,
        eer=eer,
        best_threshold=cut,
        accuracy=float(accuracy[best]),
        mated=mated,
        other=other,
        bin_width=width,
        roc_auc_error=float(np.sum(np.diff(fpr) * np.diff(tpr)) / 2) if width else 0.0,
        eer_error=eer_error if width else 0.0,
        tar_error=slack,
    )


def _equal_error(fpr: Any, tpr: Any) -> tuple[float, float]:
    """The rate at which the ROC crosses FAR = FRR, and how far it can be from the crossing of the exact curve."""
    gap = fpr + tpr - 1
    after = max(int(np.argmax(gap >= 0)), 1)
    before = after - 1
    part = -gap[before] / (gap[after] - gap[before])
    step = fpr[after] - fpr[before]
    return float(fpr[before] + part * step), float(min(step, tpr[after] - tpr[before]))

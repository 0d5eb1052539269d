"""Identification, 1:K: to which identity of the gallery does an embedding belong, if to any? Closed and open set.

The score of a probe and an identity is that of the identity's nearest gallery vector ("max") or of the mean of its
vectors ("mean"). Over the probes whose identity is in the gallery (known) and those whose identity is not (unknown),

    rank of a known probe       1 + identities scored above its own; of equal scores the lowest label comes first
    CMC(r)                      known probes of rank <= r / known probes, every probe answered: closed set
    FAR(t)                      unknown probes with a score >= t for any identity / unknown probes
    DIR(t, r)                   known probes of rank <= r whose own score is >= t / known probes
    DIR at FAR f                DIR at the lowest threshold t with FAR(t) <= f

FAR is the false alarm rate and DIR the detection and identification rate; the papers of NIST and IJB call them FPIR and
TPIR. See Phillips, Grother and Micheals, "Evaluation Methods in Face Recognition", Handbook of Face Recognition 2011;
Grother and Phillips, "Models of large population recognition performance", CVPR 2004; IJB-C (Maze et al. 2018). With
fewer than 1 / f unknown probes FAR f cannot be measured: the result is NaN, with a warning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.checks import check_choice, check_integer
from ..progress import Progress, reporter
from . import streaming
from .streaming import GallerySearch
from .verification import check_far

__all__ = ["Identification", "IdentificationResult", "evaluate_identification", "identify"]


@dataclass(frozen=True)
class Identification:
    """The k nearest identities of N probes, nearest first.

    Attributes:
        identities: (N, k) int64 labels of the gallery.
        scores: (N, k) fp32.
    """

    identities: Tensor
    scores: Tensor

    def predictions(self, threshold: float, unknown: int = -1) -> Tensor:
        """The nearest identity where its score reaches the threshold, else ``unknown`` (rejected).

        Args:
            threshold: the lowest score that is accepted.
            unknown: the value for rejected probes.

        Returns:
            (N,) int64.
        """
        unknown = check_integer("unknown", unknown)
        return torch.where(self.scores[:, 0].double() >= threshold, self.identities[:, 0], unknown)


@dataclass(frozen=True)
class IdentificationResult:
    """Rates of identification, fractions in [0, 1] (formulas at the top of the module).

    Attributes:
        rank_1: CMC at rank 1, NaN without known probes.
        cmc: rank -> CMC, NaN without known probes.
        dir_at_far: (f, rank) -> DIR at FAR f, NaN where there are too few unknown probes.
        threshold_at_far: f -> the lowest threshold with FAR at most f, for ``Identification.predictions``; NaN where
            there are too few unknown probes.
        known: how many probes are known.
        unknown: how many probes are unknown.
        identities: how many identities the gallery holds.
    """

    rank_1: float
    cmc: dict[int, float]
    dir_at_far: dict[tuple[float, int], float]
    threshold_at_far: dict[float, float]
    known: int
    unknown: int
    identities: int


def identify(
    probes: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    k: int = 1,
    *,
    template: str = "max",
    metric: str = "cosine",
    tile: tuple[int, int] | None = None,
    progress: Progress = None,
) -> Identification:
    """Find the k nearest identities of each probe, nearest first; equal scores rank by lowest label.

    Extra memory: O(N k + M) and about 40 bytes per entry of a tile; for ``mean`` also the templates, 8 bytes an entry.

    Args:
        probes: (N, D) floating point, CPU or CUDA.
        gallery: (M, D) enrolled vectors.
        gallery_labels: (M,) integers: the identity of each enrolled vector; an identity has one vector or more.
        k: from 1 to the number of identities.
        template: ``max``: an identity scores as its nearest vector; ``mean``: as the mean of its vectors, which are
            unit vectors where ``metric`` is ``cosine``.
        metric: as in :func:`evaluate`.
        tile: as in :func:`evaluate`.
        progress: called with the number of probes just finished; True: a tqdm bar.

    Returns:
        The identities and their scores.

    Raises:
        ValueError: wrong shapes, an empty set, k out of [1, identities], NaN or infinity, an unknown metric or
            template.
        TypeError: wrong dtypes.
    """
    problem, names = _check(probes, gallery, gallery_labels, template, metric, tile)
    k = check_integer("k", k)
    if not 1 <= k <= len(names):
        raise ValueError(f"k={k} is out of range: the gallery holds {len(names)} identities")
    count, device = len(probes), probes.device
    identities = torch.empty(count, k, dtype=torch.int64, device=device)
    scores = torch.empty(count, k, device=device)
    order = torch.argsort(problem.gallery_labels, stable=True)
    with reporter(progress, count, "identification", "probes") as report:
        start = 0
        # Fewer rows where k is large: the running top-k stays within the tile.
        step = max(1, problem.tile[0] * problem.tile[1] // (problem.tile[1] + k))
        for start in range(0, count, step):
            rows = torch.arange(start, min(start + step, count), device=device)
            keys: Tensor | None = None
            for part in _identity_keys(problem, rows, order):
                merged = part if keys is None else torch.cat([keys, part], dim=1)
                keys = merged.topk(min(k, merged.shape[1]), dim=1).values
            assert keys is not None
            scores[rows] = streaming.score_of(keys)
            identities[rows] = names[streaming.index_of(keys)]
            report(len(rows))
    return Identification(identities, scores)


def evaluate_identification(
    probes: Tensor,
    probe_labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    far: Sequence[float] = (0.01, 0.1),
    template: str = "max",
    metric: str = "cosine",
    tile: tuple[int, int] | None = None,
    progress: Progress = None,
) -> IdentificationResult:
    """Compute CMC at the ranks and, where there are unknown probes, DIR at each false alarm rate and rank.

    The memory is that of :func:`identify` with k = max(ranks).

    Args:
        probes, gallery, gallery_labels, template, metric, tile, progress: as in :func:`identify`.
        probe_labels: (N,) integers; a label that the gallery lacks makes a probe unknown.
        ranks: the ranks of CMC and DIR; a rank above the number of identities counts as that number.
        far: false alarm rates in (0, 1]; the unknown probes given here determine the threshold.

    Returns:
        The rates. Without unknown probes both open-set dictionaries are empty.

    Raises:
        ValueError: as :func:`identify`; a rank that is not positive, or a rate outside (0, 1].
        TypeError: wrong dtypes.
    """
    rates = check_far(far)
    depths = streaming.check_depths("ranks", ranks)
    if min(depths) < 1:
        raise ValueError(f"ranks must be positive integers; got {ranks}")
    streaming.check_vectors("probes", probes)
    probe_labels = streaming.check_integers("probe_labels", probe_labels, len(probes), probes.device)
    streaming.check_vectors("gallery", gallery)
    gallery_labels = streaming.check_integers("gallery_labels", gallery_labels, len(gallery), probes.device)
    names = gallery_labels.unique()
    deepest = min(max(depths), len(names))
    found = identify(
        probes, gallery, gallery_labels, deepest, template=template, metric=metric, tile=tile, progress=progress
    )
    known = torch.isin(probe_labels, names)
    mated = (found.identities == probe_labels[:, None])[known]
    own = found.scores[known]

    def share(hits: Tensor, rank: int) -> float:
        return hits[:, :rank].any(dim=1).double().mean().item()

    alarms = found.scores[~known, 0].sort(descending=True).values
    thresholds = {rate: _threshold(alarms, rate) for rate in rates} if len(alarms) else {}
    # A NaN threshold gives no result; it must not count as "nothing detected".
    detected = {
        (rate, rank): math.nan if math.isnan(cut) else share(mated & (own.double() >= cut), rank)
        for rate, cut in thresholds.items()
        for rank in depths
    }
    return IdentificationResult(
        rank_1=share(mated, 1),
        cmc={rank: share(mated, rank) for rank in depths},
        dir_at_far=detected,
        threshold_at_far=thresholds,
        known=int(known.sum()),
        unknown=len(alarms),
        identities=len(names),
    )


def _threshold(alarms: Tensor, rate: float) -> float:
    """The lowest threshold that at most a share ``rate`` of the unknown probes' best scores (descending) reaches."""
    if rate * len(alarms) < 1:
        warnings.warn(f"FAR {rate:g} needs {math.ceil(1 / rate)} unknown probes; got {len(alarms)}", stacklevel=4)
        return math.nan
    # alarms / probes <= rate, with one rounding, as in verification.
    allowed = int((torch.arange(1, len(alarms) + 1, dtype=torch.float64) / len(alarms) <= rate).sum())
    if allowed == len(alarms):
        return -math.inf
    return torch.nextafter(alarms[allowed], torch.full_like(alarms[allowed], math.inf)).item()


def _identity_keys(problem: GallerySearch, rows: Tensor, order: Tensor) -> Iterator[Tensor]:
    """Yield keys (len(rows), identities) of whole identities; ``order`` sorts the gallery by identity, from 0 on."""
    queries = problem.queries_of(rows)
    unfinished = torch.full((len(rows),), -math.inf, device=rows.device)  # the best score of an identity that is cut
    for start in range(0, len(order), problem.tile[1]):
        part = order[start : start + problem.tile[1]]
        owners = problem.gallery_labels[part]
        scores = problem.scores(queries, streaming.prepare(problem.gallery[part], problem.metric == "cosine"))
        first, last = int(owners[0]), int(owners[-1])
        best = torch.full((len(rows), last - first + 1), -math.inf, device=rows.device)
        best.scatter_reduce_(1, (owners - first).expand(len(rows), -1), scores, "amax")
        best[:, 0] = torch.maximum(best[:, 0], unfinished)
        after = start + len(part)
        if after < len(order) and int(problem.gallery_labels[order[after]]) == last:
            unfinished, best = best[:, -1].clone(), best[:, :-1]
        else:
            unfinished = torch.full_like(unfinished, -math.inf)
        if best.shape[1]:
            yield streaming.key_of(best, first)


def _check(
    probes: Tensor, gallery: Tensor, gallery_labels: Tensor, template: str, metric: str, tile: tuple[int, int] | None
) -> tuple[GallerySearch, Tensor]:
    """The checked problem, with identities numbered by ascending label, and their labels."""
    check_choice("template", template, ("max", "mean"))
    streaming.check_vectors("probes", probes)
    streaming.check_vectors("gallery", gallery)
    problem = streaming.check(
        probes, None, gallery, gallery_labels, None, metric, tile, names=("gallery", "gallery_labels")
    )
    names, numbers, sizes = problem.gallery_labels.unique(return_inverse=True, return_counts=True)
    templates = problem.gallery
    if template == "mean":
        templates = torch.zeros(len(names), gallery.shape[1], dtype=torch.float64, device=gallery.device)
        for start in range(0, len(gallery), problem.tile[1]):
            part = numbers[start : start + problem.tile[1]]
            templates.index_add_(0, part, problem.gallery_of(start) / sizes[part, None])
        numbers = torch.arange(len(names), device=gallery.device)
    none = torch.empty(0, dtype=torch.int64, device=gallery.device)
    return GallerySearch(problem.queries, none, templates, numbers, problem.exclude, metric, problem.tile), names

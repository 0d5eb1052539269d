"""Pairs for verification: draws them from labels, scores them, checks them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..labels import integers_by_position
from ..ops.checks import check_integer, check_tensor
from ..progress import Progress, reporter
from . import streaming

__all__ = ["check_pairs", "pair_scores", "sample_pairs"]

BLOCK = 1 << 19  # entries of vectors that are gathered at a time


def sample_pairs(
    labels: Tensor, *, max_positives: int = 100_000, negatives: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pairs of rows for verification, without repeats and never of a row with itself.

    It takes O(N + P) memory.

    Args:
        labels: (N,) integers.
        max_positives: the most pairs of one class; where there are more, this many are drawn uniformly.
        negatives: the most pairs of two classes; None: as many as there are pairs of one class.
        seed: the same seed gives the same pairs.

    Returns:
        (first, second, same), two (P,) int64 and a (P,) bool, on the CPU. Pairs of one class come first.

    Raises:
        ValueError: one kind of pair is missing, or a count is not positive.
        TypeError: labels that are not integers.
    """
    labels = integers_by_position("labels", labels, booleans=True).cpu()
    if labels.dim() != 1:
        raise ValueError(f"labels must have shape (count,); got {tuple(labels.shape)}")
    max_positives, seed = check_integer("max_positives", max_positives, 1), check_integer("seed", seed, 0)
    negatives = None if negatives is None else check_integer("negatives", negatives, 1)
    order = torch.argsort(labels, stable=True)
    place = torch.arange(len(labels))
    _, sizes = torch.unique_consecutive(labels[order], return_counts=True)
    end = sizes.cumsum(0).repeat_interleave(sizes)  # in sorted order: where the class of each place ends
    generator = torch.Generator().manual_seed(seed)

    def draw(partners: Tensor, first_partner: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Pairs of a place and one of its partners, which are consecutive from first_partner on."""
        running = partners.cumsum(0)
        chosen = _choose(int(running[-1]) if len(running) else 0, most, generator)
        one = torch.searchsorted(running, chosen, right=True)
        two = first_partner[one] + chosen - (running[one] - partners[one])
        return order[one], order[two]

    mated = draw(end - 1 - place, place + 1, max_positives)
    other = draw(len(labels) - end, end, len(mated[0]) if negatives is None else negatives)
    if not len(mated[0]) or not len(other[0]):
        raise ValueError(
            "labels give no pair of one class" if not len(mated[0]) else "labels give no pair of two classes"
        )
    first, second = (torch.cat(ends) for ends in zip(mated, other))
    same = torch.arange(len(first)) < len(mated[0])
    return first, second, same


def _choose(count: int, most: int, generator: torch.Generator) -> Tensor:
    """All of range(count), or ``most`` of them drawn uniformly without repeats: int64, ascending."""
    if count <= most:
        return torch.arange(count)
    if count <= 2 * most:
        return torch.randperm(count, generator=generator)[:most].sort().values
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < most:
        fresh = torch.randint(count, (most - len(drawn) + 64,), generator=generator)
        drawn = torch.cat([drawn, fresh]).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:most]].sort().values


def pair_scores(
    embeddings: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    ref_embeddings: Tensor | None = None,
    metric: str = "cosine",
    progress: Progress = None,
) -> Tensor:
    """Score listed pairs by the cosine, the dot product, or minus the Euclidean distance.

    Memory: O(P), and blocks of a fixed size.

    Args:
        embeddings: (N, D) floating point.
        first: (P,) integers: rows of ``embeddings``.
        second: (P,) integers: rows of ``ref_embeddings``, or of ``embeddings`` without it.
        ref_embeddings: (M, D) floating point, on the same device.
        metric: as in :func:`evaluate`.
        progress: called with the number of pairs just finished; True: a tqdm bar.

    Returns:
        (P,) fp32.

    Raises:
        ValueError: wrong shapes, NaN or infinity, an index out of range, or an unknown metric.
        TypeError: wrong dtypes.
    """
    problem = streaming.check(embeddings, None, ref_embeddings, None, None, metric, None)
    device = problem.queries.device
    first = integers_by_position("first", first).to(device)
    if first.dim() != 1:
        raise ValueError(f"first must have shape (pairs,); got {tuple(first.shape)}")
    second = streaming.check_integers("second", second, len(first), device, booleans=False)
    for name, rows, count in (("first", first, len(embeddings)), ("second", second, len(problem.gallery))):
        if len(rows) and bool(((rows < 0) | (rows >= count)).any()):
            raise ValueError(f"{name} must hold indices in [0, {count})")
    scores = torch.empty(len(first), device=device)
    block = max(1, BLOCK // embeddings.shape[1])
    with reporter(progress, len(first), "pairs", "pairs") as report:
        for start in range(0, len(first), block):
            part = slice(start, start + block)
            a = problem.queries_of(first[part])
            b = streaming.prepare(problem.gallery[second[part]], metric == "cosine")
            if metric == "euclidean":
                scores[part] = -torch.linalg.vector_norm(a - b, dim=1).float()
            else:
                scores[part] = problem.settled((a * b).sum(dim=1), a, b)
            report(len(a))
    return scores


def check_pairs(scores: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Check scores (P,) and same (P,); return both detached and on the CPU, same as bool."""
    check_tensor("scores", scores)
    if not scores.is_floating_point():
        raise TypeError(f"scores must be a floating point tensor; got {getattr(scores, 'dtype', type(scores))}")
    if scores.dim() != 1 or not len(scores):
        raise ValueError(f"scores must be a non-empty (pairs,) tensor; got shape {tuple(scores.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores hold NaN or infinity")
    same = streaming.check_integers("same", same, len(scores), torch.device("cpu"))
    if not bool(((same == 0) | (same == 1)).all()):
        raise ValueError("same must hold only 0 and 1 (or False and True): is each pair of one class?")
    return scores.detach().cpu(), same.bool()

"""The functions of pair and triplet losses: sums of hinges, and mining. Reached as functional.masked_hinge_sum, ..."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..ops import choice as backends
from ..ops import contract
from ..ops import masked_argmax as _argmax
from ..ops import masked_hinge_sum as _hinge
from ..ops import pair_scores as _pairs
from ..ops.checks import check_choice, check_flag, check_integer, check_number, check_tensor, shown
from ..ops.signatures import ArgmaxSpec, Hinged, HingeSpec, Listed, ScoresSpec, Search

Threshold = Tensor | None | tuple[Tensor | None, Tensor | None]


class MaskedHingeSum(NamedTuple):
    """What masked_hinge_sum returns: (N,) each."""

    same: Tensor
    different: Tensor
    count_same: Tensor
    count_different: Tensor


class Choice(NamedTuple):
    """One set's choices, (N,) each: the bank index or -1, its score, and the number of candidates."""

    index: Tensor  # type: ignore[assignment]  # the field's names, before a tuple's methods
    score: Tensor
    count: Tensor  # type: ignore[assignment]


class MaskedArgmax(NamedTuple):
    """What masked_argmax returns; None for a set that was not asked for."""

    same: Choice | None
    different: Choice | None


def masked_hinge_sum(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    c: Tensor | None = None,
    *,
    metric: str = "euclidean",
    normalize: bool = True,
    same: tuple[float, float] | None = None,
    different: tuple[float, float] | None = None,
    threshold: Threshold = None,
    relative: bool = False,
    exclude: Tensor | None = None,
    ignore_index: int = -100,
    eps: float = 1e-12,
    backend: str | None = None,
) -> MaskedHingeSum:
    """Each row's sum of hinges over the bank entries of its own label, and over all others, in one pass.

    With the score s_ij of ``metric`` (larger is closer: u.p, -|u - p|^2, -|u - p|; unit vectors if ``normalize``), each
    set has its own factor k and offset o::

        same_i      = sum_{j: c_j  = y_i} relu(k_same s_ij + o_same + t_same_i)
        different_i = sum_{j: c_j != y_i} relu(k_different s_ij + o_different + t_different_i)

    and with ``relative`` s_ij - s_{i,y_i} in place of s_ij. A contrastive loss (Hadsell et al. 2006) of distances -s is
    ``same=(-1, -pos_margin), different=(1, neg_margin)``; a margin loss (Wu et al. 2017) learns its boundary through
    ``threshold``; triplets of a row, its proxy and every other proxy are ``different=(1, margin), relative=True``.
    Nothing of size N x M is built, in the forward, the backward or the double backward.

    Args:
        x: (N, D) rows. w: (M, D) bank, in a dtype of its own, as :func:`masked_logsumexp` has it.
        y: (N,) int64 labels of the rows. Without ``c`` they must be bank rows, or ``ignore_index``.
        c: (M,) int64 labels of the bank; None: each entry's own index.
        metric: ``cosine``, ``dot``, ``sqeuclidean`` or ``euclidean``.
        normalize: compare unit vectors (``cosine`` always does, ``dot`` never).
        same, different: (k, o) of each set; None leaves the set out: its sum and count are 0.
        threshold: t, a () or (N,) tensor for both sets, or a pair of these (each may be None); it gets a gradient.
        relative: subtract the row's own positive's score; needs ``c=None``. The positive's gradient is part of the same
            pass: no gather of ``w`` is needed outside.
        exclude: (N,) int64 bank index left out of both of the row's sets (its own copy), -1 for none.
        ignore_index: rows with this label, and bank entries whose ``c`` is it, are in no set.
        eps: guards the division by the norm.
        backend: overrides the choice of backend for this call.

    Returns:
        MaskedHingeSum of (N,) tensors: both sums in fp32 (fp64 where either is), differentiable twice, and the numbers
        of their positive terms in int64. The slope is 0 where a hinge is exactly 0, and at zero Euclidean distance.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value; the message names the fix.
        RuntimeError: no backend, or not the one asked for, runs this combination.
    """
    base, unit, eps, ignore_index = _check(x, w, y, c, exclude, metric, normalize, ignore_index, eps)
    n, m = x.size(0), w.size(0)
    if same is None and different is None:
        raise ValueError("neither set is asked for: give same=(k, o), different=(k, o) or both")
    relative = check_flag("relative", relative)
    if relative and c is not None:
        raise ValueError("relative=True compares with the row's own bank entry: it needs c=None")
    t_same, t_different = _thresholds(threshold)
    t_same, t_different = (None if s is None else t for s, t in ((same, t_same), (different, t_different)))
    for t in (t_same, t_different):
        contract.check_vector("threshold", t, n, x, integer=False, scalar=True)
    lines = (("same", same), ("different", different))
    numbers = [number for name, line in lines for number in contract.check_line(name, line, optional=True)]
    dtype = contract.product_dtype(x, w)
    chosen = backends.choose("masked_hinge_sum", x.device, dtype, argument=backend, size=(n, m, x.size(1)))
    spec = HingeSpec(
        metric=base, normalize=unit, hinge=numbers, relative=relative, eps=eps, ignore_index=ignore_index,
        dtype=dtype, backend=chosen,
    )  # fmt: skip
    return hinge_sum_of(Hinged(x, w, y, c, exclude, t_same, t_different), spec)


def hinge_sum_of(inputs: Hinged, spec: HingeSpec) -> MaskedHingeSum:
    """:func:`masked_hinge_sum` of arguments that are checked, on the backend that is chosen: for losses, which check
    theirs under their own names.
    """
    x, w, y, c, exclude, t_same, t_different = inputs
    if spec.backend == backends.REFERENCE:
        k_same, o_same, k_different, o_different = spec.hinge
        return MaskedHingeSum(*reference.masked_hinge_sum(
            x, w, y, c, metric=spec.metric, normalized=spec.normalize, same=(k_same, o_same),
            different=(k_different, o_different), t_same=t_same, t_different=t_different, relative=spec.relative,
            exclude=exclude, ignore_index=spec.ignore_index, eps=spec.eps,
        ))  # fmt: skip
    w, c, t_different = contract.apart(w, x), contract.apart(c, y), contract.apart(t_different, t_same)
    return MaskedHingeSum(*_hinge.masked_hinge_sum(Hinged(x, w, y, c, exclude, t_same, t_different), spec))


def masked_argmax(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    c: Tensor | None = None,
    *,
    metric: str = "euclidean",
    normalize: bool = True,
    which: str = "both",
    largest_same: bool = False,
    largest_different: bool = True,
    bounds: tuple[Tensor | None, Tensor | None] | None = None,
    noise_seed: int | None = None,
    cutoff: float = 0.5,
    nonzero_loss_cutoff: float = 1.4,
    exclude: Tensor | None = None,
    ignore_index: int = -100,
    eps: float = 1e-12,
    backend: str | None = None,
) -> MaskedArgmax:
    """Each row's hardest, or a sampled, bank entry of its own label and of other labels, in one pass; mining.

    With the score s_ij as in masked_hinge_sum (larger is closer), a set's choice is the candidate of largest score, or
    of smallest: by default the hardest positive (farthest) and the hardest negative (nearest). ``bounds`` keeps the
    candidates with low_i < s_ij < high_i: semi-hard negatives (Schroff et al. 2015) are the nearest below the
    positive's score, ``bounds=(None, s_ap)``.

    With ``noise_seed`` the choice is a draw, the distance-weighted sampling of Wu et al. 2017 on unit vectors: in
    proportion to w = 1/q(d) with d = max(distance, ``cutoff``), and nothing from ``nonzero_loss_cutoff`` on. It is the
    argmax of log w plus Gumbel noise, which a counter-based generator makes of (seed, row, column), so that a seed
    gives one result on any tiling and number of threads.

    Args:
        x, w, y, c, metric, normalize, exclude, ignore_index, eps, backend: as in masked_hinge_sum.
        which: ``same``, ``different`` or ``both``.
        largest_same, largest_different: choose the largest score of the set, else the smallest. Not used by a draw.
        bounds: (low, high), each an (N,) tensor or None: an open interval of scores, for every set asked for. NaN
            leaves the row no candidate.
        noise_seed: an integer from 0: draw, by distances of unit vectors; None: choose by score.
        cutoff, nonzero_loss_cutoff: the least distance that a draw weighs by, and the least that it never takes.

    Returns:
        MaskedArgmax of a Choice for each set: index (N,) int64 into the bank, of equal candidates the lowest, -1 where
        there is none; score (N,) in fp32 (fp64 where either is), detached, -inf where there is none (+inf where the
        smallest is chosen); count (N,) int64 of the candidates. NaN scores are no candidates, nor is -inf where the
        largest is chosen, nor +inf where the smallest is. Equal means equal scores: a matrix product may add in another
        order at the edge of a block, so that copies of one bank row can differ in the last bit of their scores. Which
        copy is taken then depends on the shapes and the backend; it is the same at every call.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value; the message names the fix.
        RuntimeError: no backend, or not the one asked for, runs this combination.
    """
    base, unit, eps, ignore_index = _check(x, w, y, c, exclude, metric, normalize, ignore_index, eps)
    n, m = x.size(0), w.size(0)
    check_choice("which", which, ("same", "different", "both"))
    if bounds is not None and (not isinstance(bounds, Sequence) or len(bounds) != 2):
        raise TypeError(f"bounds must be a pair (low, high); got {shown(bounds)}")
    low, high = (None, None) if bounds is None else bounds
    for t in (low, high):
        contract.check_vector("bounds", t, n, x, integer=False)
    noise_seed = None if noise_seed is None else check_integer("noise_seed", noise_seed, 0)
    cutoffs = _check_draw(noise_seed, cutoff, nonzero_loss_cutoff, base, unit)
    dtype = contract.product_dtype(x, w)
    chosen = backends.choose("masked_argmax", x.device, dtype, argument=backend, size=(n, m, x.size(1)))
    wanted = [which != "different", which != "same"]
    largest = [check_flag("largest_same", largest_same), check_flag("largest_different", largest_different)]
    if chosen == backends.REFERENCE:
        with torch.no_grad():
            found = tuple(reference.masked_argmax(
                x, w, y, c, metric=base, normalized=unit, largest=largest, low=low, high=high, seed=noise_seed,
                cutoffs=cutoffs, exclude=exclude, ignore_index=ignore_index, eps=eps,
            ))  # fmt: skip
    else:
        inputs = Search(x, contract.apart(w, x), y, contract.apart(c, y), exclude, low, high)
        noise, seed = noise_seed is not None, noise_seed or 0
        spec = ArgmaxSpec(
            metric=base, normalize=unit, wanted=wanted, largest=largest, noise=noise, seed=seed, cutoffs=cutoffs,
            eps=eps, ignore_index=ignore_index, dtype=dtype, backend=chosen,
        )  # fmt: skip
        found = _argmax.masked_argmax(inputs, spec)
    return MaskedArgmax(*(Choice(*found[3 * i : 3 * i + 3]) if wanted[i] else None for i in range(2)))


def pair_scores(
    x: Tensor,
    w: Tensor,
    rows: Tensor,
    cols: Tensor,
    metric: str = "cosine",
    *,
    normalize: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """The scores of listed pairs: s_k of row rows[k] of x and row cols[k] of w, larger is closer.

    Rows are gathered a block of pairs at a time, forward and backward; the backward adds a row's pairs up in the order
    of the list, so that the same call gives the same bits. Two equal rows have distance 0 exactly, and gradient 0.

    Args:
        x: (N, D) rows. w: (M, D) bank; x itself for pairs within a batch.
        rows, cols: (P,) int64, in [0, N) and [0, M); a pair may be there more than once.
        metric: ``cosine``, ``dot``, ``sqeuclidean`` or ``euclidean``: u.p, x.w, -|u - p|^2 or -|u - p|.
        normalize: compare unit vectors; implied by ``cosine``, and ``dot`` with it is ``cosine``.
        eps: guards the division by the norm.

    Returns:
        (P,) in fp32, or fp64 where either input is. Differentiable twice, then in O(P D) memory.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device, metric or index; the message names the fix.
    """
    contract.check_pair(x, w)
    for name, index in (("rows", rows), ("cols", cols)):
        check_tensor(name, index)
        contract.check_vector(name, index, rows.numel(), x, integer=True)
    base, unit = contract.split_metric(metric, normalize)
    w = contract.apart(w, x)
    acc = contract.accumulate_dtype(contract.product_dtype(x, w))
    spec = ScoresSpec(metric=base, normalize=unit, eps=contract.check_eps(eps), dtype=acc)
    return _pairs.pair_scores(Listed(x, w, rows, cols), spec)


def _check(
    x: Tensor, w: Tensor, y: Tensor, c: Tensor | None, exclude: Tensor | None,
    metric: str, normalize: bool, ignore_index: int, eps: float,
) -> tuple[str, bool, float, int]:  # fmt: skip
    """What both functions share; the metric as backends know it, eps and ignore_index."""
    contract.check_pair(x, w)
    contract.check_members(x, w.size(0), y, c, exclude)
    base, unit = contract.split_metric(metric, normalize, plain_dot=True)
    return base, unit, contract.check_eps(eps), check_integer("ignore_index", ignore_index)


def _thresholds(threshold: Threshold) -> tuple[Tensor | None, Tensor | None]:
    if threshold is None or isinstance(threshold, Tensor):
        return threshold, threshold
    if not isinstance(threshold, Sequence) or len(threshold) != 2:
        raise TypeError(
            f"threshold must be a tensor, a pair of tensors (same, different) or None; got {shown(threshold)}"
        )
    return threshold[0], threshold[1]


def _check_draw(seed: int | None, cutoff: float, nonzero_loss_cutoff: float, metric: str, unit: bool) -> list[float]:
    cutoffs = [check_number("cutoff", cutoff),
               check_number("nonzero_loss_cutoff", nonzero_loss_cutoff)]  # fmt: skip
    if seed is not None:
        if not unit:
            raise ValueError(
                f"noise_seed draws by the distances of unit vectors; got metric={metric!r} of vectors as they are. "
                "Use normalize=True, or metric='cosine'"
            )
        if min(cutoffs) <= 0:
            raise ValueError(f"cutoff and nonzero_loss_cutoff must be positive; got {cutoff} and {nonzero_loss_cutoff}")
    return cutoffs

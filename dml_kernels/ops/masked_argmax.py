"""masked_argmax: the hardest or a randomly drawn bank entry of each row's label and of other labels; no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import choice, own_bank
from .checks import check_choice, check_flag, check_integer, check_number, shown
from .contract import accumulate_dtype, apart, check_comparison, check_values, check_vector
from .library import register, without_autocast
from .signatures import ArgmaxSpec, Bank, Search


def _fwd(inputs: Search, spec: ArgmaxSpec) -> tuple[Tensor, ...]:
    inputs = own_bank.spelled_out(inputs, spec.own)
    check_values(Bank(*inputs[:5]), spec.ignore_index, first_class=spec.first_class)
    with without_autocast(inputs.x.device.type):
        return tuple(choice.BACKENDS[spec.backend].masked_argmax_fwd(inputs, spec))


def _fwd_fake(inputs: Search, spec: ArgmaxSpec) -> tuple[Tensor, ...]:
    dtypes = (torch.int64, accumulate_dtype(spec.dtype), torch.int64)
    sizes = [inputs.x.size(0) if wanted else 0 for wanted in spec.wanted]
    return tuple(inputs.x.new_empty(size, dtype=dtype) for size in sizes for dtype in dtypes)


fwd = register("masked_argmax_fwd", Search, ArgmaxSpec, 6, _fwd, _fwd_fake)


class Choice(NamedTuple):
    """The choices from one set, (N,) each: the bank index or -1, its score, and the number of candidates."""

    index: Tensor  # type: ignore[assignment]  # the field's names, before a tuple's methods
    score: Tensor
    count: Tensor  # type: ignore[assignment]


class MaskedArgmax(NamedTuple):
    """The result of masked_argmax, with None for a set that ``which`` does not name."""

    same: Choice | None
    different: Choice | None


def masked_argmax(
    x: Tensor,
    w: Tensor | None = None,
    y: Tensor | None = None,
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
    own: bool = False,
    ignore_index: int = -100,
    first_class: int | None = None,
    eps: float = 1e-12,
    backend: str | None = None,
) -> MaskedArgmax:
    """For mining: each row's hardest or a drawn bank entry of its label, and of other labels, in one pass.

    With the score s_ij as in masked_hinge_sum (larger is closer), the choice from a set is the candidate with the
    largest or the smallest score: by default the hardest positive (farthest) and the hardest negative (nearest).
    ``bounds`` keeps the candidates with low_i < s_ij < high_i: semi-hard negatives (Schroff et al. 2015) are the
    nearest ones below the positive's score, ``bounds=(None, s_ap)``.

    With ``noise_seed`` the choice is random: the distance-weighted sampling of Wu et al. 2017 on unit vectors, with
    probability proportional to w = 1/q(d), where d = max(distance, ``cutoff``), and 0 from ``nonzero_loss_cutoff`` on.
    It is the argmax of log w plus Gumbel noise, which a counter-based generator makes from (seed, row, column), so that
    a seed gives the same result for any tiling and number of threads.

    Args:
        x, w, y, c, metric, normalize, exclude, own, ignore_index, eps, backend: as in masked_hinge_sum.
        first_class: as in :func:`masked_logsumexp`. A row whose class is not in the bank has no candidate of its label,
            and all columns are of other labels.
        which: ``same``, ``different`` or ``both``.
        largest_same, largest_different: choose the largest score of the set, else the smallest. Draws do not use them.
        bounds: (low, high), each an (N,) tensor or None: an open interval of scores, for every chosen set. A row whose
            bound is NaN has no candidate.
        noise_seed: an integer of at least 0 to draw by distances of unit vectors; None to choose by score.
        cutoff: the smallest distance that a draw uses for its weights.
        nonzero_loss_cutoff: the distance from which on nothing is drawn.

    Returns:
        MaskedArgmax with a Choice for each set: index (N,) int64 into the bank, the lowest of equal candidates, -1
        where there is none; score (N,) in fp32 (fp64 where either input is fp64), detached, -inf where there is no
        candidate (+inf where the smallest is chosen); count (N,) int64 of the candidates. A NaN score is not a
        candidate, nor is -inf where the largest is chosen, nor +inf where the smallest is chosen. Candidates are equal
        if their scores are: a matrix product may add in another order at the edge of a block, so the scores of copies
        of one bank row can differ in the last bit. Then the choice among these copies depends on the shapes and the
        backend, but it is the same in every call.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value; the message names the fix.
        RuntimeError: no backend, or not the requested one, runs this combination.
    """
    y, numbers = check_comparison(
        x, w, y, c, exclude, own, metric, normalize, eps, ignore_index, plain_dot=True, first_class=first_class
    )
    check_choice("which", which, ("same", "different", "both"))
    if bounds is not None and (not isinstance(bounds, Sequence) or len(bounds) != 2):
        raise TypeError(f"bounds must be a pair (low, high); got {shown(bounds)}")
    low, high = (None, None) if bounds is None else bounds
    for t in (low, high):
        check_vector("bounds", t, x.size(0), x, integer=False)
    seed = None if noise_seed is None else check_integer("noise_seed", noise_seed, 0)
    spec = ArgmaxSpec(
        **numbers,
        wanted=[which != "different", which != "same"],
        largest=[check_flag("largest_same", largest_same), check_flag("largest_different", largest_different)],
        noise=seed is not None,
        seed=seed or 0,
        cutoffs=_check_draw(seed, cutoff, nonzero_loss_cutoff, numbers["metric"], numbers["normalize"]),
    )
    inputs = Search(*(t if t is None else t.detach() for t in (x, apart(w, x), y, apart(c, y), exclude, low, high)))
    spec = choice.settle("masked_argmax", inputs, spec, backend)
    if spec.backend == choice.REFERENCE:
        found = choice.reference.masked_argmax(own_bank.spelled_out(inputs, spec.own), spec)
    else:
        found = fwd(*inputs, *spec)
    return MaskedArgmax(*(Choice(*found[3 * i : 3 * i + 3]) if spec.wanted[i] else None for i in range(2)))


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

"""Random hostile inputs for every public function, values and derivatives, against the dense reference."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dml_kernels import functional as F
from dml_kernels import reference
from dml_kernels.ops.signatures import PairSpec
from dml_kernels.pairs import dense as dense_pairs
from tests.support.backends import on_backends
from tests.support.fuzzing import cases, check, fuzz
from tests.support.problems import METRICS, randint

# Distances of unit vectors are drawn more often: there equal rows are exact whatever strides they have.
metrics = st.sampled_from((*METRICS, *(m for m in METRICS if m[0].endswith("euclidean") and m[1]), ("euclidean", True)))


def points(leaves):
    return leaves["x"], leaves["w"]


@on_backends
@fuzz(50)
@given(case=cases())
def test_normalize(case, backend):
    case.w_dtype = case.x_dtype
    check(
        case,
        lambda leaves: {"x": F.normalize(leaves["x"], backend=backend)},
        lambda leaves: {"x": reference.normalize(leaves["x"])},
    )


@on_backends
@fuzz(120)
@given(case=cases(), metric=metrics)
def test_normalized_distance(case, metric, backend):
    name, normalize = metric
    # The matrix is in the products' dtype, and fp16 ends at 65,504.
    assume(case.product != torch.float16 or normalize or case.points.norm(dim=1).amax() < 100)
    check(
        case,
        lambda leaves: {"d": F.normalized_distance(*points(leaves), name, normalize=normalize, backend=backend)},
        lambda leaves: {"d": reference.normalized_distance(*points(leaves), name, normalize)},
    )


LINES = st.tuples(st.sampled_from([-2.0, 0.5, 1.0, 16.0]), st.sampled_from([-0.7, 0.0, 0.1]))


def labels(case, bank):
    """Arguments that say which pairs are which."""
    exclude = randint(-1, len(case.cols), len(case.rows), seed=case.seed + 7) if case.seed % 3 == 0 else None
    return {"exclude": exclude, **({} if bank else {"c": case.c})}


@st.composite
def logsumexp_cases(draw):
    bank = draw(st.booleans())
    policy, params = draw(st.sampled_from([
        ("linear", ()), ("linear", ()), ("quadratic", (0.4,)), ("max_pool", (3,)), ("softmax_pool", (2, 0.2)),
    ]))  # fmt: skip
    centres = int(params[0]) if policy.endswith("pool") else 1
    case = draw(cases(centres=centres, labels="bank" if bank else "classes"))
    columns = len(case.cols) // centres
    for name, size in (("scale", len(case.rows)), ("col_bias", columns)):
        if draw(st.sampled_from([False, False, True])):
            case.other[name] = case.vector(size, 8)
    case.needs |= draw(st.sets(st.sampled_from(sorted(case.other)))) if case.other else set()
    same, different = draw(LINES), draw(LINES)
    options = {"same": same, "different": different, "policy": policy, "policy_params": params}
    options["exclude"] = randint(-1, columns, len(case.rows), seed=case.seed + 7) if draw(st.booleans()) else None
    return case, options | ({} if bank else {"c": case.c})


@on_backends
@fuzz(120)
@given(drawn=logsumexp_cases(), metric=metrics)
def test_masked_logsumexp(drawn, metric, backend):
    (case, options), (name, normalize) = drawn, metric
    names = ("same", "different", "sum same", "sum different")

    def ours(leaves):
        out = F.masked_logsumexp(
            y=case.y, metric=name, normalize=normalize, sums=True, backend=backend, **leaves, **options
        )
        return dict(zip(names, out, strict=True))

    def dense(leaves):
        out = reference.masked_logsumexp(y=case.y, metric=name, normalized=normalize, **leaves, **options)
        return dict(zip(names, out, strict=True))

    # In all our derivatives Circle's weights are constants, as they are in the reference.
    check(case, ours, dense)


@on_backends
@fuzz(80)
@given(data=st.data(), bank=st.booleans(), metric=metrics, same=LINES, different=LINES)
def test_masked_hinge_sum(data, bank, metric, same, different, backend):
    case, (name, normalize) = data.draw(cases(labels="bank" if bank else "classes")), metric
    lines = {"same": same, "different": different}
    relative = bank and data.draw(st.booleans())
    options = {**labels(case, bank), **lines, "relative": relative, "metric": name}
    normalize = normalize or name == "cosine"
    # The sign of a term depends on rounding where lengths differ much, or where two rows of zeros are equally far.
    assume(not case.extreme() or (normalize and not relative))
    # So does the sign of a term whose entry is a copy of the row's positive: its hinge is 0 apart from rounding.
    assume(not relative or different[1] != 0)

    def ours(leaves):
        out = F.masked_hinge_sum(y=case.y, normalize=normalize, backend=backend, **leaves, **options)
        return {"same": out.same, "different": out.different}

    def dense(leaves):
        out = reference.masked_hinge_sum(y=case.y, normalized=normalize, **leaves, **options)
        return {"same": out[0], "different": out[1]}

    check(case, ours, dense)


@on_backends
@fuzz(80)
@given(case=cases(), metric=metrics, largest=st.tuples(st.booleans(), st.booleans()))
def test_masked_argmax(case, metric, largest, backend):
    """The score of the choice is the extreme of its set, and the score of the entry it names; counts are exact."""
    name, normalize = metric
    leaves, options = case.leaves(), labels(case, bank=False)
    found = F.masked_argmax(
        *(t.detach() for t in points(leaves)), case.y, metric=name, normalize=normalize or name == "cosine",
        largest_same=largest[0], largest_different=largest[1], backend=backend, **options,
    )  # fmt: skip

    def dense(leaves):
        s = reference.scores(*points(leaves), name, normalize)
        same, different = reference.sets(case.y, case.c, case.c.numel(), options["exclude"])
        out = {}
        for key, members, most in (("same", same, largest[0]), ("different", different, largest[1])):
            extreme = (
                s.masked_fill(~members, -torch.inf).amax(1) if most else s.masked_fill(~members, torch.inf).amin(1)
            )
            out[key] = extreme
            at = getattr(found, key).index
            out[f"{key} chosen"] = torch.where(at < 0, extreme, s.gather(1, at.clamp_min(0)[:, None]).squeeze(1))
            assert torch.equal(getattr(found, key).count, members.sum(1))
            assert torch.equal(at >= 0, members.any(1))
        return out

    def ours(leaves):
        return {f"{key}{more}": getattr(found, key).score for key in ("same", "different") for more in ("", " chosen")}

    case.needs = frozenset()
    check(case, ours, dense)


@fuzz(80)
@given(case=cases(), metric=metrics, pairs=st.integers(0, 200))
def test_pair_scores(case, metric, pairs):
    name, normalize = metric
    n = len(case.rows)
    rows, cols = (
        randint(0, max(size, 1), pairs if n else 0, seed=case.seed + 9 + size) for size in (n, len(case.cols))
    )
    check(
        case,
        lambda leaves: {"s": F.pair_scores(*points(leaves), rows, cols, name, normalize=normalize)},
        lambda leaves: {"s": reference.scores(*points(leaves), name, normalize)[rows, cols]},
    )


@fuzz(80)
@given(case=cases(), metric=metrics, kind=st.sampled_from(["softplus", "lifted"]), infinite=st.booleans())
def test_positive_pair_sum(case, metric, kind, infinite):
    name, normalize = metric
    n, m = len(case.rows), len(case.cols)
    case.other["u"] = case.vector(n, 10)
    if kind == "lifted":
        case.other["v"] = case.vector(m, 11)
    if infinite:
        for t in case.other.values():
            t[::2] = -torch.inf
    case.needs |= {"u"}
    params = (2.0,) if kind == "softplus" else (1.0, 0.3)
    exclude = labels(case, bank=False)["exclude"]

    def ours(leaves):
        out = F.positive_pair_sum(
            *points(leaves), case.y, case.c, leaves["u"], leaves.get("v"), kind=kind, params=params, metric=name,
            normalize=normalize, exclude=exclude,
        )  # fmt: skip
        return {"total": out.total}

    def dense(leaves):
        s = reference.scores(*points(leaves), name, normalize)
        same, _ = reference.sets(case.y, case.c, case.c.numel(), exclude)
        spec = PairSpec(
            kind=kind, params=list(params), metric=name, normalize=normalize, eps=1e-12, ignore_index=-100,
            dtype=torch.float64,
        )  # fmt: skip
        total, _, _ = dense_pairs.positive_pair_sum(s, same, leaves["u"], leaves.get("v"), spec)
        return {"total": total}

    check(case, ours, dense)


@fuzz(50)
@given(case=cases(), metric=metrics, smooth=st.booleans(), swap=st.booleans())
def test_triplet_sum(case, metric, smooth, swap):
    name, normalize = metric
    exclude = labels(case, bank=False)["exclude"]

    def ours(leaves):
        out = F.triplet_sum(
            *points(leaves), case.y, case.c, margin=0.1, smooth=smooth, swap=swap, metric=name, normalize=normalize,
            exclude=exclude,
        )  # fmt: skip
        return {"total": out.total}

    def dense(leaves):
        x, w = points(leaves)
        s, between = (reference.scores(t, w, name, normalize) for t in (x, w))
        same, different = reference.sets(case.y, case.c, case.c.numel(), exclude)
        return {"total": dense_pairs.triplet_sum(s, same, different, 0.1, smooth, between if swap else None)[0]}

    check(case, ours, dense)

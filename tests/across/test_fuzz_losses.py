"""Random hostile inputs for every loss of the registry, values and derivatives, against its own dense reference."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dml_kernels import reducers, use_backend
from dml_kernels.losses import REGISTRY, family
from tests.support.backends import on_backends
from tests.support.fuzzing import cases, check, fuzz
from tests.support.problems import randint

# N-pairs chooses its pairs itself and takes no references.
WITHIN_THE_BATCH = {"NPairsLoss"}
# Pair losses consist of several ops; "auto" takes the C++ kernels for those that exist in C++.
on_chosen = pytest.mark.parametrize("backend", ["torch", pytest.param("auto", marks=pytest.mark.cpp)])


def using(backend):
    return contextlib.nullcontext() if backend == "auto" else use_backend(backend)


def entries(names):
    """Draws a loss of the registry and one of its options."""
    return st.sampled_from([(name, i) for name in names for i in range(len(REGISTRY[name].options))])


def no_reference(case, entry):
    """Whether the derivative of the dense reference is not the truth, as at the angle between aligned vectors or at
    the length of a zero vector.
    """
    repeated = len(torch.cat((case.rows, case.cols)).unique()) < len(case.rows) + len(case.cols)
    aligned = entry.angular and (repeated or case.points.size(1) < 4)
    return aligned or (entry.lengths_matter and bool((case.points == 0).all(1).any()))


@on_backends
@fuzz(120)
@given(data=st.data(), which=entries(family("proxies")))
def test_losses_on_proxies(data, which, backend):
    entry, options = REGISTRY[which[0]], REGISTRY[which[0]].options[which[1]]
    case = data.draw(cases(centres=entry.centres, labels="bank", least=1))
    assume(not no_reference(case, entry))

    def call(function, **more):
        return lambda leaves: {"loss": function(leaves["x"], leaves["w"], case.y, **options, **more)}

    check(case, call(entry.function, backend=backend), call(entry.reference))


@on_chosen
@fuzz(100)
@given(data=st.data(), which=entries(family("pairs")), references=st.booleans())
def test_losses_on_pairs(data, which, references, backend):
    entry, options = REGISTRY[which[0]], REGISTRY[which[0]].options[which[1]]
    case = data.draw(cases(least=1, largest=24))
    references = references and which[0] not in WITHIN_THE_BATCH
    if not references:
        case.w_dtype = case.x_dtype

    def call(function):
        def loss(leaves):
            given = {"ref_emb": leaves["w"], "ref_labels": case.c} if references else {}
            return {"loss": function(leaves["x"], case.y, **given, **options)}

        return loss

    # The backward takes the backend of the forward, after the `with` has ended.
    def ours(leaves):
        with using(backend):
            return call(entry.function)(leaves)

    check(case, ours, call(entry.reference))


@on_backends
@fuzz(80)
@given(data=st.data(), which=entries(["MagnetLoss"]), given_centres=st.sampled_from([True, True, False]))
def test_magnet(data, which, given_centres, backend):
    entry, options = REGISTRY["MagnetLoss"], REGISTRY["MagnetLoss"].options[which[1]]
    case = data.draw(cases(labels="bank", least=1, largest=24))
    classes = randint(0, 4, len(case.cols), seed=case.seed + 12)
    if not given_centres:
        case.w_dtype = case.x_dtype

    def call(function, **more):
        def loss(leaves):
            centres = leaves["w"] if given_centres else None
            return {"loss": function(leaves["x"], case.y, classes, centers=centres, **options, **more)}

        return loss

    check(case, call(entry.function, backend=backend), call(entry.reference))


@on_chosen
@fuzz(150)
@given(
    data=st.data(),
    which=entries([*family("proxies"), *family("pairs")]),
    poison=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    reducer=st.sampled_from([None, "MeanReducer", "SumReducer", "AvgNonZeroReducer", "DivisorReducer"]),
)
def test_a_loss_of_nan_or_infinite_embeddings_is_never_a_number(data, which, poison, reducer, backend):
    entry, options = REGISTRY[which[0]], dict(REGISTRY[which[0]].options[which[1]])
    n, seed = data.draw(st.integers(2, 12)), data.draw(st.integers(0, 1000))
    x, y = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)), randint(0, 3, n, seed=seed)
    y = torch.cat((y, y, (y[:1] + 1) % 3))  # every row has a positive and a negative
    x = torch.cat((x, x.flip(1), -x[:1]))
    rows = slice(None) if which[0] in WITHIN_THE_BATCH else data.draw(st.integers(0, len(y) - 1))
    x[rows, data.draw(st.integers(0, 5))] = poison
    # To a softmax a score of -inf, which vectors that are not normalised can have, is a number.
    assume(poison != poison or getattr(options.get("distance"), "normalize_embeddings", True))
    if reducer == "DivisorReducer":
        assume(which[0] in ("MarginLoss", "ProxyAnchorLoss"))
    if reducer is not None and options.get("reduction", "mean") == "mean":
        options["reducer"] = getattr(reducers, reducer)()
    options.pop("metric", None)
    sizes = (3, 6) if entry.family == "proxies" else ()
    with using(backend):
        value = entry.loss(*sizes, **options)(x, y)
    assert not value.isfinite().any(), f"{which[0]} {options}: {value}"

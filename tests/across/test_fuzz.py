"""Random combinations of every option of masked_logsumexp, in fp64, against the dense reference."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.backends import on_backends
from tests.support.fuzzing import fuzz
from tests.support.problems import METRICS, OUTPUTS, Problem, randint, randn

FACTORS = st.sampled_from([-32.0, -1.0, 0.0, 0.5, 1.0, 30.0])
OFFSETS = st.sampled_from([-0.7, 0.0, 0.1])


@st.composite
def problems(draw):
    n, m, d = draw(st.integers(0, 9)), draw(st.integers(1, 90)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 1000))
    p = Problem.random(n, m, d, *draw(st.sampled_from(METRICS)), seed=seed)
    vectors = {"scale": n, "col_bias": m}
    for name in draw(st.sets(st.sampled_from(sorted(vectors)))):
        p.tensors[name] = randn(vectors[name], seed=seed + 20)
    if "scale" not in p.tensors:
        p.options["scale"] = draw(st.sampled_from([0.1, 1.0, 64.0]))
    p.options.update(same=(draw(FACTORS), draw(OFFSETS)), different=(draw(FACTORS), draw(OFFSETS)))
    if draw(st.booleans()):
        classes = draw(st.integers(1, 6))
        p.options["c"], p.y = randint(0, classes, m, seed=seed + 21), randint(0, classes + 1, n, seed=seed + 22)
        p.options["c"][:: draw(st.integers(1, 9))] = draw(st.sampled_from([-100, 0]))
    if draw(st.booleans()):
        p.options["exclude"] = randint(-1, m, n, seed=seed + 23)
    if draw(st.booleans()):
        p.y[:: draw(st.integers(1, 4))] = -100
    if "col_bias" in p.tensors and draw(st.booleans()):
        p.tensors["col_bias"][:: draw(st.integers(1, 5))] = -math.inf
    if draw(st.booleans()):
        same = min(n, m)
        p.tensors["w"][:same] = p.tensors["x"][:same] * draw(st.sampled_from([-1.0, 1.0]))
    return p


def values(p, function):
    leaves = {k: t.clone().requires_grad_() for k, t in p.tensors.items()}
    out = function(leaves)
    # An infinite output has no gradient.
    total = sum((torch.where(v.isfinite(), v, 0) * p.grads[k]).sum() for k, v in out.items())
    found = torch.autograd.grad(total, list(leaves.values()))
    return {**out, **{f"grad {k}": g for k, g in zip(leaves, found)}}


@on_backends
@fuzz(150)
@given(p=problems())
def test_any_combination_of_options_matches_the_reference(p, backend):
    found = values(p, lambda leaves: p.ours(leaves, backend))
    expected = values(p, lambda leaves: p.dense(leaves, torch.float64))
    assert set(OUTPUTS) < set(found)
    for name, value in found.items():
        # One dimension leaves a unit vector nothing to learn: rounding times the size of what was projected off.
        unit = max(1.0, expected[name].nan_to_num(neginf=0).abs().amax().item() if value.numel() else 1.0)
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9 * unit, msg=lambda m, n=name: f"{n}: {m}")

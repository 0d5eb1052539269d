"""Shared by the tests of the Magnet loss: a problem, and a function's value and gradients on it."""

from __future__ import annotations

import math

import pytest
import torch

from dml_kernels.losses.magnet import ENTRY
from tests.support.problems import randint, randn

OPTIONS = ENTRY.options
on_options = pytest.mark.parametrize("which", range(len(OPTIONS)), ids=[str(o or "defaults") for o in OPTIONS])
on_given = pytest.mark.parametrize("given", [False, True], ids=["batch means", "given centres"])


def problem(n=31, k=9, d=24, seed=0):
    """Embeddings around their clusters' centres, ids in random order; a row and a class to be ignored."""
    centers = randn(k, d, seed=seed) / math.sqrt(d)
    clusters = randint(0, k, n, seed=seed + 1)
    x = centers[clusters] + 0.7 * randn(n, d, seed=seed + 2) / math.sqrt(d)
    classes = torch.arange(k) // 2 * 5 - 3
    if n > 4 and k > 3:
        clusters[3], classes[2] = -100, -100
    return x, clusters, classes, centers


def evaluate(function, x, clusters, classes, centers=None, **options):
    leaves = {"x": x.clone().requires_grad_()}
    if centers is not None:
        leaves["w"] = centers.clone().requires_grad_()
    value = function(leaves["x"], clusters, classes, centers=leaves.get("w"), **options)
    grads = torch.autograd.grad(value.sum(), list(leaves.values()), materialize_grads=True)
    return {"value": value.detach(), **{f"grad {name}": g for name, g in zip(leaves, grads, strict=True)}}

"""Bad input: one table of (what, call, error, message), tested row by row. A message names the argument and the fix."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from dml_kernels import functional as F
from dml_kernels import losses
from tests.support.backends import on_backends

X, W, Y = torch.ones(4, 3), torch.ones(6, 3), torch.arange(4)
NAN, INF = math.nan, math.inf


class Row(NamedTuple):
    what: str
    call: Callable[..., Any]
    arguments: dict[str, Any]
    error: type[Exception]
    message: str  # regular expression
    on_backends: bool = False  # the backends check it too, so it runs on each


def normalize(what, error, message, **arguments):
    return Row(f"normalize: {what}", F.normalize, {"x": X, **arguments}, error, message)


def distance(what, error, message, **arguments):
    return Row(f"distance: {what}", F.normalized_distance, {"x": X, "w": W, **arguments}, error, message)


def lse(what, error, message, **arguments):
    return Row(f"lse: {what}", F.masked_logsumexp, {"x": X, "w": W, "y": Y, **arguments}, error, message, True)


def loss(what, error, message, **arguments):
    given = {"embeddings": X, "proxies": W, "labels": Y, **arguments}
    return Row(f"loss: {what}", F.proxy_nca_loss, given, error, message, True)


def module(what, error, message, **arguments):
    return Row(
        f"module: {what}", losses.ProxyNCALoss, {"num_classes": 6, "embedding_size": 3, **arguments}, error, message
    )


def forward(what, error, message, **arguments):
    return Row(
        f"forward: {what}", losses.ProxyNCALoss(6, 3), {"embeddings": X, "labels": Y, **arguments}, error, message
    )


def from_data(what, error, message, **arguments):
    call = losses.ProxyNCALoss(6, 3).init_from_data
    return Row(f"from data: {what}", call, {"embeddings": X, "labels": Y, **arguments}, error, message)


def matrices(make):
    """The faults that any pair of matrices can have."""
    return [
        make("x is a list", TypeError, r"x must be a torch\.Tensor; got list", x=[[1.0]]),
        make("x has one dimension", ValueError, r"x must have shape \(rows, D\); got \(3,\)", x=X[0]),
        make("x has three dimensions", ValueError, r"x must have shape .*got \(1, 4, 3\).*flatten", x=X[None]),
        make("w has one dimension", ValueError, r"w must have shape \(rows, D\); got \(3,\)", w=W[0]),
        make("x is integer", TypeError, r"x must be float32.*got torch\.int64.*x\.float\(\)", x=X.long()),
        make("x is complex", TypeError, r"x must be float32.*got torch\.complex64", x=X.to(torch.complex64)),
        make("w is boolean", TypeError, r"w must be float32.*got torch\.bool", w=W.bool()),
        make("sizes differ", ValueError, r"same embedding size; got 2 and 3", x=X[:, :2]),
        make("no bank", ValueError, r"w has no rows, shape \(0, 3\)", w=W[:0]),
        make("no columns", ValueError, r"embedding size 0", x=X[:, :0], w=W[:, :0]),
        make("w elsewhere", ValueError, r"x is on cpu and w on meta; move", w=W.to("meta")),
        make("metric", ValueError, r"metric must be one of cosine, dot, .*got 'l2'", metric="l2"),
        make("eps is 0", ValueError, r"eps must be positive.*got 0", eps=0),
        make("eps is negative", ValueError, r"eps must be positive.*got -1", eps=-1.0),
        make("eps is NaN", ValueError, r"eps must be finite", eps=NAN),
        make("eps is text", TypeError, r"eps must be a number; got 'small'", eps="small"),
        make("backend", ValueError, r"unknown backend 'gpu'; the backends are cpu, .*torch, reference", backend="gpu"),
    ]


def vectors():
    """The faults of the (N,) and (M,) arguments of masked_logsumexp."""
    rows = []
    for name, size, integer in (("y", 4, True), ("c", 6, True), ("exclude", 4, True), ("scale", 4, False),
                                ("col_bias", 6, False)):  # fmt: skip
        good = torch.zeros(size, dtype=torch.int64 if integer else torch.float32)
        shape = rf"{name} must have shape \({size},\)"
        rows += [
            lse(f"{name} too short", ValueError, rf"{shape}.*got \({size - 1},\)", **{name: good[:-1]}),
            lse(f"{name} has two dimensions", ValueError, shape, **{name: good[None]}),
            lse(
                f"{name} elsewhere",
                ValueError,
                rf"{name} is on meta and x on cpu; use {name}\.to",
                **{name: good.to("meta")},
            ),
        ]
        if integer:
            for dtype in (torch.float32, torch.bool, torch.int32):
                message = rf"{name} must be int64; got {dtype}.*{name}\.long\(\)"
                rows.append(lse(f"{name} is {dtype}", TypeError, message, **{name: good.to(dtype)}))
        else:
            message = rf"{name} must be a floating dtype; got torch\.int64.*{name}\.float\(\)"
            rows.append(lse(f"{name} is integer", TypeError, message, **{name: good.long()}))
        if name != "scale":
            rows.append(lse(f"{name} is a list", TypeError, rf"{name} must be a torch\.Tensor", **{name: [0] * size}))
    return rows


def filled(size, value, at=-1):
    t = torch.ones(size)
    t[at] = value
    return t


def labels(*values):
    return torch.tensor(values)


TABLE = [
    *matrices(distance),
    *matrices(lse),
    *vectors(),
    # normalize
    normalize("a list", TypeError, r"x must be a torch\.Tensor; got list", x=[1.0]),
    normalize("a number", ValueError, r"x must have shape \(\.\.\., D\)", x=torch.tensor(1.0)),
    normalize("no columns", ValueError, r"D at least 1; got \(4, 0\)", x=X[:, :0]),
    normalize("integer", TypeError, r"x must be float32.*x\.float\(\)", x=X.long()),
    normalize("complex", TypeError, r"x must be float32", x=X.to(torch.complex64)),
    normalize("eps", ValueError, r"eps must be positive", eps=0.0),
    normalize("backend", ValueError, r"unknown backend", backend="gpu"),
    # masked_logsumexp: values
    lse("label too large", ValueError, r"labels must be in \[0, 6\) or ignore_index \(-100\).*got 6$",
        y=labels(0, 1, 6, 2)),
    lse("label -1", ValueError, r"labels must be in \[0, 6\).*got -1$", y=labels(-1, 1, 5, 2)),
    lse("many bad labels", ValueError, r"got 7, 8, 9 and 1 more", y=labels(7, 8, 9, 10)),
    lse("label beyond 32 bits", ValueError, r"labels must be in", y=labels(0, 1 << 32, 0, 0)),
    lse("exclude too large", ValueError, r"exclude must be a bank index in \[0, 6\), or -1.*got 6$",
        exclude=labels(0, 6, -1, 2)),
    lse("exclude -2", ValueError, r"exclude must be.*got -2$", exclude=labels(0, -2, -1, 2)),
    lse("scale is NaN", ValueError, r"scale must be finite", scale=NAN),
    lse("scale is infinite", ValueError, r"scale must be finite", scale=INF),
    lse("scale is text", TypeError, r"scale must be a number", scale="large"),
    lse("scale is None", TypeError, r"scale must be a number", scale=None),
    lse("scale holds NaN", ValueError, r"scale must be finite; got nan", scale=filled(4, NAN)),
    lse("scale tensor is infinite", ValueError, r"scale must be finite; got inf", scale=torch.tensor(INF)),
    lse("col_bias holds +inf", ValueError, r"col_bias must be finite or -inf.*got inf", col_bias=filled(6, INF)),
    lse("col_bias holds NaN", ValueError, r"col_bias must be finite or -inf.*got nan", col_bias=filled(6, NAN)),
    lse("same is a number", TypeError, r"same must be a pair \(factor, offset\); got 1", same=1.0),
    lse("same has three values", ValueError, r"same must be a pair \(factor, offset\)", same=(1.0, 0.0, 0.0)),
    lse("different holds NaN", ValueError, r"different\[0\] must be finite", different=(NAN, 0.0)),
    lse("offset is infinite", ValueError, r"same\[1\] must be finite", same=(1.0, INF)),
    lse("offset is text", TypeError, r"different\[1\] must be a number", different=(1.0, "b")),
    lse("policy", ValueError, r"policy must be one of linear, quadratic, .*got 'cubic'", policy="cubic"),
    lse("policy without its numbers", ValueError, r"policy 'softmax_pool' takes policy_params \(K, gamma\); got \(3,\)",
        policy="softmax_pool", policy_params=(3,)),
    lse("numbers without a policy", ValueError, r"policy 'linear' takes policy_params \(\); got \(3,\)",
        policy_params=(3,)),
    lse("policy_params is a number", ValueError, r"policy 'max_pool' takes policy_params \(K\); got 3",
        policy="max_pool", policy_params=3),
    lse("policy_params holds text", TypeError, r"policy_params\[0\] \(m\) must be a number; got 'a'",
        policy="quadratic", policy_params=("a",)),
    lse("m is NaN", ValueError, r"policy_params\[0\] \(m\) must be finite", policy="quadratic", policy_params=(NAN,)),
    lse("K is a fraction", ValueError, r"K, centres a class\) must be a positive integer; got 1\.5",
        policy="max_pool", policy_params=(1.5,)),
    lse("K is 0", ValueError, r"K, centres a class\) must be a positive integer; got 0",
        policy="max_pool", policy_params=(0,)),
    lse("K does not divide the bank", ValueError, r"w must have K rows a class; got 6 rows, no multiple of K = 4",
        policy="max_pool", policy_params=(4,)),
    lse("gamma is 0", ValueError, r"policy_params\[1\] \(gamma\) must be positive.*got 0", policy="softmax_pool",
        policy_params=(2, 0)),
    lse("label beyond the classes", ValueError, r"labels must be in \[0, 3\).*a class of 2 centres; got 3$",
        y=labels(0, 3, 0, 0), policy="max_pool", policy_params=(2,)),
    lse("exclude beyond the classes", ValueError, r"exclude must be a bank index in \[0, 3\), or -1.*got 3$",
        y=labels(0, 1, 0, 0), exclude=labels(0, 3, -1, 2), policy="max_pool", policy_params=(2,)),
    lse("c for each centre", ValueError, r"c must have shape \(3,\); got \(6,\)", y=labels(0, 1, 0, 0),
        c=labels(0, 0, 1, 1, 2, 2), policy="max_pool", policy_params=(2,)),
    lse("ignore_index is a fraction", TypeError, r"ignore_index must be an integer; got 0\.5", ignore_index=0.5),
    # proxy_nca_loss
    loss("embeddings is a list", TypeError, r"embeddings must be a torch\.Tensor", embeddings=[[1.0]]),
    loss("embeddings has one dimension", ValueError, r"embeddings must have shape \(rows, D\)", embeddings=X[0]),
    loss("embeddings is integer", TypeError, r"embeddings must be float32.*embeddings\.float\(\)", embeddings=X.long()),
    loss("proxies has one dimension", ValueError, r"proxies must have shape \(rows, D\)", proxies=W[0]),
    loss("sizes differ", ValueError, r"embeddings and proxies must have the same embedding size; got 2 and 3",
         embeddings=X[:, :2]),
    loss("no proxies", ValueError, r"proxies has no rows", proxies=W[:0]),
    loss("proxies elsewhere", ValueError, r"embeddings is on cpu and proxies on meta; move", proxies=W.to("meta")),
    loss("labels is a list", TypeError, r"labels must be a torch\.Tensor; got list", labels=[0, 1]),
    loss("labels is float", TypeError, r"labels must be integers; got torch\.float32.*labels\.long\(\)",
         labels=Y.float()),
    loss("labels is boolean", TypeError, r"labels must be integers; got torch\.bool", labels=Y.bool()),
    loss("labels too short", ValueError, r"labels must have shape \(4,\).*got \(3,\)", labels=Y[:3]),
    loss("labels one-hot", ValueError, r"labels must have shape \(4,\).*got \(4, 6\)", labels=torch.zeros(4, 6).long()),
    loss("label too large", ValueError, r"labels must be in \[0, 6\).*got 6", labels=labels(0, 6, 1, 2)),
    loss("label -1", ValueError, r"labels must be in \[0, 6\).*ignore_index.*got -1", labels=labels(0, -1, 1, 2)),
    loss("reduction", ValueError, r"reduction must be one of mean, sum, none; got 'max'", reduction="max"),
    loss("label_smoothing of 1", ValueError, r"label_smoothing must be in \[0, 1\); got 1", label_smoothing=1.0),
    loss("label_smoothing negative", ValueError, r"label_smoothing must be in \[0, 1\)", label_smoothing=-0.1),
    loss("label_smoothing NaN", ValueError, r"label_smoothing must be finite; got nan", label_smoothing=NAN),
    loss("smoothing without the positive", ValueError, r"label_smoothing needs the positive.*exclude_positive=False",
         label_smoothing=0.1, exclude_positive=True),
    loss("softmax_scale NaN", ValueError, r"scale must be finite", softmax_scale=NAN),
    loss("softmax_scale of wrong shape", ValueError, r"scale must have shape \(4,\) or \(\)",
         softmax_scale=torch.ones(3)),
    loss("class_weight of two dimensions", ValueError, r"class_weight must have shape", class_weight=torch.ones(6, 1)),
    loss("class_weight too short", ValueError, r"class_weight must have shape \(6,\); got \(5,\)",
         class_weight=torch.ones(5)),
    loss("class_weight is a list", TypeError, r"class_weight must be a torch\.Tensor", class_weight=[1.0] * 6),
    loss("class_weight NaN", ValueError, r"class_weight must be finite", class_weight=filled(6, NAN)),
    loss("label outside the map", ValueError, r"labels must be in \[0, 3\), the size of label_to_proxy; got 3",
         label_to_proxy=labels(0, 1, 0)),
    loss("map outside the proxies", ValueError, r"label_to_proxy must be in \[0, 6\).*got 9",
         label_to_proxy=labels(0, 1, 9, 2)),
    loss("map of floats", TypeError, r"label_to_proxy must be int64", label_to_proxy=torch.zeros(4)),
    loss("map of two dimensions", ValueError, r"label_to_proxy must have shape",
         label_to_proxy=torch.zeros(4, 1).long()),
    loss("empty map", ValueError, r"label_to_proxy", label_to_proxy=torch.zeros(0).long()),
    # ProxyNCALoss
    module("no classes", ValueError, r"num_classes must be a positive integer; got 0", num_classes=0),
    module("negative width", ValueError, r"embedding_size must be a positive integer; got -3", embedding_size=-3),
    module("fraction of a class", TypeError, r"num_classes must be an integer; got 2\.5", num_classes=2.5),
    module("reduction", ValueError, r"reduction must be one of", reduction="avg"),
    module("smoothing", ValueError, r"label_smoothing must be in", label_smoothing=2.0),
    module("class_weight", ValueError, r"class_weight must have shape \(6,\); got \(5,\)", class_weight=torch.ones(5)),
    module("proxies of wrong shape", ValueError, r"proxies must have shape \(6, 3\); got \(6, 4\)",
           proxies=torch.ones(6, 4)),
    module("proxies transposed", ValueError, r"proxies must have shape \(6, 3\); got \(3, 6\)", proxies=W.t()),
    module("proxies of integers", TypeError, r"proxies must be", proxies=W.long()),
    module("short map", ValueError, r"label_to_proxy must be int64 of shape \(6,\)", label_to_proxy=Y),
    module("map of floats", ValueError, r"label_to_proxy must be int64.*got torch\.float32",
           label_to_proxy=torch.zeros(6)),
    module("negative map", ValueError, r"label_to_proxy must not be negative; got -1",
           label_to_proxy=labels(0, 1, 2, -1, 0, 0)),
    forward("indices_tuple of two", ValueError, r"indices_tuple must be triplets.*or pairs", indices_tuple=(Y, Y)),
    forward("indices_tuple out of range", ValueError, r"indices_tuple must hold rows in \[0, 4\); got 0 to 4",
            indices_tuple=(labels(0), labels(4), labels(1), labels(2))),
    forward("no labels", ValueError, r"ProxyNCALoss needs labels", labels=None),
    forward("ref_emb", ValueError, r"does not take ref_emb", ref_emb=X + 1),
    forward("label too large", ValueError, r"labels must be in \[0, 6\)", labels=labels(0, 1, 2, 6)),
    forward("wrong width", ValueError, r"embeddings and proxies must have the same embedding size",
            embeddings=torch.ones(4, 5)),
    from_data("unknown way", ValueError, r"how must be one of mean, sample, nearest; got 'median'", how="median"),
    from_data("label too large", ValueError, r"labels must be in \[0, 6\)", labels=labels(0, 1, 2, 6)),
    from_data("labels too short", ValueError, r"labels must have shape \(4,\)", labels=Y[:2]),
    from_data("wrong width", ValueError, r"embeddings must have shape \(n, 3\); got \(4, 5\)",
              embeddings=torch.ones(4, 5)),
]  # fmt: skip


def check(row, **more):
    with pytest.raises(Exception) as caught:
        row.call(**row.arguments, **more)
    found = f"{type(caught.value).__name__}: {caught.value}"
    assert caught.type is row.error, f"{found} is not the {row.error.__name__} wanted"
    assert re.search(row.message, str(caught.value)), f"{found!r} does not match {row.message!r}"


def ids(rows):
    return [row.what for row in rows]


def test_the_table_names_every_case_once():
    assert len(set(ids(TABLE))) == len(TABLE)


@pytest.mark.parametrize("row", TABLE, ids=ids(TABLE))
def test_is_refused_with_the_argument_and_the_fix(row):
    check(row)


CHOSEN = [row for row in TABLE if row.on_backends and not {"backend", "policy"} & set(row.arguments)]


@on_backends
@pytest.mark.parametrize("row", CHOSEN, ids=ids(CHOSEN))
def test_every_backend_refuses_it_alike(row, backend):
    check(row, backend=backend)


@pytest.mark.parametrize("call", [F.normalized_distance, F.masked_logsumexp, F.proxy_nca_loss])
def test_good_input_is_not_refused(call):
    """The table's unchanged arguments pass, so that each row fails for its own reason."""
    call(*((X, W) if call is F.normalized_distance else (X, W, Y)))
    losses.ProxyNCALoss(6, 3)(X, Y)
    losses.ProxyNCALoss(6, 3).init_from_data(X, Y)
    F.normalize(X)


def test_nothing_was_changed_by_a_refusal():
    loss = losses.ProxyNCALoss(6, 3)
    before = loss.proxies.detach().clone()
    with pytest.raises(ValueError, match="labels"):
        loss.init_from_data(X, labels(0, 1, 2, 6))
    assert torch.equal(loss.proxies, before)

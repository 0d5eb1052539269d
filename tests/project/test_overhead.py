"""`python -m bench.overhead`: what it counts, and the checks that a call of a loss may do only once."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from dml_kernels import losses
from dml_kernels.ops import checks, masked_logsumexp

overhead = pytest.importorskip("bench.overhead", reason="the benchmarks are not beside these tests")


def test_hops_are_the_packages_own_functions():
    # check_positive -> check_number, one file; nothing of PyTorch is counted.
    assert overhead.hops(lambda: checks.check_positive("scale", 1.0)) == (2, 1, 0)
    assert overhead.hops(lambda: torch.nn.Linear(2, 2)(torch.ones(1, 2))) == (0, 0, 0)


def test_ops_are_those_that_the_dispatcher_sees():
    seen = [str(op) for op, _ in overhead.ops_of(lambda: torch.ones(3) * 2)]
    assert seen == ["aten.ones.default", "aten.mul.Tensor"]


@pytest.mark.cpp
def test_layers_lie_one_under_the_other():
    x, y = overhead.batch("proxies")
    call = overhead.functional.masked_logsumexp
    found = overhead.layers("masked_logsumexp", lambda: call(x, x.detach() + 1, y, scale=8.0, backend="cpu"))
    assert [name.split(": ")[1] for name in found] == [
        "autograd Function", "registered op", "the cpu backend's method", "C++",
    ]  # fmt: skip
    ends = [overhead.ops_of(layer)[0][0] for layer in found.values()]
    assert ends[:2] == [masked_logsumexp.fwd] * 2
    assert "dml_kernels_cpu" in str(ends[3])


def test_the_command_prints_a_row_for_each_loss_and_layer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(overhead, "REPEATS", 1)
    threads = torch.get_num_threads()
    try:
        assert overhead.main(["--losses", "ArcFaceLoss,NTXentLoss", "--rounds", "1", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    (path,) = tmp_path.iterdir()
    records = {r["name"]: r for r in json.loads(path.read_text())["records"]}
    assert {"ArcFaceLoss", "NTXentLoss", "proxy_nca: function"} <= set(records)
    assert 0 < records["ArcFaceLoss"]["forward"] < records["ArcFaceLoss"]["step"]
    assert "ArcFaceLoss" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        overhead.main(["--losses", "ArcLoss"])


@pytest.mark.parametrize("name", losses.family("proxies"))
def test_a_loss_checks_and_chooses_once(name):
    """In the whole call: what one function has checked, such as softmax_loss, the functions it calls do not check."""
    entry = losses.REGISTRY[name]
    x, y = overhead.batch("proxies")
    for options in entry.options:
        proxies = torch.randn(overhead.SIZE * entry.centres, overhead.SIZE)
        called = Counter(code.co_name for code in overhead.called(lambda: entry.function(x, proxies, y, **options)))  # noqa: B023
        assert [called[f] for f in ("check_pair", "product_dtype", "choose")] == [1, 1, 1], options

"""Run as a child by tests of memory: `python -m tests.support.memory_probe WHAT ARGUMENTS`, JSON on stdout.

It is a new process because memory that an earlier call left in a pool would be reused without showing.
"""

from __future__ import annotations

import json
import sys

import torch

from dml_kernels import functional as F
from dml_kernels import miners, regularizers
from dml_kernels.losses import REGISTRY, CrossBatchMemory
from dml_kernels.ops import normalized_distance as distance_ops
from dml_kernels.profiling import peak_extra_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def step(backend: str, n: int, m: int, d: int, dtype: str, collapsed: str = "") -> dict:
    """The peak of a forward and backward of the loss, and its gradients' bytes; `collapsed`: points nearly equal."""

    def problem(n, m):
        x, w = torch.randn(n, d, dtype=DTYPES[dtype]), torch.randn(m, d, dtype=DTYPES[dtype])
        if collapsed:
            x, w = (t.mul_(1e-3).add_(1) for t in (x, w))
        return x.requires_grad_(), w.requires_grad_(), torch.randint(0, m, (n,))

    def run(x, w, y):
        F.proxy_nca_loss(x, w, y, softmax_scale=8, backend=backend).backward()
        return x.grad, w.grad

    small, large = problem(8, 600), problem(n, m)
    peak = peak_extra_bytes(lambda: run(*large), lambda: run(*small))
    gradients = sum(t.numel() * t.element_size() for t in large[:2])
    return {"peak": peak, "gradients": gradients}


def pooled(backend: str, policy: str, n: int, m: int, k: int, d: int) -> dict:
    """As step, for both log-sum-exps of n rows over m classes of k centres."""

    def problem(n, m):
        x, w = torch.randn(n, d, requires_grad=True), torch.randn(m * k, d, requires_grad=True)
        return x, w, torch.randint(0, m, (n,))

    def run(x, w, y):
        params = (k,) if policy == "max_pool" else (k, 0.1)
        out = F.masked_logsumexp(x, w, y, scale=8.0, policy=policy, policy_params=params, backend=backend)
        (out.different - out.same).sum().backward()
        return x.grad, w.grad

    small, large = problem(8, 200), problem(n, m)
    peak = peak_extra_bytes(lambda: run(*large), lambda: run(*small))
    return {"peak": peak, "gradients": sum(t.numel() * t.element_size() for t in large[:2])}


def pair_loss(name: str, n: int, d: int, per_class: int) -> dict:
    """As step, for a pair loss on n rows, per_class of each class."""
    loss = REGISTRY[name].loss()

    def problem(n):
        return torch.randn(n, d, requires_grad=True), torch.arange(n) // per_class

    def run(x, y):
        loss(x, y).backward()
        return x.grad

    small, large = problem(256), problem(n)
    peak = peak_extra_bytes(lambda: run(*large), lambda: run(*small))
    return {"peak": peak, "gradients": large[0].nbytes}


def cross_batch(n: int, m: int, d: int) -> dict:
    """As step, for a contrastive loss of n rows with a full memory of m."""

    def problem(n, m):
        memory = CrossBatchMemory(REGISTRY["ContrastiveLoss"].loss(), d, m)
        for _ in range(m // n):
            memory.add_to_memory(torch.randn(n, d), torch.randint(0, m // 8, (n,)))
        return memory, torch.randn(n, d, requires_grad=True), torch.randint(0, m // 8, (n,))

    def run(memory, x, y):
        memory(x, y).backward()
        return x.grad

    small, large = problem(32, 256), problem(n, m)
    peak = peak_extra_bytes(lambda: run(*large), lambda: run(*small))
    return {"peak": peak, "gradients": large[1].nbytes}


def magnet(backend: str, n: int, k: int, d: int, given: int) -> dict:
    """As step, for the Magnet loss of n rows in k clusters, with given centres if `given`."""

    def problem(n, k):
        x, w = torch.randn(n, d, requires_grad=True), torch.randn(k, d, requires_grad=True)
        return x, w if given else None, torch.randint(0, k, (n,)), torch.arange(k) // 3

    def run(x, w, clusters, classes):
        F.magnet_loss(x, clusters, classes, centers=w, backend=backend).backward()
        return x.grad, None if w is None else w.grad

    small, large = problem(8, 6), problem(n, k)
    peak = peak_extra_bytes(lambda: run(*large), lambda: run(*small))
    return {"peak": peak, "gradients": (n + k * given) * d * 4}


def mine(n: int) -> dict:
    """The peak of each miner on n rows in well separated classes of 8, so that few tuples are listed."""

    def problem(n):
        y = torch.arange(n) // 8
        return torch.randn(n // 8, 32).repeat_interleave(8, 0) + 0.02 * torch.randn(n, 32), y

    kinds = {
        miners.TripletMarginMiner(type_of_triplets="hard"), miners.PairMarginMiner(0.9, 0.3), miners.BatchHardMiner(),
        miners.MultiSimilarityMiner(), miners.BatchEasyHardMiner(), miners.UniformMiner(2),
        miners.DistanceWeightedMiner(triplets_per_anchor=2),
    }  # fmt: skip
    data, small = problem(n), problem(80)
    return {type(kind).__name__: peak_extra_bytes(lambda k=kind: k(*data), lambda k=kind: k(*small)) for kind in kinds}


def pairs(backend: str, n: int, m: int, d: int, what: str) -> dict:
    """As step, for masked_hinge_sum, or for masked_argmax by score or by draws."""

    def problem(n, m):
        x, w = torch.randn(n, d, requires_grad=True), torch.randn(m, d, requires_grad=True)
        return x, w, torch.randint(0, m, (n,))

    def run(x, w, y):
        if what == "hinge":
            out = F.masked_hinge_sum(x, w, y, different=(1, 1.3), relative=True, backend=backend)
            out.different.sum().backward()
            return x.grad, w.grad
        draw = {"noise_seed": 3} if what == "draw" else {}
        return F.masked_argmax(x, w, y, backend=backend, **draw)

    small, large = problem(8, 600), problem(n, m)
    peak = peak_extra_bytes(lambda: run(*large), lambda: run(*small))
    return {"peak": peak, "gradients": (n + m) * d * 4 if what == "hinge" else 0}


def proxies(names: str, backend: str, n: int, m: int, d: int) -> dict:
    """As step, for several losses on proxies by name, each with its first options."""

    def one(entry):
        def problem(n, m):
            classes = m // entry.centres
            x, w = torch.randn(n, d, requires_grad=True), torch.randn(classes * entry.centres, d, requires_grad=True)
            return x, w, torch.randint(0, classes, (n,))

        def run(x, w, y):
            entry.function(x, w, y, **entry.options[0], backend=backend).backward()
            return x.grad, w.grad

        small, large = problem(8, 600), problem(n, m)
        peak = peak_extra_bytes(lambda: run(*large), lambda: run(*small))
        return {"peak": peak, "gradients": sum(t.numel() * t.element_size() for t in large[:2])}

    return {name: one(REGISTRY[name]) for name in names.split(",")}


def regular_face(m: int, d: int) -> dict:
    """As step, for the regulariser that searches for each row's nearest other row."""
    regularizer = regularizers.RegularFaceRegularizer()
    small, large = torch.randn(50, d, requires_grad=True), torch.randn(m, d, requires_grad=True)
    peak = peak_extra_bytes(lambda: regularizer(large).backward(), lambda: regularizer(small).backward())
    return {"peak": peak, "gradients": m * d * 4}


def triplets(n: int, each: int, d: int, variant: str = "") -> dict:
    """As step, for all triplets of n rows, ``each`` of a class, in random order."""

    def problem(n):
        return torch.randn(n, d, requires_grad=True), torch.randperm(n) % max(n // each, 1), torch.arange(n)

    def run(x, y, own):
        options = {variant: True} if variant else {}
        out = F.triplet_sum(x, x, y, y, margin=0.05, metric="euclidean", normalize=True, exclude=own, **options)
        out.total.sum().backward()
        return x.grad, out

    small, large = problem(64), problem(n)
    return {"peak": peak_extra_bytes(lambda: run(*large), lambda: run(*small)), "gradients": 2 * n * d * 4}


def positive_pairs(n: int, each: int, d: int) -> dict:
    """As step, for a term for each positive pair of n rows, ``each`` of a class."""

    def problem(n):
        return torch.randn(n, d, requires_grad=True), torch.randperm(n) % max(n // each, 1), torch.arange(n)

    def run(x, y, own):
        u = torch.zeros(n, requires_grad=True)[: x.size(0)]
        out = F.positive_pair_sum(x, x, y, y, u, kind="softplus", params=(10.0,), exclude=own)
        out.total.sum().backward()
        return x.grad, out

    small, large = problem(64), problem(n)
    return {"peak": peak_extra_bytes(lambda: run(*large), lambda: run(*small)), "gradients": 2 * n * d * 4}


def windows(backend: str, m: int, d: int) -> dict:
    """M x D past 2^31 from a buffer of M + D values: row j is the window that starts at j. Forward and x's gradient."""
    buffer = torch.randn(m + d, dtype=torch.bfloat16)
    w = buffer.as_strided((m, d), (1, 1))
    x = torch.randn(2, d, dtype=torch.bfloat16, requires_grad=True)
    y = torch.tensor([m - 1, 5])

    def run():
        out = F.masked_logsumexp(x, w, y, scale=4.0, sums=True, backend=backend)
        return *out, *torch.autograd.grad(out.different.sum() + out.same.sum(), x)

    found = []
    small = torch.randn(600, d, dtype=torch.bfloat16)
    warm = lambda: F.masked_logsumexp(x, small, y * 0, backend=backend).different.sum().backward()  # noqa: E731
    peak = peak_extra_bytes(lambda: found.extend(run()), warm)
    # The truth in fp64: every dot product of a window is a correlation; norms are running sums.
    wide, rows = buffer.double(), x.detach().double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    norms = wide.square().cumsum(0)
    norms = (norms[d - 1 : -1] - torch.cat((norms.new_zeros(1), norms[: m - 1]))).sqrt()
    dots = torch.nn.functional.conv1d(wide[None, None, :-1], rows[:, None])[0]
    z = 4 * dots / norms
    own = z.gather(1, y[:, None])
    others = z.scatter(1, y[:, None], -torch.inf)
    truth = [own.squeeze(1), others.logsumexp(1), own.squeeze(1), z.sum(1) - own.squeeze(1)]
    errors = [((a.double() - b).abs() / b.abs()).max().item() for a, b in zip(found, truth)]
    return {"peak": peak, "errors": errors, "grad_finite": bool(found[4].isfinite().all())}


def far_apart(backend: str) -> dict:
    """Rows whose offsets exceed 2^31 elements, in storage of which only these rows are touched."""
    stride, m, d, n = (1 << 29) + 17, 6, 40, 3
    base = torch.empty(m * stride, dtype=torch.bfloat16)
    w, x = base.as_strided((m, d), (stride, 1)), base.as_strided((n, d), (2 * stride, 1), 1000)
    small = torch.randn(m + n, d).bfloat16()
    found = []

    def run():
        w.copy_(small[:m])
        x.copy_(small[m:])
        # And a width whose stride exceeds 2^31: (D, M) transposed twice.
        tall = base.as_strided((d // 10, m), (stride, 1), 5000).t()
        tall.copy_(small[:m, : d // 10])
        for a, b in ((x, w), (x[:, : d // 10], tall)):
            a, b = (t.detach().requires_grad_() for t in (a, b))
            out = F.masked_logsumexp(a, b, torch.arange(n), metric="sqeuclidean", normalize=True, backend=backend)
            distance = F.normalized_distance(a, b, "euclidean", backend=backend)
            (grad,) = torch.autograd.grad(out.different.sum() + distance.float().sum(), a)
            found.extend((out.different.detach(), distance.detach(), grad))

    peak = peak_extra_bytes(run)
    expected = []
    for width in (d, d // 10):
        a, b = small[m:, :width].clone().requires_grad_(), small[:m, :width].clone()
        out = F.masked_logsumexp(a, b, torch.arange(n), metric="sqeuclidean", normalize=True, backend=backend)
        distance = F.normalized_distance(a, b, "euclidean", backend=backend)
        expected.extend(
            (out.different, distance, *torch.autograd.grad(out.different.sum() + distance.float().sum(), a))
        )
    same = [torch.allclose(f.float(), e.float(), rtol=1e-2, atol=1e-3) for f, e in zip(found, expected, strict=True)]
    return {"peak": peak, "same": same, "span": w.stride(0) * (m - 1)}


def wide_gradient(backend: str, n: int, m: int) -> dict:
    """normalized_distance's backward for an N x M past 2^31 whose incoming gradient is one number, expanded."""
    # The two sets of points are far apart, because near pairs take a slower way.
    x, w = torch.randn(n, 2) + 9, torch.randn(m, 2) - 9
    grad = torch.ones(()).expand(n, m)
    found = []

    def run():
        found.extend(distance_ops.bwd(grad, [True, True], x, w, "sqeuclidean", False, 1e-12, torch.float32, backend))

    peak = peak_extra_bytes(run)
    a, b = x.double(), w.double()
    truth = 2 * (m * a - b.sum(0)), 2 * (n * b - a.sum(0))
    errors = [((f - t).abs().max() / t.abs().max()).item() for f, t in zip(found, truth)]
    return {"peak": peak, "errors": errors}


def main() -> None:
    what, *rest = sys.argv[1:]
    torch.manual_seed(0)
    arguments = [int(a) if a.isdigit() else a for a in rest]
    print(json.dumps(globals()[what](*arguments)))


if __name__ == "__main__":
    main()

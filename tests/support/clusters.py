"""Helpers for the tests of the cluster index and of its batches; as a program, the memory of a refresh as JSON."""

from __future__ import annotations

import io
import json

import pytest
import torch

pytest.importorskip("faiss", reason="faiss is not installed")

from dml_kernels.clustering import ClusterIndex
from dml_kernels.profiling import peak_extra_bytes


def blobs(counts, modes=3, width=8, *, spread=0.02, seed=0, shuffled=True, offset=0.0):
    """Embeddings of len(counts) classes, each of `modes` tight blobs far apart: embeddings, labels, blob of each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    mode = torch.cat([torch.arange(count) % modes for count in counts])
    places = 5 * torch.randn(len(counts), modes, width, generator=generator)
    embeddings = offset + places[labels, mode] + spread * torch.randn(len(labels), width, generator=generator)
    order = torch.randperm(len(labels), generator=generator) if shuffled else torch.arange(len(labels))
    return embeddings[order], labels[order], (labels * modes + mode)[order]


def same_partition(a, b):
    """Whether two assignments form the same groups, under any names."""
    return len({*zip(a.tolist(), b.tolist())}) == len(set(a.tolist())) == len(set(b.tolist()))


def assert_consistent(index, labels, embeddings, normalize=False, atol=1e-5):
    """Checks everything that the attributes promise, computed from the assignment alone in fp64."""
    x = embeddings.detach().cpu().double()
    if normalize:
        x = torch.nn.functional.normalize(x, dim=1)
    inside = labels != -100
    assert torch.equal(index.clusters >= 0, inside)
    assert torch.equal(index.cluster_classes[index.clusters[inside]], labels[inside])
    assert torch.equal(index.sizes, torch.bincount(index.clusters[inside], minlength=len(index)))
    total = 0.0
    for cluster in range(len(index)):
        mine = (index.clusters == cluster).nonzero().squeeze(1)
        assert torch.equal(index.members(cluster), mine)
        rows = mine if len(mine) else (labels == index.cluster_classes[cluster]).nonzero().squeeze(1)
        torch.testing.assert_close(index.centers[cluster].double(), x[rows].mean(0), rtol=1e-6, atol=atol)
        total += (x[mine] - x[mine].mean(0)).square().sum().item() if len(mine) else 0.0
    assert index.variance == pytest.approx(total / max(int(inside.sum()) - 1, 1), rel=1e-4, abs=1e-12)
    assert (index.centers.dtype, index.sizes.dtype, index.clusters.dtype) == (torch.float32, torch.int64, torch.int64)


def without_change(index, error, match, call):
    """Checks that the call is refused and leaves the state of the index unchanged."""
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in index.state_dict().items()}
    with pytest.raises(error, match=match):
        call()
    after = index.state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]


def make_index(counts, clusters_per_class=2, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    index = ClusterIndex(labels, clusters_per_class=clusters_per_class, **options)
    index.refresh(torch.randn(len(labels), 6, generator=generator) + labels[:, None])
    return index


def saved(state):
    """The state after it was saved to a checkpoint and loaded."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def probe() -> None:
    """Peak of a refresh of many examples, half of them one class, given by a function."""

    def problem(n):
        labels = torch.randint(0, n // 50, (n,))
        labels[: n // 2] = 0
        return ClusterIndex(labels, block_examples=2048)

    def embed(rows):
        # Made of the indices, so that they are nowhere as a whole.
        return torch.sin(rows[:, None] * torch.arange(1, 65)).float()

    small, large = problem(10_000), problem(200_000)
    reports = []
    peak = peak_extra_bytes(lambda: reports.append(large.refresh(embed)), lambda: small.refresh(embed))
    print(json.dumps({"peak": peak, "whole": 200_000 * 64 * 4, "examples": reports[0].examples}))


if __name__ == "__main__":
    probe()

"""The peak memory of the streamed measures, far below one number for each pair; slow: a million vectors."""

from __future__ import annotations

import pytest

from tests.support.evaluation import probe

MB = 1 << 20
LIMIT = 112 * MB  # tiles of 512 x 2,048 at 28 to 40 bytes an entry, what an allocator keeps of them, O(N + M)

pytest.importorskip("faiss")
pytest.importorskip("sklearn")


@pytest.mark.parametrize(
    ("what", "queries", "gallery", "width"),
    [
        ("retrieval", 1000, 80_000, 32),
        ("identification", 1000, 80_000, 32),
        ("verification_against", 1000, 80_000, 8),
        pytest.param("retrieval", 2000, 1_000_000, 64, marks=pytest.mark.slow),
        pytest.param("identification", 2000, 1_000_000, 64, marks=pytest.mark.slow),
        pytest.param("verification_against", 500, 1_000_000, 64, marks=pytest.mark.slow),
    ],
)
def test_a_gallery_is_streamed(what, queries, gallery, width):
    matrix = 4 * queries * gallery
    assert matrix > 2.5 * LIMIT
    found = probe(what, queries, gallery, width)
    assert found["peak"] < LIMIT, f"{found['peak'] / MB:.0f} MB; one fp32 matrix: {matrix / MB:.0f} MB"
    # The results mean something.
    assert max(found.get(name, 0) for name in ("recall_at_1", "rank_1", "roc_auc")) > 0.7


def test_all_pairs_are_counted_in_bins():
    """12,000 embeddings are 72 million pairs: 288 MB of scores in fp32, without their labels."""
    found = probe("verification", 12_000, 8)
    assert found["pairs"] == 12_000 * 11_999 // 2
    assert found["peak"] < LIMIT
    assert 0 < found["error"] < 1e-4


@pytest.mark.parametrize("count", [300_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_clusters_are_trained_on_a_sample(count):
    """A copy of the embeddings in fp32 would take 154 MB (512 MB); none is made."""
    found = probe("clustering", count, 128, 16, 8192)
    assert found["peak"] < LIMIT
    assert found["nmi"] > 0.1

"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[1] / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="the tests run without the repository around them")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.S | re.M) if README.exists() else []


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_runs(block):
    pytest.importorskip("faiss")
    given = {"embeddings": torch.randn(8, 128, requires_grad=True), "labels": torch.randint(0, 100_000, (8,))}
    exec(compile(block, str(README), "exec"), given)


def test_there_are_blocks():
    assert len(BLOCKS) >= 3

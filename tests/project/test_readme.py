"""The Python in the README and in docs/ runs unchanged, the blocks of each page one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if page.exists()]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
pytestmark = pytest.mark.skipif(not PAGES, reason="the tests run without the repository around them")


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_a_page_runs(page):
    pytest.importorskip("faiss")
    if "pytorch_metric_learning" in page.read_text(encoding="utf-8"):
        pytest.importorskip("pytorch_metric_learning")
    names = {"embeddings": torch.randn(8, 128, requires_grad=True), "labels": torch.randint(0, 100_000, (8,))}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


def test_there_are_blocks():
    assert sum(len(blocks(page)) for page in PAGES) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing

"""Paths that comments, docstrings and pages name exist, so that moving or renaming a file also changes its mentions."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("dml_kernels", "csrc", "tests", "tools", "bench", "docs")
NAMED = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w")
WRITTEN_LATER = ("bench/results",)  # by a command


def sources():
    yield from ROOT.glob("*.md")
    for folder in FOLDERS:
        for suffix in ("py", "md", "h", "cpp", "cu", "cuh"):
            yield from (ROOT / folder).rglob(f"*.{suffix}")


def missing(text, *folders):
    """The paths in a text that exist neither in the root nor in one of the folders. NAME stands for any name."""
    # Patterns of tests write a dot as "\\.".
    found = (m.group() for m in NAMED.finditer(text.replace("\\", "")))
    there = lambda p: any((folder / p).exists() for folder in (ROOT, *folders))  # noqa: E731
    return [p for p in found if "NAME" not in p and p not in WRITTEN_LATER and not there(p)]


def test_named_paths_exist():
    wrong = {str(p.relative_to(ROOT)): missing(p.read_text(), p.parent) for p in sources() if p != Path(__file__)}
    assert {name: paths for name, paths in wrong.items() if paths} == {}


def test_a_missing_path_is_found():
    assert missing("see csrc/cpu/tiles.h, dml_kernels/functional_pairs.py.") == ["dml_kernels/functional_pairs.py"]
    assert missing("tools/aot.py, tools/cuda.py", ROOT / "dml_kernels/backends/triton") == ["tools/cuda.py"]
    assert missing("`dml_kernels/losses/`, dml_kernels/losses/NAME.py, x/dml_kernels/y") == []


def test_the_constants_that_bound_memory_are_where_the_table_says():
    page = (ROOT / "docs" / "design.md").read_text()
    table = page.split("## The constants that bound memory")[1].split("\n## ")[0]
    rows = [[re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:3]] for line in table.splitlines()]
    rows = [row for row in rows if len(row) == 2 and all(row)]
    assert len(rows) > 10
    for names, files in rows:
        texts = [(ROOT / file).read_text() for file in files]
        assert [name for name in names if not all(re.search(rf"\b{name}\b", text) for text in texts)] == []


def test_the_modules_that_the_triton_backend_imports_by_name_are_there():
    folder = ROOT / "dml_kernels" / "backends" / "triton"
    named = set(re.findall(r'_host\("(\w+)"\)', (folder / "__init__.py").read_text()))
    assert len(named) > 3
    assert [name for name in named if not (folder / f"{name}.py").exists()] == []

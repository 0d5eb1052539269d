"""A missing package is named with a way to get it, and no text says to install this package's name from an index."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from dml_kernels.optional import how_to_install, import_optional

ROOT = Path(__file__).resolve().parents[2]
# An installer, then this package's name, not as a path, a module of it or what `python -m` runs.
ENDS = r"[\s'\"`](?<!-m )dml[-_.]kernels\b(?![/.\w])"
INSTALL = re.compile(r"(?:pip3?|uv|conda|pipx)\s+(?:install|add)\b[^\n]*" + ENDS, re.I)
JOINED = re.compile(r"\\\n|[\"']\s*\n\s*f?[\"']")  # lines that a shell or Python makes one
TEXTS = {".py", ".md", ".toml", ".txt", ".cfg", ".in", ".sh", ".cpp", ".h", ".cu", ""}


def test_a_missing_module_is_named_with_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.metrics", raising=False)
    with pytest.raises(ImportError, match=r"verification needs sklearn, .*: pip install scikit-learn \(in a checkout"):
        import_optional("sklearn.metrics", "verification")
    assert import_optional("json", "nothing").dumps([]) == "[]"
    assert how_to_install("rich", "faiss").startswith("pip install rich faiss-cpu (")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pip install 'dml_kernels[demo]'", True),
        ("run pip install dml-kernels", True),
        ('f"pip install faiss-cpu, "\n            "or pip install \'dml_kernels[demo]\'"', True),
        ("pip install -U \\\n    dml_kernels", True),
        ("uv add dml_kernels", True),
        ("pip install -e '.[demo]' && python -m dml_kernels info", False),
        ("pip install faiss-cpu", False),
    ],
)
def test_the_search_below_finds_what_it_is_for(text, found):
    assert bool(from_an_index(text)) is found


def from_an_index(text: str) -> list[str]:
    return INSTALL.findall(JOINED.sub(" ", text))


def test_no_text_tells_people_to_install_this_package_from_an_index():
    folders = ["dml_kernels", "docs", "csrc", "bench", "tools", "requirements", ".ci"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
    bad = {
        str(path.relative_to(ROOT)): hits
        for path in files
        if path.is_file() and path.suffix in TEXTS
        if (hits := from_an_index(path.read_text(encoding="utf-8", errors="replace")))
    }
    assert not bad

"""Docstrings name arguments that exist, so that a renamed or removed argument also changes its line in `Args:`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "dml_kernels"
SECTION = re.compile(r"^Args:\n((?:    .*\n?|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*):", re.MULTILINE)


def parameters(node):
    """The names that a function or class can be called with; None for a class that inherits its constructor."""
    if isinstance(node, ast.ClassDef):
        fields = [line.target.id for line in node.body if isinstance(line, ast.AnnAssign)]
        made = {f.name: f for f in node.body if isinstance(f, ast.FunctionDef) and f.name in ("__init__", "__new__")}
        if not made:
            return fields or None
        node = next(iter(made.values()))
    a = node.args
    return [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if p]


def unknown(source):
    """(line, name, entry) for each entry of an `Args:` section that is no parameter."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        section, known = SECTION.search(ast.get_docstring(node) or ""), parameters(node)
        if section and known is not None:
            entries = ", ".join(ENTRY.findall(section[1])).replace("*", "").split(", ")
            yield from ((node.lineno, node.name, entry) for entry in entries if entry not in known)


def test_the_arguments_that_docstrings_describe_exist():
    found = {str(p.relative_to(PACKAGE)): list(unknown(p.read_text())) for p in PACKAGE.rglob("*.py")}
    assert {name: entries for name, entries in found.items() if entries} == {}


SOURCE = '''
def f(x, *rest, k=1):
    """Sum.

    Args:
        x: a.
        w, k: b
            of: c.
    """
'''


def test_an_argument_that_is_gone_is_found():
    assert list(unknown(SOURCE)) == [(2, "f", "w")]
    assert list(unknown(SOURCE.replace("w, k", "rest, k"))) == []

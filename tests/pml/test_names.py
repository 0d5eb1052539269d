"""Every public name of pytorch-metric-learning exists here, or gives an error that says what to use in its place.

docs/switching.md lists the names.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import dml_kernels
from dml_kernels.elsewhere import ABSENT, MODULES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "switching.md"
PARTS = ["losses", "miners", "distances", "reducers", "regularizers", "samplers"]
HEADING = "## Every public name"


def ours(part):
    return importlib.import_module(f"dml_kernels.{part}")


def their_names(pml, part):
    """The classes of a part, or what a module of ``utils`` defines; read from its text if its imports are missing."""
    if not part.startswith("utils."):
        tree = ast.parse((Path(pml.__path__[0]) / part / "__init__.py").read_text())
        names = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    else:
        tree = ast.parse((Path(pml.__path__[0]) / f"{part.replace('.', '/')}.py").read_text())
        names = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    return sorted(name for name in names if not name.startswith("_"))


def section(pml):
    """The text that the page must have under its heading."""
    lines = [HEADING, "", "Those of 2.9, module by module.", ""]
    for part in PARTS:
        here = [f"`{n}`" for n in their_names(pml, part) if n not in ABSENT[part]]
        lines += textwrap.wrap(f"`{part}`, here: {', '.join(here)}.", 120, break_on_hyphens=False)
        lines += ["", "| not here | use |", "|---|---|"]
        by_use = {}
        for name in their_names(pml, part):
            if name in ABSENT[part]:
                by_use.setdefault(ABSENT[part][name], []).append(f"`{name}`")
        lines += [f"| {', '.join(names)} | {use} |" for use, names in by_use.items()] + [""]
    lines += ["Modules that are not here:", "", "| module | its names | use |", "|---|---|---|"]
    for module, use in MODULES.items():
        names = "" if module == "utils" else ", ".join(f"`{n}`" for n in their_names(pml, module))
        lines.append(f"| `{module}` | {names} | {use} |")
    return "\n".join(lines) + "\n"


def test_the_page_lists_every_public_name(pml):
    """If it fails, replace the section of the page by what the test prints."""
    expected = section(pml)
    text = PAGE.read_text()
    found = text[text.index(HEADING) :] if HEADING in text else ""
    if found.split("\n## ", 1)[0].strip() != expected.strip():
        print(expected)
        pytest.fail("docs/switching.md does not list the names as they are")


@pytest.mark.parametrize("part", PARTS)
def test_each_name_is_here_or_says_what_to_use(part, pml):
    names = their_names(pml, part)
    assert len(names) == len(set(names))
    missing = {n for n in names if n not in vars(ours(part))}
    assert missing == set(ABSENT[part])
    for name in missing:
        assert not hasattr(ours(part), name)
        with pytest.raises(AttributeError, match=r"docs/switching\.md") as raised:
            getattr(ours(part), name)
        assert f"Use {ABSENT[part][name]}." in str(raised.value)
        with pytest.raises(ImportError) as imported:
            exec(f"from dml_kernels.{part} import {name}", {})
        assert str(imported.value) == str(raised.value)
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        ours(part).Nonsense
    with pytest.raises(ImportError, match="cannot import name 'Nonsense'"):
        exec(f"from dml_kernels.{part} import Nonsense", {})


def test_missing_modules_say_what_to_use(pml):
    utils = importlib.import_module("pytorch_metric_learning.utils")
    assert {f"utils.{m.name}" for m in pkgutil.iter_modules(utils.__path__)} | {"utils"} == {
        m for m in MODULES if m.startswith("utils")
    }
    parts = {m.name for m in pkgutil.iter_modules(pml.__path__)}
    assert parts == {*PARTS, *(m for m in MODULES if "." not in m)}
    for module in ("testers", "trainers", "datasets", "utils"):
        with pytest.raises(AttributeError, match=r"Use .*docs/switching\.md"):
            getattr(dml_kernels, module)
        with pytest.raises(ImportError, match=r"Use .*docs/switching\.md"):
            exec(f"from dml_kernels import {module}", {})


def test_what_is_named_is_there():
    """The names of this package that the lines recommend."""
    for use in [*MODULES.values(), *(use for part in ABSENT.values() for use in part.values())]:
        for name in re.findall(r"`dml_kernels\.([\w.]+)`", use):
            module, _, attribute = name.rpartition(".")
            assert hasattr(ours(module) if module else dml_kernels, attribute) or importlib.util.find_spec(
                f"dml_kernels.{name}"
            ), name


def test_submodules_are_still_found():
    code = "import dml_kernels, dml_kernels.miners; from dml_kernels import samplers, reducers; dml_kernels.functional"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)

"""The structure of the package: imports point down, without cycles; parameter lists and files are short."""

from __future__ import annotations

import ast
import graphlib
import inspect
from pathlib import Path

import pytest

from dml_kernels.ops import choice, signatures
from dml_kernels.ops.choice import BACKENDS, Backend

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dml_kernels"
# From the ground up. A module imports from its own floor and from those below; the longest prefix that fits says where
# a module lives.
FLOORS = (
    ("build_info", "foreign", "logspace", "noise", "optional", "profiling", "progress",
     "saved_state", "reference", "elsewhere"),
    ("ops.signatures", "ops.checks", "ops.contract", "ops.library", "ops.segments", "pairs.class_ranges",
     "pairs.dense", "pairs.sets"),
    ("backends",),
    ("ops",),
    ("distances", "labels", "pairs", "records", "reducers", "regularizers"),
    ("losses", "miners", "clustering", "samplers", "evaluation"),
    ("distributed", "functional"),
    ("backends.triton.tools", "demo", "cli", "__init__", "__main__"),
)  # fmt: skip
MODULES = {str(p.relative_to(PACKAGE)).removesuffix(".py").replace("/", ".").removesuffix(".__init__"): p
           for p in PACKAGE.rglob("*.py")}  # fmt: skip


def floor(module: str) -> int:
    fits = [(len(name), i) for i, names in enumerate(FLOORS) for name in names
            if module == name or module.startswith(name + ".")]  # fmt: skip
    assert fits, f"{module} is on no floor: name it in FLOORS"
    return max(fits)[1]


def imported(module: str, path: Path) -> set[str]:
    """The modules of the package that it imports anywhere, also inside functions, but not for annotations alone."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = [] if module == "__init__" else package
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == "dml_kernels"]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif (node.module or "").split(".")[0] == "dml_kernels":
                base = []
            else:
                continue
            base = base + [part for part in (node.module or "").split(".") if part and part != "dml_kernels"]
            names = [[*base, alias.name] if ".".join([*base, alias.name]) in MODULES else base for alias in node.names]
        found |= {".".join(name) or "__init__" for name in names}
    return found - {module}


IMPORTS = {module: imported(module, path) for module, path in MODULES.items()}


def test_arrows_point_down():
    up = {f"{a} -> {b}" for a, found in IMPORTS.items() for b in found if floor(a) < floor(b)}
    assert up == set()


def test_no_circle_of_imports():
    tuple(graphlib.TopologicalSorter(IMPORTS).static_order())


def test_a_circle_and_an_arrow_up_are_seen(tmp_path):
    path = tmp_path / "logspace.py"
    path.write_text("def f():\n    from .ops import choice\n")
    assert imported("logspace", path) == {"ops.choice"}
    assert floor("logspace") < floor("ops.choice")
    with pytest.raises(graphlib.CycleError):
        tuple(graphlib.TopologicalSorter({**IMPORTS, "logspace": {"ops.choice"}}).static_order())


def test_production_does_not_import_the_reference():
    """Except for the backend of that name and the references of the losses."""
    wrong = {a for a, found in IMPORTS.items() if not a.startswith(("reference", "losses."))
             for b in found if b.startswith("reference")}  # fmt: skip
    assert wrong == {"backends.reference"}


SPECS = {name for name, value in vars(signatures).items() if name.endswith("Spec") and isinstance(value, type)}


def calls_by_position(text: str) -> list[int]:
    return [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and node.args
            and getattr(node.func, "id", getattr(node.func, "attr", "")) in SPECS
            and not all(isinstance(a, ast.Starred) for a in node.args)]  # fmt: skip


def test_specs_are_made_by_keyword():
    assert {m: lines for m, p in MODULES.items() if (lines := calls_by_position(p.read_text()))} == {}
    assert calls_by_position("Spec('dot', True)\nsignatures.HingeSpec(metric='dot')") == [1]


def parameters(text: str) -> dict[str, int]:
    return {
        node.name: len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
        for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }  # fmt: skip


def test_no_function_has_more_than_20_parameters():
    """Except for Triton kernels."""
    for module, path in MODULES.items():
        if not module.startswith("backends.triton.kernels"):
            assert {f: n for f, n in parameters(path.read_text()).items() if n > 20} == {}, module


def test_no_file_has_more_than_400_lines():
    files = [p for folder in ("dml_kernels", "csrc", "tests", "tools", "bench") for p in (ROOT / folder).rglob("*")
             if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]  # fmt: skip
    assert {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > 400} == {}


METHODS = {name: inspect.signature(method) for name, method in vars(Backend).items() if name.endswith(("_fwd", "_bwd"))}


def test_the_registry_the_specs_and_the_protocol_name_the_same_ops():
    assert {name.removesuffix("_fwd") for name in METHODS if name.endswith("_fwd")} == set(signatures.OPS)
    for op, (tensors, numbers) in signatures.OPS.items():
        schema = getattr(__import__("torch").ops.dml_kernels, f"{op}_fwd").default._schema
        assert [a.name for a in schema.arguments] == [*tensors._fields, *numbers._fields], op


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_has_what_the_protocol_says(name):
    backend = BACKENDS[name]
    for fact in ("name", "OPS", "OPTIONS", "METRICS", "can_run", "describe", "fuses", "keeps_mean"):
        assert hasattr(backend, fact), fact
    assert set(backend.OPS) <= set(signatures.OPS)
    for method, promised in METHODS.items():
        op = method.rpartition("_")[0]
        if op not in backend.OPS or (op in ("proxy_nca", "magnet") and not hasattr(backend, method)):
            continue
        found = list(inspect.signature(getattr(backend, method)).parameters)
        assert len(found) == len(promised.parameters) - 1, method  # without self
        assert found[-1] == "spec", method


def test_an_option_that_a_backend_does_not_know_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(BACKENDS["torch"], "OPTIONS", ("sums", "keep"))
    monkeypatch.setattr(BACKENDS["torch"], "METRICS", ("dot",))
    ask = "masked_logsumexp", torch.device("cpu"), torch.float32, "torch"
    assert choice.choose(*ask, metric="dot") == "torch"
    for asked in ({"policy": "quadratic"}, {"metric": "euclidean"}):
        with pytest.raises(RuntimeError, match=r"torch: \w+ '\w+' is not implemented here"):
            choice.choose(*ask, **asked)

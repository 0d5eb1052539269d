"""Every parameter of every public callable refuses bad values with an error that names it, and nothing crashes.

Parameters are found by signature, so a new callable or parameter is attacked without being listed. The annotation says
what a parameter takes; the name of a tensor says whether it holds vectors or labels.
"""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from dml_kernels import clustering, distances, evaluation, losses, miners, reducers, regularizers, samplers
from dml_kernels import functional as F

X, W, Y = torch.randn(6, 3), torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested tensors")
FOUR = torch.arange(6) % 4
VALUE = torch.ones(6)


class Subject(NamedTuple):
    what: str
    call: Callable[..., Any]
    given: dict[str, Any]


def functions() -> list[Subject]:
    """The functions, with valid arguments."""
    bank, loss = {"x": X, "w": W, "y": Y, "c": Y}, {"embeddings": X, "proxies": W, "labels": Y}
    given = {
        "normalize": {"x": X},
        "normalized_distance": {"x": X, "w": W},
        "pair_scores": {"x": X, "w": W, "rows": Y, "cols": Y},
        "positive_pair_sum": {**bank, "u": VALUE, "kind": "softplus"},
        "triplet_sum": {**bank, "margin": 0.1},
        "masked_hinge_sum": {**bank, "same": (1.0, 0.0)},
        "magnet_loss": {"embeddings": X, "clusters": Y, "cluster_classes": torch.arange(3)},
        "soft_triple_loss": {**loss, "proxies": torch.randn(60, 3)},
        "subcenter_arcface_loss": {**loss, "proxies": torch.randn(18, 3)},
    }
    names = [name for name in F.__all__ if not inspect.isclass(getattr(F, name))]
    return [
        Subject(f"functional.{n}", getattr(F, n), given.get(n, loss if n.endswith("_loss") else bank)) for n in names
    ]


def constructors() -> list[Subject]:
    """The classes, with valid arguments."""
    sizes = {"num_classes": 6, "embedding_size": 3}
    found = []
    for module in (losses, miners, distances, regularizers, reducers):
        names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
        for name in names:
            kind = getattr(module, name)
            if not (inspect.isclass(kind) and issubclass(kind, torch.nn.Module) and kind.__module__.startswith("dml_")):
                continue
            if kind in (distances.Distance, miners.Miner, reducers.Reducer, regularizers.Regularizer):
                continue
            own = inspect.signature(kind).parameters
            given = {k: v for k, v in sizes.items() if k in own}
            given |= {"weights": VALUE} if "weights" in own else {}
            given |= {"centers_per_class": 2} if name == "SparseCentersRegularizer" else {}
            given |= {"loss": losses.ContrastiveLoss()} if name == "CrossBatchMemory" else {}
            given |= {"low": 0.0} if name == "ThresholdReducer" else {}
            try:
                kind(**given)
            except (AttributeError, TypeError, NotImplementedError):
                continue  # a class that needs other objects has its own tests
            found.append(Subject(f"{module.__name__.split('.')[-1]}.{name}", kind, given))
    index = clustering.ClusterIndex(Y, clusters_per_class=1)
    index.refresh(X)
    return [
        *found,
        Subject("ClusterIndex", clustering.ClusterIndex, {"labels": Y}),
        Subject("MPerClassSampler", samplers.MPerClassSampler, {"labels": Y, "m": 2, "length_before_new_iter": 6}),
        Subject("MagnetBatchSampler", samplers.MagnetBatchSampler, {"index": index}),
    ]


def calls() -> list[Subject]:
    """Losses and miners called on a batch."""
    found = []
    for name, entry in losses.REGISTRY.items():
        if entry.family == "proxies":
            found.append(Subject(f"{name}()", entry.loss(6, 3), {"embeddings": X, "labels": Y}))
        elif entry.family == "pairs":
            found.append(Subject(f"{name}()", entry.loss(), {"embeddings": X, "labels": Y}))
        else:
            given = {"embeddings": X, "clusters": Y, "cluster_classes": torch.arange(3)}
            found.append(Subject(f"{name}()", entry.loss(), given))
    memory = losses.CrossBatchMemory(losses.ContrastiveLoss(), 3, 12)
    found.append(Subject("CrossBatchMemory()", memory, {"embeddings": X, "labels": Y}))
    for miner in (miners.BatchHardMiner(), miners.TripletMarginMiner(), miners.MultiSimilarityMiner()):
        found.append(Subject(f"{type(miner).__name__}()", miner, {"embeddings": X, "labels": Y}))
    return found


def evaluations() -> list[Subject]:
    given = {
        "k_nearest_clusters": {"embeddings": X, "centers": W, "center_classes": Y, "variance": 1.0},
        "k_nearest_neighbours": {"embeddings": X, "ref_embeddings": W, "ref_labels": Y},
        "identify": {"probes": X, "gallery": W, "gallery_labels": Y},
        "evaluate_identification": {"probes": X, "probe_labels": Y, "gallery": W, "gallery_labels": Y, "ranks": (1,)},
        "nearest": {"embeddings": X, "k": 2},
        "pair_scores": {"embeddings": X, "first": Y, "second": Y},
        "sample_pairs": {"labels": Y},
        "verify_pairs": {"embeddings": X, "first": Y, "second": FOUR, "same": Y % 2},
        "verify_scores": {"scores": VALUE, "same": Y % 2},
        "fold_accuracy": {"scores": VALUE, "same": Y % 2, "folds": 2},
        "few_shot_accuracy": {"embeddings": X, "labels": Y, "ways": 2, "queries": 1, "episodes": 2},
        "evaluate": {"embeddings": X, "labels": Y, "k": (1, 2)},
        "evaluate_retrieval": {"embeddings": X, "labels": Y, "gallery": W, "gallery_labels": Y, "k": (1, 2)},
        "recall_at_k": {"embeddings": X, "labels": Y, "k": (1, 2)},
    }
    names = [n for n in evaluation.__all__ if not inspect.isclass(getattr(evaluation, n))]
    default = {"embeddings": X, "labels": Y}
    return [Subject(f"evaluation.{n}", getattr(evaluation, n), given.get(n, default)) for n in names]


HUGE = 10**400
LEARNED = torch.tensor(1.0, requires_grad=True)
ON_META = torch.ones((), device="meta")  # valid in a module, all of which may be moved later
NUMBERS = ["a", 1j, math.nan, math.inf, HUGE, torch.ones(2), torch.tensor(1j), ON_META, [1.0], True]
INTEGERS = [1.5, "a", True, 1 << 70, HUGE, 1j, torch.tensor(1.5), torch.tensor(True), torch.ones(2), [1]]
FLAGS = ["no", 2, 0.5, [True], torch.ones(2), torch.tensor(2)]
CHOICES = ["nonsense", ["x"], 3, ("a",), torch.ones(1)]
ROW = X[0]
MATRICES = [
    [[1.0, 2.0]], X.to_sparse(), X.to_sparse_csr(), X.to_mkldnn(), torch.nested.nested_tensor([X[:2], X[2:]]),
    torch.nested.nested_tensor([X[:2], X[2:]], layout=torch.jagged), X.to(torch.complex64), X.long(), ROW, None,
]  # fmt: skip
SHORT = Y[:2]
VECTORS = [
    Y.float(), Y.bool(), Y.to("meta"), Y.to_sparse(), Y[None], SHORT, Y + 1j, object(), torch.tensor(0), 3,
    torch.nested.nested_tensor([Y[:2], Y[2:]]),
]  # fmt: skip

OF_VECTORS = {"x", "w", "embeddings", "proxies", "ref_emb", "centers", "probes", "gallery", "ref_embeddings"}
OF_LABELS = {
    "y", "c", "exclude", "labels", "ref_labels", "clusters", "cluster_classes", "rows", "cols", "center_classes",
    "gallery_labels", "probe_labels", "first", "second",
}  # fmt: skip
# A label vector may be boolean here: two classes.
TWO_CLASSES = {"labels", "ref_labels", "center_classes", "gallery_labels", "probe_labels"}
# Tensors of one dimension or more are valid for these, which have their own tests.
LEARNABLE = {"scale", "softmax_scale", "la", "temperature", "variance"}


def hostile(subject: Subject, name: str, parameter: inspect.Parameter) -> list[Any]:
    """The values that this parameter must refuse; none for a parameter that takes objects."""
    text, optional = str(parameter.annotation), parameter.default is None
    if name in OF_VECTORS and "Tensor" in text:
        # `normalize` takes vectors of any number of dimensions.
        any_shape = subject.what == "functional.normalize"
        return [v for v in MATRICES if not (v is None and optional) and not (v is ROW and any_shape)]
    if name in OF_LABELS and ("Tensor" in text or text == "Any"):
        values = list(VECTORS)
        if subject.what.startswith(("evaluation", "ClusterIndex", "MPer")) and name in TWO_CLASSES:
            values = [v for v in values if not (isinstance(v, torch.Tensor) and v.dtype == torch.bool)]
        return [v for v in values if not alone(subject, name, v)]
    kinds = {part.strip() for part in text.split("|")} - {"None"}
    none = [] if optional or "None" in text else [None]
    if kinds <= {"float", "Tensor"} and "float" in kinds:
        if "Tensor" not in kinds or name not in LEARNABLE:
            return [*NUMBERS, *none, LEARNED]
        return [v for v in [*NUMBERS, *none] if not (subject.what.startswith("losses.") and v is ON_META)]
    if kinds == {"int"}:
        return [*INTEGERS, *none]
    if kinds == {"bool"}:
        return [*FLAGS, *none]
    if kinds == {"str"} and name not in ("name",):
        return [*CHOICES, *(none if name != "backend" else [])]
    if text.startswith(("Sequence[int", "Sequence[float")):
        return ["a", 3, (1j,), ("b",), (math.nan,), [HUGE], None]
    if text.startswith("tuple[int, int]"):
        return ["ab", 3, (0, 1), (1.5, 2), (2,), (True, 2), (1, HUGE)]
    if text.startswith("tuple[float, float]"):
        return ["ab", 3, (1.0,), (1j, 2.0), (math.nan, 1.0), (HUGE, 1.0), torch.ones(2, 2)]
    return []


def alone(subject: Subject, name: str, value: Any) -> bool:
    """Whether no other argument determines the length of the vector."""
    only = name == "labels" and subject.what in ("ClusterIndex", "MPerClassSampler", "evaluation.sample_pairs")
    return value is SHORT and (only or name == "cluster_classes")


def cases() -> list[Any]:
    found = []
    for subject in (*functions(), *constructors(), *calls(), *evaluations()):
        target = subject.call.forward if isinstance(subject.call, torch.nn.Module) else subject.call
        for name, parameter in inspect.signature(target).parameters.items():
            values = hostile(subject, name, parameter)
            if values:
                found.append(pytest.param(subject, name, values, id=f"{subject.what}-{name}"))
    return found


CASES = cases()


def words(name: str) -> str:
    """The names that a message may use for a parameter: also its alias, or a parameter that belongs to it."""
    others = {
        "la": "scale", "temperature": "scale", "gallery": "ref_embeddings", "gallery_labels": "ref_labels",
        "c": "labels", "y": "labels", "rows": "cols", "first": "second", "ref_labels": "ref_emb",
        "ref_emb": "ref_labels|references",
    }  # fmt: skip
    return rf"\b({name}|{others[name]})\b" if name in others else rf"\b{name}\b"


@pytest.mark.parametrize(("subject", "name", "values"), CASES)
def test_is_refused_by_name(subject, name, values):
    faults = []
    for value in values:
        try:
            subject.call(**{**subject.given, name: value})
        except Exception as error:
            by_name = type(error) in (TypeError, ValueError) and re.search(words(name), str(error))
            if not by_name:
                faults.append(f"{value!r:.80}: {type(error).__name__}: {error}")
        else:
            faults.append(f"{value!r:.80} is taken")
    assert not faults, "\n".join(faults)


def test_the_walk_is_of_everything():
    assert sum(len(case.values[2]) for case in CASES) > 4500
    for subject in (*functions(), *calls(), *evaluations()):
        subject.call(**subject.given)


MKLDNN = """
import torch
from dml_kernels import losses
memory = losses.CrossBatchMemory(losses.ContrastiveLoss(), 3, 12)
for bad in (torch.ones(4, 3).to_mkldnn(), torch.ones(4, 3).to_sparse()):
    for call in (memory, memory.add_to_memory):
        try:
            call(bad, torch.arange(4))
        except TypeError as error:
            assert "embeddings must be a dense tensor" in str(error), error
        else:
            raise SystemExit("taken")
"""


def test_a_memory_of_tensors_that_are_not_dense_does_not_end_the_process():
    done = subprocess.run([sys.executable, "-c", MKLDNN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

"""Labels in any container are read by position, and give the same draws, clusters and measures as a tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dml_kernels import evaluation, losses
from dml_kernels.labels import integers_by_position
from dml_kernels.samplers import MPerClassSampler, NPairsSampler

VALUES = [3, 1, 1, 0, 3, 0, 1, 3]
NAMES = ["cat", "ape", "ape", "ant", "cat", "ant", "ape", "cat"]
NUMBERS = [2, 1, 1, 0, 2, 0, 1, 2]  # of the names and of the values, in sorted order


class Column:
    """Behaves as a pandas column after a split does: it is indexed by the names of its rows, not by position."""

    def __init__(self, values, dtype=None):
        self.values = dict(zip(range(1, 2 * len(values) + 1, 2), values, strict=True))
        self.dtype = dtype

    def __len__(self):
        return len(self.values)

    def __getitem__(self, row):
        return self.values[row]  # KeyError: 2

    def __iter__(self):
        return iter(self.values.values())

    def to_numpy(self):
        return np.array(list(self.values.values()), dtype=self.dtype)


def of_pandas(values, dtype=None):
    pandas = pytest.importorskip("pandas")
    return pandas.Series(values, index=range(1, 2 * len(values) + 1, 2), dtype=dtype)


def categorical(values):
    return pytest.importorskip("pandas").Categorical(values)


INTEGERS = {
    "list": lambda: VALUES,
    "tuple": lambda: tuple(VALUES),
    "list of numpy's": lambda: [np.int16(v) for v in VALUES],
    "list of tensors": lambda: [torch.tensor(v) for v in VALUES],
    "uint8": lambda: np.array(VALUES, dtype=np.uint8),
    "int32, strided": lambda: np.array(VALUES, dtype=np.int32).repeat(2)[::2],
    "uint64": lambda: np.array(VALUES, dtype=np.uint64),
    "big endian": lambda: np.array(VALUES, dtype=">i4"),
    "objects": lambda: np.array(VALUES, dtype=object),
    "read only": lambda: np.frombuffer(np.array(VALUES, dtype=np.int64).tobytes(), dtype=np.int64),
    "tensor uint8": lambda: torch.tensor(VALUES, dtype=torch.uint8),
    "tensor int16, strided": lambda: torch.tensor(VALUES, dtype=torch.int16).repeat_interleave(2)[::2],
    "column": lambda: Column(VALUES),
    "column of objects": lambda: Column(VALUES, dtype=object),
    "pandas": lambda: of_pandas(VALUES),
    "pandas Int64": lambda: of_pandas(VALUES, "Int64"),
    "pandas category": lambda: of_pandas(VALUES, "category"),
    "pandas Categorical": lambda: categorical(VALUES),
}
STRINGS = {
    "list": lambda: NAMES,
    "numpy": lambda: np.array(NAMES),
    "bytes": lambda: np.array([name.encode() for name in NAMES]),
    "objects": lambda: np.array(NAMES, dtype=object),
    "column": lambda: Column(NAMES),
    "pandas": lambda: of_pandas(NAMES),
    "pandas category": lambda: of_pandas(NAMES, "category"),
    "pandas Categorical": lambda: categorical(NAMES),
}
BOTH = INTEGERS | {f"names, {kind}": make for kind, make in STRINGS.items()}


@pytest.mark.parametrize("make", INTEGERS.values(), ids=INTEGERS)
def test_integers_are_read_by_position(make):
    found = integers_by_position("labels", make())
    assert found.dtype == torch.int64
    assert found.tolist() == VALUES


@pytest.mark.parametrize("make", STRINGS.values(), ids=STRINGS)
def test_names_are_numbered_in_sorted_order_where_they_are_taken(make):
    assert integers_by_position("labels", make(), names=True).tolist() == NUMBERS
    with pytest.raises(ValueError, match=r"y must be integers; got names such as .*(cat|ant).*numpy\.unique"):
        integers_by_position("y", make())


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ("cats", TypeError, "labels must be a tensor, an array, a list or a pandas column; got str"),
        ({1, 2}, TypeError, "got set"),
        (iter([1]), TypeError, "got list_iterator"),
        ([1.0, 2.0], TypeError, "labels must be integers; got float64"),
        ([True, False], TypeError, "labels must be integers; got bool"),
        ([1, "a"], TypeError, "all integers, or all names .*; got int, str"),
        ([(1,), "a"], TypeError, "labels must be"),
        ([[1], [2, 3]], TypeError, "labels must be"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), TypeError, "labels must be integers; got datetime64"),
        ([0, None, 1], ValueError, "labels hold a missing value, at position 1"),
        ([0, float("nan")], ValueError, "labels hold a missing value, at position 1"),
        (["a", "b", None], ValueError, "labels hold a missing value, at position 2"),
        ([1, 1 << 64], ValueError, "labels must fit int64; got 18446744073709551616"),
        (np.array([1 << 63], dtype=np.uint64), ValueError, "labels must fit int64; got 9223372036854775808"),
        (torch.tensor([1 << 63], dtype=torch.uint64), ValueError, "labels must fit int64"),
        (torch.zeros(2), TypeError, r"labels must be integers; got torch\.float32. Use labels\.long"),
        (torch.zeros(2, dtype=torch.bool), TypeError, r"labels must be integers; got torch\.bool"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), TypeError, "must hold values; got a tensor on meta"),
        (torch.zeros(2, dtype=torch.int64).to_sparse(), TypeError, "must be a dense tensor"),
    ],
)
def test_what_is_no_label_is_refused_by_name(values, error, message):
    with pytest.raises(error, match=message):
        integers_by_position("labels", values, names=True)


def test_a_missing_value_of_pandas_is_named():
    pandas = pytest.importorskip("pandas")
    columns = {"Int64": [1, None], "float64": [1, None], "str": ["a", None], "category": ["a", None]}
    for dtype, values in columns.items():
        with pytest.raises(ValueError, match="labels hold a missing value, at position 1"):
            integers_by_position("labels", pandas.Series(values, index=[7, 3], dtype=dtype), names=True)


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_samplers_draw_the_same_from_all(make):
    as_tensor = torch.tensor(NUMBERS)
    for sampler in (lambda y: MPerClassSampler(y, 2, 4, 40, seed=1), lambda y: NPairsSampler(y, 4, 40, seed=1)):
        assert list(sampler(make())) == list(sampler(as_tensor))


@pytest.mark.parametrize("kind", ["column", "pandas", "names, column", "names, pandas category"])
def test_clusters_are_the_same_from_all(kind):
    pytest.importorskip("faiss")
    from dml_kernels.clustering import ClusterIndex

    embeddings = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    ours = ClusterIndex(BOTH[kind](), clusters_per_class=2)
    tensors = ClusterIndex(torch.tensor(NUMBERS), clusters_per_class=2)
    ours.refresh(embeddings)
    tensors.refresh(embeddings)
    assert torch.equal(ours.clusters, tensors.clusters)
    assert torch.equal(ours.centers, tensors.centers)


@pytest.mark.parametrize("kind", ["list", "uint8", "column", "objects", "pandas", "pandas Int64"])
def test_measures_are_the_same_from_all(kind):
    pytest.importorskip("faiss")
    pytest.importorskip("sklearn")
    x, y, labels = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.tensor(VALUES), INTEGERS[kind]()
    assert evaluation.evaluate(x, labels, (1, 2)) == evaluation.evaluate(x, y, (1, 2))
    assert evaluation.evaluate(x, labels, ref_embeddings=x, ref_labels=labels, k=(1,)).queries == 8
    assert evaluation.cluster_agreement(x, labels).nmi == evaluation.cluster_agreement(x, y).nmi
    assert evaluation.verify(x, labels, far=()) == evaluation.verify(x, y, far=())
    assert evaluation.few_shot_accuracy(x, labels, ways=2, queries=1, episodes=9) == evaluation.few_shot_accuracy(
        x, y, ways=2, queries=1, episodes=9
    )
    assert all(map(torch.equal, evaluation.sample_pairs(labels), evaluation.sample_pairs(y)))
    assert evaluation.identify(x, x, labels, 1).identities[:, 0].tolist() == VALUES
    assert evaluation.k_nearest_neighbours(x, x, labels).error(labels) == 0


def test_a_loss_says_how_to_make_a_tensor_of_a_column():
    with pytest.raises(TypeError, match=r"got Column\. Use torch\.as_tensor\(numpy\.asarray\(labels\)\)"):
        losses.ContrastiveLoss()(torch.randn(8, 3), Column(VALUES))

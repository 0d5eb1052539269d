"""CrossBatchMemory, a ring of past embeddings for any pair loss, compared with pytorch-metric-learning 2.9.0."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

from dml_kernels import losses, miners
from dml_kernels.losses import CrossBatchMemory, family
from dml_kernels.profiling import run_in_child
from tests.support.backends import require
from tests.support.problems import randint, randn

# With references, pytorch-metric-learning's LiftedStructureLoss takes the negatives of another row; see
# tests/pml/test_drop_in_triplets.py.
NAMES = [name for name in family("pairs") if name not in ("NPairsLoss", "LiftedStructureLoss")]
# The loss for which pytorch-metric-learning compares a row with its own copy in the memory.
OWN_COPY = "NCALoss"
on_names = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def theirs():
    require("pytorch_metric_learning")
    from pytorch_metric_learning import losses

    return losses


def batches(count=5, n=8, d=6, classes=3):
    return [(randn(n, d, seed=10 * i), randint(0, classes, n, seed=10 * i + 1)) for i in range(count)]


def step(memory, x, y, *rest, **options):
    x = x.clone().requires_grad_()
    value = memory(x, y, *rest, **options)
    value.sum().backward()
    return value.detach().sum(), x.grad


def pair(theirs, name, size, **options):
    ours, other = (lib.CrossBatchMemory(getattr(lib, name)(), 6, size, **options).double() for lib in (losses, theirs))
    return ours, other


@pytest.mark.parametrize("size", [8, 20, 64], ids=["one batch", "wraps around", "never full"])
@on_names
def test_every_step_is_theirs(name, size, theirs):
    if name == OWN_COPY:
        return
    ours, other = pair(theirs, name, size)
    for x, y in batches():
        for a, b in zip(step(ours, x, y), step(other, x, y)):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
        assert ours.queue_idx == other.queue_idx
        assert ours.has_been_filled is other.has_been_filled
        assert torch.equal(ours.curr_batch_idx, other.curr_batch_idx)
        filled = size if other.has_been_filled else other.queue_idx
        torch.testing.assert_close(ours.embedding_memory, other.embedding_memory)
        assert torch.equal(ours.label_memory[:filled], other.label_memory[:filled])


@pytest.mark.parametrize("kind", ["pairs", "triplets"])
@on_names
def test_with_a_miner_every_step_is_theirs(name, kind, theirs):
    if name == OWN_COPY:
        return
    from pytorch_metric_learning import miners

    def miner():
        return miners.MultiSimilarityMiner(epsilon=0.4) if kind == "pairs" else miners.TripletMarginMiner(margin=0.3)

    ours, other = pair(theirs, name, 20, miner=miner())
    for x, y in batches():
        for a, b in zip(step(ours, x, y), step(other, x, y)):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["ContrastiveLoss", "MultiSimilarityLoss", "MarginLoss"])
def test_a_given_tuple_joins_as_theirs(name, theirs):
    ours, other = pair(theirs, name, 40)
    for kind, (x, y) in zip(("pairs", "triplets") * 2, batches(4)):
        at, same = ours.queue_idx, (y[:, None] == y) & ~torch.eye(8, dtype=torch.bool)
        if kind == "triplets":
            a, p, n = (same[:, :, None] & (y[:, None] != y)[:, None]).nonzero(as_tuple=True)
            given = (a[::5], p[::5] + at, n[::5] + at)
        else:
            (a, p), (b, n) = same.nonzero(as_tuple=True), (y[:, None] != y).nonzero(as_tuple=True)
            given = (a, p + at, b, n + at)
        for found, expected in zip(step(ours, x, y, given), step(other, x, y, given)):
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@on_names
def test_a_mask_stores_some_and_compares_the_others(name, theirs):
    if name == OWN_COPY:
        return
    ours, other = pair(theirs, name, 10)
    for x, y in batches():
        mask = torch.arange(8) >= 4
        for a, b in zip(step(ours, x, y, enqueue_mask=mask), step(other, x, y, enqueue_mask=mask)):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@on_names
def test_a_rows_own_copy_is_left_out(name):
    """A memory that holds one batch gives the loss of that batch, with the references held fixed."""
    (x, y), loss = batches(1)[0], getattr(losses, name)()
    memory = CrossBatchMemory(loss, 6, 8).double()
    value, grad = step(memory, x, y)
    torch.testing.assert_close(value, loss.double()(x, y))
    assert grad.count_nonzero() > 0
    assert not memory.embedding_memory.requires_grad


def test_the_state_goes_on_where_it_stopped():
    steps = batches()
    whole = CrossBatchMemory(losses.ContrastiveLoss(), 6, 20).double()
    for x, y in steps[:3]:
        step(whole, x, y)
    state = copy.deepcopy(whole.state_dict())
    assert set(state) == {"embedding_memory", "label_memory"}
    resumed = CrossBatchMemory(losses.ContrastiveLoss(), 6, 20).double()
    resumed.load_state_dict(state)
    for x, y in steps[3:]:
        assert torch.equal(step(resumed, x, y)[0], step(whole, x, y)[0])
    whole.reset_queue()
    assert whole.queue_idx == 0
    assert not whole.has_been_filled
    assert whole(x[:1], y[:1]) == 0


def filled(memory, count):
    for x, y in batches(count):
        memory(x, y)
    return memory


def contents(memory):
    """The stored embeddings and labels, oldest first."""
    stored = memory.embedding_memory, memory.label_memory
    if memory.has_been_filled:
        return [t.roll(-memory.queue_idx, 0) for t in stored]
    return [t[: memory.queue_idx] for t in stored]


@pytest.mark.parametrize("count", [0, 2, 3], ids=["empty", "part", "wrapped"])
@pytest.mark.parametrize("way", ["saved", "values alone", "position of 0.1"])
def test_a_state_holds_the_rings_position(count, way, tmp_path):
    memory = filled(CrossBatchMemory(losses.ContrastiveLoss(), 6, 20).double(), count)
    state = memory.state_dict()
    if way == "saved":
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    elif way == "values alone":
        state = dict(state)
    else:
        ring = {name: getattr(memory, name) for name in ("embedding_memory", "label_memory")}
        state = {**ring, "queue_idx": torch.tensor(memory.queue_idx), "has_been_filled": torch.tensor(count == 3)}
    for assign in (False, True):
        resumed = CrossBatchMemory(losses.ContrastiveLoss(), 6, 20).double()
        resumed.load_state_dict(copy.deepcopy(state), assign=assign)
        assert resumed.has_been_filled is memory.has_been_filled
        for a, b in zip(contents(resumed), contents(memory), strict=True):
            assert torch.equal(a, b)
        if way != "values alone":
            assert resumed.queue_idx == memory.queue_idx
            assert torch.equal(resumed.embedding_memory, memory.embedding_memory)


@pytest.mark.parametrize("before", [0, 1, 4], ids=["fresh", "begun", "filled"])
@pytest.mark.parametrize("count", [2, 3], ids=["part", "wrapped"])
def test_values_put_into_another_states_place(count, before):
    """``torch.distributed.checkpoint`` and ``state.update(...)`` do this; the metadata is that of the other state."""
    memory, other = (CrossBatchMemory(losses.ContrastiveLoss(), 6, 20).double() for _ in range(2))
    state = filled(other, before).state_dict()
    for name, value in filled(memory, count).state_dict().items():
        state[name].copy_(value)
    other.load_state_dict(state)
    assert other.has_been_filled is memory.has_been_filled
    for a, b in zip(contents(other), contents(memory), strict=True):
        assert torch.equal(a, b)


def test_a_state_without_the_memory_or_of_another_size_leaves_it_alone():
    memory = filled(CrossBatchMemory(losses.ContrastiveLoss(), 6, 20).double(), 3)
    memory.load_state_dict({}, strict=False)
    assert (memory.queue_idx, memory.has_been_filled) == (4, True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        memory.load_state_dict(CrossBatchMemory(losses.ContrastiveLoss(), 6, 30).state_dict())
    assert (memory.queue_idx, memory.has_been_filled) == (4, True)


def test_a_loaded_state_is_not_written_to():
    state = filled(CrossBatchMemory(losses.ContrastiveLoss(), 6, 20).double(), 3).state_dict()
    for _ in range(2):
        resumed = CrossBatchMemory(losses.ContrastiveLoss(), 6, 20).double()
        resumed.load_state_dict(state)
        assert resumed.queue_idx == 4
        filled(resumed, 1)


@pytest.mark.parametrize("count", [2, 3], ids=["part", "wrapped"])
def test_their_state_loads_and_ours_loads_there(count, theirs):
    ours, other = pair(theirs, "ContrastiveLoss", 20)
    filled(other, count), filled(ours, count)
    assert {k: (v.shape, v.dtype) for k, v in ours.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in other.state_dict().items()
    }
    fresh, there = pair(theirs, "ContrastiveLoss", 20)
    fresh.load_state_dict(other.state_dict())
    there.load_state_dict(ours.state_dict())
    # pytorch-metric-learning saves the ring as it stands, without the position.
    assert fresh.has_been_filled is other.has_been_filled
    assert fresh.queue_idx == (0 if count == 3 else 16)
    there.queue_idx, there.has_been_filled = fresh.queue_idx, fresh.has_been_filled
    x, y = randn(8, 6, seed=77), randint(0, 3, 8, seed=78)
    mask = torch.arange(8) >= 7  # pytorch-metric-learning reports a memory without rows as filled
    if count == 3:  # so that all three overwrite the oldest row
        other.queue_idx = 0
        for name in ("embedding_memory", "label_memory"):
            setattr(other, name, getattr(ours, name).roll(-ours.queue_idx, 0))
        fresh.load_state_dict(other.state_dict())
    want = other(x, y, enqueue_mask=mask)
    for memory in (fresh, there):
        torch.testing.assert_close(memory(x, y, enqueue_mask=mask), want)


def test_the_position_can_be_assigned():
    memory = filled(CrossBatchMemory(losses.ContrastiveLoss(), 6, 20).double(), 3)
    memory.queue_idx, memory.has_been_filled = 8, False  # what is after place 8 is not in the memory
    (x, y), other = batches(1)[0], CrossBatchMemory(losses.ContrastiveLoss(), 6, 20).double()
    other.add_to_memory(memory.embedding_memory[:8], memory.label_memory[:8], 8)
    assert torch.equal(memory(x, y), other(x, y))
    assert memory.queue_idx == other.queue_idx == 16
    with pytest.raises(ValueError, match=r"queue_idx must be in \[0, 20\); got 20"):
        memory.queue_idx = 20


@pytest.mark.parametrize("mined", [False, True], ids=["streamed", "listed"])
@on_names
def test_several_forwards_before_one_backward(name, mined):
    """Each gradient uses the memory as it was in its forward."""
    miner = miners.PairMarginMiner(0.1, 2.0) if mined else None
    together, alone = (CrossBatchMemory(getattr(losses, name)(), 6, 20, miner).double() for _ in range(2))
    want = [step(alone, x, y) for x, y in batches()]
    leaves = [x.clone().requires_grad_() for x, _ in batches()]
    values = [together(x, y) for x, (_, y) in zip(leaves, batches())]
    sum(values).backward()
    for value, leaf, (expected, grad) in zip(values, leaves, want, strict=True):
        assert torch.equal(value, expected)
        assert torch.equal(leaf.grad, grad)
    assert torch.equal(together.embedding_memory, alone.embedding_memory)


def test_the_memory_is_written_in_place_where_no_graph_waits_for_it():
    memory = CrossBatchMemory(losses.ContrastiveLoss(), 6, 20).double()
    at, (x, y) = memory.embedding_memory.data_ptr(), batches(1)[0]
    for _ in range(3):
        loss = memory(x.requires_grad_(), y)  # alive through the next forward, as in most training loops
        loss.backward()
        assert memory.embedding_memory.data_ptr() == at
    kept = memory(x, y)
    memory(x, y)
    assert memory.embedding_memory.data_ptr() != at
    kept.backward()


def test_a_memory_copies_and_pickles_with_a_graph_waiting():
    memory = filled(CrossBatchMemory(losses.ContrastiveLoss(), 6, 20).double(), 3)
    x, y = batches(1)[0]
    value = memory(x.requires_grad_(), y)
    copies = copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))
    value.backward()
    want = step(memory, x.detach(), y)
    for other in copies:
        assert all(torch.equal(a, b) for a, b in zip(step(other, x.detach(), y), want, strict=True))


def test_the_names_of_the_losses_it_takes():
    assert "ContrastiveLoss" in CrossBatchMemory.supported_losses()
    assert "NPairsLoss" not in CrossBatchMemory.supported_losses()
    CrossBatchMemory.check_loss_support("TripletMarginLoss")
    with pytest.raises(ValueError, match=r"takes CircleLoss, .*; got ArcFaceLoss"):
        CrossBatchMemory.check_loss_support("ArcFaceLoss")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_memory_keeps_its_dtype(dtype):
    memory = CrossBatchMemory(losses.SupConLoss(), 6, 20)
    for x, y in batches(3):
        value, grad = step(memory, x.to(dtype), y)
        assert value.dtype == torch.float32
        assert grad.dtype == dtype
        assert memory.embedding_memory.dtype == torch.float32


def test_an_fp64_batch_meets_an_fp32_memory_in_fp64():
    memory, wide = (CrossBatchMemory(losses.SupConLoss(), 6, 20) for _ in range(2))
    wide.double()
    for x, y in batches(3):
        x = x.float().double()  # what the memory holds is rounded: the same numbers in both
        found, expected = step(memory, x, y), step(wide, x, y)
        assert memory.embedding_memory.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    eager, other = (CrossBatchMemory(losses.ContrastiveLoss(), 6, 20).double() for _ in range(2))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager", dynamic=False)
    for x, y in batches(4):
        torch.testing.assert_close(step(compiled, x, y), step(eager, x, y))
    assert other.queue_idx == eager.queue_idx
    assert torch.equal(other.curr_batch_idx, eager.curr_batch_idx)


def test_learns_the_parameters_of_its_loss():
    memory = CrossBatchMemory(losses.MarginLoss(learn_beta=True, nu=0.1), 6, 20).double()
    (x, y) = batches(1)[0]
    memory(x, y).backward()
    assert memory.loss.beta.grad.count_nonzero() == 1


@pytest.mark.parametrize(
    ("make", "call", "error", "message"),
    [
        ({"loss": losses.NPairsLoss()}, {}, TypeError, "takes ref_emb.*got NPairsLoss"),
        ({"loss": torch.nn.L1Loss()}, {}, TypeError, "got L1Loss"),
        ({"memory_size": 0}, {}, ValueError, "must be a positive integer"),
        ({"memory_size": 7}, {}, ValueError, "8 rows do not fit a memory of 7"),
        ({"embedding_size": 5}, {}, ValueError, r"must have shape \(N, 5\); got \(8, 6\)"),
        ({}, {"enqueue_mask": torch.ones(3) > 0}, ValueError, r"enqueue_mask must be bool of shape \(8,\)"),
        ({}, {"enqueue_mask": torch.ones(8) > 0, "indices_tuple": (torch.arange(2),) * 3}, ValueError, "exclude"),
        ({}, {"labels": torch.arange(3)}, ValueError, "labels must have shape"),
    ],
)
def test_bad_input_is_refused(make, call, error, message):
    x, y = batches(1)[0]
    with pytest.raises(error, match=message):
        CrossBatchMemory(**{"loss": losses.ContrastiveLoss(), "embedding_size": 6, "memory_size": 20, **make})(
            **{"embeddings": x.float(), "labels": y, **call}
        )


@pytest.mark.slow
def test_a_large_memory_is_streamed():
    found = json.loads(
        run_in_child("tests.support.memory_probe", "cross_batch", "512", "65536", "128").splitlines()[-1]
    )
    assert found["peak"] <= found["gradients"] + (64 << 20)


def test_the_lifted_structure_loss_sees_the_memory_as_references():
    loss, memory = losses.LiftedStructureLoss(), losses.CrossBatchMemory(losses.LiftedStructureLoss(), 6, 16).double()
    (x, y), (z, t) = batches(2)
    memory(x, y)
    stored = torch.tensor([True] * 3 + [False] * 5)
    expected = loss(z[~stored], t[~stored], None, torch.cat((x, z[stored])), torch.cat((y, t[stored])))
    torch.testing.assert_close(memory(z, t, enqueue_mask=stored), expected)


def test_a_loss_without_references_is_refused():
    for loss in (losses.ArcFaceLoss(3, 6), losses.NPairsLoss(), torch.nn.Identity()):
        with pytest.raises(TypeError, match=r"pair loss of dml_kernels.losses that takes ref_emb"):
            losses.CrossBatchMemory(loss, 6)

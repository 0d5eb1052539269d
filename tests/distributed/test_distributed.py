"""dml_kernels.distributed: two ranks with a part of the batch each, on gloo, against one process with all of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from dml_kernels import losses, miners, regularizers
from dml_kernels.distributed import DistributedLossWrapper, DistributedMinerWrapper, GlobalTuple, gather
from tests.support.backends import missing, require
from tests.support.problems import randint, randn

RANKS, ROWS, CLASSES, WIDTH = 2, 12, 4, 5
EVEN, UNEVEN, NONE_LAST, NONE_FIRST = (6, 6), (3, 9), (12, 0), (0, 12)


def batch(step: int) -> tuple[Tensor, Tensor]:
    return randn(ROWS, 7, seed=step), randint(0, CLASSES, ROWS, seed=100 + step)


def theirs(module: str, name: str, *args: Any, **options: Any) -> Any:
    return getattr(require(f"pytorch_metric_learning.{module}"), name)(*args, **options)


def memory(**options: Any) -> nn.Module:
    return losses.CrossBatchMemory(losses.ContrastiveLoss(), WIDTH, 30, **options)


@dataclass
class Case:
    """A case that runs twice: plain in one process, and wrapped on each rank."""

    loss: Callable[[], nn.Module]
    miner: Callable[[], nn.Module] | None = None
    sizes: tuple[int, int] = EVEN
    # Whether DistributedDataParallel averages the loss's gradients; or all are summed.
    bank_in_ddp: bool = True
    gradient: str = "mean"
    # extra(network, rows, step): further arguments of the call.
    extra: Callable[[nn.Module, slice, int], dict[str, Any]] = lambda network, rows, step: {}
    steps: int = 1
    together: bool = False  # one backward after all steps
    penalty: bool = False  # a second derivative


def views(network: nn.Module, rows: slice, step: int) -> dict[str, Any]:
    return {"ref_emb": network(batch(50)[0][rows] + 1), "ref_labels": batch(51)[1][rows]}


def listed_views(network: nn.Module, rows: slice, step: int) -> dict[str, Any]:
    """Two references a row, and triplets of a row with its two."""
    at = torch.arange(ROWS)[rows] - rows.start
    twice = {name: t.repeat_interleave(2, 0) for name, t in views(network, rows, step).items()}
    twice["ref_emb"] = twice["ref_emb"] * torch.tensor([1, -1]).repeat(len(at))[:, None]
    return {**twice, "indices_tuple": (at, 2 * at, 2 * at + 1)}


def mask(network: nn.Module, rows: slice, step: int) -> dict[str, Any]:
    return {"enqueue_mask": (torch.arange(ROWS) % 3 == step)[rows]}


def places(network: nn.Module, rows: slice, step: int) -> dict[str, Any]:
    """Triplets in addition to all pairs: anchors are the rank's rows, positives and negatives places of the memory."""
    at = torch.arange(ROWS)[rows]
    return {"indices_tuple": (at - rows.start, at * step, at * step + 1)}


PROXIES = (CLASSES, WIDTH)
CASES = {
    "pairs": Case(losses.ContrastiveLoss),
    "pairs, uneven": Case(losses.MultiSimilarityLoss, sizes=UNEVEN),
    "pairs, no rows last": Case(losses.ContrastiveLoss, sizes=NONE_LAST),
    "pairs, no rows first": Case(losses.SupConLoss, sizes=NONE_FIRST),
    "pairs mined": Case(losses.ContrastiveLoss, miners.MultiSimilarityMiner, UNEVEN),
    "triplets mined": Case(losses.TripletMarginLoss, miners.TripletMarginMiner, UNEVEN),
    "triplets mined, no rows": Case(losses.TripletMarginLoss, miners.TripletMarginMiner, NONE_LAST),
    "summed": Case(losses.MultiSimilarityLoss, gradient="sum", sizes=UNEVEN),
    "second derivative": Case(losses.NTXentLoss, sizes=UNEVEN, penalty=True),
    "views": Case(losses.NTXentLoss, sizes=UNEVEN, extra=views),
    "views with tuples": Case(losses.TripletMarginLoss, sizes=UNEVEN, extra=listed_views),
    "embedding regulariser": Case(lambda: losses.CircleLoss(embedding_regularizer=regularizers.LpRegularizer())),
    "learned thresholds": Case(lambda: losses.MarginLoss(learn_beta=True, num_classes=CLASSES, nu=0.1), sizes=UNEVEN),
    "Proxy-NCA": Case(lambda: losses.ProxyNCALoss(*PROXIES), sizes=UNEVEN),
    "Proxy-NCA, no rows": Case(lambda: losses.ProxyNCALoss(*PROXIES), sizes=NONE_FIRST),
    "ArcFace": Case(lambda: losses.ArcFaceLoss(*PROXIES, weight_regularizer=regularizers.LpRegularizer())),
    "ArcFace mined": Case(lambda: losses.ArcFaceLoss(*PROXIES), miners.PairMarginMiner, UNEVEN),
    "ArcFace outside": Case(lambda: losses.ArcFaceLoss(*PROXIES), sizes=UNEVEN, bank_in_ddp=False),
    "ArcFace summed": Case(lambda: losses.ArcFaceLoss(*PROXIES), sizes=UNEVEN, gradient="sum"),
    "Proxy-Anchor": Case(lambda: losses.ProxyAnchorLoss(*PROXIES, alpha=4), sizes=UNEVEN),
    "memory": Case(memory, sizes=UNEVEN, steps=4),
    "memory, no rows": Case(memory, sizes=NONE_LAST, steps=3),
    "memory with miner": Case(lambda: memory(miner=miners.PairMarginMiner()), sizes=UNEVEN, steps=4),
    "memory, one backward": Case(memory, sizes=UNEVEN, steps=4, together=True),
    "memory masked": Case(memory, sizes=UNEVEN, steps=4, extra=mask),
    "memory with tuples": Case(memory, sizes=UNEVEN, steps=2, extra=places),
    "their pairs": Case(
        lambda: theirs("losses", "ContrastiveLoss"), lambda: theirs("miners", "PairMarginMiner"), UNEVEN
    ),
    "their ArcFace": Case(lambda: theirs("losses", "ArcFaceLoss", *PROXIES), sizes=UNEVEN),
    "their memory": Case(
        lambda: theirs("losses", "CrossBatchMemory", theirs("losses", "ContrastiveLoss"), WIDTH, 30), steps=4
    ),
}  # fmt: skip


def run(case: Case, rank: int | None) -> dict[str, Any]:
    """Values, gradients and memory after the steps: of the whole batch with plain objects, or of one rank."""
    torch.manual_seed(0)
    network, loss, rows = nn.Linear(7, WIDTH).double(), case.loss().double(), slice(0, ROWS)
    miner = None if case.miner is None else case.miner()
    parts, kept = (network, loss), loss
    if rank is not None:
        start = sum(case.sizes[:rank])
        rows = slice(start, start + case.sizes[rank])
        loss = DistributedLossWrapper(loss, gradient=case.gradient)
        miner = None if miner is None else DistributedMinerWrapper(miner)
        if case.gradient == "mean":
            network = DistributedDataParallel(network)
            if case.bank_in_ddp and list(loss.parameters()):
                loss = DistributedDataParallel(loss)
    values = []
    for step in range(case.steps):
        x, y = (t[rows] for t in batch(step))
        e = network(x)
        arguments = case.extra(network, rows, step)
        if miner is not None:
            arguments["indices_tuple"] = miner(e, y)
        values.append(loss(e, y, **arguments))
        if case.penalty:
            ranks = 1 if rank is None else RANKS
            (slope,) = torch.autograd.grad(values[-1], e, create_graph=True)
            values[-1] = values[-1] + ranks * (slope / ranks).pow(2).sum()
        if not case.together:
            values[-1].backward()
    if case.together:
        sum(values).backward()
    grads = [p.grad for part in parts for p in part.parameters()]
    if rank is not None and case.gradient == "sum":
        for grad in grads:
            distributed.all_reduce(grad)
    state = {name: kept.get_buffer(name).clone() for name in dict(kept.named_buffers()) if "memory" in name}
    shown = [] if case.penalty else [v.detach() for v in values]  # each rank's penalty is of its own rows
    return {"values": shown, "grads": grads, "memory": state}


def own_tuples(rank: int) -> dict[str, Any]:
    """Tuples of miners without a wrapper, which see only the rank's rows."""
    e, y = (t[slice(0, 3) if rank == 0 else slice(3, ROWS)] for t in (batch(0)[0][:, :WIDTH], batch(0)[1]))
    e.requires_grad_()
    found = {}
    for kind, miner in (("pairs", miners.PairMarginMiner(0.0, 9.0)), ("triplets", miners.TripletMarginMiner(9.0))):
        tuples = miner(e, y)
        found[kind] = gather(e, y, tuples).indices_tuple, DistributedLossWrapper(losses.ContrastiveLoss())(e, y, tuples)
    return found


def by_hand(rank: int) -> list[Tensor]:
    """MagnetLoss takes clusters in place of labels."""
    e = batch(0)[0][:3] if rank == 0 else batch(0)[0][3:]
    e = e.clone().requires_grad_()
    clusters = torch.arange(ROWS) % 4
    value = losses.MagnetLoss()(*gather(e, clusters[:3] if rank == 0 else clusters[3:], gradient="sum")[:2], CLUSTERED)
    value.backward()
    return [value.detach(), e.grad]


CLUSTERED = torch.tensor([0, 0, 1, 1])
EFFICIENT = {
    "ours": (losses.ContrastiveLoss, None),
    "ours with batch-hard": (losses.TripletMarginLoss, miners.BatchHardMiner),
    "ours with their miner": (losses.MultiSimilarityLoss, lambda: theirs("miners", "MultiSimilarityMiner")),
    "theirs": (lambda: theirs("losses", "ContrastiveLoss"), None),
}


def silent(rank: int) -> list[Tensor]:
    """The other rank lists nothing, so its loss does not use this rank's rows; the backward must still reach them."""
    e, y = (t[:6] if rank == 0 else t[6:] for t in (batch(0)[0][:, :WIDTH].clone(), batch(0)[1]))
    e.requires_grad_()
    tuples = [(torch.empty(0, dtype=torch.int64),) * 4, (torch.arange(5), torch.arange(1, 6)) * 2][rank]
    value = DistributedLossWrapper(theirs("losses", "ContrastiveLoss"), efficient=True)(e, y, tuples)
    value.backward()
    return [value.detach(), e.grad]


def efficient(name: str, rank: int) -> tuple[list[Tensor], Any]:
    """Value and embeddings' gradient of one rank, and what was mined."""
    make, miner = EFFICIENT[name]
    e, y = batch(0)[0][:, :WIDTH].clone(), batch(0)[1]
    e, y = (e[:3], y[:3]) if rank == 0 else (e[3:], y[3:])
    e.requires_grad_()
    tuples = None if miner is None else DistributedMinerWrapper(miner(), efficient=True)(e, y)
    value = DistributedLossWrapper(make(), efficient=True)(e, y, tuples)
    value.backward()
    return [value.detach(), e.grad], tuples


def refusals(rank: int) -> list[str]:
    """The messages of refusals, which both ranks raise, so that neither waits for the other."""
    (x, y), found = batch(0), []
    loss = DistributedLossWrapper(losses.ContrastiveLoss())
    mined = DistributedMinerWrapper(miners.PairMarginMiner(0.0, 9.0))(x[:5], y[:5])
    for call in (
        lambda: loss(x[:5, : 5 + rank], y[:5]),
        lambda: loss(x[:5].to([torch.float32, torch.float64][rank]), y[:5]),
        lambda: loss(x[:5].clone().requires_grad_(rank == 0), y[:5]),
        lambda: loss(x[:5], y[:5], tuple(mined)),
        lambda: loss(x[:5], y[:5], [None, (y[:2],) * 3][rank]),
        lambda: DistributedLossWrapper(losses.ContrastiveLoss(), efficient=True)(x[:5], y[:5], mined),
        lambda: gather(x[:5], y[:5], GlobalTuple(mined, efficient=True)),
    ):
        try:
            call()
            found.append("nothing")
        except ValueError as error:
            found.append(str(error))
    return found


def work(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{directory}/meeting", timedelta(seconds=60), RANKS, rank)
    found: dict[str, Any] = {name: run(case, rank) for name, case in CASES.items()}
    found["own tuples"], found["by hand"], found["refusals"] = own_tuples(rank), by_hand(rank), refusals(rank)
    found["efficient"] = {name: efficient(name, rank) for name in EFFICIENT}
    found["silent"] = silent(rank)
    torch.save(found, f"{directory}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory) -> list[dict[str, Any]]:
    if not (distributed.is_available() and distributed.is_gloo_available()):
        missing("this PyTorch has no torch.distributed with gloo")
    require("pytorch_metric_learning")
    directory = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(work, (str(directory),), nprocs=RANKS)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_memories_are_those_of_one_process(name, by_rank):
    want = run(CASES[name], None)
    assert all(grad.abs().max() > 1e-6 for grad in want["grads"][:1])
    for found in by_rank:
        close(found[name], want)


def test_the_whole_batch_alone_gives_the_same(by_rank):
    """Wrappers without a process group pass everything through."""
    for name in ("pairs", "triplets mined", "Proxy-NCA", "memory", "memory masked", "views"):
        case = CASES[name]
        wrapped = Case(lambda case=case: DistributedLossWrapper(case.loss()), case.miner and (
            lambda case=case: DistributedMinerWrapper(case.miner())), extra=case.extra, steps=case.steps)  # fmt: skip
        close(run(wrapped, None)["values"], run(case, None)["values"])


def test_tuples_of_own_rows_become_rows_of_the_whole_batch(by_rank):
    x, y = batch(0)[0][:, :WIDTH], batch(0)[1]
    for kind, miner in (("pairs", miners.PairMarginMiner(0.0, 9.0)), ("triplets", miners.TripletMarginMiner(9.0))):
        each = [miner(x[:3], y[:3]), [t + 3 for t in miner(x[3:], y[3:])]]
        whole = tuple(torch.cat(both) for both in zip(*each, strict=True))
        assert all(t.numel() for t in each[1])
        for found in by_rank:
            tuples, value = found["own tuples"][kind]
            assert all(torch.equal(a, b) for a, b in zip(tuples, whole, strict=True))
            close(value.detach(), losses.ContrastiveLoss()(x, y, whole))


@pytest.mark.parametrize("name", EFFICIENT)
def test_efficient_is_the_mean_of_own_rows_against_all(name, by_rank):
    """Compared with lists of pairs: each part's rows with the whole batch, without their own copies."""
    make, miner = EFFICIENT[name]
    x, y = batch(0)[0][:, :WIDTH].clone().requires_grad_(), batch(0)[1]
    same = (y[:, None] == y) & ~torch.eye(ROWS, dtype=torch.bool)
    values, loss = [], make()
    for rows in (slice(0, 3), slice(3, ROWS)):
        if miner is None:
            tuples = (*same[rows].nonzero(as_tuple=True), *(y[rows, None] != y).nonzero(as_tuple=True))
        else:  # as the miner sees the whole batch; the anchors of these rows
            tuples = miner()(x.detach(), y)
            anchors = (0, 0, 0) if len(tuples) == 3 else (0, 0, 2, 2)
            inside = [(tuples[a] >= rows.start) & (tuples[a] < rows.stop) for a in anchors]
            tuples = tuple(t[i] - rows.start * (k in anchors) for k, (t, i) in enumerate(zip(tuples, inside)))
        values.append(loss(x[rows], y[rows], tuples, x, y))
        value, mined = by_rank[len(values) - 1]["efficient"][name]
        close(value[0], values[-1].detach())
        if miner is not None:
            assert all(torch.equal(a.sort().values, b.sort().values) for a, b in zip(mined, tuples, strict=True))
    sum(values).backward()
    close(torch.cat([found["efficient"][name][0][1] for found in by_rank]), x.grad)


def test_a_rank_that_lists_nothing_takes_part(by_rank):
    x, y = batch(0)[0][6:, :WIDTH].clone().requires_grad_(), batch(0)[1][6:]
    value = theirs("losses", "ContrastiveLoss")(x, y, (torch.arange(5), torch.arange(1, 6)) * 2, x, y)
    value.backward()
    close(by_rank[1]["silent"], [value.detach(), x.grad])
    close(by_rank[0]["silent"], [torch.zeros_like(value), torch.zeros(6, WIDTH, dtype=torch.float64)])


def test_a_memory_is_known_by_its_class_and_not_by_its_name(pml):
    ours = losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 8)
    original = pml.losses.CrossBatchMemory(pml.losses.ContrastiveLoss(), 4, 8)
    homonym = type("CrossBatchMemory", (nn.Module,), {})()
    found = [DistributedLossWrapper(loss).has_memory for loss in (ours, original, homonym)]
    assert found == [True, True, False]


def test_a_copied_tuple_keeps_its_mark():
    found = GlobalTuple((torch.arange(2),) * 3, efficient=True)
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert isinstance(other, GlobalTuple)
        assert other.efficient
        assert len(other) == 3


def test_magnet_by_hand(by_rank):
    x = batch(0)[0].clone().requires_grad_()
    value = losses.MagnetLoss()(x, torch.arange(ROWS) % 4, CLUSTERED)
    value.backward()
    for found in by_rank:
        close(found["by hand"][0], value.detach())
    close(torch.cat([found["by hand"][1] for found in by_rank]), x.grad)


def test_what_differs_between_ranks_is_refused_on_both(by_rank):
    for found in by_rank:
        assert [
            expected in message
            for expected, message in zip(
                (
                    "embeddings.size(1) must be the same on every rank; ranks 0 and 1 differ",
                    "embeddings.dtype must be the same",
                    "embeddings.requires_grad must be the same",
                    "indices_tuple must hold this rank's own rows, in [0, 5); got",
                    "the kind of indices_tuple must be the same",
                    "indices_tuple is of a miner with efficient=False; use the same for both",
                    "indices_tuple is of a miner with efficient=True; gather takes one with efficient=False",
                ),
                found["refusals"],
                strict=True,
            )
        ] == [True] * 7, found["refusals"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DistributedLossWrapper(losses.MagnetLoss()), TypeError, "takes clusters, not labels"),
        (lambda: DistributedLossWrapper(lambda x, y: x), TypeError, "loss must be a loss of dml_kernels or"),
        (lambda: DistributedMinerWrapper(None), TypeError, "miner must be a miner of dml_kernels or"),
        (lambda: DistributedLossWrapper(memory(), efficient=True), ValueError, "use efficient=False"),
        (lambda: DistributedLossWrapper(losses.ArcFaceLoss(3, 4), True), TypeError, "ArcFaceLoss takes none"),
        (lambda: DistributedLossWrapper(losses.NCALoss(), gradient="max"), ValueError, "one of mean, sum; got 'max'"),
        (lambda: gather(torch.ones(2, 2), gradient="max"), ValueError, "one of mean, sum; got 'max'"),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()

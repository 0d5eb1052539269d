"""Losses under DistributedDataParallel: two processes, a batch each, on gloo; parameters of the loss among the rest."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dml_kernels import losses
from tests.support.backends import missing
from tests.support.problems import randint, randn

RANKS, CLASSES, WIDTH = 2, 6, 5
LOSSES = {
    "CosFaceLoss": lambda: losses.CosFaceLoss(CLASSES, WIDTH, scale=4),
    "SoftTripleLoss": lambda: losses.SoftTripleLoss(CLASSES, WIDTH, centers_per_class=3),
    "ProxyAnchorLoss": lambda: losses.ProxyAnchorLoss(CLASSES, WIDTH, alpha=4),
    "MarginLoss": lambda: losses.MarginLoss(learn_beta=True, num_classes=CLASSES),
    "MultiSimilarityLoss": lambda: losses.MultiSimilarityLoss(),
}


class Trained(nn.Module):
    """A network and its loss as one module, so that the gradients of both are averaged."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network, self.loss = nn.Linear(7, WIDTH), LOSSES[name]()
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.network(x), y)


def gradients(model: nn.Module, rank: int) -> list[Tensor]:
    """The gradients of every parameter, for the batch of one rank."""
    model.zero_grad()
    model(randn(12, 7, seed=rank), randint(0, CLASSES, 12, seed=10 + rank)).backward()
    return [p.grad.clone() for p in model.parameters()]


def work(rank: int, directory: str) -> None:
    """One process: saves its gradients of every loss."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{directory}/meeting", timedelta(seconds=60), RANKS, rank)
    found = {}
    for name in LOSSES:
        torch.manual_seed(rank)  # all ranks then take the parameters of rank 0
        found[name] = gradients(DistributedDataParallel(Trained(name)), rank)
    torch.save(found, f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory) -> list[dict[str, list[Tensor]]]:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        missing("this PyTorch has no torch.distributed with gloo")
    directory = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(work, (str(directory),), nprocs=RANKS)
    return [torch.load(directory / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_on_every_rank_are_the_mean_over_the_ranks(name, by_rank):
    torch.manual_seed(0)
    model = Trained(name)
    alone = [gradients(model, rank) for rank in range(RANKS)]
    for found in by_rank:
        for got, *each in zip(found[name], *alone, strict=True):
            torch.testing.assert_close(got, torch.stack(each).mean(0), rtol=1e-10, atol=1e-12)
            assert all((got - own).abs().max() > 1e-6 for own in each)  # a rank's own gradient is another

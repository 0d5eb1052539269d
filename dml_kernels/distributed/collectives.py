"""Two collectives: gather the rows of all ranks, and scatter their sum. Each is the derivative of the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from ..ops.contract import accumulate_dtype

Group = Any  # torch.distributed.ProcessGroup, which a PyTorch without torch.distributed does not have


def world_size(group: Group = None) -> int:
    """The number of ranks of a group (None: all ranks); 1 without a process group.

    Raises:
        ValueError: this rank is not in the group.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    if distributed.get_rank(group) < 0:
        raise ValueError("this rank is not in the group; call only on its ranks")
    return distributed.get_world_size(group)


def _all_gather(whole: Tensor, mine: Tensor, group: Group) -> None:
    # PyTorch 2.13 renamed this function and the next.
    call = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    call(whole, mine, group=group)


def _reduce_scatter(mine: Tensor, whole: Tensor, group: Group) -> None:
    call = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
    call(mine, whole, group=group)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the caller needs the numbers at once
def exchange(numbers: Sequence[int], device: torch.device, group: Group) -> list[list[int]]:
    """Exchange numbers: every rank gives the same count, and receives those of all ranks, by rank."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    all_ranks = mine.new_empty(world_size(group) * len(numbers))
    _all_gather(all_ranks, mine, group)
    return all_ranks.view(-1, len(numbers)).tolist()


class RankRows(NamedTuple):
    """How the rows of a tensor are spread over the ranks.

    Args:
        sizes: the number of rows N_r of each rank.
        rank: this rank.
        group: the process group.
    """

    sizes: tuple[int, ...]
    rank: int
    group: Group

    @property
    def start(self) -> int:
        """Where this rank's rows begin."""
        return sum(self.sizes[: self.rank])

    def places(self, device: torch.device) -> Tensor:
        """The places of this rank's rows, (N_r,) int64."""
        return torch.arange(self.start, self.start + self.sizes[self.rank], device=device)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # traced collectives are left unwaited for
    def gather(self, t: Tensor) -> Tensor:
        """From (N_r, ...) to (sum of N_r, ...); the gradient is this rank's part of the sum of all ranks' gradients."""
        return _Gather.apply(t, self)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(t: Tensor, rows: RankRows) -> Tensor:
        most = max(rows.sizes)
        if most == 0:
            return t.clone()
        whole = t.new_empty(len(rows.sizes) * most, *t.shape[1:])
        _all_gather(whole, _padded(t.detach(), most), rows.group)
        parts = [part[:n] for part, n in zip(whole.split(most), rows.sizes, strict=True)]
        return whole if min(rows.sizes) == most else torch.cat(parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rows = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Scatter.apply(grad, ctx.rows), None


class _Scatter(torch.autograd.Function):
    """From (sum of N_r, ...) on each rank to this rank's rows of the sum over the ranks, computed in fp32 or fp64."""

    @staticmethod
    def forward(whole: Tensor, rows: RankRows) -> Tensor:
        n, most = rows.sizes[rows.rank], max(rows.sizes)
        if most == 0:
            return whole.clone()
        wide = whole.detach().to(accumulate_dtype(whole.dtype))
        padded = torch.cat([_padded(part, most) for part in wide.split(rows.sizes)])
        mine = padded.new_empty(most, *whole.shape[1:])
        _reduce_scatter(mine, padded, rows.group)
        return mine[:n].to(whole.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rows = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Gather.apply(grad, ctx.rows), None


def _padded(t: Tensor, rows: int) -> Tensor:
    """``t`` filled up with zeros to ``rows`` rows, contiguous as collectives require."""
    short = rows - t.size(0)
    return torch.cat([t, t.new_zeros(short, *t.shape[1:])]) if short else t.contiguous()

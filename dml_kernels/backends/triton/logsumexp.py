"""masked_logsumexp on the GPU: launches the kernels and allocates their memory, without a host synchronisation."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ...ops.contract import accumulate_dtype
from ...ops.signatures import Bank, Spec
from ..torch.logsumexp import scale_grad
from . import configs
from .collect import BUFFER_BYTES, LARGEST_FP16, Block, Gradients, lift, slope_bound
from .kernels import gradients as backward
from .kernels import logsumexp as forward
from .kernels import logsumexp_owned as owned
from .launch import ACCUMULATE, cdiv, launch, on_device
from .operand import Operand, finish, part, tile_arguments

# A fixed offset replaces the running maximum where the span of all possible logits, in natural units, is below this.
SPAN_LIMIT = 80.0


def fixed_peak(bank: Bank, spec: Spec) -> float | None:
    """The largest possible logit of `different`, in units of log 2, if it can replace the running maximum, else None.

    It can where the scale is a plain number, no column has a bias, and unit vectors are compared whose logits have a
    small span.
    """
    if not spec.normalize or spec.policy == "quadratic" or bank.scale is not None or bank.col_bias is not None:
        return None
    k, o = spec.logit[2:]
    low, high = {"dot": (-1.0, 1.0), "sqeuclidean": (-4.0, 0.0), "euclidean": (-2.0, 0.0)}[spec.metric]
    if abs(k) * (high - low) >= SPAN_LIMIT:
        return None
    return max(k * (low - o), k * (high - o)) * math.log2(math.e)


def logit_arguments(bank: Bank, spec: Spec) -> dict[str, Any]:
    """The kernel arguments that turn a score into a logit and determine the set of a pair."""
    c, exclude, bias = (None if t is None else t.contiguous() for t in (bank.c, bank.exclude, bank.col_bias))
    stride = 0 if bank.scale is None or bank.scale.dim() == 0 else bank.scale.stride(0)
    return {
        "y_ptr": bank.y.contiguous(), "c_ptr": c, "exclude_ptr": exclude, "scale_ptr": bank.scale,
        "bias_ptr": bias, "stride_scale": stride, "ignore_index": spec.ignore_index,
        **dict(zip(("k_same", "o_same", "k_different", "o_different"), spec.logit, strict=True)),
    }  # fmt: skip


def pad_of(spec: Spec) -> int:
    """The number of bank rows of a class in the kernels: its centres, rounded up to a power of two."""
    return 1 << (spec.centres - 1).bit_length()


def policy_arguments(spec: Spec) -> dict[str, Any]:
    number = spec.policy_params[-1] if spec.policy_params else 0.0
    return {"POLICY": spec.policy, "CENTRES": spec.centres, "PAD": pad_of(spec), "number": float(number)}


def padded(w: Tensor, spec: Spec) -> Tensor:
    """The bank with the last centre of each class repeated up to a power of two; w itself where there are as many."""
    beyond = pad_of(spec) - spec.centres
    if not beyond:
        return w
    classes = w.unflatten(0, (-1, spec.centres))
    return torch.cat((classes, classes[:, -1:].expand(-1, beyond, -1)), 1).flatten(0, 1)


def unpadded(grad: Tensor | None, spec: Spec) -> Tensor | None:
    if grad is None or pad_of(spec) == spec.centres:
        return grad
    return grad.unflatten(0, (-1, pad_of(spec)))[:, : spec.centres].flatten(0, 1)


def _pick(kernel: str, bank: Bank, spec: Spec) -> configs.Config:
    extras = any(t is not None for t in (bank.c, bank.exclude, bank.col_bias))
    arch = configs.arch_of(bank.x.device)
    tile = configs.pick(kernel, arch, spec.dtype, bank.x.size(1), spec.metric, bank.w.dtype, extras)
    return tile if spec.policy == "linear" else configs.for_policy(tile, arch, pad_of(spec))


def operands(bank: Bank, spec: Spec) -> tuple[Operand, Operand]:
    kind = (spec.metric, spec.normalize, spec.eps, spec.dtype)
    return Operand.of(bank.x, *kind), Operand.of(padded(bank.w, spec), *kind)


def keeps_mean(bank: Bank, spec: Spec) -> bool:
    """Whether the forward also computes the rows' gradient: in the owned form, for products, with labels as indices.

    A bank with labels may hold many positives of a row, which would be a second sum to accumulate, and the gradient of
    plain sums is not weighted by a softmax.
    """
    if not spec.keep or bank.x.size(0) == 0 or spec.metric != "dot" or spec.policy != "linear":
        return False
    if spec.sums or bank.c is not None:
        return False
    return configs.form(configs.arch_of(bank.x.device), spec.dtype, bank.x.size(1), spec.metric) == "owned"


def by_descriptors(tile: configs.Config, x: Tensor, w: Tensor) -> bool:
    """Whether the forward loads by tensor descriptors: the tile asks for it, and rows are contiguous and 16-aligned."""
    return tile.tma and all(
        t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 and t.size(0) < 1 << 30
        for t in (x, w)
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory in which Triton puts the descriptors of a launch."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def masked_logsumexp_fwd(bank: Bank, spec: Spec) -> tuple[Tensor, ...]:
    n = bank.x.size(0)
    acc = accumulate_dtype(spec.dtype)
    out = [bank.x.new_empty(n, dtype=acc) for _ in range(2)]
    out += [bank.x.new_empty(n if spec.sums else 0, dtype=acc) for _ in range(2)]
    if n == 0:
        return tuple(out)
    with on_device(bank.x):
        x, w = operands(bank, spec)
        m = w.t.size(0)
        keep = keeps_mean(bank, spec)
        tile = _pick("kept" if keep else "forward", bank, spec)
        n_tiles, splits, span = configs.ranges(tile, n, m, bank.x.device, slices(x) if keep else None)
        kept = bank.x.new_empty((splits, *x.t.shape), dtype=acc) if keep else None
        parts = bank.x.new_empty((6 if spec.sums else 4, splits, n), dtype=acc)
        # A weight relative to a fixed offset may be too small for fp16.
        peak = None if keep and spec.dtype == torch.float16 else fixed_peak(bank, spec)
        logit = logit_arguments(bank, spec)
        described = by_descriptors(tile, x.t, w.t)
        arguments = {
            **tile_arguments(x, w, spec.metric, spec.dtype, tile), **logit,
            **policy_arguments(spec), "out_ptr": parts, "mean_ptr": kept, "N": n, "M": m,
            "span": span, "splits": splits, "SUMS": spec.sums, "FIXED": peak is not None,
            "KEEP": keep, "LIFT": weight_lift(spec), "peak": peak or 0.0, "TMA": described,
            "SPECIALIZE": described and tile.specialize,
        }  # fmt: skip
        if described and bank.x.is_cuda:
            triton.set_allocator(_scratch)
        launch(forward.forward_kernel, (n_tiles, splits), arguments, num_warps=tile.num_warps,
               num_stages=tile.num_stages)  # fmt: skip
        _merge(parts, logit["y_ptr"], out, spec)
        if kept is not None:
            out.append(_mean(kept, parts, logit["y_ptr"], spec))
    return tuple(out)


def weight_lift(spec: Spec) -> float:
    return LARGEST_FP16 if spec.dtype == torch.float16 else 1.0


def _merge(parts: Tensor, y: Tensor, out: list[Tensor], spec: Spec) -> None:
    """Runs ``merge_kernel``: the partial results of the ranges become those of the op."""
    _, splits, n = parts.shape
    arguments = {
        "part_ptr": parts, "y_ptr": y, "same_ptr": out[0], "different_ptr": out[1], "sum_same_ptr": out[2],
        "sum_different_ptr": out[3], "N": n, "splits": splits, "ignore_index": spec.ignore_index, "SUMS": spec.sums,
        "BLOCK_N": 128, "ACC": ACCUMULATE[parts.dtype],
    }  # fmt: skip
    launch(forward.merge_kernel, (cdiv(n, 128),), arguments, num_warps=4, num_stages=2)


def _mean(kept: Tensor, parts: Tensor, y: Tensor, spec: Spec) -> Tensor:
    """Runs ``merge_means_kernel``: the partial sums of the ranges become the mean of `different` (N, D)."""
    splits, n, d = kept.shape
    mean = kept.new_empty(n, d)
    arguments = {
        "part_ptr": parts, "sums_ptr": kept, "y_ptr": y, "mean_ptr": mean, "N": n, "splits": splits,
        "ignore_index": spec.ignore_index, "LIFT": weight_lift(spec), **whole_rows(d, kept.dtype),
    }  # fmt: skip
    launch(forward.merge_means_kernel, (cdiv(n, configs.ROWS.block_n),), arguments, num_warps=configs.ROWS.num_warps,
           num_stages=configs.ROWS.num_stages)  # fmt: skip
    return mean


def whole_rows(d: int, acc: torch.dtype) -> dict[str, Any]:
    """The arguments with which a kernel over rows takes all of D in one block."""
    block_d = max(16, 1 << (d - 1).bit_length())
    return {"D": d, "BLOCK_N": configs.ROWS.block_n, "BLOCK_D": block_d, "ACC": ACCUMULATE[acc]}


def slices(operand: Operand, least: int = 16) -> int:
    """The most partial gradients of a matrix that may be held: 16, or as many as fit into one bounded buffer."""
    rows, d = operand.t.shape
    return max(least, BUFFER_BYTES // (rows * d * 4))


class Backward:
    """One backward call: the vectors that all chunks share, and the sums over the chunks."""

    def __init__(self, grads: tuple[Tensor, ...], lse: tuple[Tensor, ...], needs: list[bool], bank: Bank, spec: Spec):
        self.bank, self.spec, self.needs = bank, spec, needs
        self.x, self.w = operands(bank, spec)
        self.acc = accumulate_dtype(spec.dtype)
        self.logit = logit_arguments(bank, spec)
        g = [t.to(self.acc).contiguous() for t in grads]
        names = ("g_same_ptr", "g_different_ptr", "h_same_ptr", "h_different_ptr")
        self.rows = dict(zip(names, (*g[:2], *(g[2:] if spec.sums else (None, None))), strict=True))
        self.rows |= {"same_ptr": lse[0].contiguous(), "different_ptr": lse[1].contiguous()}
        n, m = bank.x.size(0), bank.w.size(0) // spec.centres
        self.of_scale = bank.x.new_zeros(n, dtype=self.acc) if needs[2] else None
        self.of_bias = bank.x.new_zeros(m, dtype=self.acc) if needs[3] else None
        self.lift = self._lift() if spec.dtype == torch.float16 else None
        self.tile = _pick("gradient", bank, spec)
        self.fold = spec.normalize and spec.dtype != torch.float16

    def _lift(self) -> Tensor:
        """The lift, from a bound on |E| = |dz k t s'| with p at most 1."""
        parts = []
        for g, h, k in (("g_same_ptr", "h_same_ptr", 0), ("g_different_ptr", "h_different_ptr", 2)):
            size = self.rows[g].abs() if self.rows[h] is None else self.rows[g].abs() + self.rows[h].abs()
            parts.append(size * abs(self.spec.logit[k]))
        bound = torch.maximum(*parts)
        if self.bank.scale is not None:
            bound = bound * self.bank.scale.to(self.acc).abs()
        bound = bound.nan_to_num(nan=0.0, posinf=0.0).amax()
        return lift(bound * slope_bound(self.x, self.w, self.spec.metric) * self._policy_bound())

    def _policy_bound(self) -> Tensor | float:
        """A bound on the factor that a policy has in dS: Circle's weight, or the slope dS/ds_k of a pool."""
        bank, spec = self.bank, self.spec
        if spec.policy == "softmax_pool":  # p_k (1 + (s_k - S) / gamma), where (s_k - S) / gamma <= p_k K / e
            return 1 + spec.centres / math.e
        if spec.policy != "quadratic":
            return 1.0
        if spec.normalize:
            scores: Tensor | float = {"dot": 1.0, "sqeuclidean": 4.0, "euclidean": 2.0}[spec.metric]
        else:
            longest = [t.to(self.acc).square().sum(1).amax() for t in (bank.x, bank.w)]
            scores = longest[0] + longest[1]  # |x.w| is at most half of this sum, |x - w|^2 at most twice
            scores = 1 + 2 * scores.nan_to_num(nan=0.0, posinf=0.0)
        return 1 + abs(spec.policy_params[0]) + scores

    def fill(self, block: Block) -> None:
        n, m, pad = block.x.t.size(0), block.w.t.size(0), pad_of(self.spec)
        new = self.bank.x.new_empty
        t_rows = new((block.grid[1], n), dtype=self.acc) if self.needs[2] else None
        b_cols = new((block.grid[0], m // pad), dtype=self.acc) if self.needs[3] else None
        logit, rows = self.logit, block.rows
        cols = slice(block.cols.start // pad, block.cols.stop // pad)
        arguments = {
            **tile_arguments(block.x, block.w, self.spec.metric, self.spec.dtype, self.tile), **logit,
            **policy_arguments(self.spec), **block.arguments(),
            **{name: part(t, rows) for name, t in self.rows.items()},
            **{name: part(logit[name], rows) for name in ("y_ptr", "exclude_ptr")},
            **{name: part(logit[name], cols) for name in ("c_ptr", "bias_ptr")},
            "scale_ptr": part(logit["scale_ptr"], rows) if logit["stride_scale"] else logit["scale_ptr"],
            "lift_ptr": self.lift,
            "t_rows_ptr": t_rows, "b_cols_ptr": b_cols, "N": n, "M": m,
            "first": cols.start, "FOLD": self.fold,
        }  # fmt: skip
        launch(backward.gradient_kernel, (block.grid[0] * block.grid[1],), arguments, num_warps=self.tile.num_warps,
               num_stages=self.tile.num_stages)  # fmt: skip
        if t_rows is not None:
            self.of_scale[block.rows] += t_rows.sum(0)
        if b_cols is not None:
            self.of_bias[cols] += b_cols.sum(0)

    def owned(self, which: str) -> Tensor | None:
        """grad_x ("rows") or grad_w ("bank") in the owned form, if needed, together with the sums over that side."""
        rows = which == "rows"
        operand, walked = (self.x, self.w) if rows else (self.w, self.x)
        tile = _pick(which, self.bank, self.spec)
        side, step = (tile.block_n, tile.block_m) if rows else (tile.block_m, tile.block_n)
        (r, d), new = operand.t.shape, self.bank.x.new_empty
        tiles, walk = cdiv(r, side), cdiv(walked.t.size(0), step)
        most = slices(operand, 16 if rows else 1)
        per_split = cdiv(walk, min(most, configs.splits(tiles, walk, configs.cores_of(operand.t.device))))
        splits = cdiv(walk, per_split)
        out = torch.empty_like(operand.t, memory_format=torch.contiguous_format)
        parts = new((splits, r, d), dtype=self.acc) if splits > 1 else out
        own = new((splits, r), dtype=self.acc) if splits > 1 and self.spec.metric != "dot" else None
        needed = self.needs[0 if rows else 1]
        name, total = ("t_rows_ptr", self.of_scale) if rows else ("b_cols_ptr", self.of_bias)
        sums = None if total is None else new((splits, r), dtype=self.acc)
        arguments = {
            **tile_arguments(self.x, self.w, self.spec.metric, self.spec.dtype, tile), **self.logit, **self.rows,
            name: sums, "unit_ptr": operand.unit, "lift_ptr": self.lift, "out_ptr": parts if needed else None,
            "own_ptr": own, "N": self.x.t.size(0), "M": self.w.t.size(0), "span": per_split * step,
            "FOLD": self.fold, "PARTS": splits > 1,
        }  # fmt: skip
        del arguments["width"]  # all of D is in one block
        kernel = owned.owned_rows_kernel if rows else owned.owned_bank_kernel
        launch(kernel, (tiles, splits), arguments, num_warps=tile.num_warps, num_stages=tile.num_stages)
        if total is not None:
            torch.sum(sums, 0, out=total)
        if not needed or splits == 1:
            return out if needed else None
        own = None if own is None else own.sum(0)
        return finish(parts.sum(0), operand, own, out, lift=self.lift, folded=self.fold)

    def from_mean(self, mean: Tensor) -> Tensor | None:
        """grad_x and the scale's gradient, from the mean that the forward has kept."""
        n, d = self.x.t.shape
        out = torch.empty_like(self.x.t, memory_format=torch.contiguous_format) if self.needs[0] else None
        taken = ("y_ptr", "scale_ptr", "stride_scale", "k_same", "o_same", "k_different", "o_different")
        rows = ("same_ptr", "different_ptr", "g_same_ptr", "g_different_ptr")
        arguments = {
            "x_ptr": self.x.t, "w_ptr": self.w.t, "rx_ptr": self.x.r, "rw_ptr": self.w.r, "unit_ptr": self.x.unit,
            "stride_xn": self.x.t.stride(0), "stride_xd": self.x.t.stride(1), "stride_wm": self.w.t.stride(0),
            "stride_wd": self.w.t.stride(1), **{name: self.logit[name] for name in taken},
            **{name: self.rows[name] for name in rows}, "mean_ptr": mean, "out_ptr": out, "t_rows_ptr": self.of_scale,
            "N": n, "NORMALIZE": self.spec.normalize, **whole_rows(d, self.acc),
        }  # fmt: skip
        launch(owned.owned_means_kernel, (cdiv(n, configs.ROWS.block_n),), arguments,
               num_warps=configs.ROWS.num_warps, num_stages=configs.ROWS.num_stages)  # fmt: skip
        return out


def masked_logsumexp_bwd(grads, lse, mean, needs, bank: Bank, spec: Spec) -> list[Tensor | None]:
    if bank.x.size(0) == 0:
        wanted = (bank.x, bank.w, *bank[5:])
        return [torch.zeros_like(t) if need else None for t, need in zip(wanted, needs, strict=True)]
    with on_device(bank.x):
        call = Backward(grads, lse, needs, bank, spec)
        d = bank.x.size(1)
        form = configs.form(configs.arch_of(bank.x.device), spec.dtype, d, spec.metric)
        if mean is not None or (form == "owned" and spec.policy == "linear"):
            grad_x = None
            if needs[0] or needs[2]:
                grad_x = call.owned("rows") if mean is None else call.from_mean(mean)
            grad_w = call.owned("bank") if needs[1] or needs[3] else None
        else:
            chunks = Gradients(call.x, call.w, spec.metric, spec.dtype, needs[:2], call.tile, call.lift)
            grad_x, grad_w = chunks.run(call.fill)
        return [
            grad_x,
            unpadded(grad_w, spec),
            scale_grad(call.of_scale, bank) if needs[2] else None,
            call.of_bias.to(bank.col_bias.dtype) if needs[3] else None,
        ]

"""``loss.W`` and ``loss.fc``: the parameter ``weight`` (M, D) as pytorch-metric-learning has it, (D, M).

The parameter itself is row-major, and only ``weight`` is in ``loss.parameters()``. Reading, derivatives and changes in
place work because the view shares the memory of ``weight``. What belongs to a parameter (its gradient, data,
requires_grad) is passed on to ``weight``. What cannot be passed on is refused by name, never done to the view alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Each would act on a view that the loss never sees again.
REFUSED = {
    torch.autograd.grad, Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad,
    Tensor.resize_, Tensor.resize_as_, Tensor.share_memory_,
}  # fmt: skip


def _refuse(what: str) -> RuntimeError:
    return RuntimeError(f"{what} is not for loss.W or loss.fc, the transposed view of a parameter: use loss.weight, "
                        "whose rows are the classes, or loss.parameters()")  # fmt: skip


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def fill(bank: Tensor, transposed: Tensor) -> None:
    """Copy the values of (D, M) into the parameter (M, D), which stays the parameter, in its memory if possible."""
    if transposed.shape != bank.shape[::-1]:
        raise ValueError(f"the transpose of weight must have shape {tuple(bank.shape[::-1])}; got "
                         f"{tuple(transposed.shape)}")  # fmt: skip
    value = transposed.detach().t()
    if (value.dtype, value.device) == (bank.dtype, bank.device):
        with torch.no_grad():
            bank.copy_(value)
    else:
        bank.data, bank.grad = value.clone(memory_format=torch.contiguous_format), None


class Transposed(Tensor):
    """The transpose of a parameter, which stands for it.

    Raises:
        RuntimeError: at what only the parameter itself can do: stand in an optimiser, have hooks, be differentiated by.
    """

    bank: Tensor

    @staticmethod
    def of(bank: Tensor) -> Tensor:
        """The transpose of ``weight`` (M, D); a plain view where that is no Parameter, as inside ``torch.func``."""
        view = bank.t()
        if type(bank) is not torch.nn.Parameter or torch.compiler.is_compiling():
            return view
        view = view.as_subclass(Transposed)
        view.bank = bank
        return view

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every function returns plain tensors."""
        if func in REFUSED:
            raise _refuse(func.__name__)
        with torch._C.DisableTorchFunctionSubclass():
            for t in args:
                if isinstance(t, Transposed) and not _same_memory(t, t.bank):
                    raise RuntimeError("this loss.W or loss.fc was taken before the parameter moved to another dtype "
                                       "or device: take it from the loss anew")  # fmt: skip
            return func(*args, **(kwargs or {}))

    @property
    def grad(self) -> Tensor | None:
        """The gradient of the parameter, transposed: a view, so that it can be scaled in place."""
        return None if self.bank.grad is None else self.bank.grad.t()

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.bank.grad = None if value is None else value.t().contiguous()

    @property
    def data(self) -> Tensor:
        """The values without gradient, in the same memory."""
        return self.bank.data.t()

    @data.setter
    def data(self, value: Tensor) -> None:
        fill(self.bank, value)

    @property
    def requires_grad(self) -> bool:
        """Whether the parameter requires a gradient."""
        return self.bank.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.bank.requires_grad = value

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Set whether the parameter requires a gradient."""
        self.bank.requires_grad_(requires_grad)
        return self

    @property
    def retains_grad(self) -> bool:  # type: ignore[override]
        """Refused: only optimisers read this, and they would step a tensor that is not the parameter."""
        raise _refuse("an optimiser")

    def set_(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refused."""
        raise _refuse("set_")

    def __deepcopy__(self, memo: Any) -> torch.nn.Parameter:
        """A separate parameter, (D, M)."""
        return torch.nn.Parameter(self.data.clone(), self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as a separate parameter, (D, M)."""
        return self.__deepcopy__({}).__reduce_ex__(protocol)

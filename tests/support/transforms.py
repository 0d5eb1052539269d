"""Checks that torch.compile and torch.func do not change the values and derivatives of a function of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def value_and_grads(function: Callable[..., Tensor], args: Sequence[Tensor]) -> tuple[Tensor, ...]:
    out = function(*args)
    return out.detach(), *torch.autograd.grad(out.sum(), [a for a in args if a.requires_grad])


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)


def assert_compiles_whole(function: Callable[..., Tensor], *calls: Sequence[Tensor], dynamic: bool | None = None):
    """Checks that one graph gives the values and gradients for the arguments of each call."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for args in calls:
        assert_equal(value_and_grads(compiled, args), value_and_grads(function, args))


def assert_grad_of_grad_is_double_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    found = torch.func.grad(lambda x: torch.func.grad(function)(x).pow(2).sum())(x)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(first.pow(2).sum(), leaf)
    torch.testing.assert_close(found, expected)
    assert expected.abs().max() > 0.1


def assert_vmap_of_grad_is_a_loop(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    batch, gradient = torch.stack([x, x * 2, x - 1]), torch.func.grad(function)
    torch.testing.assert_close(torch.func.vmap(gradient)(batch), torch.stack([gradient(b) for b in batch]))

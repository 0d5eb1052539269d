"""``loss.W`` and ``loss.fc``, as code written for pytorch-metric-learning uses them: they work, or name ``weight``."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from dml_kernels import losses
from tests.support.problems import randint
from tests.support.problems import randn as randn64

N, C, D = 9, 7, 5
on_both = pytest.mark.parametrize(("name", "key"), [("ArcFaceLoss", "W"), ("SoftTripleLoss", "fc")])


def randn(*size, seed):
    return randn64(*size, seed=seed).float()


def stepped(name):
    """A loss after one backward."""
    loss = getattr(losses, name)(C, D)
    loss(randn(N, D, seed=1), randint(0, C, N, seed=2)).backward()
    return loss


@on_both
def test_its_gradient_is_the_parameters(name, key):
    loss = stepped(name)
    grad = loss.weight.grad.clone()
    assert torch.equal(getattr(loss, key).grad, grad.t())
    norm = torch.nn.utils.clip_grad_norm_([getattr(loss, key)], 1e-3)
    torch.testing.assert_close(norm, grad.norm())
    torch.testing.assert_close(loss.weight.grad, grad * (1e-3 / grad.norm()), rtol=1e-3, atol=0)
    torch.nn.utils.clip_grad_value_([getattr(loss, key)], 1e-5)
    assert loss.weight.grad.abs().max() <= 1e-5
    getattr(loss, key).grad = grad.t().clone()
    assert torch.equal(loss.weight.grad, grad)
    getattr(loss, key).grad *= 2
    assert torch.equal(loss.weight.grad, 2 * grad)
    assert loss.weight.grad.is_contiguous()
    getattr(loss, key).grad = None
    assert loss.weight.grad is None


@on_both
def test_expressions_differentiate_into_the_parameter(name, key):
    loss = getattr(losses, name)(C, D)
    bank = getattr(loss, key)
    assert bank.shape == (D, len(loss.weight))
    value = (bank**2).sum() + torch.nn.functional.normalize(bank, dim=0)[0].sum()
    assert type(value) is torch.Tensor
    (truth,) = torch.autograd.grad(
        (loss.weight**2).sum() + torch.nn.functional.normalize(loss.weight)[:, 0].sum(), loss.weight
    )
    value.backward()
    torch.testing.assert_close(loss.weight.grad, truth)


@on_both
def test_changes_reach_the_parameter(name, key):
    loss = getattr(losses, name)(C, D)
    parameter, rows = loss.weight, len(loss.weight)
    held, new = getattr(loss, key), randn(D, rows, seed=3)
    for change in (
        lambda: setattr(getattr(loss, key), "data", new),
        lambda: getattr(loss, key).data.copy_(new * 2),
        lambda: torch.no_grad()(lambda: getattr(loss, key).copy_(new * 3))(),
        lambda: setattr(loss, key, new * 4),
        lambda: setattr(loss, key, torch.nn.Parameter(new * 5)),
        lambda: torch.nn.utils.vector_to_parameters((new * 6).flatten(), [getattr(loss, key)]),
        lambda: torch.no_grad()(lambda: held.copy_(new * 7))(),
    ):
        before = loss.weight.detach().clone()
        change()
        assert not torch.equal(loss.weight, before)
        factor = (loss.weight.detach().t() / new).mean().round()
        torch.testing.assert_close(loss.weight.detach(), factor * new.t())
        assert loss.weight is parameter
        assert loss.weight.is_contiguous()
        assert torch.equal(held, loss.weight.t())
    with torch.no_grad():
        torch.nn.init.zeros_(getattr(loss, key))
    assert (loss.weight == 0).all()
    with pytest.raises(ValueError, match="must have shape"):
        getattr(loss, key).data = new.t()
    with pytest.raises(RuntimeError, match="in-place"):
        getattr(loss, key).add_(1)  # with gradients on, as of any parameter


@on_both
def test_an_optimiser_made_before_an_assignment_goes_on(name, key):
    loss = getattr(losses, name)(C, D)
    optimiser = torch.optim.SGD(loss.parameters(), lr=1)
    setattr(loss, key, torch.nn.Parameter(randn(D, len(loss.weight), seed=3)))
    before = loss.weight.detach().clone()
    loss(randn(N, D, seed=1), randint(0, C, N, seed=2)).backward()
    optimiser.step()
    assert not torch.equal(loss.weight, before)


@on_both
def test_freezing_it_freezes_the_parameter(name, key):
    loss = getattr(losses, name)(C, D)
    assert not getattr(loss, key).requires_grad_(False).requires_grad
    assert not loss.weight.requires_grad
    getattr(loss, key).requires_grad = True
    assert loss.weight.requires_grad
    setattr(loss, key, torch.nn.Parameter(randn(D, len(loss.weight), seed=3), requires_grad=False))
    assert not loss.weight.requires_grad


@on_both
def test_copies_and_pickles_are_parameters_of_their_own(name, key):
    loss = getattr(losses, name)(C, D)
    buffer = io.BytesIO()
    torch.save(getattr(loss, key), buffer)
    buffer.seek(0)
    for made in (copy.deepcopy(getattr(loss, key)), pickle.loads(pickle.dumps(getattr(loss, key))), torch.load(buffer)):
        assert type(made) is torch.nn.Parameter
        assert torch.equal(made, loss.weight.t())
    for whole in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        with torch.no_grad():
            getattr(whole, key).fill_(2)
        assert (whole.weight == 2).all()
        assert not (loss.weight == 2).any()


@on_both
@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda w, value: torch.optim.SGD([w], lr=1), "an optimiser"),
        (lambda w, value: torch.optim.AdamW([{"params": w, "lr": 1}]), "an optimiser"),
        (lambda w, value: torch.autograd.grad(value, w), "grad"),
        (lambda w, value: torch.autograd.grad(value, [w], allow_unused=True), "grad"),
        (lambda w, value: w.register_hook(print), "register_hook"),
        (lambda w, value: w.register_post_accumulate_grad_hook(print), "hook"),
        (lambda w, value: w.set_(torch.zeros(1)), "set_"),
    ],
)  # fmt: skip
def test_what_only_the_parameter_can_do_says_so(name, key, use, what):
    loss = getattr(losses, name)(C, D)
    value = loss(randn(N, D, seed=1), randint(0, C, N, seed=2))
    with pytest.raises(RuntimeError, match=f"{what}.*use loss.weight"):
        use(getattr(loss, key), value)


@on_both
def test_one_held_while_the_parameter_moves_is_refused(name, key):
    loss = getattr(losses, name)(C, D)
    held = getattr(loss, key)
    loss.double()
    with pytest.raises(RuntimeError, match="anew"):
        held.fill_(1)
    with pytest.raises(RuntimeError, match="anew"):
        held + 1
    assert torch.equal(getattr(loss, key), loss.weight.t())
    setattr(loss, key, getattr(loss, key).float())  # as a Parameter of another dtype would
    assert loss.weight.dtype == torch.float32


@on_both
def test_it_compiles_and_works_inside_torch_func(name, key):
    loss = getattr(losses, name)(C, D)
    x = randn(N, D, seed=1)
    compiled = torch.compile(lambda x: (x @ getattr(loss, key)).sum(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), (x @ loss.weight.t()).sum())

    def penalty(weight):
        return torch.func.functional_call(Reading(loss, key), {"loss.weight": weight}, ())

    weight = torch.ones_like(loss.weight)
    torch.testing.assert_close(torch.func.grad(penalty)(weight), 2 * weight)


class Reading(torch.nn.Module):
    """A module that squares the matrix of a loss."""

    def __init__(self, loss, key):
        super().__init__()
        self.loss, self.key = loss, key

    def forward(self):
        return getattr(self.loss, self.key).square().sum()

"""Resuming Magnet's batches: states, within an epoch, with DataLoader workers that draw ahead, by pickling."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dml_kernels.samplers import MagnetBatchSampler
from tests.support.clusters import make_index, saved


def loss_of(index, batch):
    """A stand-in for a loss that depends on the batch alone."""
    return index.clusters[batch], (torch.tensor(batch) % 7).double()


def train(sampler, batches, steps=None):
    """Takes up to `steps` batches and updates the sampler after each."""
    taken = []
    for batch in batches:
        sampler.update(*loss_of(sampler.index, batch))
        taken.append(batch)
        if len(taken) == steps:
            break
    return taken


@pytest.mark.parametrize("steps", [0, 1, 7, 19, 20])
def test_resumed_at_any_step_the_batches_are_the_same(steps):
    index = make_index([30] * 8)
    sampler = MagnetBatchSampler(index, 4, 3)
    train(sampler, sampler)
    batches = iter(sampler)
    if steps:
        train(sampler, batches, steps)
    state = saved(sampler.state_dict())
    resumed = MagnetBatchSampler(index, 4, 3, seed=99)
    resumed.load_state_dict(state)
    rest = train(sampler, batches)
    assert len(rest) == 20 - steps
    if steps < 20:
        assert train(resumed, resumed) == rest
    assert train(resumed, resumed) == train(sampler, sampler)
    assert torch.equal(resumed.losses, sampler.losses)


def test_a_resumed_epoch_that_is_broken_off_is_not_resumed_again():
    sampler = MagnetBatchSampler(make_index([30] * 8), 4, 3)
    train(sampler, sampler, 5)
    sampler.load_state_dict(sampler.state_dict(consumed=3))
    train(sampler, sampler, 1)
    assert len(list(sampler)) == 20


def test_a_state_that_does_not_fit_is_refused_and_nothing_changes():
    index = make_index([30] * 8)
    good = MagnetBatchSampler(index, 4, 3).state_dict()
    sampler = MagnetBatchSampler(index, 4, 3, seed=1)
    twin = copy.deepcopy(sampler)
    others = [
        MagnetBatchSampler(index, 5, 3),
        MagnetBatchSampler(index, 4, 2),
        MagnetBatchSampler(index, 4, 3, batches=9),
    ]
    others.append(MagnetBatchSampler(make_index([30] * 7), 4, 3, batches=20))
    for other in others:
        with pytest.raises(ValueError, match="the sampler"):
            sampler.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="format"):
        sampler.load_state_dict({**good, "format": 7})
    with pytest.raises(ValueError, match="consumed"):
        sampler.state_dict(consumed=1)
    assert list(sampler) == list(twin)


def test_a_state_is_not_changed_by_what_comes_later():
    sampler = MagnetBatchSampler(make_index([30] * 8), 4, 3)
    state = sampler.state_dict()
    before = pickle.dumps(state)
    train(sampler, sampler)
    assert pickle.dumps(state) == before


def test_history_is_bounded(monkeypatch):
    monkeypatch.setattr(MagnetBatchSampler, "HISTORY", 5)
    sampler = MagnetBatchSampler(make_index([30] * 8), 4, 3)
    list(sampler)
    assert len(sampler.state_dict(consumed=15)["outstanding"]) == 5
    with pytest.raises(ValueError, match="from 15 to 20"):
        sampler.state_dict(consumed=14)


class Numbers(Dataset):
    def __len__(self):
        return 240

    def __getitem__(self, i):
        return i


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_resumed_in_mid_epoch_gives_the_same_batches(workers):
    index = make_index([30] * 8)

    def loader_of(sampler):
        options = {"multiprocessing_context": "fork", "prefetch_factor": 3} if workers else {}
        return DataLoader(Numbers(), batch_sampler=sampler, num_workers=workers, **options)

    def run(sampler, consumed, stop=None):
        taken = []
        for batch in loader_of(sampler):
            taken.append(batch.tolist())
            sampler.update(*loss_of(index, taken[-1]))
            consumed += 1
            if consumed == stop:
                return taken, saved(sampler.state_dict(consumed=consumed))
        return taken, None

    straight = MagnetBatchSampler(index, 4, 3)
    uncut = run(straight, 0)[0]
    assert len(uncut) == 20
    sampler, taken, state = MagnetBatchSampler(index, 4, 3), [], None
    for start, stop in ((0, 4), (4, 6), (6, 17), (17, None)):
        if state:
            assert len(state["outstanding"]) == (min(6, 20 - start) if workers else 0)
            sampler = MagnetBatchSampler(index, 4, 3, seed=50 + start)
            sampler.load_state_dict(state)
        part, state = run(sampler, start, stop)
        taken += part
    assert taken == uncut
    assert run(sampler, 0)[0] == run(straight, 0)[0]


@pytest.mark.slow
def test_spawned_workers_get_the_same_batches():
    index = make_index([30] * 8)
    expected = list(MagnetBatchSampler(index, 4, 3))
    loader = DataLoader(
        Numbers(), batch_sampler=MagnetBatchSampler(index, 4, 3), num_workers=2, multiprocessing_context="spawn"
    )
    assert [batch.tolist() for batch in loader] == expected
    assert len(loader) == 20


def test_index_and_sampler_survive_pickling():
    sampler = MagnetBatchSampler(make_index([30] * 8), 4, 3)
    twin = pickle.loads(pickle.dumps(sampler))
    assert train(twin, twin) == train(sampler, sampler)

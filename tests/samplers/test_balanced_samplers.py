"""Class-balanced samplers: m of each class, whole batches, unusual classes, draws that follow the seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dml_kernels.samplers import MPerClassSampler, NPairsSampler

LABELS = torch.tensor([7] * 10 + [2] * 3 + [5] * 1 + [9] * 20 + [-100] * 4)


def test_a_batch_holds_m_of_each_of_its_classes():
    sampler = MPerClassSampler(LABELS, 4, batch_size=12, length_before_new_iter=250)
    drawn = torch.tensor(list(sampler))
    assert len(sampler) == len(drawn) == 240
    for batch in drawn.view(-1, 12):
        labels, counts = LABELS[batch].unique(return_counts=True)
        assert counts.tolist() == [4, 4, 4]
        assert -100 not in labels
        for label in labels:
            # There are no repeats if the class has enough examples.
            members = batch[LABELS[batch] == label]
            assert len(members.unique()) == min(4, int((label == LABELS).sum()))


def test_without_a_batch_size_a_pass_goes_through_every_class():
    sampler = MPerClassSampler(LABELS.numpy(), 2, length_before_new_iter=30)
    drawn = torch.tensor(list(sampler))
    assert len(sampler) == len(drawn) == 24
    for one_pass in drawn.view(-1, 8):
        assert sorted(LABELS[one_pass][::2].tolist()) == [2, 5, 7, 9]
        assert torch.equal(LABELS[one_pass][::2], LABELS[one_pass][1::2])
    assert len(list(MPerClassSampler(LABELS, 2, length_before_new_iter=5))) == 5


def test_every_class_and_every_example_is_drawn_alike():
    labels = np.arange(40) % 8
    drawn = np.array(list(MPerClassSampler(labels, 1, batch_size=2, length_before_new_iter=40000, seed=0)))
    count = np.bincount(drawn, minlength=40)
    # With 39 degrees of freedom it exceeds 100 once in a million.
    assert ((count - 1000) ** 2 / 1000).sum() < 100


def test_the_seed_and_the_epoch_say_all():
    first = MPerClassSampler(LABELS, 2, 4, 40, seed=1)
    again = MPerClassSampler(LABELS, 2, 4, 40, seed=1)
    assert list(first) == list(first) == list(again)
    again.set_epoch(1)
    assert list(first) != list(again)
    loose = MPerClassSampler(LABELS, 2, 4, 40)
    torch.manual_seed(0)
    once = list(loose)
    assert once != list(loose)
    torch.manual_seed(0)
    assert once == list(loose)


@pytest.mark.parametrize("workers", [0, 1])
def test_it_serves_a_data_loader(workers):
    loader = DataLoader(LABELS, batch_size=4, sampler=MPerClassSampler(LABELS, 2, 4, 40), num_workers=workers)
    assert [batch.unique(return_counts=True)[1].tolist() for batch in loader] == [[2, 2]] * 10


def test_n_pairs_leaves_out_classes_of_one_example():
    sampler = NPairsSampler(LABELS, 6, 600)
    labels = LABELS[torch.tensor(list(sampler))]
    assert set(labels.tolist()) == {2, 7, 9}
    assert all(len(batch.unique()) == 3 for batch in labels.view(-1, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LABELS, 0), "m must be a positive"),
        ((LABELS, 2, 5), "multiple of m"),
        ((LABELS, 2, 10), "at most m times the 4 classes, 8"),
        ((LABELS, 2, 8, 7), "at least batch_size"),
        ((LABELS[None], 2), "shape"),
        ((torch.full((3,), -100), 2), "no example"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MPerClassSampler(*arguments)


def test_labels_that_are_no_integers_are_refused():
    with pytest.raises(TypeError, match="labels must be integers"):
        MPerClassSampler(LABELS.float(), 2)

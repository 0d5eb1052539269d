"""The demo's checkpoints under faults: flipped bits, full disks, and content that no run can have written."""

from __future__ import annotations

import copy
import errno
import io
import math
import os
import pickle

import pytest
import torch

from dml_kernels.demo import checkpoint, train
from dml_kernels.demo.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from dml_kernels.demo.objectives import MagnetRecipe
from dml_kernels.demo.plots import plt, save
from tests.demo.test_demo import RECIPES, TINY, assert_same_state, small_trainer


@pytest.fixture(scope="module")
def states():
    """The states after one epoch of each recipe."""
    threads = torch.get_num_threads()
    trainers = [small_trainer(recipe) for recipe in RECIPES]
    for trainer in trainers:
        trainer.run_epoch()
    yield {trainer.recipe.key: trainer.state() for trainer in trainers}
    torch.set_num_threads(threads)


def changed(state, place, value):
    """A copy with `value` at the place, a path of keys; KeyError's sentinel deletes."""
    state = copy.deepcopy(state)
    part = state
    for key in place[:-1]:
        part = part[key]
    if value is KeyError:
        del part[place[-1]]
    else:
        part[place[-1]] = value
    return state


def places(part, path=()):
    """Paths to everything in nested dicts and lists."""
    for key, value in part.items() if isinstance(part, dict) else enumerate(part):
        yield (*path, key), value
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def refusal(trainer, state):
    try:
        trainer.load_state(state)
    except CheckpointError as error:
        return error


def one_line(error):
    return "\n" not in str(error) and 10 < len(str(error)) < 600


def test_one_flipped_bit_anywhere_is_found(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"weights": torch.arange(8.0), "epoch": 1})
    whole = path.read_bytes()
    assert torch.equal(torch.load(path, weights_only=True)["weights"], torch.arange(8.0))  # PyTorch's own file too
    edges = (0, 1, 2, 3, len(whole) - 1)
    for place in (*edges, *range(4, len(whole), 11), *range(len(whole) - checkpoint.SEAL_LENGTH, len(whole), 9)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged|cannot be read") as caught:
            load_checkpoint(path)
        assert one_line(caught.value)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\n", lambda b: b[1:], lambda b: b[:100]])
def test_a_byte_less_or_more_is_found(tmp_path, change):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match="delete it and start anew"):
        load_checkpoint(path)


class Evil:
    """An object that would create a file if it were unpickled."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("what", [Evil(), {"format": checkpoint.FORMAT, "epoch": Evil()}, [1], torch.ones(2), "text"])
def test_a_sealed_pickle_of_something_else_is_refused_and_runs_nothing(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save(what, buffer)
    for content in (buffer.getvalue(), pickle.dumps("not a zip"), b""):
        path = tmp_path / "checkpoint.pt"
        path.write_bytes(content + checkpoint._seal(content))
        with pytest.raises(CheckpointError, match="start anew") as caught:
            load_checkpoint(path)
        assert one_line(caught.value)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("epoch",), "x", "epoch must be an integer from 0 to 3; got 'x'"),
        (("epoch",), 99, "epoch must be an integer from 0 to 3; got 99"),
        (("epoch",), 2, "not that of 6 steps"),
        (("epoch",), True, "got True"),
        (("epoch",), KeyError, "epoch must be"),
        (("model",), KeyError, "lacks model"),
        (("model", "head.weight"), KeyError, "lacks head.weight"),
        (("model", "extra"), torch.ones(1), "has extra"),
        (("model", "head.weight"), torch.ones(3, 3), r"head.weight is float32 \(3, 3\), expected float32 \(8, 2048\)"),
        (("model", "head.weight"), torch.ones(8, 2048).double(), "is float64"),
        (("model", "head.weight"), torch.full((8, 2048), math.nan), "head.weight holds NaN or infinity"),
        (("model", "head.weight"), [1.0], "of type list, expected Tensor"),
        (("model", "norm.running_var"), torch.full((8,), -1.0), "running_var is negative"),
        (("model", "pixel_std"), torch.tensor(0.5), "of other drawings"),
        (("optimiser", 0), KeyError, "lacks 0"),
        (("optimiser", 0, "exp_avg"), torch.ones(2), "exp_avg is float32"),
        (("optimiser", 0, "exp_avg_sq"), torch.full((32, 1, 3, 3), -1.0), "state is not that of 3 steps"),
        (("optimiser",), {}, "optimiser lacks 0"),
        (("rng",), torch.zeros(5056, dtype=torch.uint8), "mt19937"),
        (("rng",), torch.ones(5056), "rng is float32"),
        (("step_losses",), [1.0], "a list of 3 finite numbers"),
        (("step_losses", 1), math.nan, "a list of 3 finite numbers"),
        (("seconds",), [1.0], "a list of 2 finite numbers"),
        (("threads",), 0, "threads must be"),
        (("recipe",), 7, "of another recipe"),
        (("recipe", "lr"), KeyError, "lr None there"),
        (("recipe", "lr"), torch.ones(2), "lr"),
        (("loss_name",), None, "of another recipe"),
        (("objective",), {}, "objective lacks"),
    ],
)
def test_wrong_content_is_refused_in_one_line(states, recipe, place, value, says):
    trainer = small_trainer(recipe)
    with pytest.raises(CheckpointError, match=says) as caught:
        trainer.load_state(changed(states[recipe.key], place, value))
    assert one_line(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("index", "clusters"), torch.full((48,), 10**9), "damaged"),
        (("index", "centers"), torch.full((18, 8), math.nan), "centers holds NaN"),
        (("index", "centers"), torch.ones(18, 3), "coordinates"),
        (("index", "sizes"), [1], "sizes is of type list"),
        (("index", "seconds"), math.inf, "seconds is inf"),
        (("index", "labels"), None, "other labels"),
        (("index", "cluster_classes"), None, "no clusters"),
        (("index", "next_slice"), 7, "next_slice must be"),
        (("index", "refreshes"), 0, "refreshes must be"),
        (("index", "asked_at"), "soon", "asked_at must be"),
        (("index",), [], "index is of type list"),
        (("sampler", "outstanding"), [[10**9] * 16], "holds 1 batches after 3"),
        (("sampler", "losses"), torch.full((18,), math.nan, dtype=torch.float64), "losses holds NaN"),
        (("sampler", "losses"), torch.full((18,), -1.0, dtype=torch.float64), "at least 0"),
        (("sampler", "counts"), torch.ones(18), "counts is float32"),
        (("sampler", "shape"), 7, "clusters per batch"),
        (("sampler", "generator"), "{}", "generator"),
        (("sampler", "generator"), "not JSON", "generator"),
        (("sampler", "position"), 2, "between two epochs"),
        (("sampler", "position"), -1, "position must be"),
        (("sampler", "counts"), KeyError, "lacks counts"),
    ],
)
def test_wrong_content_of_magnets_clusters_and_batches_is_refused(states, place, value, says):
    with pytest.raises(CheckpointError, match=says) as caught:
        small_trainer(MagnetRecipe).load_state(changed(states["magnet"], ("objective", *place), value))
    assert one_line(caught.value)


def test_indices_of_batches_to_come_must_be_of_the_data(states):
    state = copy.deepcopy(states["magnet"]["objective"]["sampler"])
    sampler = small_trainer(MagnetRecipe).objective.sampler
    for outstanding in ([[10**9]], [[-1]], [["x"]], ["x"], [[]], [[1.5]], [[True]]):
        with pytest.raises(ValueError, match="batch of the state"):
            sampler.load_state_dict({**state, "position": 1, "outstanding": outstanding})
    sampler.load_state_dict({**state, "position": 1, "outstanding": [[47], [0]]})
    assert list(sampler) == [[47], [0]]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_whatever_stands_anywhere_is_refused_or_trains(states, recipe):
    """Each of these values at each place of the state in turn causes no other error, and no NaN later."""
    state = states[recipe.key]
    values = [KeyError, "x", -1, 99, 1 << 70, math.nan, [], torch.tensor(-(10**9))]
    trainer, accepted = small_trainer(recipe), set()
    for place, old in places(state):
        if place[0] == "recipe":
            continue
        spoiled = (
            [old.double(), old[:0], torch.full_like(old, 255), -old - 1]
            if isinstance(old, torch.Tensor) and old.dim()
            else []
        )
        for value in [*values, *spoiled]:
            said = refusal(trainer, changed(state, place, value))
            assert said is None or one_line(said), (place, value)
            if said is None:
                accepted.add(place[0])
                assert math.isfinite(trainer.run_epoch()), (place, value)
                trainer = small_trainer(recipe)
    assert not accepted & {"loss_name", "epoch"}


def test_old_checkpoints_are_refused_by_name(tmp_path, capsys):
    torch.save({"format": "dml_kernels demo checkpoint 2", "epoch": 1}, tmp_path / "proxy-nca.pt")
    assert train.main([*TINY, "--resume", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "proxy-nca.pt is damaged, or not a checkpoint of this version: delete it" in said


def full_disk(file, *_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_checkpoint_whole_and_is_named(tmp_path, monkeypatch, states, capsys):
    path = tmp_path / "proxy-nca.pt"
    save_checkpoint(path, states["proxy-nca"])
    monkeypatch.setattr(checkpoint.os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"proxy-nca.pt cannot be written \(No space left on device\).*as it was"):
        save_checkpoint(path, {"epoch": 2})
    with pytest.raises(OSError, match=r"loss.png cannot be written \(No space left on device\); no file of that name"):
        save(plt.figure(), tmp_path / "loss.png")
    with pytest.raises(OSError, match=r"metrics.json cannot be written"):
        checkpoint.write_json(tmp_path / "metrics.json", {})
    assert train.main([*TINY, "--out", str(tmp_path / "new")]) == 1
    assert "proxy-nca.pt cannot be written (No space left" in capsys.readouterr().err
    assert_same_state(load_checkpoint(path), states["proxy-nca"])
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["proxy-nca.pt"]

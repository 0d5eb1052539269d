"""The demo: tiny trainings, resuming bit for bit, whole-or-nothing files, plots."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dml_kernels.demo import checkpoint, cluster_plot, judging, options, plots, step_cost, train
from dml_kernels.demo.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from dml_kernels.demo.data import ImageSet, hold_out
from dml_kernels.demo.model import EmbeddingNet, embed
from dml_kernels.demo.objectives import MagnetRecipe, ProxyNCARecipe
from dml_kernels.demo.trainer import Trainer

for extra in train.EXTRAS:
    pytest.importorskip(extra)

TINY = ["--train-classes", "12", "--unseen-classes", "6", "--batch-size", "32", "--cost-classes", "0", "--threads", "1"]
RECIPES = [ProxyNCARecipe, MagnetRecipe]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(train.Run, "_plot", lambda *arguments: [])


def drawings(classes=6, each=8):
    """Class c is a bright square at a place of its own, with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(each)
    images = torch.randint(0, 60, (classes * each, 32, 32), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels):
        image[4 * label : 4 * label + 6, 4 * label : 4 * label + 6] = 255
    return images, labels


def small_trainer(recipe=ProxyNCARecipe, seed=0, **changes):
    settings = {"batch_size": 16, "embedding_size": 8, "train_classes": 6, "epochs": 3, "seed": seed} | changes
    return Trainer(recipe(**settings), *drawings())


def assert_same_state(left, right):
    """Equal to the last bit, apart from the clock."""
    assert left.keys() == right.keys()
    for key in left:
        if isinstance(left[key], dict):
            assert_same_state(left[key], right[key])
        elif isinstance(left[key], torch.Tensor):
            assert torch.equal(left[key], right[key]), key
        elif key != "seconds":
            assert left[key] == right[key], key


def test_a_tiny_run_lowers_both_losses_and_writes_every_file(tmp_path, capsys):
    assert train.main([*TINY, "--epochs", "4", "--out", str(tmp_path)]) == 0
    steps = 12 * 14 // 32
    for name in ("proxy-nca", "magnet"):
        step_losses = load_checkpoint(tmp_path / f"{name}.pt")["step_losses"]
        assert len(step_losses) == 4 * steps
        assert np.mean(step_losses[-steps:]) < 0.75 * np.mean(step_losses[:steps])
    for name in ("loss.png", "neighbours.png", "map.png", "clusters.png"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 10_000
    written = json.loads((tmp_path / "metrics.json").read_text())
    shown = capsys.readouterr().out
    assert_unseen_is_judged(written["unseen"], shown)
    seen = written["seen_held_out"]
    assert list(seen) == ["Proxy-NCA, 64-d", "Magnet, 64-d"]
    for one in seen.values():
        assert (one["drawings"], one["references"]) == (12 * 2, 12 * 14)
        assert 0 <= one["knn_error"] < 0.9
    assert seen["Proxy-NCA, 64-d"]["knc_error"] is None
    magnet = seen["Magnet, 64-d"]
    assert 12 < magnet["clusters"] <= 36
    assert f"{magnet['knc_error']:.3f}" in shown
    training = written["training"]
    assert training["Proxy-NCA"]["refresh_share"] == 0
    assert 0 < training["Magnet"]["refresh_share"] < 1
    assert f"{training['Magnet']['refresh_share']:.0%}" in shown
    assert written["machine"]["torch"] == torch.__version__


def assert_unseen_is_judged(unseen, shown):
    assert list(unseen) == ["raw pixels, 1024-d", "Proxy-NCA, 64-d", "Magnet, 64-d"]
    for one in unseen.values():
        assert one["queries"] == 6 * 16
        assert 0 < one["map_at_r"] <= one["recall"]["1"] <= one["recall"]["10"] <= 1
        assert len(one["recall_at_1_by_face"]) == 16
        assert np.mean(list(one["recall_at_1_by_face"].values())) == pytest.approx(one["recall"]["1"])
        assert f"{one['map_at_r']:.3f}" in shown
    assert len({one["map_at_r"] for one in unseen.values()}) == 3
    assert "Recall@10" in shown


def test_one_loss_alone_is_trained_where_asked(tmp_path, capsys, no_plots):
    arguments = [*TINY, "--epochs", "1", "--cost-classes", "1000", "--loss", "magnet", "--out", str(tmp_path)]
    assert train.main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["magnet.pt", "metrics.json"]
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert list(written["training"]) == ["Magnet"]
    assert list(written["unseen"]) == ["raw pixels, 1024-d", "Magnet, 64-d"]
    assert written["step_cost"] is None  # Proxy-NCA's
    assert "Proxy-NCA" not in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_recipe_gives_the_same_bits(recipe):
    first, second = small_trainer(recipe), small_trainer(recipe)
    assert first.run_epoch() == second.run_epoch()
    assert_same_state(first.state(), second.state())
    other = small_trainer(recipe, seed=1)
    other.run_epoch()
    assert other.step_losses != first.step_losses


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_state_holds_all_that_the_next_epoch_depends_on(recipe, tmp_path):
    """The state goes through a file. It has Magnet's clusters, tracked losses, draws and running variance."""
    whole = small_trainer(recipe)
    whole.run_epoch()
    save_checkpoint(tmp_path / "state.pt", whole.state())
    whole.run_epoch()
    resumed = small_trainer(recipe)
    torch.manual_seed(12345)
    resumed.load_state(load_checkpoint(tmp_path / "state.pt"))
    resumed.run_epoch()
    assert_same_state(whole.state(), resumed.state())


def test_magnet_tells_the_sampler_the_losses_of_each_step(monkeypatch):
    trainer = small_trainer(MagnetRecipe, examples_per_cluster=4)
    told = []
    monkeypatch.setattr(trainer.objective.sampler, "update", lambda *step: told.append(step))
    trainer.run_epoch()
    assert [float(each.mean()) for _, each in told] == pytest.approx(trainer.step_losses)
    for clusters, each in told:
        # Four examples of each of four clusters.
        assert torch.unique(clusters, return_counts=True)[1].tolist() == [4] * 4
        assert len(trainer.objective.index.cluster_classes[clusters].unique()) > 1
        assert not each.requires_grad
    index = trainer.objective.index
    assert index.refreshes == 1
    assert len(index) == 6 * 3
    assert 0 < trainer.refresh_seconds < trainer.seconds
    refreshed = []
    trainer.run_epoch(on_refresh=refreshed.append)
    assert index.refreshes == 2
    assert sum(refreshed) == 48


@pytest.mark.parametrize("first", ["proxy-nca", "magnet"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, capsys, no_plots, first):
    """After Ctrl-C in the second epoch of one loss, the resumed run ends with the bits of an uninterrupted one."""
    arguments = [*TINY, "--epochs", "2", "--out"]
    assert train.main([*arguments, str(tmp_path / "whole")]) == 0
    run_epoch = Trainer.run_epoch

    def interrupt(_loss):
        raise KeyboardInterrupt

    def interrupted_epoch(self, on_step=None, on_refresh=None):
        now = self.epoch == 1 and self.recipe.key == first
        return run_epoch(self, interrupt if now else on_step, on_refresh)

    monkeypatch.setattr(Trainer, "run_epoch", interrupted_epoch)
    capsys.readouterr()
    assert train.main([*arguments, str(tmp_path / "cut")]) == 130
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{first}.pt holds {'Magnet' if first == 'magnet' else 'Proxy-NCA'} after epoch 1 of 2" in shown
    assert f"magnet.pt holds Magnet after epoch {1 if first == 'magnet' else 0} of 2" in shown
    assert "--resume" in shown
    assert load_checkpoint(tmp_path / "cut" / f"{first}.pt")["epoch"] == 1

    monkeypatch.setattr(Trainer, "run_epoch", run_epoch)
    torch.manual_seed(12345)
    assert train.main([*arguments, str(tmp_path / "cut"), "--resume"]) == 0
    for name in ("proxy-nca.pt", "magnet.pt"):
        whole, resumed = (load_checkpoint(tmp_path / run / name) for run in ("whole", "cut"))
        assert whole["epoch"] == 2
        assert_same_state(whole, resumed)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "cut")]
    for part, entries in (("unseen", 3), ("seen_held_out", 2)):
        assert [one.pop("seconds") > 0 for run in metrics for one in run[part].values()] == [True] * (2 * entries)
        assert metrics[0][part] == metrics[1][part]


def test_resuming_another_recipe_is_refused(tmp_path, capsys, no_plots):
    arguments = [*TINY, "--epochs", "1", "--out", str(tmp_path)]
    assert train.main(arguments) == 0
    assert train.main([*arguments, "--resume", "--softmax-scale", "3"]) == 1
    assert "softmax_scale 1.0 there, 3.0 asked for" in capsys.readouterr().err
    assert train.main([*arguments, "--resume", "--loss", "magnet", "--alpha", "2"]) == 1
    assert "alpha 4.0 there, 2.0 asked for" in capsys.readouterr().err
    (tmp_path / "magnet.pt").write_bytes((tmp_path / "proxy-nca.pt").read_bytes())
    assert train.main([*arguments, "--resume", "--loss", "magnet"]) == 1
    assert "loss proxy-nca there, magnet asked for" in capsys.readouterr().err


def test_resuming_without_a_checkpoint_says_so(tmp_path, capsys):
    assert train.main([*TINY, "--resume", "--out", str(tmp_path)]) == 1
    assert "no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_a_damaged_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)


def test_a_truncated_checkpoint_and_a_foreign_file_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"weights": torch.ones(1000)})
    assert torch.equal(load_checkpoint(path)["weights"], torch.ones(1000))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)
    torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
        load_checkpoint(path)


@pytest.mark.parametrize("when", ["writing", "moving"])
def test_a_failed_save_leaves_the_old_file_whole(tmp_path, monkeypatch, when):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1})

    def fail_half_way(state, file):
        file.write(b"half")
        raise OSError("disk full")

    def refuse(*arguments):
        raise OSError("disk full")

    if when == "writing":
        monkeypatch.setattr(torch, "save", fail_half_way)
    else:
        monkeypatch.setattr(checkpoint.os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"epoch": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["epoch"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    checkpoint.write_json(path, {"recall": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write_json(path, {"recall": float("nan")})
    assert json.loads(path.read_text()) == {"recall": 1.0}


def test_too_few_drawings_for_a_batch_are_refused(tmp_path, capsys):
    assert train.main([*TINY, "--batch-size", "1000", "--out", str(tmp_path)]) == 2
    assert "do not fill one batch of 1000" in capsys.readouterr().err


def test_a_batch_that_clusters_do_not_make_up_is_refused(tmp_path, capsys):
    assert train.main([*TINY, "--loss", "magnet", "--examples-per-cluster", "5", "--out", str(tmp_path)]) == 2
    assert "not made up of two or more clusters of 5" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["proxy-nca", "magnet"])
def test_a_diverging_run_stops(tmp_path, monkeypatch, capsys, loss):
    """It stops at once, not at a NaN recall many seconds later."""
    monkeypatch.setattr(train, "recipes_of", lambda found: [replace(r, lr=np.nan) for r in options.recipes_of(found)])
    assert train.main([*TINY, "--loss", loss, "--epochs", "2", "--out", str(tmp_path)]) == 1
    assert "lower --lr" in capsys.readouterr().err


def test_embed_in_batches_equals_embed_at_once_and_keeps_the_mode():
    images, _ = drawings()
    model = EmbeddingNet(8, width=4)
    model.set_pixel_statistics(images)
    assert float(model.pixel_mean) == pytest.approx(float(images.float().mean()), rel=1e-5)
    assert float(model.pixel_std) == pytest.approx(float(images.float().std(correction=0)), rel=1e-5)
    counts = []
    in_batches = embed(model, images, batch_size=7, progress=counts.append)
    assert model.training
    assert counts == [7] * 6 + [6]
    torch.testing.assert_close(in_batches, embed(model, images), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="shape"):
        model(images[:, None])


def test_cost_bars_are_drawn(tmp_path):
    variants = {
        "fused": step_cost.VariantCost(0.2, [0.19, 0.2, 0.22], 60_000_000),
        "plain": step_cost.VariantCost(1.5, [1.4, 1.5, 1.9], 1_300_000_000),
    }
    plots.cost_bars(tmp_path / "cost.png", step_cost.StepCost(512, 100_000, 128, "fp32", variants, 51_462_144, 0, 0))
    assert (tmp_path / "cost.png").read_bytes().startswith(PNG)


def test_hard_queries_are_misses_spread_over_faces():
    hit = np.array([1, 0, 0, 0, 0, 1, 0, 1], dtype=bool)
    faces = np.array([0, 0, 1, 1, 1, 2, 2, 2])
    picked = plots._hard_queries(hit, faces, 3, np.random.default_rng(0))
    assert not hit[picked].any()
    assert faces[picked[0]] == 1
    assert sorted(faces[picked]) == [0, 1, 2]
    assert sorted(plots._hard_queries(hit, faces, 99, np.random.default_rng(0))) == [1, 2, 3, 4, 6]


def test_recall_by_face_counts_that_faces_queries():
    """Face 0 draws classes 0 and 1 far apart; face 1 draws them alike, each nearest to the other class."""
    embeddings = torch.tensor([[1, 0.01, 0], [1, 0, 0], [0, 1, 0.01], [0, 1, 0], [1, 1, 5], [1, 1, 5.1]])
    labels, faces = torch.tensor([0, 0, 1, 1, 0, 1]), torch.tensor([0, 0, 0, 0, 1, 1])
    judged = judging.judge("made by hand", lambda: embeddings, labels, faces)
    assert judged.face_recall == [1.0, 0.0]
    assert judged.result.recall == {1: pytest.approx(4 / 6)}
    assert judged.neighbours[:, 0].tolist() == [1, 0, 3, 2, 5, 4]


def test_no_two_drawings_on_the_map_overlap():
    places = np.random.default_rng(0).random((60, 2)).repeat(3, axis=0)
    spread = plots._spread(places, 0.03)
    apart = np.abs(spread[:, None] - spread[None]).max(axis=2) + np.eye(len(spread))
    assert apart.min() >= 0.95 * 0.03
    assert np.abs(spread - places).max() < 0.2


def test_first_classes_keeps_whole_classes():
    images = ImageSet(np.zeros((6, 32, 32), np.uint8), np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 0, 1]))
    assert train._first_classes(images, 2).labels.tolist() == [0, 0, 1, 1]
    assert train._first_classes(images, 0) is images


def test_held_out_drawings_are_some_of_each_class_and_of_no_training_set():
    images = ImageSet(np.arange(40 * 4).reshape(40, 2, 2), np.repeat(np.arange(5), 8), np.tile(np.arange(8), 5))
    kept, held = hold_out(images, 3, seed=1)
    assert np.bincount(held.labels).tolist() == [3] * 5
    assert sorted([*kept.images[:, 0, 0], *held.images[:, 0, 0]]) == list(range(0, 160, 4))
    for one in (kept, held):
        assert np.array_equal(one.images[:, 0, 0], 32 * one.labels + 4 * one.faces)
    assert len({tuple(held.faces[held.labels == label]) for label in range(5)}) > 1
    assert np.array_equal(hold_out(images, 3, seed=1)[1].faces, held.faces)
    assert not np.array_equal(hold_out(images, 3, seed=2)[1].faces, held.faces)
    for each in (0, 8):
        with pytest.raises(ValueError, match=f"cannot hold out {each} of 8"):
            hold_out(images, each)


def test_seen_drawings_are_named_by_neighbours_and_clusters():
    """After some epochs on drawings that are easy to tell apart; labels turned round are all errors."""
    trainer = small_trainer(MagnetRecipe, epochs=8)
    for _ in range(8):
        trainer.run_epoch()
    images, labels = drawings()
    held = ImageSet(images.numpy()[::3], labels.numpy()[::3], np.zeros(16, np.int64))
    counted = []
    right = judging.judge_seen("Magnet", trainer, held, counted.append)
    assert (right.drawings, right.references, sum(counted)) == (16, 48, 16)
    assert right.knn_error == right.knc_error == 0.0
    wrong = judging.judge_seen("Magnet", trainer, held._replace(labels=(held.labels + 1) % 6))
    assert wrong.knn_error == wrong.knc_error == 1.0


def test_the_most_evenly_divided_characters_are_shown():
    labels = np.repeat(np.arange(5), 6)
    divided = [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1]]
    clusters = np.concatenate([2 * i + np.array(row) for i, row in enumerate(divided)])
    generator = np.random.default_rng(0)
    for count, wanted, least in ((2, [2, 4], 3), (3, [2, 3, 4], 2), (4, [1, 2, 3, 4], 1), (9, [0, 1, 2, 3, 4], 0)):
        shown, bound = cluster_plot._divided_characters(labels, clusters, count, generator)
        assert (shown.tolist(), bound) == (wanted, least)
    groups = cluster_plot._groups(np.flatnonzero(labels == 3), clusters)
    assert [group.tolist() for group in groups] == [[20, 21, 22, 23], [18, 19]]


def test_a_recipe_for_each_loss_is_made_of_the_options():
    both = options.recipes_of(options.parse(["--alpha", "2.5", "--softmax-scale", "3", "--seed", "4", "--quick"]))
    assert [recipe.key for recipe in both] == ["proxy-nca", "magnet"]
    assert {(recipe.seed, recipe.epochs, recipe.train_classes) for recipe in both} == {(4, 2, 80)}
    assert (both[0].softmax_scale, both[1].alpha) == (3.0, 2.5)
    assert both[1].clusters_per_batch * both[1].examples_per_cluster == both[0].batch_size
    (alone,) = options.recipes_of(options.parse(["--loss", "magnet"]))
    assert alone == MagnetRecipe()

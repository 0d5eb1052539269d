"""The demo: a tiny training, resuming bit for bit, whole-or-nothing files, cost against plain PyTorch."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest
import torch

from dml_kernels import losses, profiling
from dml_kernels.demo import checkpoint, plots, report, step_cost, train
from dml_kernels.demo.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from dml_kernels.demo.data import ImageSet
from dml_kernels.demo.model import EmbeddingNet, embed
from dml_kernels.demo.trainer import Recipe, Trainer
from dml_kernels.losses.proxy_nca import proxy_nca_reference

for extra in train.EXTRAS:
    pytest.importorskip(extra)

TINY = [
    "--train-classes",
    "12",
    "--unseen-classes",
    "6",
    "--batch-size",
    "32",
    "--cost-classes",
    "0",
    "--threads",
    "1",
]
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


def small_trainer(seed=0):
    recipe = Recipe(batch_size=16, embedding_size=8, train_classes=6, epochs=3, seed=seed)
    return Trainer(recipe, *drawings())


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


def test_a_tiny_run_lowers_the_loss_and_writes_every_file(tmp_path, capsys):
    assert train.main([*TINY, "--epochs", "2", "--out", str(tmp_path)]) == 0
    step_losses = load_checkpoint(tmp_path / "checkpoint.pt")["step_losses"]
    assert len(step_losses) == 2 * 6
    assert np.mean(step_losses[-3:]) < 0.7 * np.mean(step_losses[:3])
    for name in ("loss.png", "neighbours.png", "map.png"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 10_000
    written = json.loads((tmp_path / "metrics.json").read_text())
    raw, trained = written["unseen"].values()
    assert raw["queries"] == trained["queries"] == 6 * 16
    assert 0 < raw["map_at_r"] <= raw["recall"]["1"] <= raw["recall"]["10"] <= 1
    assert len(trained["recall_at_1_by_face"]) == 16
    assert np.mean(list(raw["recall_at_1_by_face"].values())) == pytest.approx(raw["recall"]["1"])
    assert written["machine"]["torch"] == torch.__version__
    shown = capsys.readouterr().out
    assert f"{trained['map_at_r']:.3f}" in shown
    assert "Recall@10" in shown


def test_the_same_recipe_gives_the_same_bits():
    first, second = small_trainer(), small_trainer()
    assert first.run_epoch() == second.run_epoch()
    assert_same_state(first.state(), second.state())
    other = small_trainer(seed=1)
    other.run_epoch()
    assert other.step_losses != first.step_losses


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, capsys, no_plots):
    """Ctrl-C in the middle of the second epoch; the resumed run ends with the very bits of one left alone."""
    arguments = [*TINY, "--epochs", "3", "--out"]
    assert train.main([*arguments, str(tmp_path / "whole")]) == 0
    run_epoch = Trainer.run_epoch

    def interrupt(_loss):
        raise KeyboardInterrupt

    def interrupted_epoch(self, on_step=None):
        return run_epoch(self, on_step if self.epoch == 0 else interrupt)

    monkeypatch.setattr(Trainer, "run_epoch", interrupted_epoch)
    assert train.main([*arguments, str(tmp_path / "cut")]) == train.INTERRUPTED
    shown = capsys.readouterr().out
    assert "holds the state after epoch 1 of 3" in " ".join(shown.split())
    assert "--resume" in shown
    assert load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["epoch"] == 1

    monkeypatch.setattr(Trainer, "run_epoch", run_epoch)
    torch.manual_seed(12345)
    assert train.main([*arguments, str(tmp_path / "cut"), "--resume"]) == 0
    whole, resumed = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    assert whole["epoch"] == 3
    assert_same_state(whole, resumed)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text())["unseen"] for name in ("whole", "cut")]
    assert [m.pop("seconds") > 0 for run in metrics for m in run.values()] == [True] * 4
    assert metrics[0] == metrics[1]


def test_resuming_another_recipe_is_refused(tmp_path, capsys, no_plots):
    arguments = [*TINY, "--epochs", "1", "--out", str(tmp_path)]
    assert train.main(arguments) == 0
    assert train.main([*arguments, "--resume", "--softmax-scale", "3"]) == 1
    assert "softmax_scale 1.0 there, 3.0 asked for" in capsys.readouterr().err


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
    assert train.main([*TINY, "--batch-size", "1000", "--out", str(tmp_path)]) == 1
    assert "do not fill one batch of 1000" in capsys.readouterr().err


def test_a_diverging_run_stops(tmp_path, capsys):
    """Not on a NaN recall many seconds later."""
    assert train.main([*TINY, "--epochs", "2", "--lr", "nan", "--out", str(tmp_path)]) == 1
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


@pytest.mark.parametrize("exclude_positive", [False, True])
def test_plain_pytorch_is_the_papers_loss(exclude_positive):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (9, 14))
    y = torch.randint(14, (9,), generator=generator)
    options = {"softmax_scale": 3.0, "exclude_positive": exclude_positive}
    plain = step_cost.plain_proxy_nca(x, w, y, **options)
    torch.testing.assert_close(plain, proxy_nca_reference(x, w, y, **options))
    torch.testing.assert_close(plain, losses.proxy_nca.proxy_nca_loss(x, w, y, **options))


def test_step_cost_sees_the_dense_buffers():
    """10 MB a dense buffer here, of which plain PyTorch holds several; the fused loss none."""
    cost = step_cost.measure(256, 10_000, 32, rounds=1)
    dense = 4 * 256 * 10_000
    fused, plain = cost.variants["fused"], cost.variants["plain"]
    assert plain.peak_bytes > 3 * dense
    assert cost.gradient_bytes <= fused.peak_bytes < cost.gradient_bytes + dense
    assert len(fused.samples) == len(plain.samples) == 1
    assert fused.seconds > 0


def test_each_step_has_gradients_of_its_own():
    """Left to add up, fused and plain would be compared with their own sum."""
    problem = step_cost._Problem(8, 20, 4, 8.0, False)
    first, second = problem.step("fused"), problem.step("fused")
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert first[1].data_ptr() != second[1].data_ptr()


@pytest.mark.parametrize("bug", ["loss", "gradient", "nan"])
def test_different_numbers_are_not_timed(monkeypatch, bug):
    right = step_cost.VARIANTS["fused"]

    def wrong(embeddings, proxies, labels, **options):
        loss = right(embeddings, proxies, labels, **options)
        if bug == "nan":
            return loss * float("nan")
        return loss * 1.001 if bug == "loss" else loss + (1.001 * loss - (1.001 * loss).detach())

    monkeypatch.setitem(step_cost.VARIANTS, "fused", wrong)
    with pytest.raises(step_cost.ComparisonError, match="not timed"):
        step_cost.measure(16, 100, 8, rounds=1)


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
    judged = report.judge("made by hand", lambda: embeddings, labels, faces)
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


def test_peak_sees_memory_that_is_not_pytorchs_and_is_freed_again():
    """A numpy temporary of 64 MB, gone when the function returns."""
    peak = profiling.peak_extra_bytes(lambda: float(np.ones(8_000_000).sum()), gc.collect)
    assert 63e6 <= peak < 72e6
    assert profiling.peak_extra_bytes(lambda: None) < 4e6


def test_peak_refuses_to_guess_where_it_cannot_be_reset(monkeypatch, tmp_path):
    float(np.ones(30_000_000).sum())  # an earlier, higher peak
    monkeypatch.setattr(profiling, "CLEAR_REFS", tmp_path / "no" / "such")
    with pytest.raises(RuntimeError, match="fresh process"):
        profiling.peak_extra_bytes(lambda: np.ones(1000))


def test_interleaved_times_turn_the_order_and_drop_the_warmup():
    calls = []
    times = profiling.interleaved_times({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert [len(samples) for samples in times.values()] == [3, 3, 3]
    assert gc.isenabled()
    assert profiling.interleaved_medians({"a": lambda: None}, rounds=2, warmup=0)["a"] >= 0
    with pytest.raises(ValueError, match="round"):
        profiling.interleaved_times({}, 3)


def test_run_in_child_reports_the_childs_error():
    with pytest.raises(RuntimeError, match="--peak-of"):
        profiling.run_in_child("dml_kernels.demo.step_cost", "--peak-of", "nothing")

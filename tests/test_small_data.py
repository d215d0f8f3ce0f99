"""Sizes 0 and 1 of data, after splitting and after skipping, in every evaluation and picture; files of all kinds."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_same_results, metrics

from sslfast.cli import main
from sslfast.evaluation import evaluate, features, generative, linear, plots
from sslfast.training import checkpoint, data, loop

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding")

COMMON = ["--size", "16", "--workers", "0", "--device", "cpu", "--epochs", "1", "--no-evaluate", "--log-every", "1"]
METHODS = {
    "simclr": ["--batch-size", "4", "--head-hidden", "8", "--head-features", "8"],
    "ddpm": ["--batch-size", "4", "--widths", "8", "--attention", "--patch", "2"],
    "ssgan": ["--batch-size", "4", "--latent", "8", "--reports", "1"],
}
JUDGE = {"simclr": [], "ddpm": ["--samples", "10", "--steps", "2"], "ssgan": ["--samples", "10"]}


def write(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(random.integers(0, 256, (18, 16, 3), np.uint8)).save(folder / f"{number}.png")


def train(method: str, folder: Path, run: Path) -> None:
    assert main([method, "--data", str(folder), *COMMON, *METHODS[method], "--run", str(run)]) == 0


@pytest.fixture(scope="module")
def one_thread():
    """Networks of eight channels are slower on two, by far where these are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=METHODS)
def trained(request, tmp_path_factory, one_thread):
    """(method, data, run) of a short run on two classes of 6 images, of which one of either cannot be read."""
    folder = tmp_path_factory.mktemp("small")
    for seed, kind in enumerate("ab"):
        write(folder / "data" / "train" / kind, 6, seed)
        (folder / "data" / "train" / kind / "3.png").write_bytes(b"")
    train(request.param, folder / "data", folder / "run")
    return request.param, folder / "data", folder / "run"


@pytest.fixture(autouse=True)
def quick(monkeypatch, one_thread):
    monkeypatch.setattr(generative, "LEAST_STEPS", 2)
    monkeypatch.setattr(features, "AT_ONCE", 3)  # so that a part may be a single file


TESTS = {
    "none": {},
    "one image": {"a": 1},
    "enough": {"a": 3, "b": 3},
    "one that cannot be read": {"a": -1},
    "of a class that training lacks": {"c": 3},
}


@pytest.mark.parametrize("case", TESTS)
def test_every_evaluation_copes_with_few_test_images(trained, case, capsys):
    method, folder, run = trained
    shutil.rmtree(folder / "test", ignore_errors=True)
    for path in [*run.glob("*.png"), run / "evaluation.json", run / "classifier.safetensors"]:
        path.unlink(missing_ok=True)
    for kind, count in TESTS[case].items():
        write(folder / "test" / kind, abs(count), seed=9)
        if count < 0:
            for path in (folder / "test" / kind).iterdir():
                path.write_bytes(b"no image")
    assert main(["evaluate", str(run), "--device", "cpu", *JUDGE[method]]) == 0
    said = capsys.readouterr().out
    labelled = sum(abs(count) for kind, count in TESTS[case].items() if kind != "c")
    readable = sum(max(0, count) for kind, count in TESTS[case].items() if kind != "c")
    pictures = {path.name for path in run.glob("*.png")}
    assert "loss.png" in pictures
    assert ("kNN" in said) == (readable > 0)
    assert ("no test images in class folders" in said) == (labelled == 0)
    if method == "simclr":
        assert ("neighbours.png" in pictures) == (readable > 0)
        assert ("embedding.png" in pictures) == (readable >= 4)
    else:
        assert "samples.png" in pictures
        assert ("precision" in said) == (labelled > 0)
        assert ("nothing can be said" in said) == (labelled > 0 and readable < 4)
    if method == "ddpm":
        assert "neighbours.png" in pictures
    if (run / "evaluation.json").exists():
        assert json.loads((run / "evaluation.json").read_text()) is not None


@pytest.mark.parametrize("samples", [0, 4])
@pytest.mark.parametrize("trained", ["simclr"], indirect=True)
def test_a_map_of_few_points_is_left_out(trained, samples):
    _, folder, run = trained
    shutil.rmtree(folder / "test", ignore_errors=True)
    write(folder / "test" / "a", 5)
    (run / "embedding.png").unlink(missing_ok=True)
    assert set(evaluate.evaluate(run, map_samples=samples)) == {"raw pixels", "untrained encoder", "simclr"}
    assert (run / "embedding.png").exists() == (samples >= 4)


@pytest.mark.parametrize("method", METHODS)
def test_one_class_alone_has_pictures_and_no_accuracies(method, tmp_path, capsys):
    write(tmp_path / "data" / "train" / "a", 5)
    write(tmp_path / "data" / "test" / "a", 1, seed=1)
    train(method, tmp_path / "data", tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), "--device", "cpu", *JUDGE[method]]) == 0
    said = capsys.readouterr().out
    assert "kNN" not in said
    assert "5 training images of 1 class (a) in train/, 1 test image in test/" in said
    names = {"simclr": ["neighbours.png"], "ddpm": ["neighbours.png", "samples.png"], "ssgan": ["samples.png"]}
    assert all((tmp_path / "run" / name).exists() for name in names[method])


@pytest.mark.parametrize("trained", ["ddpm"], indirect=True)
def test_inpainting_passes_over_test_images_that_cannot_be_read(trained, tmp_path, capsys):
    _, folder, run = trained
    shutil.rmtree(folder / "test", ignore_errors=True)
    write(folder / "test" / "a", 4)
    (folder / "test" / "a" / "0.png").write_bytes(b"")
    words = ["sample", str(run), "--device", "cpu", "--inpaint", "left", "--steps", "2", "--out", str(tmp_path)]
    assert main([*words, "--n", "3"]) == 0
    assert main([*words, "--n", "4"]) == 1
    assert "has 3 test images to paint in, fewer than --n 4" in capsys.readouterr().err


def test_features_keep_to_their_images_when_files_are_skipped(tmp_path):
    write(tmp_path / "a", 8)
    write(tmp_path / "b", 8)
    images = data.load(str(tmp_path), "train")
    rows = torch.tensor([11, 2, 5, 0, 3, 4, 1])
    wanted = {
        row: features.raw_pixels(next(data.batches(images, [np.array([row])], square=16))[0])[0]
        for row in rows.tolist()
    }
    for row in (2, 0, 3, 4):  # of the parts of three, one loses one image, one all, and the last none
        images.source[row].write_bytes(b"")
    found, ids = features.over_images(features.raw_pixels, images, 16, rows)
    assert ids.tolist() == [11, 5, 1]
    assert all(torch.equal(vector, wanted[row]) for vector, row in zip(found, ids.tolist(), strict=True))
    for path in images.source:
        path.write_bytes(b"")
    found, ids = features.over_images(features.raw_pixels, images, 16, rows)
    assert (len(found), len(ids)) == (0, 0)


def test_pictures_of_files_that_are_gone_are_grey(tmp_path):
    write(tmp_path / "a", 3)
    images = data.load(str(tmp_path / "a"), "train")
    images.source[1].unlink()
    found = evaluate.pictures(images, torch.tensor([0, 1, 2]), 16)
    assert found.shape == (3, 3, 16, 16)
    assert (found[1] == 128).all()
    assert found[0].float().std() > 30


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5])
def test_a_map_of_any_number_of_points(tmp_path, count):
    points = torch.randn(count, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 2
    assert plots.embedding_map(points, labels, ["a", "b"], tmp_path / "map.png") == (count >= 4)
    assert plots.embedding_map(points * 0, labels, ["a", "b"], tmp_path / "same.png") is False
    assert (tmp_path / "map.png").exists() == (count >= 4)


@pytest.mark.parametrize("count", range(1, 8))
def test_a_probe_of_any_number_of_samples(count):
    points = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 2
    assert linear.linear_probe(points, labels, points, labels) >= (100 if count < 4 else 50)


def zoo(folder: Path) -> None:
    """One file of each kind that once ended a training, among plain ones."""
    for seed, kind in enumerate("ab"):
        write(folder / kind, 10, seed)
    random = np.random.default_rng(3)
    Image.fromarray(np.full((24, 24), 40000, np.uint16)).save(folder / "a" / "deep.png")
    Image.fromarray(np.full((24, 24), 40000, np.uint16)).save(folder / "b" / "deep.tif")
    frames = [Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8)) for _ in range(4)]
    frames[0].save(folder / "b" / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(random.integers(0, 256, (24, 24, 4), np.uint8)).save(folder / "a" / "alpha.webp")
    Image.new("RGB", (5000, 1)).save(folder / "a" / "line.bmp")


@pytest.mark.parametrize("method", [*METHODS, "moco"])
def test_files_of_all_kinds_train(tmp_path, method, capsys):
    zoo(tmp_path / "data")
    words = METHODS.get(method, [*METHODS["simclr"], "--bn-groups", "2", "--queue", "32"])
    words = [method, "--data", str(tmp_path / "data"), *COMMON, *words, "--corrupt", "stop"]
    assert main([*words, "--background", "#102030", "--run", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "20 training images of 2 classes (a, b), 5 test images (each fifth of all)" in said
    settings = checkpoint.load_config(tmp_path / "run")
    assert (settings["background"], settings["max_pixels"], settings["max_unpacked"]) == (
        "#102030",
        100_000_000,
        4_000_000_000,
    )
    assert main([method, "--resume", str(tmp_path / "run"), "--background", "black"]) == 1
    assert "--background was #102030" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_stopped_between_steps_without_images_a_run_ends_the_same(tmp_path, monkeypatch, stop):
    write(tmp_path / "data", 12)
    order = data.epoch_order(12, 0, 0).reshape(6, 2)
    images = data.load(str(tmp_path / "data"), "train")
    for row in (*order[1], *order[2], order[3][0]):  # two batches are empty, and one has a single image
        images.source[row].write_bytes(b"")
    words = ["simclr", "--data", str(tmp_path / "data"), *COMMON, *METHODS["simclr"], "--batch-size", "2"]
    assert main([*words, "--run", str(tmp_path / "whole")]) == 0
    assert [line["step"] for line in metrics(tmp_path / "whole")] == [1, 5, 6]

    end_step = loop.Loop.end_step

    def end_step_and_signal(self, *args, **values):
        if self.step + 1 == stop:
            os.kill(os.getpid(), signal.SIGINT)
        end_step(self, *args, **values)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "end_step", end_step_and_signal)
        with pytest.raises(SystemExit):
            main([*words, "--run", str(tmp_path / "stopped")])
    assert checkpoint.load(tmp_path / "stopped")[1]["step"] == stop
    assert main(["simclr", "--resume", str(tmp_path / "stopped")]) == 0
    assert_same_results(tmp_path / "stopped", tmp_path / "whole")


def test_files_of_too_many_pixels_are_skipped_by_name(tmp_path, capsys):
    zoo(tmp_path / "data")
    words = ["simclr", "--data", str(tmp_path / "data"), *COMMON, *METHODS["simclr"], "--max-pixels", "4999"]
    assert main([*words, "--run", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "line.bmp: 5,000 × 1 pixels: expected at least 1 and at most --max-pixels 4,999" in said
    assert main([*words, "--background", "chartreux", "--run", str(tmp_path / "wrong")]) == 1
    assert main([*words, "--max-pixels", "0", "--run", str(tmp_path / "wrong")]) == 1
    assert not (tmp_path / "wrong").exists()


def test_the_gallery_shows_files_of_all_kinds(tmp_path, capsys):
    zoo(tmp_path / "data")
    words = ["augment-gallery", "--data", str(tmp_path / "data"), "--images", "20", "--epochs", "1", "--size", "16"]
    assert main([*words, "--background", "red", "--out", str(tmp_path / "a.png")]) == 0
    assert "20 images" in capsys.readouterr().out
    for path in (tmp_path / "data").glob("*/*"):
        path.write_bytes(b"")
    assert main([*words, "--out", str(tmp_path / "b.png")]) == 1
    assert "not one of 20 image files" in capsys.readouterr().err

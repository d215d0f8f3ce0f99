"""The loop learns, and a run killed at any moment ends as one that never was."""

import dataclasses
import json
import math
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import assert_same_results, curve, metrics, spawn, wait_for_a_step_after
from torchvision.io import write_jpeg

from sslfast.evaluation.evaluate import evaluate, load_encoder
from sslfast.methods import simclr
from sslfast.methods.simclr import SimCLR, main, train
from sslfast.training import UserError, checkpoint

SMALL = {
    "data": "digits",
    "batch_size": 128,
    "head_hidden": 64,
    "head_features": 32,
    "device": "cpu",
    "log_every": 1,
    "evaluate": False,
}


def small(run: Path, **changes) -> SimCLR:
    return SimCLR(**{**SMALL, "run": str(run), **changes})


def arguments(config: SimCLR) -> list[str]:
    words = ["--no-evaluate"]
    for name in {*SMALL, "run", "epochs", "checkpoint_seconds"} - {"evaluate"}:
        words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    return words


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 2 epochs, 22 steps, that nobody disturbed."""
    run = tmp_path_factory.mktemp("simclr") / "undisturbed"
    assert train(small(run, epochs=2)) == run
    return run


def test_the_loss_falls(finished):
    losses = [line["loss"] for line in metrics(finished)]
    assert len(losses) == 22
    end = sum(losses[-5:]) / 5
    assert end < sum(losses[:3]) / 3 - 0.25
    assert end < math.log(2 * 128 - 1) - 0.05, "no better than guessing which of the 255 others is the second view"


def test_the_rate_follows_the_batch_and_the_cosine(finished):
    rates = [line["lr"] for line in metrics(finished)]
    assert max(rates) == pytest.approx(SimCLR.lr * 128 / 256)
    assert rates[-1] < 0.02 * max(rates)


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(finished, tmp_path):
    train(small(tmp_path / "again", epochs=2))
    assert_same_results(tmp_path / "again", finished)
    train(small(tmp_path / "other", epochs=2, seed=1))
    assert curve(tmp_path / "other") != curve(finished)


def test_killed_at_any_moment_and_resumed_it_ends_the_same_bit_for_bit(finished, tmp_path):
    """SIGKILL three times at random moments of a run that writes a checkpoint after every step."""
    run, dice, kills = tmp_path / "killed", random.Random(), 0
    config = small(run, epochs=2, checkpoint_seconds=0.0)
    child = spawn("simclr", *arguments(config))
    for target in (3, 9, 15):
        wait_for_a_step_after(run, target, child)
        time.sleep(dice.random() * 0.1)
        child.kill()
        child.communicate()
        kills += child.returncode == -signal.SIGKILL
        child = spawn("simclr", "--resume", str(run))
    assert child.wait(120) == 0, child.communicate()[0]
    assert kills == 3, "the run was over before it could be killed"
    assert_same_results(run, finished)


def test_killed_before_the_first_checkpoint_it_starts_again(finished, tmp_path):
    run = tmp_path / "early"
    checkpoint.save_config(run, checkpoint.load_config(finished) | {"run": str(run)})
    (run / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "loss": 4.0, "lr": 0.1}\n{"step": 2, "ep')
    main(["--resume", str(run)])
    assert_same_results(run, finished)


def test_ctrl_c_saves_and_says_how_to_go_on(finished, tmp_path):
    run = tmp_path / "stopped"
    child = spawn("simclr", *arguments(small(run, epochs=2)))
    wait_for_a_step_after(run, 5, child)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)[0]
    assert child.returncode == 130
    assert f"sslfast simclr --resume {run}" in said
    step = int(re.search(r"stopped at step (\d+) of 22", said)[1])
    assert checkpoint.load(run)[1]["step"] == step
    assert 5 < step < 22
    main(["--resume", str(run)])
    assert_same_results(run, finished)


def test_a_longer_run_can_be_asked_for_on_resume(finished, tmp_path):
    run = tmp_path / "longer"
    train(small(run, epochs=1))
    main(["--resume", str(run), "--epochs", "2"])
    assert [line["step"] for line in metrics(run)] == list(range(1, 23))
    assert checkpoint.load_config(run)["epochs"] == 2


def test_other_settings_cannot_change_on_resume(finished):
    with pytest.raises(UserError, match=r"--batch-size was 128 when .* began"):
        main(["--resume", str(finished), "--batch-size", "64"])


def test_a_folder_with_a_run_is_not_overwritten(finished):
    with pytest.raises(UserError, match="already holds a run"):
        train(small(finished))


def test_a_run_of_another_method_is_not_resumed(tmp_path):
    checkpoint.save_config(tmp_path / "run", {"method": "ddpm"})
    with pytest.raises(UserError, match=r"is a run of ddpm: sslfast ddpm --resume .*run continues it"):
        main(["--resume", str(tmp_path / "run")])


def test_resume_without_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        main(["--resume", str(tmp_path / "nothing")])


def test_a_loss_of_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    class Explodes(torch.nn.Module):
        def __init__(self, temperature, gather_distributed):
            super().__init__()
            self.calls = 0

        def forward(self, first, second):
            self.calls += 1
            return (first - second).square().mean() * (float("nan") if self.calls > 4 else 1)

    monkeypatch.setattr(simclr, "NTXentLoss", Explodes)
    with pytest.raises(UserError, match=r"at step 5 .epoch 1. the loss is nan.*lower --lr"):
        train(small(tmp_path / "run", epochs=1, checkpoint_seconds=0.0))
    weights, state = checkpoint.load(tmp_path / "run")
    assert state["step"] == 4
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        ({"temperature": -0.5}, "--temperature must be at least 0.0001, not -0.5"),
        ({"lr": float("nan")}, "--lr must be a finite number, not nan"),
        ({"flip": 1.5}, "--flip must be at most 1, not 1.5"),
        ({"weight_decay": -1.0}, "--weight-decay must be at least 0, not -1.0"),
        ({"size": 27}, "--size must be even for the small encoder, not 27"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used"),
        ({"device": "abacus"}, "--device abacus cannot be used"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(small(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_weights_that_blow_up_are_never_saved(tmp_path, monkeypatch):
    """A finite loss whose gradient is not spoils the weights: the checkpoint before it must stay the last."""

    class Cliff(torch.nn.Module):
        def __init__(self, temperature, gather_distributed):
            super().__init__()
            self.calls = 0

        def forward(self, first, second):
            self.calls += 1
            difference = (first - second).square().mean()
            return difference if self.calls < 4 else difference + (difference * 0).sqrt()

    monkeypatch.setattr(simclr, "NTXentLoss", Cliff)
    with pytest.raises(UserError, match=r"at step 4"):
        train(small(tmp_path / "run", epochs=1, checkpoint_seconds=0.0))
    assert checkpoint.load(tmp_path / "run")[1]["step"] == 3


def test_a_batch_larger_than_the_data(tmp_path):
    with pytest.raises(UserError, match="--batch-size 2000 is more than the 1437 images"):
        train(small(tmp_path / "run", batch_size=2000))


@pytest.mark.parametrize(
    "changes", [{"optimizer": "lars", "lr": 1.0}, {"precision": "float32"}, {"head_layers": 3}], ids=str
)
def test_variants_learn(tmp_path, changes):
    train(small(tmp_path / "run", epochs=2, **changes))
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) / 5 < sum(losses[:3]) / 3 - 0.2


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """48 JPEG files of different sizes in two classes; one is cut short."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = torch.Generator().manual_seed(0)
    for number in range(48):
        (folder / "ab"[number % 2]).mkdir(exist_ok=True)
        coarse = torch.randint(0, 256, (1, 3, 5, 4), generator=generator, dtype=torch.uint8)
        picture = torch.nn.functional.interpolate(coarse, (30 + number, 60 - number // 2))[0]
        write_jpeg(picture, str(folder / "ab"[number % 2] / f"{number:02d}.jpg"))
    broken = folder / "a" / "04.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    return folder


@pytest.mark.filterwarnings("ignore:The image decoding and encoding")
def test_image_files_train_whatever_decodes_them_and_a_corrupt_one_is_skipped(photographs, tmp_path, capsys):
    config = small(tmp_path / "here", data=str(photographs), batch_size=12, epochs=2, size=32, workers=0)
    train(config)
    assert "04.jpg" in capsys.readouterr().out
    train(dataclasses.replace(config, run=str(tmp_path / "workers"), workers=2))
    assert_same_results(tmp_path / "workers", tmp_path / "here")
    assert [line["step"] for line in metrics(tmp_path / "here")] == list(range(1, 7))

    with pytest.raises(UserError, match=r"cannot decode .*04.jpg"):
        train(dataclasses.replace(config, run=str(tmp_path / "strict"), corrupt="stop"))

    results = evaluate(tmp_path / "here", map_samples=10)
    assert set(results["simclr"]) == {"knn10", "knn200", "linear"}


@pytest.mark.filterwarnings("ignore:The image decoding and encoding")
def test_unlabelled_image_files_train_and_are_not_judged(photographs, tmp_path, capsys):
    run = tmp_path / "run"
    train(small(run, data=str(photographs / "b"), batch_size=12, epochs=2, size=32, workers=0))
    assert evaluate(run) == {}
    assert (run / "loss.png").exists()
    assert "no test images in class folders" in capsys.readouterr().out


def test_evaluation_of_a_run(finished, capsys):
    results = evaluate(finished, map_samples=120)
    assert set(results) == {"raw pixels", "untrained encoder", "simclr"}
    assert all(60 < value <= 100 for row in results.values() for value in row.values())
    assert results["raw pixels"]["knn10"] > 95  # scikit-learn's digits are easy, by pixels above all
    assert json.loads((finished / "evaluation.json").read_text()) == results
    assert {p.name for p in finished.glob("*.png")} == {"loss.png", "embedding.png", "neighbours.png"}
    said = capsys.readouterr().out
    assert "kNN(10)" in said
    assert "untrained encoder" in said

    trained, untrained = load_encoder(finished).state_dict(), load_encoder(finished, trained=False).state_dict()
    assert not any(torch.equal(trained[name], untrained[name]) for name in trained if name.endswith("0.weight"))
    torch.manual_seed(0)
    assert all(torch.equal(untrained[k], v) for k, v in simclr.build_encoder("small", 1)[0].state_dict().items())

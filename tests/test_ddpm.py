"""DDPM learns, and a run killed at any moment ends as one that never was; what is drawn from it."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslfast import cli
from sslfast.evaluation import sampling
from sslfast.methods.ddpm import DDPM, draw, main, train
from sslfast.training import UserError, checkpoint

SMALL = {
    "data": "digits",
    "batch_size": 128,
    "widths": (16, 32),
    "attention": (),
    "patch": 2,
    "dropout": 0.1,
    "flip": 0.5,
    "conditional": True,
    "lr": 3e-3,
    "average": 0.95,
    "device": "cpu",
    "precision": "float32",
    "log_every": 1,
    "evaluate": False,
}
STEPS = 22  # of two epochs


def small(run: Path, **changes) -> DDPM:
    return DDPM(**{"epochs": 2, **SMALL, "run": str(run), **changes})


def arguments(config: DDPM) -> list[str]:
    words = ["--no-evaluate", "--conditional"]
    for name in {*SMALL, "run", "epochs", "checkpoint_seconds"} - {"evaluate", "conditional"}:
        value = getattr(config, name)
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def results(run: Path):
    """Everything about a run that must not depend on how often it was killed."""
    weights, state = checkpoint.load(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["step"], line["epoch"], line["loss"], line["lr"], line["gradient"]) for line in lines]
    moments = state["optimizer"]["state"]
    return weights, {(number, name): moments[number][name] for number in moments for name in moments[number]}, curve


def assert_same_results(run: Path, expected: Path):
    weights, moments, curve = results(run)
    wanted_weights, wanted_moments, wanted_curve = results(expected)
    assert curve == wanted_curve, "metrics.jsonl must have every step once, with the same loss"
    assert weights.keys() == wanted_weights.keys()
    assert all(torch.equal(weights[name], wanted_weights[name]) for name in weights)
    assert moments.keys() == wanted_moments.keys()
    assert all(torch.equal(moments[name], wanted_moments[name]) for name in moments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("ddpm") / "undisturbed"
    assert train(small(run)) == run
    return run


def test_the_loss_falls(finished):
    losses = [loss for _, _, loss, _, _ in results(finished)[2]]
    assert len(losses) == STEPS
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_the_average_follows_the_weights(finished):
    weights = results(finished)[0]
    raw, average, untrained = (sampling.load_unet(finished, kind) for kind in ("raw", "average", "untrained"))
    for name, value in raw.state_dict().items():
        assert torch.equal(value, weights[f"unet.{name}"])
    apart = [
        sum((p - q).square().sum().item() for p, q in zip(model.parameters(), raw.parameters(), strict=True))
        for model in (average, untrained)
    ]
    assert 0 < apart[0] < 0.5 * apart[1], "the average must lie behind the weights, and ahead of where they began"


def test_another_seed_gives_another_run(finished, tmp_path):
    train(small(tmp_path / "other", seed=1, epochs=1))
    assert results(tmp_path / "other")[2][:3] != results(finished)[2][:3]


def spawn(*args: str, ranks: int = 0) -> subprocess.Popen:
    program = (
        f"import sys, torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "from sslfast.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "ddpm", *args]
    if ranks:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "--"]
        command = [sys.executable, *torchrun, "sslfast", "ddpm", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment if ranks else None, **pipes)


def wait_for_a_step_after(run: Path, step: int, child: subprocess.Popen) -> None:
    while child.poll() is None:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b"\n") > step:
            return
        time.sleep(0.002)


def test_killed_at_any_moment_and_resumed_it_ends_the_same_bit_for_bit(finished, tmp_path):
    """SIGKILL at a random moment of a run that writes a checkpoint after every step."""
    run = tmp_path / "killed"
    child = spawn(*arguments(small(run, checkpoint_seconds=0.0)))
    wait_for_a_step_after(run, random.randint(2, 12), child)
    time.sleep(random.random() * 0.1)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    child = spawn("--resume", str(run))
    assert child.wait(120) == 0, child.communicate()[0]
    child.communicate()
    assert_same_results(run, finished)


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    """The same global batch, timesteps and noise: the weights agree up to the order of sums."""
    settings = {"epochs": 1, "dropout": 0.0, "batch_size": 256}  # dropout differs among ranks
    train(small(tmp_path / "one", **settings))
    child = spawn(*arguments(small(tmp_path / "two", **settings)), ranks=2)
    said = child.communicate(timeout=120)[0]
    assert child.returncode == 0, said
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    np.testing.assert_allclose([line[2] for line in two[2]], [line[2] for line in one[2]], rtol=1e-3)
    for name in one[0]:
        torch.testing.assert_close(two[0][name], one[0][name], rtol=0, atol=2e-3)


def test_what_is_random_depends_on_the_step_and_is_spread_evenly():
    config = small(Path("nowhere"), batch_size=64)
    timesteps, withheld, flipped = draw(config, 7, 64)
    again = draw(config, 7, 64)
    assert torch.equal(timesteps, again[0])
    assert torch.equal(withheld, again[1])
    assert torch.equal(flipped, again[2])
    assert not torch.equal(timesteps, draw(config, 8, 64)[0])
    assert timesteps.dtype == torch.int64
    assert (timesteps * 64 // config.timesteps).unique().numel() >= 60, "each 64th of the timesteps has its image"
    many = torch.cat([draw(config, step, 64)[0] for step in range(300)])
    assert many.min() >= 0
    assert many.max() < config.timesteps
    assert torch.histc(many.float(), 10, 0, 1000).sub(1920).abs().max() < 100


def test_unconditional_epsilon_without_weighting_trains_too(tmp_path):
    changes = {"conditional": False, "prediction": "epsilon", "schedule": "linear", "min_snr": 0.0, "epochs": 1}
    run = tmp_path / "plain"
    train(small(run, **changes))
    losses = [line[2] for line in results(run)[2]]
    assert losses[0] == pytest.approx(1.0, abs=0.1), "a network that answers 0 errs by the variance of the noise"
    assert losses[-1] < 0.8
    assert sampling.load_unet(run).settings["classes"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 5000}, "batch-size"),
        ({"patch": 3}, "patch"),
        ({"widths": (20,)}, "widths"),
        ({"attention": (2,)}, "attention"),
        ({"drop_class": 1.5}, "drop-class"),
        ({"lr": 0.0}, "--lr"),
        ({"timesteps": 0}, "timesteps"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        train(small(tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def sample(*words: str) -> int:
    return cli.main(["sample", *words, "--device", "cpu", "--precision", "float32"])


def test_sample_writes_a_sheet_a_strip_and_an_animation(finished, tmp_path, capsys):
    out = tmp_path / "out"
    assert sample(str(finished), "--n", "20", "--steps", "12", "--batch-size", "16", "--out", str(out)) == 0
    assert "samples.png" in capsys.readouterr().out
    with Image.open(out / "samples.png") as image:
        assert image.size[0] > 300
        assert len(np.unique(np.asarray(image))) > 50
    with Image.open(out / "denoising.gif") as animation:
        assert animation.n_frames == 12
    with Image.open(out / "denoising.png") as strip:
        assert strip.size[0] > strip.size[1]
    assert not list(out.glob("*.unfinished"))


def test_one_seed_is_one_picture(finished, tmp_path):
    common = ["--steps", "5", "--label", "3", "--guidance", "2"]
    for name, words in {
        "all": ["--n", "3", "--seed", "7"],
        "other": ["--n", "2", "--seed", "8"],
    }.items():
        assert sample(str(finished), *common, *words, "--out", str(tmp_path / name)) == 0
    config = sampling.load_config(finished)
    with contextlib.ExitStack() as stack:
        sheets = {n: stack.enter_context(Image.open(tmp_path / n / "samples.png")) for n in ("all", "other")}
        arrays = {n: np.asarray(sheet.convert("L")).astype(int) for n, sheet in sheets.items()}

    def pixels(array: np.ndarray, width: int) -> np.ndarray:
        """Undo the enlargement."""
        factor = array.shape[1] // width
        return array[factor // 2 :: factor, factor // 2 :: factor]

    size = config["size"]
    first = pixels(arrays["other"], size + 4)[2 : 2 + size, 2 : 2 + size]
    second = pixels(arrays["all"], 2 * size + 6)[2 : 2 + size, size + 4 : 2 * size + 4]
    assert np.abs(first - second).max() <= 1


def test_sample_paints_in_and_goes_from_seed_to_seed(finished, tmp_path):
    out = str(tmp_path)
    words = ["--inpaint", "left", "--n", "13", "--steps", "4", "--visits", "2", "--sampler", "ddpm"]
    assert sample(str(finished), *words, "--out", out) == 0
    assert sample(str(finished), "--interpolate", "1", "2", "--n", "5", "--steps", "4", "--out", out) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"inpainting.png", "interpolation.png"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "0"], "--n"),
        (["--steps", "1001"], "--steps"),
        (["--label", "sofa"], "--label must be one of 0, 1"),
        (["--inpaint", "left", "--sampler", "dpm-solver++"], "--inpaint"),
        (["--interpolate", "1", "2", "--sampler", "ddpm"], "--interpolate"),
        (["--sampler", "ddpm", "--eta", "0.5"], "--eta"),
    ],
)
def test_sample_refuses_what_does_not_go_together(finished, capsys, words, message):
    assert sample(str(finished), *words) == 1
    assert message in capsys.readouterr().err


def test_evaluate_judges_a_run(finished, capsys):
    words = ["--samples", "40", "--steps", "6", "--device", "cpu"]
    assert cli.main(["evaluate", str(finished), *words]) == 0
    said = capsys.readouterr().out
    found = json.loads((finished / "evaluation.json").read_text())
    for name in ("test images", "average weights", "raw weights", "untrained"):
        assert set(found[name]) == {"fid", "kid", "precision", "recall"}
        assert name in said
    assert found["test images"]["fid"] < found["average weights"]["fid"] < found["untrained"]["fid"]
    assert found["probe"]["ddpm, t = 50"]["linear"] > 70
    assert 0 < found["nearest"]["generated"] < 1
    for name in ("samples.png", "neighbours.png", "loss.png", "classifier.safetensors"):
        assert (finished / name).is_file()
    assert cli.main(["evaluate", str(finished), *words]) == 0
    assert json.loads((finished / "evaluation.json").read_text()) == found, "the same figures again"
    assert "trained and" not in capsys.readouterr().out


def test_a_run_of_another_method_is_refused(tmp_path, capsys):
    checkpoint.save_config(tmp_path / "run", {"method": "simclr"})
    assert sample(str(tmp_path / "run")) == 1
    assert "is a run of simclr" in capsys.readouterr().err
    with pytest.raises(UserError, match="is a run of simclr"):
        main(["--resume", str(tmp_path / "run")])

"""SSGAN's losses against their definitions, and its loop: it learns, and a killed run ends as one that never was."""

import dataclasses
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import curve, metrics, spawn, wait_for_a_step_after

from sslfast.cli import main as command_line
from sslfast.evaluation import evaluate_gan, plots
from sslfast.evaluation.gan import generate, latents_of, load_networks
from sslfast.methods import ssgan
from sslfast.methods.ssgan import SSGAN, Judged, discriminator_loss, generator_loss, judge, train, views
from sslfast.training import UserError, checkpoint, data, distributed

VARIANTS = ["gan", "ssgan", "ssgan-la", "ssgan-la+"]
SMALL = {"data": "digits", "batch_size": 64, "latent": 16, "device": "cpu", "log_every": 1, "reports": 2}
SMALL |= {"evaluate": False}


def small(run: Path, **changes) -> SSGAN:
    return SSGAN(**{**SMALL, "run": str(run), **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 22 steps that nobody disturbed."""
    run = tmp_path_factory.mktemp("ssgan") / "undisturbed"
    assert train(small(run, epochs=1)) == run
    return run


def assert_same_results(run: Path, expected: Path):
    assert curve(run) == curve(expected), "metrics.jsonl must have every step once, with the same loss"
    (weights, state), (wanted, wanted_state) = checkpoint.load(run), checkpoint.load(expected)
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in weights)
    for network in ("generator", "discriminator"):
        for number, moments in wanted_state[network]["state"].items():
            assert torch.equal(state[network]["state"][number]["exp_avg_sq"], moments["exp_avg_sq"])
    assert json.loads((run / "probes.json").read_text()) == json.loads((expected / "probes.json").read_text())
    for path in (expected / "samples").iterdir():
        assert (run / "samples" / path.name).read_bytes() == path.read_bytes()


# The losses.


@pytest.mark.parametrize("n", [8, 11])
def test_views_are_a_quarter_in_all_rotations_and_the_rest(n):
    images = torch.randn(n, 1, 6, 6)
    quarter = n // 4
    seen = views("ssgan", images)
    assert len(seen) == n + 3 * quarter
    for k in range(4):
        rotated = torch.rot90(images[:quarter], k, (2, 3))
        assert torch.equal(seen[k * quarter : (k + 1) * quarter], rotated)
    assert torch.equal(seen[4 * quarter :], images[quarter:])
    assert torch.equal(views("gan", images), images)
    la = views("ssgan-la", images)
    assert torch.equal(la, torch.cat([torch.rot90(images[: n // 2], k, (2, 3)) for k in range(4)]))
    assert judge("ssgan-la", None, la[:, 0, 0], n).labels.tolist() == sorted([0, 1, 2, 3] * (n // 2))


def test_every_image_counts_once_in_the_gan_loss_and_rotations_have_their_labels():
    images = torch.arange(11.0).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    seen = views("ssgan", images)
    judged = judge("ssgan", seen[:, 0, 0, 0], seen[:, 0, :2, 0], 11)
    assert sorted(judged.scores.tolist()) == list(range(11))
    assert judged.logits[:, 0].tolist() == [0, 1] * 4
    assert judged.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert judge("gan", torch.arange(11.0), None, 11).scores.tolist() == list(range(11))


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_of_the_papers(variant):
    """Written out again from the definitions, in float64, one image after the other."""
    torch.manual_seed(0)
    config = SSGAN(variant=variant, beta=0.7, alpha=0.3)
    classes = {"gan": 0, "ssgan": 4}.get(variant, 8)
    labels = torch.arange(4).repeat_interleave(2)
    real, fake = (
        Judged(
            None if variant == "ssgan-la" else torch.randn(8, dtype=torch.float64),
            torch.randn(8, classes, dtype=torch.float64) if classes else None,
            labels,
        )
        for _ in range(2)
    )

    def mean(terms):
        terms = list(terms)
        return sum(terms) / len(terms)

    def entropy(logits, which):
        return mean(-math.log(math.exp(row[c]) / sum(map(math.exp, row))) for row, c in zip(logits, which, strict=True))

    wanted = wanted_generator = 0.0
    if variant != "ssgan-la":
        scores = real.scores.tolist(), fake.scores.tolist()
        wanted = mean(max(0, 1 - s) for s in scores[0]) + mean(max(0, 1 + s) for s in scores[1])
        wanted_generator = -mean(scores[1])
    if variant == "ssgan":
        wanted += 0.7 * entropy(real.logits.tolist(), labels.tolist())
        wanted_generator += 0.3 * entropy(fake.logits.tolist(), labels.tolist())
    elif variant != "gan":
        weights = (1, 1) if variant == "ssgan-la" else (0.7, 0.3)
        as_real, as_fake = [2 * k for k in labels.tolist()], [2 * k + 1 for k in labels.tolist()]
        wanted += weights[0] * (entropy(real.logits.tolist(), as_real) + entropy(fake.logits.tolist(), as_fake))
        fooled = entropy(fake.logits.tolist(), as_real) - entropy(fake.logits.tolist(), as_fake)
        wanted_generator += weights[1] * fooled
    loss, adversarial, rotation = discriminator_loss(config, real, fake)
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    assert generator_loss(config, fake).item() == pytest.approx(wanted_generator, rel=1e-6)
    assert (adversarial < loss) == (variant in ("ssgan", "ssgan-la+"))
    if variant == "gan":
        assert rotation is None
    else:
        told = real.logits.argmax(1) // (1 if variant == "ssgan" else 2)
        assert rotation.item() == pytest.approx(100 * mean((told == labels).tolist()))


# The loop.


@pytest.mark.parametrize("variant", ["gan", "ssgan", "ssgan-la"])
def test_variants_learn(variant, tmp_path):
    """The discriminator tells rotations, and the averaged generator draws pixels as dark as digits are."""
    run = tmp_path / "run"
    train(small(run, variant=variant, epochs=3, lr=1e-3, average=0.9, reports=0))
    lines = metrics(run)
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["generator_loss"]) for line in lines)
    if variant == "gan":
        assert "rotation" not in lines[0]
    else:
        assert sum(line["rotation"] for line in lines[-10:]) / 10 > 45, "chance is 25 %"
    latents = latents_of(range(200), 16)
    real = data.load("digits", "train").source.float()
    made, untrained = (
        generate(load_networks(run, weights)[0], latents, "float32").float() for weights in ("average", "untrained")
    )
    distance = [(x.mean(0) - real.mean(0)).abs().mean().item() for x in (made, untrained)]
    assert distance[0] < 0.6 * distance[1]


def test_what_a_run_leaves_behind(finished):
    assert {path.name for path in (finished / "samples").iterdir()} == {"step-00000011.png", "step-00000022.png"}
    assert set(evaluate_gan.probes(finished)) == {11, 22}
    assert {"loss", "generator_loss", "rotation", "lr"} <= metrics(finished)[0].keys()
    rates = [line["lr"] for line in metrics(finished)]
    assert rates == pytest.approx([SSGAN.lr * (1 - step / 22) for step in range(22)])


def test_killed_at_any_moment_and_resumed_it_ends_the_same_bit_for_bit(finished, tmp_path):
    run = tmp_path / "killed"
    words = ["--no-evaluate", "--epochs", "1", "--checkpoint-seconds", "0", "--run", str(run)]
    for name in SMALL.keys() - {"evaluate"}:
        words += [f"--{name.replace('_', '-')}", str(SMALL[name])]
    child = spawn("ssgan", *words)
    wait_for_a_step_after(run, 8, child)
    time.sleep(random.Random().random() * 0.1)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    assert command_line(["ssgan", "--resume", str(run)]) == 0
    assert_same_results(run, finished)


def test_reports_change_nothing_in_the_training(finished, tmp_path, capsys):
    train(small(tmp_path / "run", epochs=1, reports=0))
    assert "warning" not in capsys.readouterr().out
    assert curve(tmp_path / "run") == curve(finished)
    assert not (tmp_path / "run/probes.json").exists()


def test_several_steps_of_the_discriminator_for_one_of_the_generator(tmp_path):
    run = tmp_path / "run"
    train(small(run, epochs=1, discriminator_steps=4, augment=True, reports=0))
    _, state = checkpoint.load(run)
    assert state["discriminator"]["state"][0]["step"] == 22
    assert state["generator"]["state"][0]["step"] == 5


def train_as_rank(rank: int, port: int, configs: list[SSGAN]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.session(timeout=60):
        for config in configs:
            train(config)


def test_two_ranks_train_as_one_process(tmp_path):
    """`gan` follows the run of one process; others turn another part of the batch, each rank its own, and only run."""
    settings = {"batch_size": 256, "epochs": 1, "precision": "float32", "reports": 0}
    configs = [small(tmp_path / v, variant=v, **settings) for v in ("gan", "ssgan-la")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=train_as_rank, args=(rank, port, configs)) for rank in range(2)]
    for process in ranks:
        process.start()
    alone = dataclasses.replace(configs[0], run=str(tmp_path / "alone"))
    train(alone)
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    for name in ("loss", "generator_loss"):
        found, wanted = ([line[name] for line in metrics(Path(run.run))] for run in (configs[0], alone))
        assert len(found) == 5
        assert found == pytest.approx(wanted, rel=2e-3, abs=2e-3)
    for config in configs[1:]:
        assert len(metrics(Path(config.run))) == 5


# Guards.


def test_a_loss_of_nan_stops_with_the_step_the_last_checkpoint_and_how_to_go_on(tmp_path, monkeypatch):
    calls = []

    def explodes(config, fake):
        calls.append(1)
        return generator_loss(config, fake) * (float("nan") if len(calls) > 4 else 1)

    monkeypatch.setattr(ssgan, "generator_loss", explodes)
    run = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train(small(run, epochs=1, checkpoint_seconds=0.0))
    said = str(caught.value)
    assert "at step 5 (epoch 1) the generator loss is nan" in said
    assert f"{run}/checkpoints/step-00000004" in said
    command = f"sslfast ssgan --resume {run} --lr 0.0001"
    assert command in said
    assert all(tensor.isfinite().all() for tensor in checkpoint.load(run)[0].values())
    monkeypatch.undo()
    assert command_line([*command.split()[1:]]) == 0
    assert metrics(run)[-1]["step"] == 22
    assert metrics(run)[4]["lr"] == pytest.approx(1e-4 * (1 - 4 / 22))


def test_a_discriminator_that_has_won_is_warned_of_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ssgan, "NOTHING_LEFT", 100.0)
    monkeypatch.setattr(ssgan, "WARN_AFTER", 5)
    train(small(tmp_path / "run", epochs=1, reports=0))
    assert capsys.readouterr().out.count("warning: the discriminator has won: in the last 5 steps") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 2}, "--batch-size 2 is too small: each rank needs at least 4 images"),
        ({"batch_size": 2000}, "--batch-size 2000 is more than the 1437 images"),
        ({"size": 30}, "--networks small --size 30: the size must be 4 to 7 times a power of two"),
        ({"alpha": -0.1}, "--alpha must be at least 0, not -0.1"),
        ({"average": 1.5}, "--average must be at most 1, not 1.5"),
        ({"discriminator_steps": 0}, "--discriminator-steps must be at least 1, not 0"),
        ({"device": "abacus"}, "--device abacus cannot be used"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(small(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


# What comes of a run.


def test_evaluation_of_a_run(finished, capsys):
    assert command_line(["evaluate", str(finished), "--samples", "300"]) == 0
    results = json.loads((finished / "evaluation.json").read_text())
    assert results["test images"]["fid"] < results["generator"]["fid"]
    assert 0 <= results["generator"]["precision"] <= 1
    for kind in ("raw pixels", "untrained discriminator", "discriminator"):
        assert all(50 < value <= 100 for value in results[f"features: {kind}"].values())
    assert {"loss.png", "samples.png", "training.gif"} <= {path.name for path in finished.iterdir()}
    with Image.open(finished / "training.gif") as gif:
        assert gif.n_frames == 2
    assert "untrained generator" in capsys.readouterr().out


def test_sheets_and_interpolations(finished, tmp_path):
    assert command_line(["sample", str(finished), "--n", "9", "--out", str(tmp_path)]) == 0
    assert command_line(["sample", str(finished), "--n", "5", "--interpolate", "2", "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "samples.png") as square, Image.open(tmp_path / "interpolation.png") as strip:
        assert square.width == square.height
        assert strip.width > 2 * strip.height


def test_an_image_depends_on_its_own_seed_alone(finished):
    generator, _ = load_networks(finished)
    alone = generate(generator, latents_of([7], 16), "float32")
    among = generate(generator, latents_of(range(5, 10), 16), "float32")
    assert (alone[0].int() - among[2].int()).abs().max() <= 1


def test_a_run_of_another_method_is_refused(tmp_path):
    checkpoint.save_config(tmp_path / "run", {"method": "simclr"})
    with pytest.raises(UserError, match="is a run of simclr, not of ssgan"):
        load_networks(tmp_path / "run")


def test_forgetting_is_drawn(tmp_path):
    plots.probe_curves(
        {"gan": [{1: 80.0, 2: 70.0}, {1: 82.0, 2: 71.0}], "ssgan": [{1: 80.0, 2: 85.0}]}, tmp_path / "p.png"
    )
    with Image.open(tmp_path / "p.png") as image:
        assert image.width > 500

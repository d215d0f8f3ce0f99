"""MoCo's parts against their definitions, and its loop: it learns, and a killed run ends as one that never was."""

import copy
import dataclasses
import itertools
import math
import multiprocessing
import os
import random
import signal
import socket
import time
from collections import deque
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from info_nce import InfoNCE
from runs import assert_same_results, metrics, spawn, wait_for_a_step_after
from torch import nn

from sslfast.cli import main as command_line
from sslfast.evaluation.evaluate import evaluate, load_encoder
from sslfast.methods import moco
from sslfast.methods.moco import InGroups, MoCo, Queue, build_heads, build_transform, contrast, settle, train
from sslfast.training import UserError, checkpoint, data, distributed

SMALL = {
    "data": "digits",
    "batch_size": 64,
    "queue": 2000,  # no multiple of the batch
    "bn_groups": 2,
    "lr": 0.06,
    "crop_scale": 0.6,
    "flip": 0.0,
    "head_hidden": 64,
    "head_features": 32,
    "device": "cpu",
    "log_every": 1,
    "evaluate": False,
}
STEPS = 22  # an epoch


def small(run: Path, **changes) -> MoCo:
    return MoCo(**{**SMALL, "run": str(run), **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 2 epochs that nobody disturbed."""
    run = tmp_path_factory.mktemp("moco") / "undisturbed"
    assert train(small(run, epochs=2, symmetric=True)) == run
    return run


# The parts.


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_the_loss_is_info_nce(temperature):
    """Against info-nce-pytorch in float64: with a queue, and with the batch's other keys instead."""
    torch.manual_seed(0)
    queries, keys, queue = (F.normalize(torch.randn(n, 32, dtype=torch.float64)) for n in (24, 24, 100))
    for negatives in (queue, None):
        ours, theirs = queries.clone().requires_grad_(), queries.clone().requires_grad_()
        loss, wanted = contrast(ours, keys, negatives, temperature), InfoNCE(temperature)(theirs, keys, negatives)
        torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-9)
        loss.backward()
        wanted.backward()
        tangent = ours.grad - (ours.grad * queries).sum(1, keepdim=True) * queries  # theirs normalises queries, too
        torch.testing.assert_close(tangent, theirs.grad, rtol=1e-7, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 9), batches=st.lists(st.integers(1, 12), max_size=8))
def test_the_queue_holds_the_last_keys_whatever_the_batch(size, batches):
    queue, number = Queue(size, 1), 0
    expected = deque(queue.keys[:, 0].tolist(), maxlen=size)
    for count in batches:
        keys = torch.arange(number, number + count, dtype=torch.float32)[:, None]
        queue.put(keys)
        expected.extend(keys[:, 0].tolist())
        number += count
    position = int(queue.position)
    assert [*queue.keys[position:, 0].tolist(), *queue.keys[:position, 0].tolist()] == list(expected)


def test_a_new_queue_holds_unit_vectors():
    torch.testing.assert_close(Queue(50, 8).keys.norm(dim=1), torch.ones(50))


def test_groups_pass_batchnorm_by_themselves():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
    images = torch.randn(10, 4)
    groups = [copy.deepcopy(layers)(part) for part in (images[:4], images[4:7], images[7:])]
    torch.testing.assert_close(InGroups(*layers)(images, 3), torch.cat(groups))
    assert not torch.allclose(InGroups(*layers)(images, 3), layers(images))


def test_the_key_momentum_of_version_3_rises_to_1():
    config = MoCo(version=3, key_momentum=0.9)
    wanted = [0.9, 1 - 0.1 * (1 + math.cos(math.pi / 4)) / 2, 0.95, 1.0]
    assert [moco.key_momentum(config, part) for part in (0, 0.25, 0.5, 1)] == pytest.approx(wanted)
    assert moco.key_momentum(dataclasses.replace(config, version=2), 0.5) == 0.9


def test_heads_of_the_versions():
    config = MoCo(head_hidden=64, head_features=32)
    kinds = {
        1: ["Linear"],
        2: ["Linear", "ReLU", "Linear"],
        3: ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"],
    }
    for version, wanted in kinds.items():
        head, predictor = build_heads(dataclasses.replace(config, version=version), 48)
        assert head(torch.randn(5, 48)).shape == predictor(torch.randn(5, 32)).shape == (5, 32)
        assert [type(layer).__name__ for layer in head.modules() if not list(layer.children())] == wanted
        assert len(list(predictor.parameters())) == (4 if version == 3 else 0)
    assert not head[-1].affine


def images(size: int, count: int = 2000) -> data.Images:
    return data.Images(torch.zeros(count, 3, size, size, dtype=torch.uint8), torch.zeros(count), [])


@pytest.mark.parametrize(
    ("version", "size", "wanted"),
    [
        (1, 224, {"queue": 65536, "key_momentum": 0.999, "temperature": 0.07, "lr": 0.03, "bn_groups": 8}),
        (2, 224, {"queue": 65536, "key_momentum": 0.999, "temperature": 0.2, "lr": 0.03, "bn_groups": 8}),
        (2, 32, {"queue": 4096, "key_momentum": 0.99, "temperature": 0.1, "bn_groups": 8, "symmetric": False}),
        (3, 224, {"queue": 0, "key_momentum": 0.99, "temperature": 1.0, "bn_groups": 1, "symmetric": True}),
    ],
)
def test_recipes(version, size, wanted):
    config = settle(MoCo(version=version, device="cpu"), images(size, 600))
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert settle(MoCo(version=version, device="cpu", temperature=0.5), images(size, 600)).temperature == 0.5


def test_augmentations_of_the_versions():
    """Blur for photographs only, and version 3's unlike views."""
    blur = {}
    for version in (1, 2, 3):
        for size in (32, 224):
            views = build_transform(MoCo(version=version, size=size), 3).distributions
            blur[version, size] = [view.blur_p for view in views]
    assert blur == {
        **{(version, 32): [0, 0] for version in (1, 2, 3)},
        **{(1, 224): [0, 0], (2, 224): [0.5, 0.5], (3, 224): [1.0, 0.1]},
    }


# The loop.


def test_the_loss_falls_below_chance(finished):
    """Once the queue holds real keys, after 16 steps: a loss of log(1 + 2000) would be guessing."""
    losses = [line["loss"] / 2 for line in metrics(finished)]  # the sum of two directions
    assert len(losses) == 2 * STEPS
    end = sum(losses[-5:]) / 5
    assert end < math.log(1 + 2000) - 1.5
    assert end < max(losses) - 0.5


def test_the_key_encoder_is_the_moving_average_of_the_encoder(tmp_path):
    """It moves before a step: after step 1 it is the untrained encoder, after step 2 on the way to step 1's."""
    run = tmp_path / "run"
    train(small(run, batch_size=700, epochs=1, key_momentum=0.75, checkpoint_seconds=0.0))
    weights = dict(checkpoint.load(run)[0])
    folder = run / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
    (folder / "step-00000002").rename(tmp_path / "second")
    first = dict(checkpoint.load(run)[0])
    start = dict(load_encoder(run, trained=False).named_parameters())
    assert start
    for name, untrained in start.items():
        assert torch.equal(first[f"key.0.0.{name}"], untrained)
        assert not torch.equal(first[f"encoder.{name}"], untrained)
        moved = 0.75 * untrained.double() + 0.25 * first[f"encoder.{name}"].double()
        torch.testing.assert_close(weights[f"key.0.0.{name}"].double(), moved, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("groups", [1, 8])
def test_keys_belong_to_their_queries_and_are_enqueued_after_the_loss(tmp_path, monkeypatch, groups):
    """With equal views and encoders, a key differs from its query only by its group in BatchNorm."""
    calls = []

    def record(queries, keys, queue, temperature):
        calls.append((queries.detach(), keys, queue.clone()))
        return contrast(queries, keys, queue, temperature)

    def one_view_twice(config, channels):
        transform = build_transform(config, channels)
        return lambda pixels, ids, epoch: transform(pixels, ids, epoch)[:1] * 2

    monkeypatch.setattr(moco, "contrast", record)
    monkeypatch.setattr(moco, "build_transform", one_view_twice)
    train(small(tmp_path / "run", epochs=1, bn_groups=groups, precision="float32"))
    queries, keys, queue = calls[0]
    own = (queries * keys).sum(1)
    if groups == 1:
        torch.testing.assert_close(own, torch.ones(64))
    else:
        assert 0.9 < own.mean() < 0.99999
        assert ((queries @ keys.T).argmax(1) == torch.arange(64)).float().mean() > 0.9
    assert not any((queue == key).all(1).any() for key in keys)
    for (_, keys, before), (_, _, after) in itertools.pairwise(calls):
        changed = (before != after).any(1)
        assert changed.sum() == 64
        assert {tuple(row) for row in after[changed].tolist()} == {tuple(row) for row in keys.tolist()}


def test_killed_at_any_moment_and_resumed_it_ends_the_same_bit_for_bit(finished, tmp_path):
    """SIGKILL at a random moment of a run that writes a checkpoint after every step: the queue must come back, too."""
    run = tmp_path / "killed"
    words = ["--no-evaluate", "--symmetric", "--epochs", "2", "--checkpoint-seconds", "0", "--run", str(run)]
    for name in SMALL.keys() - {"evaluate"}:
        words += [f"--{name.replace('_', '-')}", str(SMALL[name])]
    child = spawn("moco", *words)
    wait_for_a_step_after(run, 8, child)
    time.sleep(random.Random().random() * 0.1)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    assert command_line(["moco", "--resume", str(run)]) == 0
    assert_same_results(run, finished)


def train_as_rank(rank: int, port: int, configs: list[MoCo]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.session(timeout=60):
        for config in configs:
            train(config)


def test_two_ranks_train_as_one_process(tmp_path):
    """With shuffled BatchNorm across ranks and one queue on all of them (v2), and keys of all ranks (v3)."""
    configs = [
        small(tmp_path / "v2", batch_size=256, epochs=1, precision="float32", symmetric=True, bn_groups=4),
        small(tmp_path / "v3", batch_size=256, epochs=1, precision="float32", version=3, queue=0, sync_batchnorm=True),
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=train_as_rank, args=(rank, port, configs)) for rank in range(2)]
    for process in ranks:
        process.start()
    for config in configs:
        train(dataclasses.replace(config, run=f"{config.run}-alone"))
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    for config in configs:
        losses, wanted = ([line["loss"] for line in metrics(Path(run))] for run in (config.run, f"{config.run}-alone"))
        assert len(losses) == 5
        assert losses == pytest.approx(wanted, rel=1e-3)
        together, alone = (checkpoint.load(Path(run))[0]["queue.keys"] for run in (config.run, f"{config.run}-alone"))
        assert torch.nn.functional.cosine_similarity(together, alone).gt(0.999).all()


@pytest.mark.parametrize(
    ("changes", "chance"),
    [
        ({"version": 1, "epochs": 3}, math.log(1 + 2000)),
        ({"version": 3, "epochs": 2, "queue": 0, "lr": 0.3}, 4 * 0.2 * math.log(64)),
    ],
    ids=["version 1", "version 3"],
)
def test_other_versions_learn(tmp_path, changes, chance):
    train(small(tmp_path / "run", temperature=0.2, **changes))
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) / 5 < chance - 0.3
    assert losses[-1] < max(losses) - 0.3


def test_evaluation_of_a_run(finished):
    results = evaluate(finished, map_samples=120)
    assert set(results) == {"raw pixels", "untrained encoder", "moco"}
    assert all(60 < value <= 100 for row in results.values() for value in row.values())
    assert {path.name for path in finished.glob("*.png")} == {"loss.png", "embedding.png", "neighbours.png"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_momentum": 1.5}, "--key-momentum must be at most 1, not 1.5"),
        ({"queue": -1}, "--queue must be at least 0, not -1"),
        ({"version": 3}, "--queue 2000: version 3 has no queue"),
        ({"temperature": -0.5}, "--temperature must be 0 or at least 0.0001, not -0.5"),
        ({"bn_groups": 65}, "--bn-groups 65 needs a --batch-size of 2 for each, not 64"),
        ({"batch_size": 2000}, "--batch-size 2000 is more than the 1437 images"),
        ({"size": 27}, "--size must be even for the small encoder, not 27"),
        ({"device": "abacus"}, "--device abacus cannot be used"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(small(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()

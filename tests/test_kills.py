"""Runs of every method, killed at random moments, again and again: each ends bit for bit as one that nobody disturbed.

A few kills in `make test`; for more, say how many of each method:

    SSLFAST_KILLS=50 python -m pytest tests/test_kills.py -s
"""

import multiprocessing
import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from runs import idx_folder, metrics

from sslfast.cli import main
from sslfast.training import checkpoint

KILLS = int(os.environ.get("SSLFAST_KILLS", 2))
STEPS = 12
COMMON = ["--batch-size", "16", "--epochs", "4", "--device", "cpu", "--precision", "float32"]
COMMON += ["--log-every", "1", "--checkpoint-seconds", "0", "--no-evaluate"]
ENCODER = ["--head-hidden", "8", "--head-features", "8"]
METHODS = {
    "simclr": ENCODER,
    "moco": [*ENCODER, "--queue", "1000", "--symmetric"],
    "ddpm": ["--widths", "8", "16", "--attention", "--patch", "2", "--dropout", "0.1", "--conditional"],
    "ssgan": ["--latent", "8", "--reports", "3", "--flip", "0.5"],
}
COMPLETE = ["sha256.txt", "state.pt", "weights.safetensors"]


def command(words: list[str]) -> None:
    torch.set_num_threads(1)
    raise SystemExit(main(words))


def start(*words: str):
    """Start a command in a process that has its imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sslfast.cli", *(f"sslfast.methods.{name}" for name in METHODS), "test_kills"])
    process = context.Process(target=command, args=(list(words),))
    process.start()
    return process


def incomplete(run: Path) -> list[str]:
    """The folders of checkpoints that are there, under this name, and lack a file."""
    found = []
    for folder in (run / "checkpoints").glob("step-*"):
        try:
            if sorted(os.listdir(folder)) != COMPLETE and sorted(os.listdir(folder)) != COMPLETE:
                found.append(f"{folder.name}: {sorted(os.listdir(folder))}")
        except FileNotFoundError:
            pass  # it has another name now
    return found


def watch(run: Path, found: list[str], over: threading.Event) -> None:
    while not over.is_set():
        found += incomplete(run)
        time.sleep(0.001)


def same(a, b) -> bool:
    """Whether two values of a checkpoint's state are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def results(run: Path):
    """All that must not depend on how often a run was killed."""
    weights, state = checkpoint.load(run)
    lines = [{k: v for k, v in line.items() if k != "samples_per_second"} for line in metrics(run)]
    pictures = {path.name: path.read_bytes() for path in (run / "samples").glob("*")}
    return weights, {k: v for k, v in state.items() if k != "log_position"}, lines, pictures


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments_and_resumed_it_ends_the_same(method, tmp_path):
    images = idx_folder(tmp_path / "images", size=16, count=48)
    undisturbed, words = tmp_path / "undisturbed", ["--data", str(images), *COMMON, *METHODS[method]]
    start("--help").join()  # what takes long is imported now
    began = time.monotonic()
    process = start(method, *words, "--run", str(undisturbed))
    process.join(300)
    assert process.exitcode == 0
    duration = time.monotonic() - began
    wanted = results(undisturbed)
    assert len(wanted[2]) == STEPS

    kills, number, dice = 0, 0, random.Random()
    while kills < KILLS:
        number += 1
        run, half_there, over = tmp_path / f"killed-{number}", [], threading.Event()
        watcher = threading.Thread(target=watch, args=(run, half_there, over))
        watcher.start()
        try:
            while True:
                begun = (run / "config.json").exists()
                process = start(method, *(["--resume", str(run)] if begun else [*words, "--run", str(run)]))
                process.join(dice.random() * duration if kills < KILLS else 300)
                process.kill()
                process.join()
                half_there += incomplete(run)
                if process.exitcode == 0:
                    break
                assert process.exitcode == -9, "it failed by itself"
                kills += 1
        finally:
            over.set()
            watcher.join()
        assert not half_there, f"incomplete checkpoints: {half_there[:3]}"
        assert same(results(run), wanted)
    print(f"{method}: {kills} kills in {number} runs")

"""What the tests of the training methods share: reading a run's folder, comparing two, and running one to be killed."""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import torch

from sslfast.training import checkpoint


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple]:
    return [(line["step"], line["epoch"], line["loss"], line["lr"]) for line in metrics(run)]


def assert_same_results(run: Path, expected: Path):
    """Everything about a run that must not depend on how often it was killed."""
    assert curve(run) == curve(expected), "metrics.jsonl must have every step once, with the same loss"
    weights, state = checkpoint.load(run)
    wanted_weights, wanted_state = checkpoint.load(expected)
    assert weights.keys() == wanted_weights.keys()
    assert all(torch.equal(weights[name], wanted_weights[name]) for name in weights)
    for number, buffers in wanted_state["optimizer"]["state"].items():
        assert torch.equal(state["optimizer"]["state"][number]["momentum_buffer"], buffers["momentum_buffer"])


def idx_folder(folder: Path, size: int, count: int = 20) -> Path:
    """A data set of idx files, of two classes of square images."""
    folder.mkdir()
    for kind in ("train", "t10k"):
        pixels = torch.arange(count * size * size).remainder(251).to(torch.uint8).numpy().tobytes()
        header = b"\0\0\x08\x03" + struct.pack(">3I", count, size, size)
        (folder / f"{kind}-images-idx3-ubyte").write_bytes(header + pixels)
        labels = b"\0\0\x08\x01" + struct.pack(">I", count) + bytes(i % 2 for i in range(count))
        (folder / f"{kind}-labels-idx1-ubyte").write_bytes(labels)
    return folder


def spawn(*args: str) -> subprocess.Popen:
    """Start `sslfast ARGS` with as many threads as this process has."""
    program = (
        f"import sys, torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "from sslfast.cli import main; sys.exit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_a_step_after(run: Path, step: int, child: subprocess.Popen) -> None:
    while child.poll() is None:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b"\n") > step:
            return
        time.sleep(0.002)

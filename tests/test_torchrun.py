"""Whole trainings on several ranks: the curve of one process, stopped and resumed, and torchrun with a killed rank."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch

from sslfast.methods.simclr import SimCLR, main, train
from sslfast.training import UserError, checkpoint, distributed, loop

SETTINGS = {
    "data": "digits",
    "batch_size": 128,
    "epochs": 2,
    "lr": 0.002,
    "head_hidden": 64,
    "head_features": 32,
    "precision": "float32",
    "device": "cpu",
    "log_every": 1,
}
STEPS = 22


def arguments(run: Path, *more: str) -> list[str]:
    words = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*words, "--sync-batchnorm", "--no-evaluate", "--run", str(run), *more]


def metrics(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(run)]


def assert_same_results(run: Path, expected: Path):
    assert curve(run) == curve(expected), "every step once, with the same loss"
    weights, wanted = checkpoint.load(run)[0], checkpoint.load(expected)[0]
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def train_as_rank(rank: int, world: int, port: int, words: list[str], signal_at: int | None = None) -> None:
    """The command in a rank; the last rank gets a SIGINT after so many steps."""
    if signal_at is not None and rank == world - 1:
        end_step = loop.Loop.end_step

        def end_step_and_signal(self, *args, **values):
            if self.step == signal_at:
                os.kill(os.getpid(), signal.SIGINT)
            end_step(self, *args, **values)

        loop.Loop.end_step = end_step_and_signal
    with ranks.group(rank, world, port):
        main(words)


def train_on(world: int, words: list[str], signal_at: int | None = None) -> list[int | None]:
    return ranks.join(ranks.start(train_as_rank, world, words, signal_at))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """A run of two ranks that nobody disturbed."""
    run = tmp_path_factory.mktemp("torchrun") / "run"
    assert train_on(2, arguments(run)) == [0, 0]
    return run


def test_the_curve_does_not_depend_on_the_number_of_ranks(two_ranks, tmp_path):
    """The same batches, augmented the same way, and a loss over all of them: only rounding differs, and grows."""
    run = tmp_path / "run"
    assert train_on(1, arguments(run)) == [0]
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    found, expected = (torch.tensor([loss for _, loss in curve(path)]) for path in (run, two_ranks))
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[:5], expected[:5], rtol=5e-4, atol=0)  # twice the rate would be 2e-3 off
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
    assert found[-3:].mean() < found[:3].mean() - 0.2


def test_a_signal_to_one_rank_stops_all_and_resumed_they_end_the_same(two_ranks, tmp_path):
    run = tmp_path / "stopped"
    assert train_on(2, arguments(run), signal_at=6) == [130, 130]
    assert checkpoint.load(run)[1]["step"] == 7
    assert train_on(2, ["--resume", str(run)]) == [0, 0]
    assert_same_results(run, two_ranks)


def test_slices_of_a_batch_on_two_ranks(tmp_path):
    run = tmp_path / "run"
    assert train_on(2, arguments(run, "--micro-batch", "24", "--epochs", "1")) == [0, 0]  # slices of 24, 24 and 16
    assert curve(run)[-1][1] < curve(run)[0][1]


def workers(agent: int) -> dict[int, int]:
    """By rank, the processes that torchrun has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(re.search(r"^PPid:\s+(\d+)", (folder / "status").read_text(), re.M)[1]) == agent:
                found[int(re.search(r"\0RANK=(\d+)", (folder / "environ").read_text())[1])] = int(folder.name)
        except (OSError, TypeError):
            pass  # it has just ended, or is no rank
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint_when_a_rank_is_killed(two_ranks, tmp_path):
    run = tmp_path / "killed"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    launcher += ["--max-restarts", "3", "--monitor-interval", "0.2", "-m", "--", "sslfast", "simclr"]
    child = subprocess.Popen(
        [*launcher, *arguments(run, "--checkpoint-seconds", "0")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        end = time.monotonic() + 120
        while len(metrics(run)) < 5 and child.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(workers(child.pid)[1], signal.SIGKILL)
        said = child.communicate(timeout=120)[0]
    finally:
        child.kill()
    assert child.returncode == 0, said
    assert "rank 0 lost the other ranks: one of them died" in said, said
    assert re.search(r"continuing .* at step \d+ of 22", said), said
    assert said.count(f"trained: {run}") == 1, "only the main rank speaks"
    assert_same_results(run, two_ranks)


def fall_silent(rank: int, world: int, port: int, folder: Path) -> None:
    """The last rank stops to take part; the others write down what they are told."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["SSLFAST_RANK_TIMEOUT"] = "4"
    try:
        with distributed.session():
            distributed.any_rank(False)
            if rank == world - 1:
                time.sleep(60)
            distributed.any_rank(False)
    except UserError as error:
        (folder / str(rank)).write_text(str(error))


def join_again(rank: int, world: int, _port: int, port: int, restart: int) -> None:
    """Join the group that torchrun's own store at `port` brings together; after a restart rank 1 comes later."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(restart)}
    time.sleep(2 * restart * rank)
    with distributed.session():
        distributed.any_rank(False)
        if not restart:
            os._exit(0)  # leaves its address in the store


def test_after_a_restart_ranks_do_not_look_for_those_that_died():
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for restart in (0, 1):
        assert ranks.join(ranks.start(join_again, 2, store.port, restart), seconds=60) == [0, 0]


def test_a_silent_rank_ends_the_others_within_the_timeout(tmp_path):
    processes = ranks.start(fall_silent, 2, tmp_path)
    try:
        processes[0].join(40)
        assert processes[0].exitcode == 0
        assert processes[1].is_alive()
    finally:
        ranks.join(processes, seconds=0)
    said = (tmp_path / "0").read_text()
    assert "rank 0 lost the other ranks: one of them died, or said nothing for 4 seconds" in said


@pytest.mark.parametrize("wanted", ["soon", "0", "inf", "nan"])
def test_a_timeout_is_a_positive_number(monkeypatch, wanted):
    monkeypatch.setenv("SSLFAST_RANK_TIMEOUT", wanted)
    with pytest.raises(UserError, match=f"SSLFAST_RANK_TIMEOUT: expected a positive number of seconds, got '{wanted}'"):
        distributed.rank_timeout()


def test_restarts_need_a_folder(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UserError, match="torchrun --max-restarts needs --run FOLDER"):
        main(["--data", "digits"])


def test_a_batch_that_cannot_be_dealt_evenly(monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "world_size", lambda: 3)
    with pytest.raises(UserError, match="--batch-size 128 cannot be dealt evenly to 3 ranks"):
        train(SimCLR(**SETTINGS, run=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()

"""Checkpoints are complete or absent, load without executing code, and survive a damaged disk."""

import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch

from sslfast.training import UserError, checkpoint


def weights(step):
    return {"a.weight": torch.full((3, 4), float(step)), "a.count": torch.tensor(step)}


def names(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    state = {"step": 7, "optimizer": optimizer.state_dict(), "random": torch.get_rng_state(), "note": [1, 2.5, None]}
    checkpoint.save(tmp_path, 7, model.state_dict(), state)
    loaded, found = checkpoint.load(tmp_path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    assert found["step"] == 7
    assert found["note"] == [1, 2.5, None]
    assert torch.equal(found["random"], state["random"])
    momentum = found["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, optimizer.state_dict()["state"][0]["momentum_buffer"])


def test_the_last_two_are_kept(tmp_path):
    assert checkpoint.load(tmp_path) is None
    for step in (5, 10, 999, 1000):
        checkpoint.save(tmp_path, step, weights(step), {"step": step})
    assert names(tmp_path) == ["step-00000999", "step-00001000"]
    assert checkpoint.load(tmp_path)[1]["step"] == 1000


@pytest.mark.parametrize("file", ["weights.safetensors", "state.pt", "sha256.txt"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, file, damage):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, weights(step), {"step": step})
    path = tmp_path / "checkpoints" / "step-00000002" / file
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    elif file == "sha256.txt":  # as version 0.1 wrote it
        assert checkpoint.load(tmp_path)[1]["step"] == 2
        return
    loaded, state = checkpoint.load(tmp_path)
    assert state["step"] == 1
    assert loaded["a.count"] == 1
    assert "step-00000002" in capsys.readouterr().out
    checkpoint.save(tmp_path, 2, weights(2), {"step": 2})  # going on writes it again
    assert checkpoint.load(tmp_path)[1]["step"] == 2


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_loading_executes_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    checkpoint.save(tmp_path, 1, weights(1), {"step": 1})
    state = tmp_path / "checkpoints" / "step-00000001" / "state.pt"
    (state.parent / "sha256.txt").unlink()  # nor does it protect
    for write in (lambda: torch.save({"step": Bomb()}, state), lambda: state.write_bytes(pickle.dumps(Bomb()))):
        write()
        with pytest.raises(UserError, match=r"no checkpoint of .* can be read"):
            checkpoint.load(tmp_path)
        assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("file", ["weights.safetensors", "state.pt", "sha256.txt"])
def test_a_flipped_bit_anywhere_is_noticed(tmp_path, file):
    """In what the libraries check, in what makes them raise anything, and in the numbers themselves."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, weights(step), {"step": step, "more": torch.arange(50.0)})
    path = tmp_path / "checkpoints" / "step-00000002" / file
    content = path.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 150)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        loaded, state = checkpoint.load(tmp_path)
        assert state["step"] == 1, place
        assert loaded["a.count"] == 1


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"weights": {"a.weight": torch.zeros(5, 4), "a.count": torch.tensor(2)}}, "size mismatch"),
        ({"weights": {"a.weight": torch.zeros(3, 4)}}, "Missing key"),
        ({"weights": {"a.weight": torch.full((3, 4), float("nan")), "a.count": torch.tensor(2)}}, "not finite"),
        ({"state": [1, 2]}, "no state"),
    ],
    ids=str,
)
def test_what_cannot_be_used_counts_as_damaged(tmp_path, capsys, changed, reason):
    """A whole file, with right checksums, of other weights than the model's."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3, bias=False)})
    model["a"].register_buffer("count", torch.tensor(0))
    checkpoint.save(tmp_path, 1, weights(1), {"step": 1})
    checkpoint.save(tmp_path, 2, **({"weights": weights(2), "state": {"step": 2}} | changed))
    checkpoint.load_weights(tmp_path, a=model["a"])
    assert model["a"].count == 1
    said = capsys.readouterr().out
    assert "cannot read the checkpoint" in said
    assert reason in said


def test_all_damaged_stops_and_changes_nothing(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, weights(step), {"step": step})
        (tmp_path / f"checkpoints/step-0000000{step}/weights.safetensors").write_bytes(b"damaged")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"no checkpoint of .*step-00000002.*step-00000001.*Nothing was changed"):
        checkpoint.load(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_an_earlier_step_than_damaged_ones_is_kept(tmp_path):
    for step in (1000, 1010):
        checkpoint.save(tmp_path, step, weights(step), {"step": step})
    (tmp_path / "checkpoints/step-00001010/state.pt").write_bytes(b"damaged")
    for step in (1001, 1002):
        checkpoint.save(tmp_path, step, weights(step), {"step": step})
    assert names(tmp_path) == ["step-00001001", "step-00001002"]
    assert checkpoint.load(tmp_path)[1]["step"] == 1002


def test_other_names_in_the_folder_are_left_alone(tmp_path):
    checkpoint.save(tmp_path, 1, weights(1), {"step": 1})
    for name in ("step-zzz", "step-7", "step-00000009.bak"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints/step-00000005").write_text("a file")
    checkpoint.save(tmp_path, 2, weights(2), {"step": 2})
    checkpoint.save(tmp_path, 3, weights(3), {"step": 3})
    assert checkpoint.load(tmp_path)[1]["step"] == 3
    assert {"step-zzz", "step-7", "step-00000009.bak", "step-00000005"} < set(names(tmp_path))
    assert len(names(tmp_path)) == 6


def test_a_checkpoint_is_renamed_before_it_is_removed(tmp_path, monkeypatch):
    """A kill in the middle of a removal, of an old one and of one that is written again."""
    removed = []

    def remove_half(path, **_):
        path = type(tmp_path)(path)
        if path.exists():
            removed.append(path.name)
            next(file for file in path.iterdir()).unlink()
            raise KeyboardInterrupt

    for step in (1, 2):
        checkpoint.save(tmp_path, step, weights(step), {"step": step})
    for step in (2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.shutil, "rmtree", remove_half)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(tmp_path, step, weights(step), {"step": step})
        for folder in (tmp_path / "checkpoints").glob("step-*"):
            assert len(list(folder.iterdir())) == 3
        checkpoint.save(tmp_path, step, weights(step), {"step": step})
    assert removed
    assert not any(name.startswith("step-") for name in removed)


SAVE_FOR_EVER = """
import sys, torch, itertools
from pathlib import Path
from sslfast.training import checkpoint
for step in itertools.count(1):
    weights = {str(i): torch.full((256, 256), float(step)) for i in range(8)}
    checkpoint.save(Path(sys.argv[1]), step, weights, {"step": step, "more": torch.full((300, 300), step)})
    print(step, flush=True)
"""


def test_killed_while_writing_leaves_complete_checkpoints(tmp_path):
    """SIGKILL at three moments of a process that does nothing but write checkpoints."""
    for trial in range(3):
        command = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(3):
            child.stdout.readline()
        time.sleep(0.003 + 0.0071 * trial)
        child.kill()
        said = child.communicate()[0].split()
        loaded, state = checkpoint.load(tmp_path)
        assert state["step"] >= (int(said[-1]) if said else 3)
        assert all((tensor == state["step"]).all() for tensor in loaded.values())
        assert (state["more"] == state["step"]).all()
        assert len([name for name in names(tmp_path) if name.startswith("step-")]) <= 3
        for folder in (tmp_path / "checkpoints").glob("step-*"):
            assert sorted(p.name for p in folder.iterdir()) == ["sha256.txt", "state.pt", "weights.safetensors"]
        checkpoint.save(tmp_path, state["step"], loaded, state)  # sweeps up
        for folder in (tmp_path / "checkpoints").glob("step-*"):
            for old in folder.iterdir():
                old.unlink()
            folder.rmdir()


def test_a_run_has_its_settings(tmp_path):
    run = tmp_path / "deep" / "run"
    with pytest.raises(UserError, match="holds no run"):
        checkpoint.load_config(run)
    settings = {"method": "simclr", "lr": 0.5, "channels": 1, "size": 16, "precision": "float32"}
    checkpoint.save_config(run, settings)
    assert checkpoint.load_config(run).items() >= settings.items()
    assert checkpoint.load_config(run)["head_features"] == 128, "what an older version did not know has its default"
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        checkpoint.save_config(run, settings | {"lr": 0.6})
    assert checkpoint.load_config(run)["lr"] == 0.5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_a_flag_and_a_second_one_interrupts(number):
    before = signal.getsignal(number)
    with checkpoint.stop_signal() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before

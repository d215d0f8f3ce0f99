"""A run's folder: whose it is, what may lie in it, what may change on resume, and what failures leave in it."""

import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import curve, metrics, spawn, wait_for_a_step_after

from sslfast.cli import main
from sslfast.evaluation import plots
from sslfast.methods import moco, simclr, ssgan
from sslfast.training import UserError, checkpoint, data, files, loop
from sslfast.training.logging import RunLog

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding")

TINY = ["--data", "digits", "--batch-size", "350", "--device", "cpu", "--precision", "float32", "--log-every", "1"]
TINY += ["--no-evaluate", "--checkpoint-seconds", "0"]
STEPS = 4  # an epoch
ENCODER = ["--head-hidden", "8", "--head-features", "8"]
METHODS = {
    "simclr": ENCODER,
    "moco": [*ENCODER, "--queue", "700"],
    "ddpm": ["--widths", "8", "--attention", "--patch", "2"],
    "ssgan": ["--latent", "8", "--reports", "0"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of one epoch of simclr."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    assert main(["simclr", *TINY, *ENCODER, "--epochs", "1", "--run", str(run)]) == 0
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of that run, to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    found = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert not any("unfinished" in name for name in found)
    return found


def refused(words: list, capsys, code: int = 1) -> str:
    """What a command says that fails, in a sentence."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    said = capsys.readouterr().err
    assert said.startswith(f"sslfast {words[0]}: ")
    return said


# Whose it is.


def begin(run: Path, number: int, start: float, said: multiprocessing.Queue) -> None:
    while time.time() < start + 0.002 * number:
        pass
    try:
        checkpoint.save_config(run, {"seed": number})
        said.put("began")
    except Exception as error:
        said.put(type(error).__name__)


def test_of_processes_that_begin_a_run_at_once_one_does(tmp_path):
    said: multiprocessing.Queue = multiprocessing.Queue()
    for trial in range(15):
        start = time.time() + 0.1
        run = tmp_path / str(trial)
        processes = [multiprocessing.Process(target=begin, args=(run, i, start, said)) for i in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert sorted(said.get(timeout=5) for _ in processes) == ["UserError", "UserError", "began"]
        assert json.loads((run / "config.json").read_text())["seed"] in range(3)


def test_default_names_are_unique(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len({loop._new_folder("simclr-digits") for _ in range(20)}) == 20


def test_a_second_process_is_refused_and_the_first_one_named(run, capsys):
    child = spawn("simclr", "--resume", str(run), "--epochs", "1000")
    wait_for_a_step_after(run, STEPS + 1, child)
    try:
        said = refused(["simclr", "--resume", run, "--epochs", "2000"], capsys)
        assert f"{run} is being written by process {child.pid} on " in said
        said = refused(["simclr", *TINY, *ENCODER, "--run", run], capsys)
        assert "is being written by" in said
    finally:
        child.kill()
        child.communicate()
    step = checkpoint.load(run)[1]["step"]
    epochs = -(-step // STEPS) + 1
    assert main(["simclr", "--resume", str(run), "--epochs", str(epochs)]) == 0, "the lock ends with its process"
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS * epochs + 1))


def test_a_process_owns_a_run_once_and_lets_go(tmp_path):
    with files.owned(tmp_path), files.owned(tmp_path):
        process = multiprocessing.get_context("spawn").Process(target=own, args=(tmp_path,))
        process.start()
        process.join()
        assert process.exitcode == 3
    process = multiprocessing.get_context("spawn").Process(target=own, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0


def own(folder: Path) -> None:
    try:
        with files.owned(folder):
            pass
    except UserError:
        raise SystemExit(3) from None


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", fails)
    with files.owned(tmp_path):
        assert "start no second process" in capsys.readouterr().out


# What may lie in it.


@pytest.mark.parametrize(
    "name",
    [
        *("metrics.jsonl", "config.json", "config.json.unfinished", "tensorboard", "samples", "evaluation.json"),
        *("checkpoints", "checkpoints/step-00000009", "checkpoints/step-00000004/state.pt", "checkpoints/unfinished"),
    ],
)
@pytest.mark.parametrize("command", ["simclr", "evaluate"])
def test_links_in_a_run_are_refused(run, tmp_path, name, command, capsys):
    outside = tmp_path / "precious"
    path = run / name
    if path.exists():
        path.rename(outside)
    elif name.startswith("checkpoints/") or name in ("samples",):
        outside.mkdir()
        (outside / "file").write_text("precious")
    else:
        outside.write_text("precious")
    path.symlink_to(outside)
    before = content(outside) if outside.is_dir() else outside.read_bytes()
    words = ["simclr", "--resume", run, "--epochs", "2"] if command == "simclr" else ["evaluate", run]
    assert f"{path} is a link" in refused(words, capsys)
    assert (content(outside) if outside.is_dir() else outside.read_bytes()) == before


def test_links_in_the_folder_of_a_new_run_are_refused(tmp_path, capsys):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to(tmp_path / "precious")
    assert "is a link" in refused(["simclr", *TINY, *ENCODER, "--run", tmp_path / "run"], capsys)
    assert (tmp_path / "precious").read_text() == "precious"


def test_pipes_in_a_run_are_refused(run, capsys):
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    assert "metrics.jsonl is neither a file nor a folder" in refused(["evaluate", run], capsys)


def test_a_run_may_be_reached_by_a_link_and_have_copies_by_hard_links(run, tmp_path):
    os.link(run / "metrics.jsonl", tmp_path / "copy.jsonl")
    before = (tmp_path / "copy.jsonl").read_bytes()
    (tmp_path / "link").symlink_to(run)
    assert main(["simclr", "--resume", str(tmp_path / "link"), "--epochs", "2"]) == 0
    assert (tmp_path / "copy.jsonl").read_bytes() == before
    assert len(metrics(run)) == 2 * STEPS


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    files.write_atomically(path, "old")

    def fail() -> None:
        with files.replacing(path) as file:
            file.write(b"half")
            assert path.read_text() == "old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    (tmp_path / "elsewhere").write_text("precious")
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    files.write_atomically(path, "new")
    assert (tmp_path / "elsewhere").read_text() == "precious"
    assert path.read_text() == "new"
    assert not path.is_symlink()


DAMAGED = {
    "empty": b"",
    "cut": b'{"method": "simclr", "epo',
    "binary": bytes(range(256)),
    "null": b"null",
    "list": b"[1, 2]",
    "text": b'"simclr"',
    "deep": b"[" * 100_000,
    "large number": b'{"method": ' + b"9" * 5000 + b"}",
    "no method": b'{"epochs": 3}',
    "unknown method": b'{"method": "os.system"}',
    "a module that is no method": b'{"method": "__init__"}',
    "method of another type": b'{"method": ["simclr"]}',
    "nothing else": b'{"method": "simclr"}',
}


@pytest.mark.parametrize("command", ["simclr", "evaluate", "sample"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_settings_are_a_sentence(damage, command, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(DAMAGED[damage])
    before = content(tmp_path)
    said = refused([command, *(["--resume"] if command == "simclr" else []), tmp_path], capsys)
    if (damage, command) != ("nothing else", "sample"):
        assert "is damaged" in said
    assert len(said.splitlines()) == 1
    assert content(tmp_path) == before


WRONG = {"epochs": ["3", None, 1.5, -1, 2**70], "lr": ["x", [], True, float("nan")], "data": [3, None, ""]}
WRONG |= {"batch_size": [None, 0, [1]], "seed": [-1, "0"], "optimizer": ["adam", 1], "encoder": ["vgg", None]}
WRONG |= {"size": [0, 10**6, "16"], "head_hidden": [10**9, 0], "channels": [0, "1", 10**9], "classes": [None, [1]]}
WRONG |= {"precision": ["auto", "int8"], "evaluate": ["yes"], "device": [0], "workers": [10**9], "corrupt": ["maybe"]}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_settings_of_another_type_or_out_of_range_are_a_sentence(trained, tmp_path, name, value):
    settings = json.loads((trained / "config.json").read_text()) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"config.json is damaged: its {name} must"):
        checkpoint.load_config(tmp_path)


@pytest.mark.parametrize("settings", [{"widths": 8}, {"widths": ["8"]}, {"attention": [-1]}, {"widths": [20]}])
def test_settings_of_several_values_are_checked_too(settings, tmp_path, capsys):
    whole = {"method": "ddpm", "channels": 1, "size": 16, "precision": "float32", "classes": [], "batch_size": 350}
    (tmp_path / "config.json").write_text(json.dumps(whole | settings))
    assert "is damaged" in refused(["sample", tmp_path], capsys)


# What may change when it is resumed.


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """40 PNG files of two classes."""
    folder = tmp_path_factory.mktemp("pictures") / "set"
    random = np.random.default_rng(0)
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for number in range(20):
            picture = random.integers(0, 255, (20, 24, 3), np.uint8)
            Image.fromarray(picture).save(folder / name / f"{number:02d}.png")
    return folder


FILES = ["--batch-size", "4", "--size", "16", "--workers", "0", "--device", "cpu", "--precision", "float32"]
FILES += ["--log-every", "1", "--no-evaluate", *ENCODER]


def test_data_may_lie_elsewhere_now(pictures, tmp_path, monkeypatch, capsys):
    """Begun with a path that means nothing from another folder; then all of it moves to another machine."""
    shutil.copytree(pictures, tmp_path / "data/set")
    monkeypatch.chdir(tmp_path / "data")
    assert main(["simclr", "--data", "set", *FILES, "--epochs", "1", "--run", "../run"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["simclr", "--resume", "run", "--epochs", "2"]) == 0
    assert main(["evaluate", "run", "--map-samples", "20", "--device", "cpu"]) == 0
    (tmp_path / "data").rename(tmp_path / "moved")
    assert "Say --data where it lies now" in refused(["simclr", "--resume", "run", "--epochs", "3"], capsys)
    assert "Say --data where it lies now" in refused(["evaluate", "run"], capsys)
    words = ["--data", "moved/set", "--map-samples", "20", "--device", "cpu"]
    assert main(["evaluate", "run", *words]) == 0
    assert main(["simclr", "--resume", "run", "--epochs", "3", "--data", "moved/set", "--workers", "1"]) == 0
    settings = checkpoint.load_config(Path("run"))
    assert settings["data"] == str(tmp_path / "moved/set")
    assert settings["workers"] == 1
    assert main(["evaluate", "run", *words[2:]]) == 0


def test_other_data_is_noticed(pictures, tmp_path, capsys):
    folder, run = tmp_path / "set", tmp_path / "run"
    shutil.copytree(pictures, folder)
    assert main(["simclr", "--data", str(folder), *FILES, "--epochs", "1", "--run", str(run)]) == 0
    before = content(run)
    commands = (["simclr", "--resume", run, "--epochs", "2"], ["evaluate", run])
    (folder / "a/07.png").rename(folder / "a/7.png")
    for words in commands:
        assert re.search(r"the digest of names and labels was \w+ and is \w+", refused(words, capsys))
    (folder / "a/7.png").rename(folder / "a/07.png")
    for number in range(5):
        shutil.copy(folder / "a/00.png", folder / f"b/more{number}.png")
    for words in commands:
        assert "the number of images was 32 and is 36" in refused(words, capsys)
    assert content(run) == before


def test_other_pixels_of_data_in_memory_are_noticed():
    images = data.load("digits", "train")
    known = loop.identity(images)
    images.source = images.source.clone()
    images.source[700, 0, 3, 3] += 1
    assert loop.identity(images)["digest"] != known["digest"]
    images.source[700, 0, 3, 3] -= 1
    assert loop.identity(images) == known
    images.labels = images.labels.roll(1)
    assert loop.identity(images)["digest"] != known["digest"]


def test_fewer_epochs_than_were_trained_are_refused_and_as_many_told(run, capsys):
    assert main(["simclr", "--resume", str(run), "--epochs", "2"]) == 0
    before = content(run)
    said = refused(["simclr", "--resume", run, "--epochs", "1"], capsys)
    assert f"--epochs 1 is less than {run} has been trained: it is at step 8, in epoch 2" in said
    assert content(run) == before
    assert main(["simclr", "--resume", str(run)]) == 0
    assert f"{run} is trained, all 8 steps: more --epochs would go on" in capsys.readouterr().out


@pytest.mark.parametrize(("position", "kept"), [(10**12, STEPS), (-5, 0), (0, 0), (150, 1)])
def test_metrics_are_cut_at_a_line_and_never_padded(run, position, kept, capsys):
    lines = (run / "metrics.jsonl").read_bytes()
    if position == 150:
        assert lines.find(b"\n") < 150 < len(lines)
    RunLog(run, 10, resume_at=position).close()
    found = (run / "metrics.jsonl").read_bytes()
    assert lines.startswith(found)
    assert found.count(b"\n") == kept
    assert ("is shorter than" in capsys.readouterr().out) == (position in (150, 10**12))


def test_lost_metrics_do_not_stop_a_run(run, tmp_path, capsys):
    (run / "metrics.jsonl").unlink()
    assert main(["simclr", "--resume", str(run), "--epochs", "2"]) == 0
    assert "lines of earlier steps are missing" in capsys.readouterr().out
    assert [line["step"] for line in metrics(run)] == [5, 6, 7, 8]
    lines = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(b"\0" * 100 + b'\n[1]\n{"step": 3}\n\xff\n' + lines)
    plots.loss_curve(run / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").is_file()


def test_two_damaged_checkpoints_stop_a_run_and_nothing_is_lost(run, capsys):
    for path in (run / "checkpoints").rglob("*.safetensors"):
        path.write_bytes(b"damaged")
    before = content(run)
    for words in (["simclr", "--resume", run, "--epochs", "2"], ["evaluate", run]):
        assert "no checkpoint of" in refused(words, capsys)
        assert content(run) == before


def test_a_damaged_checkpoint_is_made_good_from_the_one_before(run, tmp_path):
    assert main(["simclr", "--resume", str(run), "--epochs", "2"]) == 0
    expected = Path(shutil.copytree(run, tmp_path / "expected"))
    (run / "checkpoints/step-00000008/state.pt").write_bytes(b"damaged")
    assert main(["simclr", "--resume", str(run)]) == 0
    assert curve(run) == curve(expected)
    weights, wanted = checkpoint.load(run)[0], checkpoint.load(expected)[0]
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("spoil", ["shape of the state", "key of the state", "step", "random state"])
def test_a_state_that_does_not_fit_counts_as_damaged(run, spoil, capsys):
    weights, state = checkpoint.load(run)
    if spoil == "shape of the state":
        state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(2, 2)
    elif spoil == "key of the state":
        del state["optimizer"]
    elif spoil == "step":
        state["step"] = "four"
    else:
        state["random"] = torch.zeros(3)
    checkpoint.save(run, STEPS, weights, state)
    assert main(["simclr", "--resume", str(run)]) == 0
    said = capsys.readouterr().out
    assert "cannot read the checkpoint" in said
    assert f"at step {STEPS - 1} of {STEPS}" in said


# What failures leave.


@pytest.fixture
def file_limit():
    """Call with a number of bytes that no file may pass: the nearest to a full disk that a test may bring about."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file", ["weights.safetensors", "state.pt", "metrics.jsonl"])
def test_a_full_disk_is_a_sentence_with_the_last_good_checkpoint(run, file, file_limit, capsys):
    last = run / "checkpoints" / f"step-0000000{STEPS}"
    sizes = {path.name: path.stat().st_size for path in last.iterdir()}
    if file == "metrics.jsonl":  # the file that grows with the run
        with (run / file).open("ab") as lines:
            lines.write(b"x" * (3_000_000 - lines.tell() - 1) + b"\n")
        weights, state = checkpoint.load(run)
        checkpoint.save(run, STEPS, weights, state | {"log_position": 3_000_000})
    limit = {"weights.safetensors": 60_000, "metrics.jsonl": 3_000_050}
    limit["state.pt"] = sizes["weights.safetensors"] + 200
    assert sizes["state.pt"] > limit["state.pt"]
    file_limit(limit[file])
    said = refused(["simclr", "--resume", run, "--epochs", "2"], capsys)
    file_limit(-1)
    assert f"The last good checkpoint is {last}: sslfast simclr --resume {run} goes on from there" in said
    assert len(said.splitlines()) == 1
    assert not list((run / "checkpoints").glob("unfinished"))
    assert main(["simclr", "--resume", str(run), "--epochs", "2"]) == 0
    assert checkpoint.load(run)[1]["step"] == 2 * STEPS


def test_a_run_that_cannot_be_begun_leaves_none(tmp_path, file_limit, capsys):
    file_limit(100)
    refused(["simclr", *TINY, *ENCODER, "--run", tmp_path / "run"], capsys)
    file_limit(-1)
    assert not content(tmp_path)
    assert main(["simclr", *TINY, *ENCODER, "--epochs", "1", "--run", str(tmp_path / "run")]) == 0


def test_results_that_do_not_fit_leave_the_old_ones(run, file_limit, capsys):
    (run / "loss.png").write_text("of the last time")
    before = content(run)
    file_limit(100)
    refused(["evaluate", run, "--device", "cpu"], capsys)
    file_limit(-1)
    assert content(run) == before


class NoMemory(torch.nn.Module):
    """In place of NT-Xent: asks for more memory than there is in its third step."""

    def __init__(self, temperature, gather_distributed):
        super().__init__()
        self.calls = 0

    def forward(self, first, second):
        self.calls += 1
        return (first - second).square().mean() + (torch.empty(2**50).sum() if self.calls == 3 else 0)


def test_missing_memory_is_a_sentence_with_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(simclr, "NTXentLoss", NoMemory)
    run = tmp_path / "run"
    said = refused(["simclr", *TINY, *ENCODER, "--epochs", "1", "--run", run], capsys)
    assert f"{run} stopped at step 2: there is not enough memory" in said
    assert f"The last good checkpoint is {run}/checkpoints/step-00000002" in said
    assert len(said.splitlines()) == 1


def test_a_killed_worker_is_a_sentence_with_the_last_good_checkpoint(pictures, tmp_path, monkeypatch, capsys):
    read = data._Files.__getitem__

    def killed(self, row):
        if self.paths[row].name == "11.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, row)

    monkeypatch.setattr(data._Files, "__getitem__", killed)
    words = [*FILES, "--workers", "1", "--checkpoint-seconds", "0", "--run", tmp_path / "run"]
    said = refused(["simclr", "--data", pictures, *words], capsys)
    assert re.search(r"run stopped at step \d: a worker process that reads images was killed", said)
    assert "checkpoint" in said
    assert len(said.splitlines()) == 1


def test_errors_of_the_program_are_not_hidden(tmp_path, monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(simclr.micro_batch, "backward", wrong)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["simclr", *TINY, *ENCODER, "--run", str(tmp_path / "run")])


# Batches that files which cannot be decoded have made smaller.



@pytest.mark.parametrize(
    ("method", "words", "needed"),
    [
        ("simclr", ENCODER, simclr.LEAST),
        ("moco", [*ENCODER, "--version", "3"], moco.LEAST),
        ("moco", [*ENCODER, "--bn-groups", "2", "--queue", "64"], moco.LEAST),
        ("ddpm", METHODS["ddpm"], 1),
        ("ssgan", METHODS["ssgan"], ssgan.LEAST),
        ("ssgan", [*METHODS["ssgan"], "--variant", "ssgan-la"], ssgan.LEAST),
    ],
)
def test_a_batch_may_shrink_to_any_size(pictures, tmp_path, capsys, method, words, needed):
    """Of steps of 6, those that keep 5, 4, 3, 2, 1 images: all finite, and too small ones left out."""
    folder = tmp_path / "set"
    shutil.copytree(pictures, folder)
    images = data.load(str(folder), "train")
    order = data.epoch_order(len(images), 0, 0)[:30].reshape(5, 6)
    for step, rows in enumerate(order):
        for row in rows[: step + 1]:
            images.source[row].write_bytes(b"")
    options = ["--batch-size", "6", "--size", "16", "--workers", "0", "--device", "cpu", "--log-every", "1"]
    options += ["--no-evaluate", "--epochs", "1", "--checkpoint-seconds", "0"]
    assert main([method, "--data", str(folder), *options, *words, "--run", str(tmp_path / "run")]) == 0
    kept = [step + 1 for step in range(5) if 5 - step >= needed]
    assert [line["step"] for line in metrics(tmp_path / "run")] == kept
    assert all(np.isfinite(line["loss"]) for line in metrics(tmp_path / "run"))
    assert checkpoint.load(tmp_path / "run")[1]["step"] == 5
    assert capsys.readouterr().out.count("is left out") == 5 - len(kept)


def test_a_batch_without_any_image_is_left_out(monkeypatch, tmp_path, capsys):
    """The steps after it keep their numbers and images."""
    images = data.Images([Path(str(number)) for number in range(12)], torch.zeros(12, dtype=torch.int64), [])
    seen = []

    def read(images, rows, *_):
        for number, chosen in enumerate(rows):
            ids = torch.from_numpy(chosen)[: 0 if number in (1, 3) else 3]
            yield [torch.zeros(3, 4, 4)] * len(ids), ids

    monkeypatch.setattr(loop.data, "batches", read)
    config = simclr.SimCLR(batch_size=3, epochs=1, run=str(tmp_path / "run"), size=4, precision="float32")
    with loop.Loop("simclr", config, images, torch.nn.Linear(1, 1), {}) as steps:
        for _, _, ids in steps.batches(least=2):
            seen.append((steps.step, ids.tolist()))
            steps.end_step(len(ids), loss=1.0, lr=1.0)
    order = data.epoch_order(12, 0, 0).reshape(4, 3)
    assert seen == [(step, order[step].tolist()) for step in (0, 2)]
    assert steps.step == 4
    assert checkpoint.load(tmp_path / "run")[1]["step"] == 4
    assert capsys.readouterr().out.count("is left out") == 2


def test_an_epoch_without_any_batch_stops(monkeypatch, tmp_path):
    images = data.Images([Path(str(number)) for number in range(12)], torch.zeros(12, dtype=torch.int64), [])
    monkeypatch.setattr(loop.data, "batches", lambda _, rows, *__: (([], torch.zeros(0)) for row in rows))
    config = simclr.SimCLR(batch_size=3, epochs=9, run=str(tmp_path / "run"), size=4, precision="float32")
    with (
        pytest.raises(UserError, match="not one batch of 4 had 2 images that could be decoded"),
        loop.Loop("simclr", config, images, torch.nn.Linear(1, 1), {}) as steps,
    ):
        list(steps.batches(least=2))

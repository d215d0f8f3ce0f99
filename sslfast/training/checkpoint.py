"""Checkpoints that survive a kill at any moment and load without executing code.

A run's folder holds ``checkpoints/step-00001234/``, each with

- ``weights.safetensors``: the model, readable by any tool;
- ``state.pt``: whatever else the loop needs to go on (optimizer, step, random state, …), plain values and tensors only.

A checkpoint is written under another name, flushed to the disk and then renamed, so that a folder called ``step-…``
is always complete. The last two are kept.
"""

import contextlib
import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sslfast.training import UserError


def save(run: Path, step: int, weights: dict[str, Tensor], state: dict) -> Path:
    """Write a checkpoint of ``step`` atomically, drop all but the newest two, and return its folder."""
    folder = run / "checkpoints"
    target = folder / f"step-{step:08d}"
    temporary = folder / "unfinished"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, temporary / "weights.safetensors")
    torch.save(state, temporary / "state.pt")
    for path in (temporary / "weights.safetensors", temporary / "state.pt", temporary):
        _flush_to_disk(path)
    shutil.rmtree(target, ignore_errors=True)  # only after a resume from an older one: the same step, written again
    temporary.rename(target)
    _flush_to_disk(folder)
    for old in _complete(run)[:-2]:
        shutil.rmtree(old)
    return target


def load(run: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict] | None:
    """Return (weights, state) of the newest readable checkpoint of a run, or None if there is none.

    An unreadable checkpoint (a damaged disk: the writer leaves none) is named, and the one before it used.
    """
    for folder in reversed(_complete(run)):
        try:
            weights = safetensors.torch.load_file(folder / "weights.safetensors", device=str(device))
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
            print(f"cannot read the checkpoint {folder} ({error}); trying the one before it")
            continue
        return weights, state
    return None


def newest(run: Path) -> Path | None:
    """Return the folder of a run's newest checkpoint, or None if there is none."""
    return next(reversed(_complete(run)), None)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(path.name + ".unfinished")
    temporary.write_text(text)
    _flush_to_disk(temporary)
    temporary.replace(path)


def save_config(run: Path, config: dict) -> None:
    """Begin a run: make its folder and keep its settings in ``config.json``; refuse a folder that has a run already."""
    if (run / "config.json").exists():
        raise UserError(f"{run} already holds a run: continue it with --resume {run}, or choose another --run")
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / "config.json", json.dumps(config, indent=2) + "\n")


def method_of(args: list[str] | None) -> str | None:
    """Return the method of the run that a command line names (None: that of this process), or None if it names none."""
    words = sys.argv[2:] if args is None else args
    runs = [Path(word) for word in words if (Path(word) / "config.json").is_file()]
    return load_config(runs[0])["method"] if runs else None


def load_config(run: Path) -> dict:
    """Return the settings of a run as they were saved when it began."""
    try:
        return json.loads((run / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{run} holds no run (there is no {run / 'config.json'})") from None


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Within the block, Ctrl-C and SIGTERM only set a flag (the value's truth), for a loop to stop between two steps.

    A second Ctrl-C interrupts at once.
    """
    received: list[int] = []

    def handler(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _complete(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

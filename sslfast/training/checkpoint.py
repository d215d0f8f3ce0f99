"""Checkpoints that survive a kill at any moment and load without executing code.

A run's folder holds ``checkpoints/step-00001234/``, each with

- ``weights.safetensors``: the model, readable by any tool;
- ``state.pt``: whatever else the loop needs to go on (optimizer, step, random state, …), plain values and tensors only;
- ``sha256.txt``: the checksums of both, as `sha256sum --check` reads them.

A checkpoint is written under another name, flushed to the disk and then renamed, and gets another name before it is
removed, so that a folder called ``step-…`` is complete at any moment. The last two are kept.
"""

import contextlib
import hashlib
import importlib
import json
import pkgutil
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import safetensors.torch
import torch
from torch import Tensor, nn

from sslfast.training import UserError, failures, files
from sslfast.training.options import EncoderOptions, at_least, at_most, complaint

WEIGHTS, STATE, SUMS = "weights.safetensors", "state.pt", "sha256.txt"
FACTS: dict[str, Any] = {
    "size": Annotated[int, at_least(1), at_most(4096)],
    "precision": Literal["float32", "bfloat16"],
    "channels": Annotated[int, at_least(1), at_most(4096)],
    "classes": list[str],
}
"""What config.json must hold: options that are not open any more, and what the data decided."""


def save(run: Path, step: int, weights: dict[str, Tensor], state: dict) -> Path:
    """Write a checkpoint of ``step`` atomically, drop all but it and the one before it, and return its folder.

    Where it cannot be written, which `failures.sentence` tells, the older ones stay as they are.
    """
    folder = run / "checkpoints"
    target = folder / f"step-{step:08d}"
    temporary = folder / "unfinished"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, temporary / WEIGHTS)
        torch.save(state, temporary / STATE)
        (temporary / SUMS).write_text("".join(f"{_sum(temporary / name)}  {name}\n" for name in (WEIGHTS, STATE)))
        for path in (temporary / WEIGHTS, temporary / STATE, temporary / SUMS, temporary):
            files.flush_to_disk(path)
        _remove(target)  # there only after a resume from an older one: the same step, written again
        temporary.rename(target)
        files.flush_to_disk(folder)
    except Exception:  # a full disk, above all: make room
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    found = _found(run)
    kept = found[: found.index(target) + 1][-2:]
    for old in found:  # later steps are damaged ones: the run was resumed from an older one
        if old not in kept:
            _remove(old)
    return target


def restore(run: Path, use: Callable[[dict[str, Tensor], dict], None]) -> Path | None:
    """Hand (weights, state) of the newest good checkpoint to ``use``; return its folder, or None if there is none.

    One that is damaged, or that ``use`` cannot take, is named, and the one before it used. Raises UserError if there
    are checkpoints and all of them are damaged: the run does not begin anew over them.
    """
    reasons = []
    for folder in reversed(_found(run)):
        try:
            use(*_read(folder))
            return folder
        except (MemoryError, PermissionError):
            raise
        except Exception as error:  # damaged bytes make libraries raise anything
            if not folder.exists():  # the training went on meanwhile, and has removed it
                return restore(run, use)
            reasons.append(f"{folder} ({failures.line(error)})")
            if len(reasons) < len(_found(run)):
                print(f"cannot read the checkpoint {reasons[-1]}; trying the one before it", flush=True)
    if reasons:
        raise UserError(
            f"no checkpoint of {run} can be read: {', '.join(reasons)}. Nothing was changed. Bring them back from a "
            f"copy, or move {run / 'checkpoints'} away to begin anew"
        )
    return None


def load(run: Path) -> tuple[dict[str, Tensor], dict] | None:
    """Return (weights, state) of the newest good checkpoint of a run, or None if there is none; see `restore`."""
    found: list = []
    restore(run, lambda weights, state: found.extend((weights, state)))
    return (found[0], found[1]) if found else None


def load_weights(run: Path, **parts: nn.Module) -> None:
    """Load from the newest good checkpoint the weights called NAME.… into each module, given as NAME=module.

    Raises UserError if the run has no checkpoint yet, or no good one.
    """

    def use(weights: dict[str, Tensor], _: dict) -> None:
        for name, module in parts.items():
            own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
            module.load_state_dict(own)

    if restore(run, use) is None:
        method = load_config(run)["method"]
        raise UserError(f"{run} has no checkpoint yet: sslfast {method} --resume {run} goes on with the training")


def newest(run: Path) -> Path | None:
    """Return the folder of a run's newest checkpoint, or None if there is none."""
    return next(reversed(_found(run)), None)


def save_config(run: Path, config: dict) -> None:
    """Begin a run: make its folder and keep its settings in ``config.json``; refuse a folder that has a run already."""
    run.mkdir(parents=True, exist_ok=True)
    files.refuse_links(run)
    with files.owned(run):
        if (run / "config.json").exists():
            raise UserError(f"{run} already holds a run: continue it with --resume {run}, or choose another --run")
        files.write_atomically(run / "config.json", json.dumps(config, indent=2) + "\n")


def method_of(args: list[str] | None) -> str | None:
    """Return the method of the run that a command line names (None: that of this process), or None if it names none."""
    words = sys.argv[2:] if args is None else args
    runs = [Path(word) for word in words if (Path(word) / "config.json").is_file()]
    return method_in(runs[0]) if runs else None


def method_in(run: Path) -> str:
    """Return the method of a run, or raise UserError for a folder without one."""
    return _settings(run)["method"]


def load_config(run: Path, method: str | None = None) -> dict[str, Any]:
    """Return the settings of a run, each of the type that it must have, and those that an older version did not know.

    Raises UserError for a folder without a run, or with one of another method than ``method``, and for a file that is
    damaged.
    """
    path, settings = run / "config.json", _settings(run)
    began = settings["method"]
    if method not in (None, began):
        raise UserError(f"{run} is a run of {began}, not of {method}")
    kind = options_of(began)
    assert kind is not None
    settings = {"method": began, **vars(kind()), **settings}
    if issubclass(kind, EncoderOptions):
        settings.setdefault("classes", [])  # which version 0.1 did not keep
    for name, hint in {**get_type_hints(kind, include_extras=True), **FACTS}.items():
        if name not in settings:
            raise UserError(f"{path} is damaged: it does not say {name}")
        if wrong := complaint(settings[name], hint):
            raise UserError(f"{path} is damaged: its {name} {wrong}")
        if get_origin(hint) is tuple:
            settings[name] = tuple(settings[name])  # which JSON made a list
    return settings


def _settings(run: Path) -> dict[str, Any]:
    """Return what config.json says, with a method that there is."""
    path = run / "config.json"
    if not path.is_file():
        raise UserError(f"{run} holds no run (there is no file {path})")
    files.refuse_links(run)
    try:
        settings = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is no JSON ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is damaged: it is no list of settings by name")
    began = settings.get("method")
    if not isinstance(began, str) or options_of(began) is None:
        raise UserError(f"{path} is damaged: its method is {began!r}, which sslfast does not have")
    return settings


def options_of(method: str) -> type | None:
    """Return the options of a method by its name, or None if there is no such method."""
    methods = importlib.import_module("sslfast.methods")
    if method not in {module.name for module in pkgutil.iter_modules(methods.__path__)}:
        return None
    return get_type_hints(importlib.import_module(f"sslfast.methods.{method}").train)["config"]


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


def _found(run: Path) -> list[Path]:
    """The folders of checkpoints, oldest step first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8,18}", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name[5:]))


def _read(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """Return (weights, state) of a checkpoint, or raise whatever shows that it is damaged."""
    if (folder / SUMS).exists():  # version 0.1 wrote none
        wanted = dict(line.split("  ")[::-1] for line in (folder / SUMS).read_text().splitlines())
        for name in (WEIGHTS, STATE):
            if wanted.get(name) != _sum(folder / name):
                raise ValueError(f"the checksum of {name} is wrong")
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} holds no state")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError("its weights are not finite")
    return weights, state


def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _remove(folder: Path) -> None:
    """Remove a checkpoint that may be there: under another name, since this takes a while."""
    outdated = folder.with_name("outdated")
    shutil.rmtree(outdated, ignore_errors=True)
    if folder.exists():
        folder.rename(outdated)
        shutil.rmtree(outdated, ignore_errors=True)

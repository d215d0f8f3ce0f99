"""What is around the steps of every method: its command line, its folder, resuming, logging, checkpoints, stopping."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro
from torch import Tensor, nn

from sslfast.distributed import world_size
from sslfast.training import UserError, checkpoint, data, distributed
from sslfast.training.logging import NoLog, RunLog
from sslfast.training.options import RunOptions, changeable, check, option

Config = TypeVar("Config", bound=RunOptions)


def parse(kind: type[Config], method: str, args: list[str] | None = None) -> Config:
    """Return the settings that a command line asks for; with --resume, those that the run began with.

    Started again by torchrun after the death of a rank, the same command line continues its --run. Raises UserError for
    a setting that cannot change on resume, and for a folder that another method began.
    """
    config: Any = tyro.cli(kind, args=args, prog=f"sslfast {method}")
    if distributed.may_restart() and not (config.run or config.resume):
        raise UserError("torchrun --max-restarts needs --run FOLDER, where a restart finds the checkpoints")
    again = distributed.restarted() and not config.resume
    folder = config.run if again else config.resume
    if not folder or (again and not distributed.on_main((Path(folder) / "config.json").exists)):
        return config
    settings = distributed.on_main(lambda: checkpoint.load_config(Path(folder)))
    if settings["method"] != method:
        began = settings["method"]
        raise UserError(f"{folder} is a run of {began}: sslfast {began} --resume {folder} continues it")
    names = {field.name for field in dataclasses.fields(config)}
    saved = {name: value for name, value in settings.items() if name in names}
    if again:
        return dataclasses.replace(config, **saved | {"resume": folder})
    config = tyro.cli(kind, args=args, prog=f"sslfast {method}", default=dataclasses.replace(config, **saved))
    for name, old in saved.items():
        if name not in changeable(kind) and getattr(config, name) != old:
            raise UserError(f"{option(name)} was {old} when {config.resume} began: it cannot change")
    return config


def begin(config: Any, method: str, **facts: Any) -> Path:
    """Make the folder of a run and keep its settings and ``facts`` in config.json, or continue the one of --resume."""
    return distributed.on_main(lambda: _begin(config, method, **facts))


def _begin(config: Any, method: str, **facts: Any) -> Path:
    if config.resume:
        folder = Path(config.resume)
        settings = checkpoint.load_config(folder) | {"epochs": config.epochs, "lr": config.lr}
        checkpoint.write_atomically(folder / "config.json", json.dumps(settings, indent=2) + "\n")
        return folder
    folder = Path(config.run or f"runs/{method}-{Path(config.data).name}-{datetime.now():%Y%m%d-%H%M%S}")
    checkpoint.save_config(folder, {"method": method, **dataclasses.asdict(config), "run": str(folder), **facts})
    return folder


def start(config: Config, least: int = 1, file_size: int = 224) -> tuple[Config, data.Images]:
    """Check the options, find the training images, and return (config with nothing left open, images).

    Args:
        config: as the command line gave it.
        least: images that a step needs on each rank.
        file_size: --size for image files where none was asked for.

    Raises UserError for options that cannot work. Nothing has been written then.
    """
    check(config)
    if config.batch_size % world_size():
        raise UserError(f"--batch-size {config.batch_size} cannot be dealt evenly to {world_size()} ranks")
    if config.batch_size < least * world_size():
        raise UserError(f"--batch-size {config.batch_size} is too small: each rank needs at least {least} images")
    with distributed.one_rank_first():
        images = data.load_for(vars(config), "train")
    if distributed.is_main():
        print(images.found, flush=True)
    if config.batch_size > len(images):
        raise UserError(f"--batch-size {config.batch_size} is more than the {len(images)} images of {config.data}")
    size = config.size or (images.size if isinstance(images.source, Tensor) else file_size)
    if getattr(config, "encoder", None) == "small" and size % 2:
        raise UserError(f"--size must be even for the small encoder, not {size}")
    precision = best_precision(config.device) if config.precision == "auto" else config.precision
    torch.manual_seed(config.seed)
    return dataclasses.replace(config, size=size, precision=precision), images


def best_precision(device: str) -> Literal["float32", "bfloat16"]:
    """Return "bfloat16" where it speeds up matrix products, else "float32"."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    fast = device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bfloat16" if fast else "float32"


class Loop:
    """The steps of a training, from the last checkpoint on.

    >>> with Loop(folder, config, model, {"optimizer": optimizer}, steps_per_epoch) as loop:
    ...     for epoch, pixels, ids in loop.batches(images):
    ...         …  # one step, in which loop.step is the number of steps before it
    ...         loop.end_step(len(ids), loss=loss, lr=rate)

    Args:
        folder: of the run, as `begin` returned it.
        config: the settings, of which epochs, batch_size, seed, resume, device, workers, corrupt, log_every and
            checkpoint_seconds are used here. batch_size is that of all ranks together.
        model: all that belongs into the checkpoint's weights.safetensors, evaluated or not: parameters and buffers.
        state: by name, what else has a state_dict() that a checkpoint must hold.
        steps_per_epoch: batches in an epoch.

    On Ctrl-C and SIGTERM it saves, says how to go on, and ends `batches` with `stopped` set. Of several ranks, each
    gets its part of every batch, the main one writes, and all stop together.
    """

    def __init__(self, folder: Path, config: Any, model: nn.Module, state: dict[str, Any], steps_per_epoch: int):
        self.folder, self.config, self.model, self.state = folder, config, model, state
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = config.epochs * steps_per_epoch
        self.step, self.stopped = 0, False
        log_position = 0
        if config.resume and (loaded := distributed.on_main(lambda: checkpoint.load(folder))):
            weights, saved = loaded
            model.load_state_dict(weights)
            for name, part in state.items():
                part.load_state_dict(saved[name])
            torch.set_rng_state(saved["random"])
            self.step, log_position = saved["step"], saved["log_position"]
            if distributed.is_main():
                print(f"continuing {folder} at step {self.step} of {self.total_steps}")
        log = RunLog if distributed.is_main() else NoLog
        self.log = log(folder, self.total_steps, first_step=self.step, resume_at=log_position)

    def __enter__(self) -> "Loop":
        self.cleanup = contextlib.ExitStack()
        self.cleanup.enter_context(data.dead_workers_explained())
        self.cleanup.enter_context(contextlib.closing(self.log))
        self.stop_signal = self.cleanup.enter_context(checkpoint.stop_signal())
        self.last_save = time.monotonic()
        return self

    def __exit__(self, *exception) -> None:
        self.cleanup.__exit__(*exception)

    def batches(
        self, images: data.Images, square: int | None = None, least: int = 1
    ) -> Iterator[tuple[int, Tensor | list[Tensor], Tensor]]:
        """Yield (epoch from 0, pixels, ids) for each step that is left, as `data.batches` does: this rank's part.

        A batch that has fewer than ``least`` images on some rank, since the others cannot be decoded, is left out on
        all: the step is counted, and nothing is trained in it. Raises UserError after an epoch of such steps alone.
        """
        config = self.config
        while self.step < self.total_steps:
            epoch = self.step // self.steps_per_epoch
            order = data.epoch_order(len(images), config.seed, epoch)[: self.steps_per_epoch * config.batch_size]
            rows = order.reshape(self.steps_per_epoch, config.batch_size)[self.step % self.steps_per_epoch :]
            own = rows[:, distributed.share(config.batch_size)]
            trained = len(rows) < self.steps_per_epoch  # some steps were made before this run was resumed
            for pixels, ids in data.batches(images, own, config.workers, square, config.corrupt, config.size):
                if not isinstance(images.source, Tensor):
                    fewest = distributed.smallest(len(ids))  # losses need equally many on all ranks
                    pixels, ids = pixels[:fewest], ids[:fewest]
                if len(ids) < least:
                    if not trained and (self.step + 1) % self.steps_per_epoch == 0:
                        raise UserError(
                            f"no batch of epoch {epoch + 1} had {least} images that could be decoded: what was skipped "
                            "is named above"
                        )
                    self.end_step(0)
                else:
                    trained = True
                    yield epoch, pixels, ids
                if self.stopped:
                    return

    def end_step(self, samples: int, **values: float | Tensor) -> None:
        """Count a finished step of so many samples; log ``values``, save a checkpoint and stop where it is time to.

        Of several ranks, each brings its own number of samples; of tensors among the values, the mean over ranks is
        logged. Raises UserError, and leaves the checkpoints as they are, if a value or a weight is not finite then.
        """
        epoch = self.step // self.steps_per_epoch + 1
        self.step += 1
        self.log.progress(samples * world_size())
        last = self.step == self.total_steps
        due = time.monotonic() - self.last_save > self.config.checkpoint_seconds
        self.stopped, due = distributed.any_rank(self.stop_signal(), due)
        save_now = self.stopped or last or due
        log_now = last or self.step % self.config.log_every == 0
        if save_now or log_now:
            numbers = {k: distributed.mean(v).item() if isinstance(v, Tensor) else v for k, v in values.items()}
            finite = all(map(math.isfinite, numbers.values()))
            if not finite or not all(weight.isfinite().all() for weight in self.model.parameters()):
                raise UserError(self.diverged(epoch, numbers))
            if log_now and numbers:
                self.log.scalars(self.step, epoch, **numbers)
        if save_now:
            self.save()
        if self.stopped and distributed.is_main():
            method = checkpoint.load_config(self.folder)["method"]
            self.log.say(
                f"\nstopped at step {self.step} of {self.total_steps}; go on with: "
                f"sslfast {method} --resume {self.folder}"
            )
        elif last:
            self.log.say(f"trained: {self.folder}")

    def diverged(self, epoch: int, numbers: dict[str, float]) -> str:
        """Return what to say when these numbers, or the weights, are not finite."""
        wrong = {name: value for name, value in numbers.items() if not math.isfinite(value)}
        found = ", ".join(f"the {name.replace('_', ' ')} is {value}" for name, value in wrong.items())
        method = checkpoint.load_config(self.folder)["method"]
        last = checkpoint.newest(self.folder)
        text = f"the training diverged: at step {self.step} (epoch {epoch}) {found or 'a weight is not finite'}. Try a "
        text += "lower --lr or --precision float32"
        if last is None:
            return f"{text}; {self.folder} has no checkpoint yet."
        lower = f"sslfast {method} --resume {self.folder} --lr {self.config.lr / 2:g}"
        return f"{text}. The last good checkpoint is {last}; it goes on from there at a lower rate with: {lower}"

    def save(self) -> None:
        """Write a checkpoint of this step."""
        self.last_save = time.monotonic()
        if not distributed.is_main():
            return
        state = {name: part.state_dict() for name, part in self.state.items()}
        state |= {"step": self.step, "log_position": self.log.position(), "random": torch.get_rng_state()}
        checkpoint.save(self.folder, self.step, self.model.state_dict(), state)

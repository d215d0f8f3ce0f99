"""What is around the steps of every method: its command line, its folder, resuming, logging, checkpoints, stopping."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro
from torch import Tensor, nn

from sslfast.distributed import world_size
from sslfast.training import UserError, checkpoint, data, distributed, failures, files
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
    if (began := distributed.on_main(lambda: checkpoint.method_in(Path(folder)))) != method:
        raise UserError(f"{folder} is a run of {began}: sslfast {began} --resume {folder} continues it")
    settings = distributed.on_main(lambda: checkpoint.load_config(Path(folder)))
    saved = {field.name: settings[field.name] for field in dataclasses.fields(config)}
    if again:
        return dataclasses.replace(config, **saved | {"resume": folder})
    config = tyro.cli(kind, args=args, prog=f"sslfast {method}", default=dataclasses.replace(config, **saved))
    for name, old in saved.items():
        if name not in changeable(kind) and getattr(config, name) != old:
            raise UserError(f"{option(name)} was {old} when {config.resume} began: it cannot change")
    return config


def start(config: Config, least: int = 1, file_size: int = 224) -> tuple[Config, data.Images]:
    """Check the options, find the training images, and return (config with nothing left open, images).

    Args:
        config: as the command line gave it.
        least: images that a step needs on each rank.
        file_size: --size for image files where none was asked for.

    Raises UserError for options that cannot work, and for a resumed run whose data is not what it began with. Nothing
    has been written then.
    """
    check(config)
    if config.batch_size % world_size():
        raise UserError(f"--batch-size {config.batch_size} cannot be dealt evenly to {world_size()} ranks")
    if config.batch_size < least * world_size():
        raise UserError(f"--batch-size {config.batch_size} is too small: each rank needs at least {least} images")
    config = dataclasses.replace(config, data=_from_anywhere(config.data), data_dir=_from_anywhere(config.data_dir))
    began = distributed.on_main(lambda: checkpoint.load_config(Path(config.resume)) if config.resume else None)
    with distributed.one_rank_first():  # within, ranks do not talk to each other
        if began:
            images = load_images(began, "train", config.data, config.data_dir)
        else:
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


def load_images(settings: dict[str, Any], split: str, where: str = "", folder: str = "") -> data.Images:
    """Return a split of the data that a run was trained on.

    ``where`` and ``folder``: --data and --data-dir, if they are other than they were. Raises UserError if that is not
    the data that the run began with.
    """
    name = where or settings["data"]
    try:
        images = data.load_for({**settings, "data": name, "data_dir": folder or settings["data_dir"]}, split)
    except UserError as error:
        raise UserError(f"{error}\nThe run was trained on {name}. Say --data where it lies now") from None
    found = identity(images) if split == "train" else {"channels": images.channels}
    for what, value in found.items():
        if settings.get(what, value) != value:  # version 0.1 kept the channels only
            text = {"images": "number of images", "digest": "digest of names and labels"}.get(what, what)
            raise UserError(
                f"--data {name} is not the data that the run began with: the {text} was {settings[what]} and is {value}"
            )
    return images


def identity(images: data.Images) -> dict[str, Any]:
    """Return by what a run knows its training images again: how many, and a digest of the order of names and labels.

    Names of files are those below the folder that has them all; images in memory count with their pixels.
    """
    digest = hashlib.sha256(images.labels.numpy().tobytes())
    if isinstance(images.source, Tensor):
        digest.update(repr(tuple(images.source.shape)).encode() + images.source.contiguous().numpy().tobytes())
    else:
        names = [str(path) for path in images.source]
        top = os.path.commonpath([os.path.dirname(min(names)), os.path.dirname(max(names))])  # what all begin with
        digest.update(b"\0".join(os.fsencode(name[len(top) :]) for name in names))
    return {"channels": images.channels, "images": len(images), "digest": digest.hexdigest()[:16]}


def _from_anywhere(path: str) -> str:
    """Return a path so that it means the same from another folder; the names of known data sets stay as they are."""
    return path if path in data.KNOWN or path.startswith("~") else os.path.abspath(path)


@contextlib.contextmanager
def rehearsal(config: RunOptions, images: data.Images, model: nn.Module) -> Iterator[Tensor]:
    """For a try of augmentation and network before anything is written, with the model in evaluation mode.

    Gives uint8 images (2, C, H, W) to put through both: the first two of data in memory, or blank ones. An error in the
    block becomes a UserError: a size that this encoder cannot take, say.
    """
    blank = torch.zeros(2, images.channels, config.size, config.size, dtype=torch.uint8)
    model.eval()
    try:
        with torch.no_grad():
            yield images.source[:2] if isinstance(images.source, Tensor) else blank
    except (ValueError, RuntimeError) as error:
        wrong = f"--size {config.size} does not work with these options: {failures.line(error)}"
        raise UserError(failures.sentence(error) or wrong) from None
    model.train()


def best_precision(device: str) -> Literal["float32", "bfloat16"]:
    """Return "bfloat16" where it speeds up matrix products, else "float32"."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    fast = device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bfloat16" if fast else "float32"


class Loop:
    """The steps of a training, from the last checkpoint on.

    >>> with Loop("simclr", config, images, model, {"optimizer": optimizer}) as loop:
    ...     for epoch, pixels, ids in loop.batches():
    ...         …  # one step, in which loop.step is the number of steps before it
    ...         loop.end_step(len(ids), loss=loss, lr=rate)
    >>> return loop.result

    It makes the run's folder, or continues the one of --resume, and owns it until the end of the block. So networks and
    options that cannot work must have failed before.

    Args:
        method: the name of the method.
        config: the settings, as `start` returned them. batch_size is that of all ranks together.
        images: the training images, as `start` returned them.
        model: all that belongs into the checkpoint's weights.safetensors, evaluated or not: parameters and buffers.
        state: by name, what else has a state_dict() that a checkpoint must hold.

    On Ctrl-C and SIGTERM it saves, says how to go on, and ends `batches` with `stopped` set. Of several ranks, each
    gets its part of every batch, the main one writes, and all stop together.
    """

    def __init__(self, method: str, config: RunOptions, images: data.Images, model: nn.Module, state: dict[str, Any]):
        self.method, self.config, self.images, self.model, self.state = method, config, images, model, state
        self.steps_per_epoch = len(images) // config.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        self.step, self.stopped, self.skipped = 0, False, 0
        with contextlib.ExitStack() as stack:
            self.folder = distributed.on_main(lambda: self._begin(stack))
            log_position = self._restore() if config.resume else 0
            if config.resume:
                distributed.on_main(self._keep_settings)
            log = RunLog if distributed.is_main() else NoLog
            self.log = log(self.folder, self.total_steps, first_step=self.step, resume_at=log_position)
            stack.enter_context(contextlib.closing(self.log))
            self.cleanup = stack.pop_all()

    @property
    def result(self) -> Path | None:
        """The run's folder, or None if the person stopped the training."""
        return None if self.stopped else self.folder

    def _begin(self, stack: contextlib.ExitStack) -> Path:
        """Make the folder of the run, or find that of --resume, and own it."""
        config = self.config
        if config.resume:
            folder = Path(config.resume)
            files.refuse_links(folder)
            stack.enter_context(files.owned(folder))
            files.sweep(folder)
            return folder
        folder = Path(config.run) if config.run else _new_folder(f"{self.method}-{Path(config.data).name}")
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(files.owned(folder))
        facts = {"classes": self.images.classes, **identity(self.images)}
        settings = {"method": self.method, **dataclasses.asdict(config), "run": str(folder), **facts}
        checkpoint.save_config(folder, settings)
        return folder

    def _restore(self) -> int:
        """Take up the newest good checkpoint, if there is one, and return where the metrics of that step end."""
        found: list = []

        def use(weights: dict[str, Tensor], saved: dict) -> None:
            self.model.load_state_dict(weights)
            for name, part in self.state.items():
                part.load_state_dict(saved[name])
                _check_shapes(part)
            torch.set_rng_state(saved["random"])
            if not (type(saved["step"]) is type(saved["log_position"]) is int and saved["step"] >= 0):
                raise ValueError("its step is no number")
            found[:] = [weights, saved]

        distributed.on_main(lambda: checkpoint.restore(self.folder, use))
        loaded = distributed.on_main(lambda: found)
        if loaded and not distributed.is_main():
            use(*loaded)
        self.step = loaded[1]["step"] if loaded else 0
        if self.step > self.total_steps:
            trained = -(-self.step // self.steps_per_epoch)
            raise UserError(
                f"--epochs {self.config.epochs} is less than {self.folder} has been trained: it is at step "
                f"{self.step}, in epoch {trained}"
            )
        if distributed.is_main() and self.step == self.total_steps:
            print(f"{self.folder} is trained, all {self.step} steps: more --epochs would go on", flush=True)
        elif distributed.is_main() and loaded:
            print(f"continuing {self.folder} at step {self.step} of {self.total_steps}", flush=True)
        return loaded[1]["log_position"] if loaded else 0

    def _keep_settings(self) -> None:
        """Write what a resumed run was told anew, and by what it knows its data, into config.json."""
        names = changeable(type(self.config)) - {"run", "resume"}
        settings = checkpoint.load_config(self.folder) | identity(self.images)
        settings |= {name: getattr(self.config, name) for name in names}
        files.write_atomically(self.folder / "config.json", json.dumps(settings, indent=2) + "\n")

    def __enter__(self) -> "Loop":
        self.stop_signal = self.cleanup.enter_context(checkpoint.stop_signal())
        self.last_save = time.monotonic()
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.cleanup.close()
        except OSError as closing:
            error = error or closing
        said = failures.sentence(error) if error is not None else None
        if said and not isinstance(error, UserError):
            raise UserError(f"{self.folder} stopped at step {self.step}: {said}. {self.how_to_go_on()}") from error

    def batches(self, square: int | None = None, least: int = 1) -> Iterator[tuple[int, Tensor | list[Tensor], Tensor]]:
        """Yield (epoch from 0, pixels, ids) for each step that is left, as `data.batches` does: this rank's part.

        Image files that cannot be decoded make a batch smaller. Losses need equally many images on all ranks, so each
        gets as many as the rank with the fewest; a step with fewer than ``least`` is counted, and nothing is trained in
        it. Raises UserError when an epoch's steps in a row are such.
        """
        config, images = self.config, self.images
        while self.step < self.total_steps and not self.stopped:
            epoch = self.step // self.steps_per_epoch
            order = data.epoch_order(len(images), config.seed, epoch)[: self.steps_per_epoch * config.batch_size]
            rows = order.reshape(self.steps_per_epoch, config.batch_size)[self.step % self.steps_per_epoch :]
            own = rows[:, distributed.share(config.batch_size)]
            reading = data.batches(images, own, config.workers, square, config.corrupt, config.size)
            self.cleanup.callback(reading.close)
            for pixels, ids in reading:
                if not isinstance(images.source, Tensor):
                    fewest = distributed.smallest(len(ids))
                    pixels, ids = pixels[:fewest], ids[:fewest]
                if len(ids) < least:
                    self._leave_out(len(ids), least)
                else:
                    self.skipped = 0
                    yield epoch, pixels, ids
                if self.stopped:
                    return

    def _leave_out(self, found: int, least: int) -> None:
        """Count a step of which only ``found`` images could be decoded."""
        self.skipped += 1
        if self.skipped == self.steps_per_epoch:
            raise UserError(f"not one batch of {self.skipped} had {least} images that could be decoded")
        self.log.say(f"step {self.step + 1} is left out: it has {found} images that could be decoded")
        self.end_step(0)

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
        log_now = bool(values) and (last or self.step % self.config.log_every == 0)
        if save_now or log_now:
            numbers = {k: distributed.mean(v).item() if isinstance(v, Tensor) else v for k, v in values.items()}
            finite = all(map(math.isfinite, numbers.values()))
            if not finite or not all(weight.isfinite().all() for weight in self.model.parameters()):
                raise UserError(self.diverged(epoch, numbers))
            if log_now:
                self.log.scalars(self.step, epoch, **numbers)
        if save_now:
            self.save()
        if self.stopped and distributed.is_main():
            self.log.say(
                f"\nstopped at step {self.step} of {self.total_steps}; go on with: "
                f"sslfast {self.method} --resume {self.folder}"
            )
        elif last:
            self.log.say(f"trained: {self.folder}")

    def how_to_go_on(self) -> str:
        """Return the sentence that names the last good checkpoint."""
        last = checkpoint.newest(self.folder)
        if last is None:
            return f"{self.folder} has no checkpoint yet: sslfast {self.method} --resume {self.folder} begins again"
        return f"The last good checkpoint is {last}: sslfast {self.method} --resume {self.folder} goes on from there"

    def diverged(self, epoch: int, numbers: dict[str, float]) -> str:
        """Return what to say when these numbers, or the weights, are not finite."""
        wrong = {name: value for name, value in numbers.items() if not math.isfinite(value)}
        found = ", ".join(f"the {name.replace('_', ' ')} is {value}" for name, value in wrong.items())
        last = checkpoint.newest(self.folder)
        text = f"the training diverged: at step {self.step} (epoch {epoch}) {found or 'a weight is not finite'}. Try a "
        text += "lower --lr or --precision float32"
        if last is None:
            return f"{text}; {self.folder} has no checkpoint yet."
        lower = f"sslfast {self.method} --resume {self.folder} --lr {self.config.lr / 2:g}"
        return f"{text}. The last good checkpoint is {last}; it goes on from there at a lower rate with: {lower}"

    def save(self) -> None:
        """Write a checkpoint of this step."""
        self.last_save = time.monotonic()
        if not distributed.is_main():
            return
        state = {name: part.state_dict() for name, part in self.state.items()}
        state |= {"step": self.step, "log_position": self.log.position(), "random": torch.get_rng_state()}
        checkpoint.save(self.folder, self.step, self.model.state_dict(), state)


def _new_folder(name: str) -> Path:
    """Make a folder that nobody else has, runs/NAME-DATE-TIME, with a number behind it where the second is taken."""
    first = f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            folder = Path(first if number == 1 else f"{first}-{number}")
            folder.mkdir(parents=True)
            return folder
    raise AssertionError


def _check_shapes(part: Any) -> None:
    """Raise ValueError if what an optimizer remembers of a weight has another shape than the weight."""
    for weight, remembered in getattr(part, "state", {}).items():
        for value in remembered.values():
            if isinstance(value, Tensor) and value.dim() and value.shape != weight.shape:
                raise ValueError("its optimizer belongs to weights of other shapes")

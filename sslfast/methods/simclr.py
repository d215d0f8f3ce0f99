"""SimCLR: learn an encoder from unlabelled images (Chen et al., arXiv 2002.05709; v2: arXiv 2006.10029).

Every image of a batch is augmented twice. The encoder and a small projection head turn the 2N views into vectors, and
the NT-Xent loss asks each to be most similar to the other view of its own image among all 2N - 1 others. Afterwards the
head is thrown away, and the encoder's features are what was learnt.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections import OrderedDict
from datetime import datetime
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn

from sslfast.losses import NTXentLoss
from sslfast.models import EncoderName, build_encoder, projection_head
from sslfast.training import UserError, checkpoint, data, optimizers
from sslfast.training.logging import RunLog
from sslfast.transforms import SimCLRTransform


@dataclasses.dataclass
class SimCLR:
    """Train an encoder on unlabelled images with SimCLR, then evaluate it.

    Writes a folder: metrics.jsonl, TensorBoard events, checkpoints, and at the end accuracies and pictures.

    Example: sslfast simclr --data fashion-mnist --epochs 10
    """

    data: str = "digits"
    """What to train on: digits (comes with scikit-learn), fashion-mnist, cifar10, or a directory with images
    (train/CLASS/*.jpg and test/CLASS/*.jpg, or CLASS/*.jpg) or with MNIST's four idx files."""
    data_dir: str = "~/.cache/sslfast"
    """Where downloaded data sets are kept."""
    run: str = ""
    """The folder to write; by default runs/simclr-DATA-DATE-TIME."""
    resume: str = ""
    """Continue the run in this folder with its own settings. Of these, --epochs, --device, --workers, --corrupt,
    --log-every, --checkpoint-seconds and --evaluate may be changed."""

    epochs: int = 5
    """How often each image is seen."""
    batch_size: int = 512
    """Images a step; each gives two views."""
    lr: float = 0.3
    """Learning rate at a batch of 256; it is multiplied by batch_size / 256."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    """SGD with momentum, or LARS (for batches of thousands; try --lr 0.3 --weight-decay 1e-6)."""
    momentum: float = 0.9
    """Momentum of either optimizer."""
    weight_decay: float = 1e-4
    """Weight decay of matrices and filters; biases and normalisation have none."""
    warmup_epochs: float = 0.5
    """Epochs in which the learning rate rises from 0; afterwards it falls along half a cosine."""
    temperature: float = 0.2
    """Temperature of the NT-Xent loss."""

    encoder: EncoderName = "small"
    """small: a few convolutions, made for 16 to 64 pixels on a CPU. resnet*-cifar: with a stem for 32 pixels."""
    head_layers: int = 2
    """Layers of the projection head: 2 as in SimCLR, 3 as in SimCLR v2."""
    head_hidden: int = 512
    """Width of the projection head's hidden layers."""
    head_features: int = 128
    """Width of the vectors that the loss compares."""

    size: int = 0
    """Height and width of the views in pixels; 0: as the data (28 or 32), 224 for image files."""
    crop_scale: float = 0.2
    """Smallest area of a random crop, as a part of the image; the largest is 1."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    color: float = 0.5
    """Strength of colour jitter: 1 for photographs, 0.5 for CIFAR-10, 0 for none."""
    blur: float = 0.0
    """Probability of Gaussian blur: 0.5 for photographs, 0 for images of 32 pixels."""

    seed: int = 0
    """Seed of everything random: weights, order and augmentation."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train: cpu, cuda, cuda:1, …"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of encoder and head; auto: bfloat16 where the hardware multiplies matrices in it."""
    compile: bool = False
    """Compile the model with torch.compile: a minute at the start, faster steps."""
    workers: int = 2
    """Processes that decode image files; data sets in memory need none."""
    corrupt: Literal["skip", "stop"] = "skip"
    """What to do when an image file cannot be decoded: name it and go on, or stop."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints."""
    evaluate: bool = True
    """Evaluate the encoder when it is trained, as `sslfast evaluate RUN` does."""


MAY_CHANGE_ON_RESUME = {"resume", "run", "device", "epochs", "workers", "corrupt"}
MAY_CHANGE_ON_RESUME |= {"log_every", "checkpoint_seconds", "evaluate"}


def main(args: list[str] | None = None) -> None:
    """The command `sslfast simclr`."""
    config = tyro.cli(SimCLR, args=args, prog="sslfast simclr")
    if config.resume:
        settings = checkpoint.load_config(Path(config.resume))
        saved = {field.name: settings[field.name] for field in dataclasses.fields(SimCLR)}
        config = tyro.cli(SimCLR, args=args, prog="sslfast simclr", default=SimCLR(**saved))
        for name, old in saved.items():
            if name not in MAY_CHANGE_ON_RESUME and getattr(config, name) != old:
                raise UserError(f"--{name.replace('_', '-')} was {old} when {config.resume} began: it cannot change")
    run = train(config)
    if run is None:
        raise SystemExit(130)  # as a shell reports a process that was interrupted
    if config.evaluate:
        from sslfast.evaluation import evaluate

        evaluate.evaluate(run)


def train(config: SimCLR) -> Path | None:
    """Train as ``config`` says and return the run's folder, or None if the person stopped it."""
    check(config)
    images = data.load(config.data, "train", config.data_dir)
    steps_per_epoch = len(images) // config.batch_size
    if steps_per_epoch == 0:
        raise UserError(f"--batch-size {config.batch_size} is more than the {len(images)} images of {config.data}")
    total_steps = config.epochs * steps_per_epoch
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    top_rate = config.lr * config.batch_size / 256

    if config.resume:
        run = Path(config.resume)
        settings = checkpoint.load_config(run) | {"epochs": config.epochs}
        checkpoint.write_atomically(run / "config.json", json.dumps(settings, indent=2) + "\n")
    else:
        config = dataclasses.replace(
            config,
            run=config.run or f"runs/simclr-{Path(config.data).name}-{datetime.now():%Y%m%d-%H%M%S}",
            size=config.size or images.size,
            precision=best_precision(config.device) if config.precision == "auto" else config.precision,
        )
        run = Path(config.run)
        checkpoint.save_config(run, {"method": "simclr", **dataclasses.asdict(config), "channels": images.channels})

    torch.manual_seed(config.seed)
    device = torch.device(config.device)
    encoder, features = build_encoder(config.encoder, images.channels)
    head = projection_head(features, config.head_hidden, config.head_features, config.head_layers)
    model = nn.Sequential(OrderedDict(encoder=encoder, head=head)).to(device).to(memory_format=torch.channels_last)
    forward = torch.compile(model) if config.compile else model
    transform = SimCLRTransform(
        config.size,
        strength=config.color,
        blur_p=config.blur,
        scale=(config.crop_scale, 1.0),
        flip_p=config.flip,
        mean=[0.5] * images.channels,
        std=[0.5] * images.channels,
        memory_format=torch.channels_last,
        seed=config.seed,
    )
    criterion = NTXentLoss(config.temperature)
    groups = optimizers.parameter_groups(model, config.weight_decay)
    optimizer: torch.optim.Optimizer
    if config.optimizer == "lars":
        optimizer = optimizers.LARS(groups, lr=config.lr, momentum=config.momentum)
    else:
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)

    step, log_position = 0, 0
    if config.resume and (loaded := checkpoint.load(run, device)):
        weights, state = loaded
        model.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        step, log_position = state["step"], state["log_position"]
        print(f"continuing {run} at step {step} of {total_steps}")

    log = RunLog(run, total_steps, first_step=step, resume_at=log_position)

    def save() -> None:
        state = {
            "step": step,
            "log_position": log.position(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        checkpoint.save(run, step, model.state_dict(), state)

    model.train()
    last_save = time.monotonic()
    with contextlib.closing(log), checkpoint.stop_signal() as stop:
        while step < total_steps:
            epoch = step // steps_per_epoch
            order = data.epoch_order(len(images), config.seed, epoch)[: steps_per_epoch * config.batch_size]
            rows = order.reshape(steps_per_epoch, config.batch_size)[step % steps_per_epoch :]
            for pixels, ids in data.batches(images, rows, config.workers, corrupt=config.corrupt):
                views = torch.cat(transform(pixels, ids, epoch)).to(device)
                rate = top_rate * optimizers.warmup_cosine(step, total_steps, warmup_steps)
                optimizers.set_learning_rate(optimizer, rate)

                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                    vectors = forward(views)
                loss = criterion(*vectors.float().chunk(2))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1

                log.progress(len(ids))
                stopping = stop()
                save_now = stopping or step == total_steps or time.monotonic() - last_save > config.checkpoint_seconds
                log_now = step % config.log_every == 0 or step == total_steps
                if save_now or log_now:
                    value = loss.item()
                    if not math.isfinite(value) or not all(weight.isfinite().all() for weight in model.parameters()):
                        raise UserError(
                            f"the training diverged: at step {step} (epoch {epoch + 1}) the loss is {value}. Try a "
                            f"lower --lr, a higher --temperature or --precision float32. {run} keeps the last good "
                            "checkpoint."
                        )
                    if log_now:
                        log.scalars(step, epoch + 1, loss=value, lr=rate)
                if save_now:
                    save()
                    last_save = time.monotonic()
                if stopping:
                    log.say(f"\nstopped at step {step} of {total_steps}; go on with: sslfast simclr --resume {run}")
                    return None
    print(f"trained: {run}")
    return run


def check(config: SimCLR) -> None:
    """Raise UserError for settings that cannot work, before anything is read or written."""
    ranges = {
        "more than 0": (
            ("epochs", "batch_size", "lr", "temperature", "head_layers", "crop_scale", "log_every"),
            1e-9,
            1e9,
        ),
        "at least 0": (("momentum", "weight_decay", "warmup_epochs", "color", "workers", "size"), 0, 1e9),
        "at most 1": (("crop_scale", "flip", "blur"), 0, 1),
    }
    for wanted, (names, least, most) in ranges.items():
        for name in names:
            if not least <= getattr(config, name) <= most:
                raise UserError(f"--{name.replace('_', '-')} must be {wanted}, not {getattr(config, name)}")
    if config.encoder == "small" and config.size % 2:
        raise UserError(f"--size must be even for the small encoder, not {config.size}")
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {config.device} cannot be used: {str(error).splitlines()[0]}") from None


def best_precision(device: str) -> Literal["float32", "bfloat16"]:
    """Return "bfloat16" where it speeds up matrix products, else "float32"."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    fast = device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bfloat16" if fast else "float32"

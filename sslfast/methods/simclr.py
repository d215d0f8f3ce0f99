"""SimCLR: learn an encoder from unlabelled images (Chen et al., arXiv 2002.05709; v2: arXiv 2006.10029).

Every image of a batch is augmented twice. The encoder and a small projection head turn the 2N views into vectors, and
the NT-Xent loss asks each to be most similar to the other view of its own image among all 2N - 1 others. Afterwards the
head is thrown away, and the encoder's features are what was learnt.
"""

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sslfast.losses import NTXentLoss
from sslfast.models import EncoderName, build_encoder, projection_head
from sslfast.training import UserError, data, distributed, micro_batch, optimizers
from sslfast.training.loop import Loop, begin, best_precision, check, parse
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
    """Continue the run in this folder with its own settings. Of these, --epochs, --lr, --device, --workers,
    --corrupt, --log-every, --checkpoint-seconds and --evaluate may be changed."""

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
    micro_batch: int = 0
    """Encode so many images of a batch at a time: the loss is still that of the whole batch, the memory that of a
    slice, and BatchNorm sees slices. A step costs one more forward pass. 0: the whole batch at once."""
    sync_batchnorm: bool = False
    """Under torchrun: BatchNorm sees the batch of all ranks instead of each rank its own part."""
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


def main(args: list[str] | None = None) -> None:
    """The command `sslfast simclr`."""
    with distributed.session():
        config = parse(SimCLR, "simclr", args)
        run = train(config)
        main_rank = distributed.is_main()
    if run is None:
        raise SystemExit(130)  # as a shell reports a process that was interrupted
    if config.evaluate and main_rank:
        from sslfast.evaluation import evaluate

        evaluate.evaluate(run)


def train(config: SimCLR) -> Path | None:
    """Train as ``config`` says and return the run's folder, or None if the person stopped it."""
    positive = ("epochs", "batch_size", "lr", "temperature", "head_layers", "crop_scale", "log_every")
    not_negative = (
        "momentum",
        "weight_decay",
        "warmup_epochs",
        "color",
        "flip",
        "blur",
        "workers",
        "size",
        "micro_batch",
    )
    check(config, positive, not_negative, at_most_1=("crop_scale", "flip", "blur"))
    if config.encoder == "small" and config.size % 2:
        raise UserError(f"--size must be even for the small encoder, not {config.size}")
    with distributed.one_rank_first():
        images = data.load(config.data, "train", config.data_dir)
    steps_per_epoch = len(images) // config.batch_size
    if steps_per_epoch == 0:
        raise UserError(f"--batch-size {config.batch_size} is more than the {len(images)} images of {config.data}")
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    top_rate = config.lr * config.batch_size / 256
    precision = best_precision(config.device) if config.precision == "auto" else config.precision
    config = dataclasses.replace(config, size=config.size or images.size, precision=precision)
    run = begin(config, "simclr", channels=images.channels)

    torch.manual_seed(config.seed)
    device = distributed.local_device(config.device)
    encoder, features = build_encoder(config.encoder, images.channels)
    head = projection_head(features, config.head_hidden, config.head_features, config.head_layers)
    model = nn.Sequential(OrderedDict(encoder=encoder, head=head)).to(device).to(memory_format=torch.channels_last)
    wrapped = distributed.wrap(model, config.sync_batchnorm)
    forward = torch.compile(wrapped) if config.compile else wrapped
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
    criterion = NTXentLoss(config.temperature, gather_distributed=True)
    optimizer = optimizers.build(config.optimizer, model, config.lr, config.momentum, config.weight_decay)

    def encode(views: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            return forward(views).float()

    def loss_of(slices: list[Tensor]) -> Tensor:
        first, second = zip(*(vectors.chunk(2) for vectors in slices), strict=True)
        return criterion(torch.cat(first), torch.cat(second))

    slice_size = config.micro_batch or config.batch_size
    with Loop(run, config, model, {"optimizer": optimizer}, steps_per_epoch) as loop:
        for epoch, pixels, ids in loop.batches(images):
            views = [view.split(slice_size) for view in transform(pixels, ids, epoch)]
            slices = [torch.cat(pair).to(device) for pair in zip(*views, strict=True)]
            rate = top_rate * optimizers.warmup_cosine(loop.step, loop.total_steps, warmup_steps)
            optimizers.set_learning_rate(optimizer, rate)

            optimizer.zero_grad()
            loss = micro_batch.backward(wrapped, encode, slices, loss_of)
            optimizer.step()
            loop.end_step(len(ids), loss=loss, lr=rate)
    return None if loop.stopped else run

"""SimCLR: learn an encoder from unlabelled images (Chen et al., arXiv 2002.05709; v2: arXiv 2006.10029).

Every image of a batch is augmented twice. The encoder and a small projection head turn the 2N views into vectors, and
the NT-Xent loss asks each to be most similar to the other view of its own image among all 2N - 1 others. Afterwards the
head is thrown away, and the encoder's features are what was learnt.
"""

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from sslfast.losses import NTXentLoss
from sslfast.models import build_encoder, projection_head
from sslfast.training import distributed, micro_batch, optimizers
from sslfast.training.loop import Loop, parse, rehearsal, start
from sslfast.training.options import (
    Depth,
    EncoderOptions,
    LearningRate,
    NotNegative,
    Share,
    Temperature,
    Whole,
    at_most,
)
from sslfast.transforms import SimCLRTransform

LEAST = 2  # images of a step: one has no negatives


@dataclasses.dataclass(kw_only=True)
class SimCLR(EncoderOptions):
    """Train an encoder on unlabelled images with SimCLR, then evaluate it.

    Writes a folder: metrics.jsonl, TensorBoard events, checkpoints, and at the end accuracies and pictures.

    Example: sslfast simclr --data fashion-mnist --epochs 10
    """

    lr: LearningRate = 0.3
    temperature: Temperature = 0.2
    """Temperature of the NT-Xent loss."""
    head_layers: Depth = 2
    """Layers of the projection head: 2 as in SimCLR, 3 as in SimCLR v2."""
    color: Annotated[NotNegative, at_most(2.5)] = 0.5
    """Strength of colour jitter: 1 for photographs, 0.5 for CIFAR-10, 0 for none."""
    blur: Share = 0.0
    """Probability of Gaussian blur: 0.5 for photographs, 0 for images of 32 pixels."""
    micro_batch: Whole = 0
    """Encode so many images of a batch at a time: the loss is still that of the whole batch, the memory that of a
    slice, and BatchNorm sees slices. A step costs one more forward pass. 0: the whole batch at once."""


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
    config, images = start(config, LEAST)
    device = distributed.local_device(config.device)
    encoder, features = build_encoder(config.encoder, images.channels)
    head = projection_head(features, config.head_hidden, config.head_features, config.head_layers)
    model = nn.Sequential(OrderedDict(encoder=encoder, head=head)).to(device).to(memory_format=torch.channels_last)
    wrapped = distributed.wrap(model, config.sync_batchnorm)
    forward = torch.compile(wrapped) if config.compile else wrapped
    with rehearsal(config, images, model) as some:
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
        model(transform(some, torch.arange(2), 0)[0].to(device))
    criterion = NTXentLoss(config.temperature, gather_distributed=True)
    optimizer = optimizers.build(config.optimizer, model, config.lr, config.momentum, config.weight_decay)

    def encode(views: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            return forward(views).float()

    def loss_of(slices: list[Tensor]) -> Tensor:
        first, second = zip(*(vectors.chunk(2) for vectors in slices), strict=True)
        return criterion(torch.cat(first), torch.cat(second))

    slice_size = config.micro_batch or config.batch_size
    top_rate = config.lr * config.batch_size / 256
    with Loop("simclr", config, images, model, {"optimizer": optimizer}) as loop:
        warmup_steps = round(config.warmup_epochs * loop.steps_per_epoch)
        for epoch, pixels, ids in loop.batches(least=LEAST):
            views = [view.split(slice_size) for view in transform(pixels, ids, epoch)]
            slices = [torch.cat(pair).to(device) for pair in zip(*views, strict=True)]
            rate = top_rate * optimizers.warmup_cosine(loop.step, loop.total_steps, warmup_steps)
            optimizers.set_learning_rate(optimizer, rate)

            optimizer.zero_grad()
            loss = micro_batch.backward(wrapped, encode, slices, loss_of)
            optimizer.step()
            loop.end_step(len(ids), loss=loss, lr=rate)
    return loop.result

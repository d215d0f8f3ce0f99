"""DDPM: learn to draw images by learning to remove noise from them (Ho et al., arXiv 2006.11239).

Each image of a batch is mixed with noise, more or less of it according to a random timestep, and a U-Net is asked what
the noise was (or the image, or the velocity between the two: --prediction). Who can take a little noise off any image
can begin with nothing but noise and take it off little by little: `sslfast sample RUN`, by averaged weights. What the
network knows about images on the way, a linear probe can read: `sslfast evaluate RUN`.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslfast.evaluation.sampling import build_unet, noise_shape
from sslfast.ops import diffusion_loss, q_sample
from sslfast.schedulers import DDPMScheduler
from sslfast.training import UserError, distributed, optimizers
from sslfast.training.average import update_average
from sslfast.training.loop import Loop, parse, rehearsal, start
from sslfast.training.options import (
    MAY_CHANGE,
    Count,
    Depth,
    Epochs,
    LearningRate,
    NotNegative,
    Pixels,
    Positive,
    RunOptions,
    Share,
    Whole,
    Width,
    at_least,
    at_most,
)


@dataclasses.dataclass(kw_only=True)
class DDPM(RunOptions):
    """Train a diffusion model on images, then judge what it draws.

    Writes a folder: metrics.jsonl, TensorBoard events, checkpoints, and at the end figures and pictures.

    Example: sslfast ddpm --data fashion-mnist
    """

    epochs: Annotated[Count, MAY_CHANGE] = 3
    batch_size: Count = 64
    lr: LearningRate = 1e-3
    """Learning rate of AdamW. It rises from 0 at first and then stays: the averaged weights need no decay."""
    weight_decay: NotNegative = 0.01
    """Weight decay of matrices and filters; biases and normalisation have none."""
    warmup_epochs: Epochs = 0.5
    """Epochs in which the learning rate rises."""
    clip: Positive = 1.0
    """Longest gradient that a step may follow; longer ones are shortened to it."""
    average: Share = 0.999
    """How much of the moving average of the weights stays in each step (less at first: (1 + step) / (10 + step))."""

    widths: tuple[Width, ...] = (64, 64, 64)
    """Channels of the U-Net at each resolution; each resolution is half of the one before. Multiples of 8."""
    blocks: Depth = 1
    """Residual blocks of each resolution on the way down; one more on the way up."""
    attention: tuple[Whole, ...] = (2,)
    """Which resolutions, counted from 0, have self-attention. The middle of the U-Net always has."""
    dropout: Share = 0.0
    """Probability of dropout in residual blocks: 0.1 on small data seen often."""
    patch: Count = 1
    """Fold blocks of patch × patch pixels into channels: with 2 a fourth of the work, and coarser detail."""
    conditional: bool = False
    """Tell the network the class of each image, so that one can ask for classes when sampling."""
    drop_class: Share = 0.1
    """With --conditional: how often the class is withheld, which classifier-free guidance needs."""

    timesteps: Annotated[int, at_least(1), at_most(100_000)] = 1000
    """Steps of the noise schedule."""
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "squaredcos_cap_v2"
    """The noise schedule; squaredcos_cap_v2 is the cosine one (arXiv 2102.09672)."""
    prediction: Literal["epsilon", "sample", "v_prediction"] = "v_prediction"
    """What the network predicts: the noise, the image, or the velocity (arXiv 2202.00512)."""
    min_snr: NotNegative = 5.0
    """γ of min-SNR weighting (arXiv 2303.09556); 0 weighs all timesteps alike."""

    size: Pixels = 0
    """Height and width of the images in pixels; 0: as the data, 64 for image files."""
    compile: bool = False
    """Compile the network with torch.compile: a minute or two at the start, faster steps."""


def main(args: list[str] | None = None) -> None:
    """The command `sslfast ddpm`."""
    with distributed.session():
        config = parse(DDPM, "ddpm", args)
        run = train(config)
        main_rank = distributed.is_main()
    if run is None:
        raise SystemExit(130)  # as a shell reports a process that was interrupted
    if config.evaluate and main_rank:
        from sslfast.evaluation.evaluate_ddpm import EvaluateDDPM, evaluate

        evaluate(EvaluateDDPM(run=str(run), device=config.device))


def train(config: DDPM) -> Path | None:
    """Train as ``config`` says and return the run's folder, or None if the person stopped it."""
    config, images = start(config, file_size=64)
    size = config.size
    if config.conditional and (images.labels < 0).any():
        raise UserError("--conditional needs images in class folders: some of these have no class")
    facts = {"channels": images.channels, "classes": images.classes}
    if size % config.patch or any(not 0 <= level < len(config.widths) for level in config.attention):
        raise UserError(
            f"--patch {config.patch} must divide the size, {size}, and --attention count resolutions from 0, not "
            f"{config.attention}"
        )

    device = distributed.local_device(config.device)
    unet = network(config, facts).to(device).to(memory_format=torch.channels_last)
    average = copy.deepcopy(unet).requires_grad_(False)
    blank = torch.zeros(1, *noise_shape(dataclasses.asdict(config) | facts), device=device)
    some = torch.zeros(1, dtype=torch.int64, device=device) if config.conditional else None
    with rehearsal(config, images, unet):
        unet(blank, 0, some)
    wrapped = distributed.wrap(unet)
    forward = torch.compile(wrapped) if config.compile else wrapped
    schedule = DDPMScheduler(
        num_train_timesteps=config.timesteps, beta_schedule=config.schedule, prediction_type=config.prediction
    )
    alphas_cumprod = schedule.alphas_cumprod.to(device)
    optimizer = torch.optim.AdamW(optimizers.parameter_groups(unet, config.weight_decay), lr=config.lr, fused=True)
    weights = nn.ModuleDict({"unet": unet, "average": average})

    with Loop("ddpm", config, images, weights, {"optimizer": optimizer}) as loop:
        warmup_steps = round(config.warmup_epochs * loop.steps_per_epoch)
        for _epoch, pixels, ids in loop.batches(square=size):
            assert isinstance(pixels, Tensor)
            timesteps, withheld, flipped = draw(config, loop.step, len(ids))
            timesteps = timesteps.to(device)
            x0 = pixels.where(~flipped[:, None, None, None], pixels.flip(3)).to(device).float() / 127.5 - 1
            x0 = F.pixel_unshuffle(x0, config.patch)
            noisy, target = q_sample(
                x0,
                timesteps,
                alphas_cumprod,
                prediction_type=config.prediction,
                seeds=(config.seed * 2**32 + ids).to(device),
                step=loop.step,
            )
            classes = None
            if config.conditional:
                classes = images.labels[ids].masked_fill(withheld, len(images.classes)).to(device)

            rate = config.lr * min(1.0, (loop.step + 1) / max(1, warmup_steps))
            optimizers.set_learning_rate(optimizer, rate)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                predicted = forward(noisy.contiguous(memory_format=torch.channels_last), timesteps, classes)
            loss = diffusion_loss(
                predicted.float(),
                target,
                timesteps,
                alphas_cumprod,
                prediction_type=config.prediction,
                snr_gamma=config.min_snr or None,
            )
            optimizer.zero_grad()
            loss.backward()
            length = nn.utils.clip_grad_norm_(unet.parameters(), config.clip)
            optimizer.step()
            update_average(average, unet, min(config.average, (1 + loop.step) / (10 + loop.step)))
            loop.end_step(len(ids), loss=loss.detach(), lr=rate, gradient=length)
    return loop.result


def network(config: DDPM, facts: dict) -> nn.Module:
    """Return the U-Net that the settings ask for, or raise UserError."""
    try:
        return build_unet(dataclasses.asdict(config) | facts)
    except ValueError as error:
        raise UserError(f"--widths, --blocks, --dropout: {error}") from None


def draw(config: DDPM, step: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is random in a step for the n images of this rank: timesteps int64, class withheld, flipped (bool).

    All depends on the seed, the step and the place in the whole batch only: a run that was resumed, or divided among
    ranks, draws the same. Timesteps are uniform in [0, T), each, and together spread evenly, for a less noisy loss (the
    low-discrepancy sampler of Kingma et al., arXiv 2107.00630, appendix I.1). Dropout is seeded here, too.
    """
    random = np.random.default_rng([config.seed, step])
    whole = config.batch_size
    places = random.permutation(whole) + random.random()
    timesteps = torch.from_numpy((places * (config.timesteps / whole)).astype(np.int64))
    withheld = torch.from_numpy(random.random(whole) < config.drop_class)
    flipped = torch.from_numpy(random.random(whole) < config.flip)
    torch.manual_seed(int(random.integers(2**62)) + distributed.rank())
    own = distributed.share(whole)
    return timesteps[own][:n], withheld[own][:n], flipped[own][:n]

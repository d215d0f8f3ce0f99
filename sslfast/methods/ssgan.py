"""SSGAN: a GAN whose discriminator also learns without labels, so that it does not forget (arXiv 1811.11212).

A generator draws images, a discriminator tells them from real ones, each learns from the other. What the discriminator
knows about images it loses again as the generator changes; the self-supervised variants give it a second task that
stays the same, to tell by how much an image was turned:

- ``gan``: none. The hinge loss with spectral normalisation of SNGAN (arXiv 1802.05957).
- ``ssgan``: a quarter of the batch goes in all four rotations through a second head. The discriminator learns to
  tell rotations of real images (weight beta), the generator to draw images whose rotation can be told (weight alpha).
- ``ssgan-la`` (arXiv 2106.08601): one head of eight classes, four rotations of real and of generated images; half of
  the batch is turned. The generator is to be taken for real *and* not for generated: so its aim is the distribution of
  real images again, from which ssgan's second loss draws it away.
- ``ssgan-la+``: the same beside the GAN loss, with the weights beta and alpha.

One samples from a moving average of the generator's weights: `sslfast sample RUN`.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslfast.evaluation.gan import HEADS, reporter
from sslfast.gan import GanName, build_gan, differentiable_augmentation
from sslfast.ops import rotate4
from sslfast.training import UserError, distributed, optimizers
from sslfast.training.average import update_average
from sslfast.training.loop import Loop, parse, start
from sslfast.training.options import (
    MAY_CHANGE,
    Count,
    LearningRate,
    NotNegative,
    Pixels,
    RunOptions,
    Share,
    Whole,
    Width,
)

Variant = Literal["gan", "ssgan", "ssgan-la", "ssgan-la+"]
TURNED = {"ssgan": 4, "ssgan-la": 2, "ssgan-la+": 4}  # one in how many images is shown in all rotations
LEAST = 4  # images of a step, so that one is turned

NOTHING_LEFT = 1e-3  # a discriminator's loss below which the generator learns nothing from it …
WARN_AFTER = 300  # … and for how many steps in a row it may stay there


@dataclasses.dataclass(kw_only=True)
class SSGAN(RunOptions):
    """Train a GAN, with self-supervision of the discriminator or without, then judge both networks.

    Writes a folder: metrics.jsonl, TensorBoard events, checkpoints, sheets of samples over time, and at the end figures
    and pictures.

    Example: sslfast ssgan --data fashion-mnist --epochs 10
    """

    variant: Variant = "ssgan"
    """The self-supervision: none, rotations, or label augmentation without or with the GAN loss."""
    beta: NotNegative = 1.0
    """Weight of the self-supervised loss of the discriminator."""
    alpha: NotNegative = 0.2
    """Weight of the self-supervised loss of the generator."""
    networks: GanName = "small"
    """small: trains on two CPU cores. resnet: the networks of SNGAN for 32, 48 or 64 pixels."""
    latent: Width = 128
    """Numbers that an image is drawn from."""

    epochs: Annotated[Count, MAY_CHANGE] = 10
    """How often the discriminator sees each image."""
    batch_size: Count = 64
    """Real images per step of the discriminator; as many are generated."""
    discriminator_steps: Count = 1
    """Steps of the discriminator for one of the generator."""
    lr: LearningRate = 2e-4
    """Learning rate of Adam (β = 0, 0.9) for both networks; it falls to 0 along a line."""
    average: Share = 0.999
    """How much of the moving average of the generator's weights stays in each of its steps (less at first)."""
    augment: bool = False
    """Show the discriminator both kinds of images with random colours, shifts and holes (DiffAugment, arXiv
    2006.10738): for a few thousand images or less."""

    size: Pixels = 0
    """Height and width of the images in pixels: 4 to 7 times a power of two; 0: as the data, 64 for image files."""
    reports: Whole = 20
    """How often in the run a sheet of samples is drawn and the discriminator's features are probed; 0 for never."""


def main(args: list[str] | None = None) -> None:
    """The command `sslfast ssgan`."""
    with distributed.session():
        config = parse(SSGAN, "ssgan", args)
        run = train(config)
        main_rank = distributed.is_main()
    if run is None:
        raise SystemExit(130)  # as a shell reports a process that was interrupted
    if config.evaluate and main_rank:
        from sslfast.evaluation import evaluate_gan

        evaluate_gan.evaluate(evaluate_gan.EvaluateGAN(run=str(run), device=config.device))


def train(config: SSGAN) -> Path | None:
    """Train as ``config`` says and return the run's folder, or None if the person stopped it."""
    config, images = start(config, LEAST, file_size=64)
    size = config.size
    device = distributed.local_device(config.device)
    try:
        heads = HEADS[config.variant]
        generator, discriminator = build_gan(config.networks, size, images.channels, config.latent, **heads)
    except ValueError as error:
        raise UserError(f"--networks {config.networks} --size {size}: {error}") from None
    generator.to(device).to(memory_format=torch.channels_last)
    discriminator.to(device).to(memory_format=torch.channels_last)
    average = copy.deepcopy(generator).requires_grad_(False)
    all_generators = distributed.wrap(generator, sync_batchnorm=True)
    all_discriminators = distributed.wrap(discriminator)
    generator_adam = torch.optim.Adam(generator.parameters(), config.lr, betas=(0.0, 0.9))
    discriminator_adam = torch.optim.Adam(discriminator.parameters(), config.lr, betas=(0.0, 0.9))
    state = {"generator": generator_adam, "discriminator": discriminator_adam}
    weights = nn.ModuleDict({"generator": generator, "discriminator": discriminator, "average": average})
    quiet = torch.zeros((), device=device)  # steps in a row in which the discriminator's loss was next to nothing
    loss_generator = torch.zeros(())

    with Loop("ssgan", config, images, weights, state) as loop:
        report = reporter(loop.folder, dataclasses.asdict(config), images, average, discriminator)
        for _epoch, pixels, ids in loop.batches(square=size, least=LEAST):
            assert isinstance(pixels, Tensor)
            # All that is random in a step depends on the seed, the step and the place in the whole batch: a run that
            # was resumed goes on as if nothing had been, and several ranks draw what one would.
            random = torch.Generator().manual_seed(config.seed * 2**32 + loop.step)
            real = pixels.to(device, memory_format=torch.channels_last).float() / 127.5 - 1
            real = torch.where(draw(random, config, ids).to(device) < config.flip, real.flip(3), real)
            rate = config.lr * (1 - loop.step / loop.total_steps)
            for optimizer in state.values():
                optimizers.set_learning_rate(optimizer, rate)

            latents = draw(random, config, ids, config.latent).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                with torch.no_grad():
                    fake = generator(latents)
                seen = torch.cat([views(config.variant, real), views(config.variant, fake)])
                both = all_discriminators(disguise(seen, config, random))
            scores, logits = ((None, None) if x is None else x.chunk(2) for x in both)
            judged = [judge(config.variant, *one, len(ids)) for one in zip(scores, logits, strict=True)]
            loss, adversarial, rotation = discriminator_loss(config, *judged)
            discriminator_adam.zero_grad()
            loss.backward()
            discriminator_adam.step()

            if (loop.step + 1) % config.discriminator_steps == 0:
                discriminator.requires_grad_(False)
                latents = draw(random, config, ids, config.latent).to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                    fake = views(config.variant, all_generators(latents))
                    scores, logits = discriminator(disguise(fake, config, random))
                loss_generator = generator_loss(config, judge(config.variant, scores, logits, len(ids)))
                generator_adam.zero_grad()
                loss_generator.backward()
                generator_adam.step()
                discriminator.requires_grad_(True)
                update_average(average, generator, min(config.average, (1 + loop.step) / (10 + loop.step)))

            if distributed.is_main() and config.reports:
                report(loop.step + 1, max(1, loop.total_steps // config.reports))
            quiet = torch.where(adversarial.detach() < NOTHING_LEFT, quiet + 1, 0.0)
            if (loop.step + 1) % config.log_every == 0 and WARN_AFTER <= quiet < WARN_AFTER + config.log_every:
                loop.log.say(
                    f"\nwarning: the discriminator has won: in the last {WARN_AFTER} steps its loss was below "
                    f"{NOTHING_LEFT:g}, so that the generator learns next to nothing. Fewer --discriminator-steps, a "
                    "lower --lr, or --augment may help."
                )
            values = {} if rotation is None else {"rotation": rotation}
            loop.end_step(len(ids), loss=loss.detach(), generator_loss=loss_generator.detach(), lr=rate, **values)
    return loop.result


def draw(random: torch.Generator, config: SSGAN, ids: Tensor, latent: int | None = None) -> Tensor:
    """Return this rank's part of numbers for the whole batch: latents (n, latent), or uniform ones (n, 1, 1, 1)."""
    whole = config.batch_size
    numbers = torch.randn(whole, latent, generator=random) if latent else torch.rand(whole, 1, 1, 1, generator=random)
    return numbers[distributed.share(whole)][: len(ids)]


def views(variant: str, images: Tensor) -> Tensor:
    """Return what the discriminator gets to see of n images: for ssgan and ssgan-la+ 4q + (n − q) with q = n // 4.

    The first 4q are the first q images in all four rotations, of which those by 0° stand for these images in the GAN
    loss too. For gan the images as they are, for ssgan-la only the 4q, with q = n // 2.
    """
    if variant == "gan":
        return images
    part = len(images) // TURNED[variant]
    turned, _ = rotate4(images[:part])
    return turned if variant == "ssgan-la" else torch.cat([turned, images[part:]])


def disguise(images: Tensor, config: SSGAN, random: torch.Generator) -> Tensor:
    return differentiable_augmentation(images, random) if config.augment else images


class Judged(NamedTuple):
    """What the discriminator says of the views of n images, real or generated."""

    scores: Tensor | None  # (n,), without ssgan-la
    logits: Tensor | None  # (4q, classes) of the rotated images, without gan
    labels: Tensor  # by how many quarters of a circle each of those is turned


def judge(variant: str, scores: Tensor | None, logits: Tensor | None, n: int) -> Judged:
    """Sort the discriminator's output for `views` of n images."""
    part = n // TURNED.get(variant, n)
    if logits is not None:
        logits = logits[: 4 * part].float()
    if scores is not None:
        scores = scores.float()
        scores = scores if variant == "gan" else torch.cat([scores[:part], scores[4 * part :]])
    device = None if logits is None else logits.device
    return Judged(scores, logits, torch.arange(4, device=device).repeat_interleave(part))


def discriminator_loss(config: SSGAN, real: Judged, fake: Judged) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the loss, what of it tells real from generated images, and how many in a hundred rotations were told."""
    hinge = rotation = None
    if real.scores is not None and fake.scores is not None:
        hinge = F.relu(1 - real.scores).mean() + F.relu(1 + fake.scores).mean()
    if real.logits is None or fake.logits is None:
        assert hinge is not None
        return hinge, hinge, None
    labels = real.labels
    if config.variant == "ssgan":
        own, told = F.cross_entropy(real.logits, labels), real.logits.argmax(1)
    else:
        own = F.cross_entropy(real.logits, 2 * labels) + F.cross_entropy(fake.logits, 2 * labels + 1)
        told = real.logits.argmax(1) // 2
    rotation = 100 * (told == labels).float().mean()
    return (own, own, rotation) if hinge is None else (hinge + config.beta * own, hinge, rotation)


def generator_loss(config: SSGAN, fake: Judged) -> Tensor:
    """Return the loss of the generator by what the discriminator says of generated images."""
    hinge = None if fake.scores is None else -fake.scores.mean()
    if fake.logits is None:
        assert hinge is not None
        return hinge
    if config.variant == "ssgan":
        own = F.cross_entropy(fake.logits, fake.labels)
    else:
        own = F.cross_entropy(fake.logits, 2 * fake.labels) - F.cross_entropy(fake.logits, 2 * fake.labels + 1)
    return own if hinge is None else hinge + config.alpha * own

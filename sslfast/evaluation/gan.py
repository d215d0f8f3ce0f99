"""Networks of an `ssgan` run: loading them, drawing with them, and what is looked at while they train."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sslfast.evaluation.features import over_images
from sslfast.evaluation.linear import linear_probe
from sslfast.evaluation.sheets import save_png, sheet, to_uint8
from sslfast.gan import Discriminator, Generator, build_gan
from sslfast.training import UserError, checkpoint, data, files

HEADS: dict[str, dict[str, Any]] = {  # of the discriminator, by variant
    "gan": {"score": True, "classes": 0},
    "ssgan": {"score": True, "classes": 4},
    "ssgan-la": {"score": False, "classes": 8},
    "ssgan-la+": {"score": True, "classes": 8},
}
SHEET = 8  # rows and columns of a sheet of samples
PROBE_TRAIN, PROBE_TEST, PROBE_L2 = 5000, 2000, 1e-3  # images, and penalty, of the probe of features during training


def load_config(run: Path) -> dict[str, Any]:
    """Return the settings of an ssgan run; raise UserError for a run of another method."""
    return checkpoint.load_config(run, "ssgan")


def load_networks(
    run: Path, weights: Literal["average", "raw", "untrained"] = "average"
) -> tuple[Generator, Discriminator]:
    """Return (generator, discriminator) of a run in evaluation mode on the CPU.

    The generator with averaged weights, with the last, or, like the discriminator, as it was before training.
    """
    config = load_config(run)
    with torch.random.fork_rng():
        torch.manual_seed(config["seed"])
        heads = HEADS[config["variant"]]
        try:
            networks = build_gan(config["networks"], config["size"], config["channels"], config["latent"], **heads)
        except ValueError as error:
            raise UserError(f"{run / 'config.json'} is damaged: {error}") from None
    if weights != "untrained":
        name = "average" if weights == "average" else "generator"
        checkpoint.load_weights(run, **{name: networks[0], "discriminator": networks[1]})
    for network in networks:
        network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return networks


@torch.inference_mode()
def generate(generator: Generator, latents: Tensor, precision: str) -> Tensor:
    """Return images (N, C, H, W) uint8 on the CPU from latents (N, latent), with the generator in evaluation mode."""
    device = next(generator.parameters()).device
    training = generator.training
    generator.eval()
    found = []
    for part in latents.split(500):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            found.append(to_uint8(generator(part.to(device))).cpu())
    generator.train(training)
    return torch.cat(found)


def latents_of(seeds: Tensor | range, latent: int) -> Tensor:
    """Return latents (N, latent), standard normal, each a function of its own seed."""
    return torch.stack([torch.randn(latent, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])


def features_of(discriminator: Discriminator, precision: str) -> Callable[[Tensor], Tensor]:
    """Return the function from uint8 images (n, C, H, W) to the discriminator's features (n, F), float32 on the CPU."""
    device = next(discriminator.parameters()).device

    @torch.inference_mode()
    def function(pixels: Tensor) -> Tensor:
        images = pixels.to(device, memory_format=torch.channels_last).float() / 127.5 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return discriminator.features(images).float().cpu()

    return function


def reporter(
    run: Path, config: dict[str, Any], train: data.Images, average: Generator, discriminator: nn.Module
) -> Callable[[int, int], None]:
    """Return a function (step, interval) that a training calls in every step: at multiples of the interval it reports.

    It draws samples/step-….png, a sheet of images from latents that stay the same, and writes into probes.json the
    accuracy in percent of a linear probe on the discriminator's features, by step. It changes nothing in the training:
    networks and random numbers stay as they are.
    """
    assert isinstance(discriminator, Discriminator)
    (run / "samples").mkdir(exist_ok=True)
    path, precision = run / "probes.json", config["precision"]
    latents = latents_of(range(SHEET**2), config["latent"])
    test = data.load_for(config, "test")
    probes: dict[str, float] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):  # a damaged one begins anew
        probes.update(json.loads(path.read_text()))
    shuffle = torch.Generator().manual_seed(0)
    chosen = []
    for split, count in ((train, PROBE_TRAIN), (test, PROBE_TEST)):
        labelled = (split.labels >= 0).nonzero()[:, 0]
        chosen.append(labelled[torch.randperm(len(labelled), generator=shuffle)[:count]])

    def report(step: int, interval: int) -> None:
        if step % interval:
            return
        images = generate(average, latents, precision)
        save_png(sheet(images, SHEET), run / "samples" / f"step-{step:08d}.png")
        if not all(map(len, chosen)):
            return
        discriminator.eval()
        function = features_of(discriminator, precision)
        (known, known_ids), (unknown, unknown_ids) = (
            over_images(function, split, config["size"], rows, config["workers"])
            for split, rows in zip((train, test), chosen, strict=True)
        )
        discriminator.train()
        labels = train.labels[known_ids], test.labels[unknown_ids]
        if len(labels[0].unique()) < 2 or not len(unknown):
            return
        probes[str(step)] = round(linear_probe(known, labels[0], unknown, labels[1], PROBE_L2), 3)
        files.write_atomically(path, json.dumps(probes, indent=1) + "\n")

    return report

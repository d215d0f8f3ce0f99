"""`sslfast sample RUN` of an ssgan run: sheets of what its generator draws."""

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from sslfast.evaluation.gan import generate, latents_of, load_config, load_networks
from sslfast.evaluation.sampling import between
from sslfast.evaluation.sheets import save_png, sheet
from sslfast.training.options import Seed, UseOptions, at_least, at_most, check


@dataclasses.dataclass(kw_only=True)
class SampleGAN(UseOptions):
    """Draw images from an ssgan run: samples.png, or interpolation.png.

    Example: sslfast sample runs/ssgan-fashion-mnist-… --interpolate 8 --n 10
    """

    n: Annotated[int, at_least(1), at_most(100_000)] = 64
    """Images; with --interpolate, images in a row."""
    seed: Seed = 0
    """Seed of the first image; each further image has the next."""
    interpolate: Annotated[int, at_least(0), at_most(1000)] = 0
    """Rows of images on the way from one seed's image to the next one's, which the next row goes on from."""
    weights: Literal["average", "raw"] = "average"
    """The moving average of the weights, or the last weights themselves."""
    out: str = ""
    """The folder to write; by default RUN."""


def main(args: list[str] | None = None) -> None:
    """The command `sslfast sample` for a run of ssgan."""
    options = tyro.cli(SampleGAN, args=args, prog="sslfast sample")
    check(options)
    run = Path(options.run)
    config = load_config(run)
    generator = load_networks(run, options.weights)[0].to(options.device)
    out = Path(options.out or run)
    out.mkdir(parents=True, exist_ok=True)
    name = "interpolation.png" if options.interpolate else "samples.png"
    columns = options.n if options.interpolate else round(options.n**0.5)
    count = options.interpolate + 1 if options.interpolate else options.n
    latents = latents_of(range(options.seed, options.seed + count), config["latent"])
    if options.interpolate:
        latents = latents[..., None, None]  # as images, of which `between` takes the arc
        latents = torch.cat([between(a, b, options.n) for a, b in itertools.pairwise(latents)]).flatten(1)
    save_png(sheet(generate(generator, latents, config["precision"]), columns), out / name)
    print(f"{out / name}")

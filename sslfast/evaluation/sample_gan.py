"""`sslfast sample RUN` of an ssgan run: sheets of what its generator draws."""

import dataclasses
import itertools
from pathlib import Path
from typing import Literal

import torch
import tyro

from sslfast.evaluation.gan import generate, latents_of, load_config, load_networks
from sslfast.evaluation.sampling import between
from sslfast.evaluation.sheets import save_png, sheet
from sslfast.training import UserError


@dataclasses.dataclass
class SampleGAN:
    """Draw images from an ssgan run: samples.png, or interpolation.png.

    Example: sslfast sample runs/ssgan-fashion-mnist-… --interpolate 8 --n 10
    """

    run: tyro.conf.Positional[str]
    """The run's folder."""
    n: int = 64
    """Images; with --interpolate, images in a row."""
    seed: int = 0
    """Seed of the first image; each further image has the next."""
    interpolate: int = 0
    """Rows of images on the way from one seed's image to the next one's, which the next row goes on from."""
    weights: Literal["average", "raw"] = "average"
    """The moving average of the weights, or the last weights themselves."""
    out: str = ""
    """The folder to write; by default RUN."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute: cpu, cuda, cuda:1, …"""


def main(args: list[str] | None = None) -> None:
    """The command `sslfast sample` for a run of ssgan."""
    options = tyro.cli(SampleGAN, args=args, prog="sslfast sample")
    run = Path(options.run)
    config = load_config(run)
    if options.n < 1 or options.interpolate < 0:
        raise UserError("--n must be at least 1 and --interpolate at least 0")
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

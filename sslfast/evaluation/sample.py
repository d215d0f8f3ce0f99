"""`sslfast sample RUN`: pictures of what a trained DDPM draws."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from sslfast.evaluation import sampling
from sslfast.evaluation.features import over_images
from sslfast.evaluation.sheets import save_gif, save_png, sheet
from sslfast.training import UserError, checkpoint
from sslfast.training.loop import best_precision, load_images
from sslfast.training.options import Count, NotNegative, Seed, UseOptions, at_least, at_most, check

FRAMES = 30  # of the animation
GIF_WIDTH = 320  # pixels, about: noise does not compress
STRIP = 10  # columns of the denoising strip


@dataclasses.dataclass(kw_only=True)
class Sample(UseOptions):
    """Draw images from a DDPM run: samples.png, denoising.png (how some came about) and denoising.gif.

    Example: sslfast sample runs/ddpm-fashion-mnist-… --n 64 --steps 50
    """

    n: Annotated[int, at_least(1), at_most(100_000)] = 64
    """Images."""
    steps: Count = 50
    """Steps of the sampler, each a call of the network."""
    sampler: sampling.Sampler = "ddim"
    """ddim: without noise, 20 to 100 steps; ddpm: with noise, 50 to 1000 steps; dpm-solver++: 10 to 25 steps."""
    eta: Annotated[NotNegative, at_most(1)] = 0.0
    """Noise of ddim: 0 for none, 1 for as much as ddpm."""
    seed: Seed = 0
    """Seed of the first image; each further image has the next."""
    label: str = ""
    """Class to draw, by name or number; by default all in turn. For runs with --conditional."""
    guidance: float = 1.0
    """Classifier-free guidance: 1 for none, 2 to 5 for clearer classes, less variety. For runs with --conditional."""
    weights: Literal["average", "raw"] = "average"
    """The moving average of the weights, or the last weights themselves."""
    inpaint: Literal["", "left", "right", "top", "bottom", "center"] = ""
    """Invent this part of n test images anew (RePaint), by ddpm or ddim; writes inpainting.png."""
    visits: Annotated[int, at_least(1), at_most(1000)] = 5
    """How often inpainting takes each step, so that known and new come to fit."""
    interpolate: tuple[Seed, Seed] | None = None
    """Two seeds: n images on the way from one to the other, by ddim; writes interpolation.png."""
    out: str = ""
    """The folder to write; by default RUN/samples."""
    batch_size: Count = 64
    """Images computed at once."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the network; auto: bfloat16 where the hardware multiplies matrices in it."""


def main(args: list[str] | None = None) -> None:
    """The command `sslfast sample`; a run of ssgan has options of its own."""
    if checkpoint.method_of(args) == "ssgan":
        from sslfast.evaluation import sample_gan

        return sample_gan.main(args)
    options = tyro.cli(Sample, args=args, prog="sslfast sample")
    check(options)
    run, device = Path(options.run), torch.device(options.device)
    config = sampling.load_config(run)
    check_together(options, config)
    precision = best_precision(options.device) if options.precision == "auto" else options.precision
    scheduler = sampling.make_scheduler(config, options.sampler, options.steps)
    unet = sampling.load_unet(run, options.weights).to(device)
    seeds = options.seed + torch.arange(options.n, device=device)
    classes = chosen_classes(config, options.label, options.n, device)
    shape = sampling.noise_shape(config)

    def model(part: Tensor) -> sampling.Model:
        return sampling.predictor(unet, precision, None if classes is None else classes[part], options.guidance)

    if options.inpaint:
        originals, mask = holes(config, options)
        known = F.pixel_unshuffle(originals.float() / 127.5 - 1, config["patch"]).to(device)
        kept = F.pixel_unshuffle(mask.expand(config["channels"], -1, -1).float(), config["patch"]).bool().to(device)

        def draw(part: Tensor, watch: sampling.Callback) -> Tensor:
            return sampling.inpaint(model(part), scheduler, known[part], kept, seeds[part], options.visits, watch)

        calls = options.visits * (options.steps - 1) + 1
    else:
        noise = scheduler.initial_noise(seeds, shape)
        if options.interpolate:
            ends = scheduler.initial_noise(torch.tensor(options.interpolate, device=device), shape)
            noise = sampling.between(ends[0], ends[1], options.n)

        def draw(part: Tensor, watch: sampling.Callback) -> Tensor:
            return sampling.generate(model(part), scheduler, noise[part], seeds[part], options.eta, watch)

        calls = options.steps

    images, path = in_batches(draw, options, calls, config["patch"])
    out = Path(options.out or run / "samples")
    out.mkdir(parents=True, exist_ok=True)
    if options.inpaint:
        draw_inpainting(originals, mask, images, out / "inpainting.png")
        print(f"{out}/inpainting.png: test images, what was left of them, and what became of it")
    elif options.interpolate:
        save_png(sheet(images, min(options.n, 10)), out / "interpolation.png")
        print(f"{out}/interpolation.png: from seed {options.interpolate[0]} to seed {options.interpolate[1]}")
    else:
        columns = len(config["classes"]) if classes is not None and not options.label else round(options.n**0.5)
        save_png(sheet(images, columns), out / "samples.png")
        draw_path(path, columns, out)
        print(f"{out}: samples.png, denoising.png, denoising.gif ({options.n} images, {options.steps} steps)")


def check_together(options: Sample, config: dict[str, Any]) -> None:
    """Raise UserError for options that do not go together, or not with this run."""
    if options.eta and options.sampler != "ddim":
        raise UserError("--eta is for --sampler ddim")
    if options.interpolate and (options.sampler != "ddim" or options.eta or options.inpaint):
        raise UserError("--interpolate goes with --sampler ddim, without --eta and --inpaint")
    if options.inpaint and options.sampler == "dpm-solver++":
        raise UserError("--inpaint goes with --sampler ddpm or ddim: dpm-solver++ cannot take a step twice")
    if (options.guidance != 1 or options.label) and not config["conditional"]:
        raise UserError("--guidance and --label need a run that was trained with --conditional")


def chosen_classes(config: dict[str, Any], label: str, n: int, device: torch.device) -> Tensor | None:
    """Return the class number of each image, (n,): one label for all, or every class in turn; None without classes."""
    names = config["classes"]
    if not config["conditional"]:
        return None
    if not label:
        return torch.arange(n, device=device) % len(names)
    known = [*names, *map(str, range(len(names)))]
    if label not in known:
        raise UserError(f"--label must be one of {', '.join(names)} or a number below {len(names)}, not {label}")
    return torch.full((n,), known.index(label) % len(names), device=device)


def holes(config: dict[str, Any], options: Sample) -> tuple[Tensor, Tensor]:
    """Return n test images (n, C, H, W) uint8 and the mask (1, H, W) of what stays."""
    images = load_images(config, "test", options.data, options.data_dir)
    size, n = config["size"], options.n
    pixels, ids = over_images(lambda pixels: pixels, images, size, torch.arange(len(images))[: 2 * n])
    if len(ids) < n:
        raise UserError(f"{config['data']} has {len(ids)} test images to paint in, fewer than --n {n}")
    pixels = pixels[:n]
    mask = torch.ones(1, size, size, dtype=torch.bool)
    half, quarter = size // 2, size // 4
    where = {
        "left": (slice(None), slice(0, half)),
        "right": (slice(None), slice(half, size)),
        "top": (slice(0, half), slice(None)),
        "bottom": (slice(half, size), slice(None)),
        "center": (slice(quarter, size - quarter), slice(quarter, size - quarter)),
    }
    mask[0][where[options.inpaint]] = False
    return pixels, mask


def in_batches(
    draw: Callable[[Tensor, sampling.Callback], Tensor], options: Sample, calls: int, patch: int
) -> tuple[Tensor, list[Tensor]]:
    """Return all images uint8, and those of the first batch on their way; show progress."""
    found: list[Tensor] = []
    path: dict[int, Tensor] = {}
    keep = {round(i * options.steps / FRAMES) for i in range(1, FRAMES + 1)}
    parts = torch.arange(options.n).split(options.batch_size)
    with tqdm(total=len(parts) * calls, unit="call", disable=None, dynamic_ncols=True) as bar:

        def watch(done: int, x: Tensor) -> None:
            bar.update()
            if done in keep and not found:
                path[done] = sampling.to_pixels(x, patch)

        for part in parts:
            found.append(sampling.to_pixels(draw(part, watch), patch))
            if bar.disable and len(parts) > 1:
                print(f"{len(found) * options.batch_size:,} of {options.n:,} images", flush=True)
    return torch.cat(found), list(path.values())


def draw_inpainting(originals: Tensor, mask: Tensor, images: Tensor, path: Path) -> None:
    """Write three rows for each 12 images: the originals, what was left of them, and the results."""
    columns = min(12, len(images))
    white = (0,) * 7 + (-len(images) % columns,)  # fills the last row
    rows = [F.pad(x, white, value=255).split(columns) for x in (originals, originals.where(mask, 160), images)]
    save_png(sheet(torch.cat([x for triple in zip(*rows, strict=True) for x in triple]), columns), path)


def draw_path(path: list[Tensor], columns: int, out: Path) -> None:
    """Write denoising.png, a row for each of 6 images at 10 of the steps, and denoising.gif of all."""
    chosen = [path[round(i * (len(path) - 1) / (STRIP - 1))] for i in range(min(STRIP, len(path)))]
    strip = torch.stack([images[:6] for images in chosen], dim=1)
    save_png(sheet(strip.flatten(0, 1), len(chosen)), out / "denoising.png")
    save_gif([sheet(images, columns, width=GIF_WIDTH) for images in path], out / "denoising.gif")

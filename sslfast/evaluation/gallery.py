"""`sslfast augment-gallery`: a picture of what an augmentation makes of the images that one is about to train on."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from sslfast.training import UserError, data, datasets, decode, files
from sslfast.training.options import MaxPixels, MaxUnpacked, Must, Pixels, Seed, Text, at_least, at_most, check
from sslfast.transforms import MoCoV1Transform, MoCoV2Transform, MoCoV3Transform, RandomAugment, SimCLRTransform

RECIPES = {
    "simclr": SimCLRTransform,
    "moco-v1": MoCoV1Transform,
    "moco-v2": MoCoV2Transform,
    "moco-v3": MoCoV3Transform,
}


@dataclasses.dataclass
class Gallery:
    """Draw some images of a data set, each beside the pairs of views that successive epochs make of it."""

    data: Text = "fashion-mnist"
    """digits, fashion-mnist, cifar10, or a directory of images."""
    out: Annotated[Text, Must("name a file, not a folder", lambda out: not Path(out).is_dir())] = "gallery.png"
    """The picture."""
    recipe: Literal["simclr", "moco-v1", "moco-v2", "moco-v3"] = "simclr"
    """The augmentation, with the values of its paper."""
    size: Pixels = 0
    """Height and width of a view in pixels; 0 is the images' own, or 224 for files."""
    images: Annotated[int, at_least(1), at_most(100)] = 5
    """How many images, spread over the training split."""
    epochs: Annotated[int, at_least(1), at_most(50)] = 4
    """How many pairs of views of each."""
    seed: Seed = 0
    """Of the augmentation."""
    data_dir: Text = "~/.cache/sslfast"
    """Where known data sets are looked for and downloaded to."""
    background: str = "white"
    """Colour on which transparent images are laid: a name, '#808080' or 'rgb(128, 128, 128)'."""
    max_pixels: MaxPixels = decode.MAX_PIXELS
    """Image files of more pixels count as files that cannot be decoded."""
    max_unpacked: MaxUnpacked = datasets.MAX_UNPACKED
    """Bytes that a .gz file of MNIST's kind may unpack to."""


def main(args: list[str] | None = None) -> None:
    """The command `sslfast augment-gallery`."""
    options = tyro.cli(Gallery, args=args, prog="sslfast augment-gallery")
    check(options)
    found = data.load_for(vars(options), "train")
    rows = np.linspace(0, len(found) - 1, min(options.images, len(found))).astype(int)
    recipe, size = RECIPES[options.recipe], options.size or found.size
    pixels, ids = next(data.batches(found, [rows], size=size))
    if not len(ids):
        raise UserError(f"not one of {len(rows)} image files of {options.data} could be decoded")
    # Numbers of a recipe's normalisation are for three channels, and the picture wants [0, 1].
    transform = recipe(size, mean=None, std=None, seed=options.seed, layout="CHW")
    draw_gallery(list(pixels), transform, Path(options.out), sample_ids=ids, epochs=options.epochs)
    print(f"{options.out}: {len(ids)} images, {options.epochs} pairs of views of each")


def draw_gallery(
    images: list[Tensor], transform: RandomAugment, path: Path, sample_ids: Tensor | None = None, epochs: int = 4
) -> None:
    """Write a PNG with a row for each image: the original, and the views that `transform` makes of it in each epoch.

    Args:
        images: uint8 (C, H, W) of any sizes.
        transform: with a seed, and without normalisation.
        path: of the picture.
        sample_ids: one integer an image; the position by default.
        epochs: how many groups of views.
    """
    groups = [torch.stack(transform(images, sample_ids, epoch=epoch)) for epoch in range(epochs)]
    views, cell, gap = len(groups[0]), 0.95, 0.22
    width, height = cell * (1 + epochs * views) + gap * epochs + 0.1, cell * len(images) + 0.35
    figure = Figure(figsize=(width, height), facecolor="white")

    def show(image: Tensor, row: int, left: float, title: str) -> None:
        bottom = cell * (len(images) - 1 - row) + 0.05
        axes = figure.add_axes((left / width, bottom / height, 0.94 * cell / width, 0.94 * cell / height))
        axes.imshow(image.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_axis_off()
        if row == 0:
            figure.text(left / width, 1 - 0.2 / height, title, fontsize=9)

    for row, image in enumerate(images):
        show(image.float() / 255, row, 0.08, "original")
        for epoch, group in enumerate(groups):
            for view in range(views):
                left = 0.08 + cell * (1 + epoch * views + view) + gap * (epoch + 1)
                show(group[view, row].clamp(0, 1), row, left, f"epoch {epoch}" if view == 0 else "")
    with files.replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")

"""Sheets of small images, pixel by pixel: PNG files and animated GIFs."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from sslfast.training import files


def sheet(images: Tensor, columns: int, width: int = 640) -> Image.Image:
    """Return images (N, 1 or 3, H, W) uint8 in rows of ``columns`` on white.

    Small ones are enlarged, by a whole factor that makes the sheet about ``width`` pixels wide.
    """
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255)
    factor = max(1, round(width / grid.shape[2]))
    grid = grid.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy())


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG, to another name first."""
    with files.replacing(path) as file:
        image.save(file, format="PNG", optimize=True)


def save_gif(frames: Sequence[Image.Image], path: Path, seconds: float = 4.0, hold: float = 1.5) -> None:
    """Write frames as a GIF that repeats for ever and holds its last frame, to another name first."""
    first, *rest = (frame.convert("P", palette=Image.Palette.ADAPTIVE) for frame in frames)
    each = max(20, round(1000 * seconds / len(frames)))
    durations = [each] * len(rest) + [round(1000 * hold)]
    with files.replacing(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def to_uint8(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as uint8 (what lies outside is clipped)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

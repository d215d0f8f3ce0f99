"""One image file, whatever its format, as a uint8 tensor (3, H, W).

torchvision decodes the common kinds, JPEG and plain PNG, and Pillow the rest. The header is read first, so that a file
of too many pixels is refused before memory is taken for them. `decode` gives RGB of 8 bits always: 16 bits are scaled,
transparent pixels are laid on a background, of an animation the first frame is taken, and the orientation that a camera
has noted is applied.
"""

import io
import math
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageFile, UnidentifiedImageError
from torch import Tensor

from sslfast.training import UserError

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif"),
    *(".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
}
MAX_PIXELS = 100_000_000
LARGE = 2_000_000  # pixels

# Pillow looks at the content, not at the name, and some of its other formats start programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM")
_UPRIGHT = {  # what brings an image with this EXIF orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF


def colour(name: str) -> tuple[int, int, int]:
    """Return (red, green, blue) of a colour's name; raise UserError if there is no such colour."""
    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError:
        raise UserError(
            f"--background {name}: expected a colour, such as white, '#808080' or 'rgb(128, 128, 128)'"
        ) from None


def decode(
    path: Path | str,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    enough: int | None = None,
) -> Tensor:
    """Return the image in a file, uint8 (3, H, W), RGB, in memory pixel by pixel.

    With ``enough``, an image of more than 2 million pixels is shrunk by a whole factor to no more, as far as its
    shorter side keeps ``enough``: 500 photographs of a camera are 20 GB as they are. Raises ValueError for more than
    ``max_pixels`` and for pixels that are no colours of 8 or 16 bits, and whatever a decoder raises for a file that is
    damaged.
    """
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if length > 8 * max_pixels + 2**20:  # 16 bits of four channels, not compressed
            raise ValueError(f"{length:,} bytes are more than --max-pixels {max_pixels:,} can fill")
        content = file.read()
    size = _size_of_jpeg(content) or _size_of_plain_png(content)
    if size:
        _check_size(*size, max_pixels)
        if _factor(*size, enough) == 1:
            from torchvision.io import ImageReadMode, decode_image

            stored = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            pixels = decode_image(stored, ImageReadMode.RGB, apply_exif_orientation=True)
            if pixels.dtype != torch.uint8 or pixels.ndim != 3 or len(pixels) != 3:
                raise ValueError(f"decoded to {pixels.dtype}, {tuple(pixels.shape)}, not to an image of 8 bits")
            return pixels
    return _by_pillow(content, background, max_pixels, enough)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if not 1 <= width * height <= max_pixels:
        raise ValueError(f"{width:,} × {height:,} pixels: expected at least 1 and at most --max-pixels {max_pixels:,}")


def _factor(width: int, height: int, enough: int | None) -> int:
    """Return by how much to shrink an image of which ``enough`` pixels on the shorter side are needed."""
    return max(1, min(math.ceil(math.sqrt(width * height / LARGE)), min(width, height) // enough)) if enough else 1


def _size_of_jpeg(content: bytes) -> tuple[int, int] | None:
    """Return (width, height) from a JPEG's header, or None where it is not found."""
    if content[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = struct.unpack_from(">HH", content, at + 5)
            return width, height
        else:
            at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return None


def _size_of_plain_png(content: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a PNG of 8 bits without transparency, or None for anything else."""
    if content[:8] != b"\x89PNG\r\n\x1a\n" or content[12:16] != b"IHDR" or len(content) < 33:
        return None
    width, height, bits, kind = struct.unpack_from(">IIBB", content, 16)
    if bits != 8 or kind not in (0, 2, 3):  # grey, RGB, palette
        return None
    at = 33
    while at + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        if name == b"tRNS":
            return None
        if name == b"IDAT":
            return width, height
        at += 12 + length
    return None


def _by_pillow(content: bytes, background: tuple[int, int, int], max_pixels: int, enough: int | None) -> Tensor:
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = None  # the limit here is --max-pixels
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata
            with _opened(content) as picture:
                _check_size(*picture.size, max_pixels)
                factor = _factor(*picture.size, enough)
                if factor > 1:
                    small = picture.width // factor, picture.height // factor
                    picture.draft(None, small)  # lets a JPEG decode to a size between
                    rgb = _rgb(picture, background).resize(small, Image.Resampling.BOX)
                else:
                    rgb = _rgb(picture, background)
                rgb = _upright(picture, rgb)
                return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _opened(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError:
        raise ValueError("no image" if content else "the file is empty") from None


def _rgb(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return the first frame of an image file as RGB of 8 bits."""
    deep = isinstance(picture, ImageFile.ImageFile) and bool(picture.tile) and picture.tile[0][3] == "RGB;16B"
    picture.load()
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return _from_16_bits(picture, background)
    if picture.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, of which nothing says what is white: expected 8 or 16")
    transparent = picture.info.get("transparency")
    if deep and isinstance(transparent, tuple):  # Pillow keeps 8 bits of such pixels, and 16 of this
        picture.info["transparency"] = tuple(value >> 8 for value in transparent)
    if picture.mode == "La":
        picture = picture.convert("LA")
    if picture.mode in ("LA", "PA", "RGBA", "RGBa") or transparent is not None:
        layer = picture.convert("RGBA")
        picture = Image.new("RGB", layer.size, background)
        picture.paste(layer, mask=layer)
    return picture.convert("RGB")


def _from_16_bits(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return a grey image of 16 bits (or as many as a TIFF says) as RGB of 8."""
    tags = getattr(picture, "tag_v2", {})
    most = 2 ** tags.get(_BITS, (16,))[0] - 1
    values = np.asarray(picture).astype(np.uint32)
    grey = ((values * 255 + most // 2) // most).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # 0 is white
        grey = 255 - grey
    colours = np.repeat(grey[..., None], 3, axis=2)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        colours[values == transparent] = background
    return Image.fromarray(colours)


def _upright(picture: Image.Image, rgb: Image.Image) -> Image.Image:
    """Return ``rgb`` turned as the EXIF data of ``picture`` ask for, if they can be read."""
    try:
        turn = _UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:
        turn = None
    return rgb if turn is None else rgb.transpose(turn)

"""Every kind of image file becomes uint8 RGB, as numpy says it must look, and nothing else passes."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from sslfast.training import UserError, decode

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding")

RANDOM = np.random.default_rng(0)
H, W = 9, 14
RGB = RANDOM.integers(0, 256, (H, W, 3), np.uint8)
GREY = RGB[..., 0]
ALPHA = RANDOM.integers(0, 256, (H, W), np.uint8)
DEEP = RANDOM.integers(0, 65536, (H, W), np.uint16)
DEEP_RGB = RANDOM.integers(0, 65536, (H, W, 3), np.uint16)
PALETTE = Image.fromarray(RGB).quantize(16)
INDEX, COLOURS = np.asarray(PALETTE), np.asarray(PALETTE.convert("RGB"))
FRAMES = [Image.fromarray(np.full((H, W, 3), value, np.uint8)) for value in (10, 200, 90)]
SMOOTH = np.asarray(Image.fromarray(RGB).resize((64, 48), Image.Resampling.BICUBIC))
WHITE, GREEN = (255, 255, 255), (10, 200, 30)


def three(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2)


def laid(colours, alpha, background=WHITE):
    """Colours of 0 to 255 with an alpha channel of 0 to 1 on a background, in float64."""
    alpha = np.asarray(alpha)[..., None]
    return colours * alpha + np.array(background) * (1.0 - alpha)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(pixels, kind: int, bits: int, *chunks: bytes) -> bytes:
    """A PNG as its specification says: Pillow writes none with 16 bits a channel."""
    kinds = ">u2" if bits == 16 else np.uint8
    rows = b"".join(b"\0" + row.astype(kinds).tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], bits, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def transparent(*values) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *map(int, values)))


def save(pixels, **options):
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    return lambda path: picture.save(path, **options)


def write(content: bytes):
    return lambda path: path.write_bytes(content)


def animation(**options):
    return lambda path: FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:], **options)


def where(mask, inside, outside):
    return np.where(np.asarray(mask)[..., None], inside, outside)


FIRST_FRAME = np.full((H, W, 3), 10)
LOSSLESS = {"lossless": True, "exact": True}
RGBA, LA = np.dstack([RGB, ALPHA]), np.dstack([GREY, ALPHA])
CASES = {  # name: (how to write it, the pixels, how far off these may be)
    **{f"rgb.{suffix}": (save(RGB), RGB, 0) for suffix in ("png", "bmp", "dib", "tif", "tiff", "ppm", "PNG")},
    "rgb.webp": (save(RGB, **LOSSLESS), RGB, 0),
    **{f"grey.{suffix}": (save(GREY), three(GREY), 0) for suffix in ("png", "bmp", "tif", "pgm", "pnm", "gif")},
    **{f"rgba.{suffix}": (save(RGBA), laid(RGB, ALPHA / 255), 0.6) for suffix in ("png", "tif")},
    "rgba.webp": (save(RGBA, **LOSSLESS), laid(RGB, ALPHA / 255), 0.6),
    **{f"la.{suffix}": (save(LA), laid(three(GREY), ALPHA / 255), 0.6) for suffix in ("png", "tif")},
    "palette.png": (save(PALETTE), COLOURS, 0),
    "palette.gif": (save(PALETTE), COLOURS, 0),
    "palette.bmp": (save(PALETTE), COLOURS, 0),
    "palette.tif": (save(PALETTE), COLOURS, 0),
    "one colour away.png": (save(PALETTE, transparency=3), where(INDEX == 3, WHITE, COLOURS), 0),
    "one colour away.gif": (save(PALETTE, transparency=3), where(INDEX == 3, WHITE, COLOURS), 0),
    "alpha by colour.png": (
        save(PALETTE, transparency=bytes(range(0, 160, 10))),
        laid(COLOURS, INDEX * 10 / 255),
        0.6,
    ),
    "one grey away.png": (
        write(png(GREY, 0, 8, transparent(GREY[0, 0]))),
        where(GREY[0, 0] == GREY, 255, three(GREY)),
        0,
    ),
    "one rgb away.png": (
        write(png(RGB, 2, 8, transparent(*RGB[0, 0]))),
        where((RGB[0, 0] == RGB).all(2), 255, RGB),
        0,
    ),
    "grey of 16.png": (save(DEEP), three(DEEP / 257), 0.51),
    "grey of 16.tif": (save(DEEP), three(DEEP / 257), 0.51),
    "big-endian.tif": (save(DEEP.astype(">u2")), three(DEEP / 257), 0.51),
    "grey of 16.pgm": (write(b"P5 14 9 65535\n" + DEEP.astype(">u2").tobytes()), three(DEEP / 257), 0.51),
    "up to 1000.pgm": (
        write(b"P5 14 9 1000\n" + (DEEP % 1001).astype(">u2").tobytes()),
        three((DEEP % 1001) * (255 / 1000)),
        0.51,
    ),
    "rgb of 16.ppm": (write(b"P6 14 9 65535\n" + DEEP_RGB.astype(">u2").tobytes()), DEEP_RGB / 257, 1),
    "rgb of 16.png": (write(png(DEEP_RGB, 2, 16)), DEEP_RGB / 257, 1),
    "la of 16.png": (
        write(png(np.dstack([DEEP, DEEP_RGB[..., 0]]), 4, 16)),
        laid(three(DEEP / 257), DEEP_RGB[..., 0] / 65535),
        2,
    ),
    "rgba of 16.png": (
        write(png(np.dstack([DEEP_RGB, DEEP]), 6, 16)),
        laid(DEEP_RGB / 257, DEEP / 65535),
        2,
    ),
    "16, one grey away.png": (
        write(png(DEEP, 0, 16, transparent(DEEP[0, 0]))),
        where(DEEP[0, 0] == DEEP, 255, three(DEEP / 257)),
        0.51,
    ),
    "16, one rgb away.png": (
        write(png(DEEP_RGB, 2, 16, transparent(*DEEP_RGB[0, 0]))),
        where((DEEP_RGB[0, 0] == DEEP_RGB).all(2), 255, DEEP_RGB / 257),
        1,
    ),
    **{f"one bit.{suffix}": (save(GREY > 99), three(255 * (GREY > 99)), 0) for suffix in ("png", "bmp", "tif", "pbm")},
    "fax.tif": (save(GREY > 99, compression="group4"), three(255 * (GREY > 99)), 0),
    "animation.gif": (animation(), FIRST_FRAME, 0),
    "animation.webp": (animation(lossless=True), FIRST_FRAME, 0),
    "animation.png": (animation(), FIRST_FRAME, 0),
    "pages.tif": (animation(), FIRST_FRAME, 0),
    "two views.jpg": (animation(format="MPO"), FIRST_FRAME, 1),
    "rgb.jpg": (save(SMOOTH, quality=98, subsampling=0), SMOOTH, 10),
    "grey.jpg": (save(SMOOTH[..., 0], quality=98), three(SMOOTH[..., 0]), 10),
    "cmyk.jpg": (save(Image.fromarray(SMOOTH).convert("CMYK"), quality=98, subsampling=0), SMOOTH, 10),
    "progressive.jpeg": (save(SMOOTH, quality=98, subsampling=0, progressive=True), SMOOTH, 10),
    "cmyk.tif": (save(Image.fromarray(SMOOTH).convert("CMYK")), SMOOTH, 1),
    "named as another.png": (save(RGB, format="BMP"), RGB, 0),
}


def close(found: torch.Tensor, expected, tolerance: float) -> None:
    assert found.dtype == torch.uint8
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy().astype(float), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_file_becomes_rgb(tmp_path, name):
    make, expected, tolerance = CASES[name]
    make(tmp_path / name)
    close(decode.decode(tmp_path / name), expected, tolerance)


@pytest.mark.parametrize("name", ["rgba.png", "rgba.tif", "rgba.webp"])
def test_transparent_pixels_are_laid_on_the_background(tmp_path, name):
    CASES[name][0](tmp_path / name)
    close(decode.decode(tmp_path / name, decode.colour("rgb(10, 200, 30)")), laid(RGB, ALPHA / 255, GREEN), 0.6)


def test_a_background_is_a_colour():
    assert decode.colour("white") == decode.colour("#ffffff") == WHITE
    for wrong in ("", "chartreux", "#12"):
        with pytest.raises(UserError, match=r"--background .*expected a colour"):
            decode.colour(wrong)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_the_camera_is_applied(tmp_path, suffix, orientation):
    # What EXIF calls row 0 and column 0: for each orientation, the edges of the scene at which these lie.
    corner = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    stored = np.full((32, 48, 3), 128, np.uint8)
    stored[:16, :24] = 250  # the first rows and columns are bright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 98, "subsampling": 0} if suffix == "jpg" else LOSSLESS if suffix == "webp" else {}
    Image.fromarray(stored).save(tmp_path / f"a.{suffix}", exif=exif, **options)
    found = decode.decode(tmp_path / f"a.{suffix}")
    assert found.shape == ((3, 48, 32) if orientation > 4 else (3, 32, 48))
    bright = (found[0] > 190).nonzero().float().mean(0) / torch.tensor(found.shape[1:])
    assert tuple((bright > 0.5).int().tolist()) == corner


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (write(b""), "empty"),
        (write(b"this is no picture"), "no image"),
        (write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "no image"),
        (save(np.zeros((3, 3), np.float32), format="TIFF"), "32 bits"),
        (save(np.zeros((3, 3), np.int32), format="TIFF"), "32 bits"),
    ],
)
def test_what_is_no_image_of_8_or_16_bits_is_refused(tmp_path, make, message):
    make(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        decode.decode(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif", "ppm"])
def test_a_file_that_is_cut_short_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RANDOM.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises((OSError, RuntimeError, ValueError, SyntaxError)):
        decode.decode(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif", "ppm"])
def test_pixels_are_counted_before_they_are_read(tmp_path, suffix, monkeypatch):
    """No byte of the content is there: what is refused is refused by the header."""
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(path)
    assert decode.decode(path, max_pixels=H * W).shape == (3, H, W)
    with pytest.raises(ValueError, match=f"{W} × {H} pixels.*--max-pixels {H * W - 1}"):
        decode.decode(path, max_pixels=H * W - 1)


def test_a_bomb_is_not_opened(tmp_path):
    path = tmp_path / "a.png"
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))))
    with pytest.raises(ValueError, match="30,000 × 30,000 pixels"):
        decode.decode(path)
    with path.open("wb") as file:
        file.truncate(10**12)  # takes no room on the disk
    with pytest.raises(ValueError, match=r"1,000,000,000,000 bytes are more than --max-pixels"):
        decode.decode(path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_photographs_are_shrunk_as_far_as_they_may_be(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(decode, "LARGE", 1000)
    path = tmp_path / f"a.{suffix}"
    large = np.asarray(Image.fromarray(RGB).resize((120, 90), Image.Resampling.BICUBIC))
    Image.fromarray(large).save(path, **({"quality": 98, "subsampling": 0} if suffix == "jpg" else {}))
    close(decode.decode(path, enough=45), np.asarray(Image.fromarray(large).reduce(2)), 12)
    assert decode.decode(path, enough=10).shape == (3, 22, 30)  # 4 times smaller, to less than 1000 pixels
    assert decode.decode(path, enough=46).shape == (3, 90, 120)
    assert decode.decode(path).shape == (3, 90, 120)


def test_other_users_of_pillow_keep_its_limit(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    Image.fromarray(RGB).save(tmp_path / "a.bmp")
    decode.decode(tmp_path / "a.bmp")
    with pytest.raises(ValueError, match="pixels"):
        decode.decode(tmp_path / "a.bmp", max_pixels=1)
    assert before == Image.MAX_IMAGE_PIXELS

"""Reading images: ``batches(images, rows)`` gives tensors from memory, or files decoded by worker processes.

``load(name, split)`` finds the data (`sslfast.training.datasets`). Neither augments: that happens to whole batches, in
the method.
"""

import signal
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslfast.training import UserError
from sslfast.training.datasets import KNOWN, Images, load, load_for, printable
from sslfast.training.decode import decode

__all__ = ["KNOWN", "Images", "batches", "epoch_order", "load", "load_for"]

ENOUGH = 4  # shorter side of a file's image, in views: the smallest crops, a tenth of the area, still fill a view


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of samples in an epoch: a permutation of range(count), int64, a function of (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def batches(
    images: Images,
    rows: Iterable[np.ndarray],
    workers: int = 0,
    square: int | None = None,
    corrupt: str = "skip",
    size: int | None = None,
) -> Generator[tuple[Tensor | list[Tensor], Tensor], None, None]:
    """Yield (pixels, ids) for each array of row numbers in ``rows``.

    pixels: uint8 (n, C, H, W); for image files a list of n tensors (3, h, w) of their own sizes, or with ``square`` one
    tensor of centre crops. ids: int64 (n,), the row numbers. A file that cannot be decoded is left out of its batch,
    named and counted in ``images.skipped`` (``corrupt="skip"``), or raises UserError (``"stop"``): a batch may become
    empty. ``workers`` processes decode files; 0 decodes here. ``size``, of the views that will be cut out, lets
    photographs be shrunk while they are read, so that a batch of them fits into memory: see `decode`.
    """
    if isinstance(images.source, Tensor):
        for chosen in rows:
            ids = torch.from_numpy(np.asarray(chosen))
            pixels = images.source[ids]
            yield (_centre_crop(pixels, square) if square else pixels), ids
        return
    loader = torch.utils.data.DataLoader(
        _Files(images.source, images.background, images.max_pixels, square, ENOUGH * (square or size or 0)),
        batch_sampler=[chosen.tolist() for chosen in rows],
        num_workers=workers,
        collate_fn=_pack if workers else list,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    iterator = iter(loader)
    try:
        for batch in iterator:
            good: list[tuple[int, Tensor]] = []
            for row, decoded in _unpack(*batch) if workers else batch:
                if isinstance(decoded, Tensor):
                    good.append((row, decoded))
                elif corrupt == "stop":
                    raise UserError(printable(f"cannot decode {images.source[row]}: {decoded}"))
                elif row not in images.skipped:
                    images.skipped.add(row)
                    said = f"skipped {images.source[row]}: {decoded} ({len(images.skipped)} skipped so far)"
                    print(printable(said), flush=True)
            ids = torch.tensor([row for row, _ in good], dtype=torch.int64)
            decoded_images = [decoded for _, decoded in good]
            if square and not good:
                yield torch.empty(0, 3, square, square, dtype=torch.uint8), ids
            else:
                yield (torch.stack(decoded_images) if square else decoded_images), ids
    finally:  # an error would keep the workers alive until it is forgotten
        if workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]


class _Files(torch.utils.data.Dataset):
    def __init__(
        self, paths: list[Path], background: tuple[int, int, int], max_pixels: int, square: int | None, enough: int
    ):
        self.paths, self.background, self.max_pixels = paths, background, max_pixels
        self.square, self.enough = square, enough

    def __getitem__(self, row: int) -> tuple[int, Tensor | str]:
        """Return (row, image), or (row, why the file cannot be decoded): decoders raise whatever they like."""
        try:
            decoded = decode(self.paths[row], self.background, self.max_pixels, self.enough)
            return row, _centre_crop(decoded, self.square) if self.square else decoded
        except Exception as error:
            return row, " ".join(str(error).split("\n")[0].split()) or type(error).__name__


def _pack(items: list[tuple[int, Tensor | str]]) -> tuple[list[tuple[int, torch.Size | str]], Tensor]:
    """Return (rows with shapes, the bytes of all images one after another, pixel by pixel).

    Each tensor that a worker sends takes a file handle, of which a process may have 1024. It is put into shared memory
    here, where an error finds its way to the main process.
    """
    pixels = [(row, image.permute(1, 2, 0) if isinstance(image, Tensor) else image) for row, image in items]
    flat = [image.flatten() for _, image in pixels if isinstance(image, Tensor)]
    stored = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8)
    return [(row, image.shape if isinstance(image, Tensor) else image) for row, image in pixels], stored.share_memory_()


def _unpack(rows: list[tuple[int, torch.Size | str]], stored: Tensor) -> Iterator[tuple[int, Tensor | str]]:
    at = 0
    for row, shape in rows:
        if isinstance(shape, str):
            yield row, shape
        else:
            yield row, stored[at : at + shape.numel()].view(shape).permute(2, 0, 1)
            at += shape.numel()


def _start_worker(number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its workers itself
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def _centre_crop(pixels: Tensor, size: int) -> Tensor:
    """Cut the middle square out of (…, C, H, W), and resize it to ``size``: so a strip never grows before it is cut."""
    from torchvision.transforms.v2 import functional

    if pixels.shape[-2:] == (size, size):
        return pixels
    side = min(pixels.shape[-2:])
    return functional.resize(functional.center_crop(pixels, [side, side]), [size, size], antialias=True)

"""Image data: small sets as one uint8 tensor in memory, folders of image files decoded by worker processes.

``load(name, split)`` finds the data; ``batches(images, rows)`` reads them. Neither augments: that happens to whole
batches, in the method.
"""

import gzip
import signal
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslfast.training import UserError

KNOWN = ("digits", "fashion-mnist", "cifar10")  # names of data sets, as against folders
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
FASHION_MNIST_CLASSES = [
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Boot"),
]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif"}
IDX_NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@dataclass
class Images:
    """A split of a data set: ``source`` is a uint8 tensor (N, C, H, W), or the paths of N image files."""

    source: Tensor | list[Path]
    labels: Tensor
    """int64, (N,); -1 where the class is unknown."""
    classes: list[str]
    skipped: set[int] = field(default_factory=set)
    """Rows of files that could not be decoded so far."""

    def __len__(self) -> int:
        return len(self.source)

    @property
    def channels(self) -> int:
        return self.source.shape[1] if isinstance(self.source, Tensor) else 3

    @property
    def size(self) -> int:
        """Height and width that a method should use when it is not told: the images' own, 224 for files."""
        return self.source.shape[2] if isinstance(self.source, Tensor) else 224


def load(name: str, split: str, download_folder: str = "~/.cache/sslfast") -> Images:
    """Return the ``train`` or ``test`` split of ``digits``, ``fashion-mnist``, ``cifar10`` or a directory.

    A directory holds either the four idx files of MNIST's kind (plain or .gz) or images: ``train/CLASS/*.jpg`` and
    ``test/CLASS/*.jpg`` (or ``val``), or only ``CLASS/*.jpg``, of which each fifth image becomes the test split. Images
    that lie in no class folder have no label: one can train on them, not evaluate; the test split may be empty. Raises
    UserError when something is missing or broken.
    """
    download = Path(download_folder).expanduser()
    if name == "digits":
        return _digits(split)
    if name == "fashion-mnist":
        return _fashion_mnist(split, download)
    if name == "cifar10":
        return _cifar10(split, download)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"--data {name}: there is no such directory, and no data set of that name "
            "(known: digits, fashion-mnist, cifar10)"
        )
    if any(folder.glob("*-ubyte*")):
        return _idx_folder(folder, split)
    return _image_folder(folder, split)


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of samples in an epoch: a permutation of range(count), int64, a function of (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def batches(
    images: Images, rows: Iterable[np.ndarray], workers: int = 0, square: int | None = None, corrupt: str = "skip"
) -> Iterator[tuple[Tensor | list[Tensor], Tensor]]:
    """Yield (pixels, ids) for each array of row numbers in ``rows``.

    pixels: uint8 (n, C, H, W); for image files a list of n tensors (3, h, w) of their own sizes, or with ``square`` one
    tensor of centre crops. ids: int64 (n,), the row numbers. A file that cannot be decoded is left out of its batch,
    named and counted in ``images.skipped`` (``corrupt="skip"``), or raises UserError (``"stop"``). ``workers``
    processes decode files; 0 decodes here.
    """
    if isinstance(images.source, Tensor):
        for chosen in rows:
            ids = torch.from_numpy(np.asarray(chosen))
            pixels = images.source[ids]
            yield (_centre_crop(pixels, square) if square else pixels), ids
        return
    files = _Files(images.source, square)
    loader = torch.utils.data.DataLoader(
        files,
        batch_sampler=[chosen.tolist() for chosen in rows],
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    for items in loader:
        good = []
        for row, decoded in items:
            if isinstance(decoded, Tensor):
                good.append((row, decoded))
            elif corrupt == "stop":
                raise UserError(f"cannot decode {images.source[row]}: {decoded}")
            elif row not in images.skipped:
                images.skipped.add(row)
                print(f"skipped {images.source[row]}: {decoded} ({len(images.skipped)} skipped so far)", flush=True)
        if not good:
            raise UserError(f"not one of {len(items)} image files could be decoded, {images.source[items[0][0]]} first")
        ids, decoded_images = torch.tensor([row for row, _ in good]), [decoded for _, decoded in good]
        yield (torch.stack(decoded_images) if square else decoded_images), ids


class _Files(torch.utils.data.Dataset):
    def __init__(self, paths: list[Path], square: int | None):
        self.paths, self.square = paths, square

    def __getitem__(self, row) -> tuple[int, Tensor | str]:
        from torchvision.io import ImageReadMode, decode_image

        try:
            decoded = decode_image(str(self.paths[row]), ImageReadMode.RGB, apply_exif_orientation=True)
        except (RuntimeError, OSError) as error:
            return int(row), str(error).splitlines()[0]
        return int(row), _centre_crop(decoded, self.square) if self.square else decoded


def _start_worker(number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its workers itself
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def _centre_crop(pixels: Tensor, size: int) -> Tensor:
    """Resize (…, C, H, W) so that the shorter side is ``size`` and cut out the middle square."""
    from torchvision.transforms.v2 import functional

    if pixels.shape[-2:] == (size, size):
        return pixels
    return functional.center_crop(functional.resize(pixels, [size], antialias=True), [size, size])


def _digits(split: str) -> Images:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels, enlarged to 16×16; each fifth is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 5 == 0) == (split == "test")
    small = torch.from_numpy(digits.images[chosen]).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    return Images(large.round().byte(), torch.from_numpy(digits.target[chosen]), [str(d) for d in range(10)])


def _fashion_mnist(split: str, download: Path) -> Images:
    folders = [FASHION_MNIST_FOLDER, download / "FashionMNIST" / "raw"]
    for folder in folders:
        if folder.is_dir():
            images = _idx_folder(folder, split)
            images.classes = FASHION_MNIST_CLASSES
            return images
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(download), download=True)
    except Exception as error:  # URLError, RuntimeError, OSError: whatever the network brings
        raise UserError(
            f"Fashion-MNIST is not in {folders[0]} nor in {folders[1]}, and the download failed ({error}).\n"
            "Install Debian's package dataset-fashion-mnist, or put the four *-ubyte.gz files of "
            "https://github.com/zalandoresearch/fashion-mnist into a directory and pass it as --data."
        ) from None
    return _fashion_mnist(split, download)


def _cifar10(split: str, download: Path) -> Images:
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(str(download), train=split == "train", download=True)
    except Exception as error:
        raise UserError(
            f"CIFAR-10 is not in {download / 'cifar-10-batches-py'}, and the download failed ({error}).\n"
            f"Put cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html into {download}."
        ) from None
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.tensor(data.targets), data.classes)


def _idx_folder(folder: Path, split: str) -> Images:
    images, labels = (torch.from_numpy(_read_idx(folder, name)) for name in IDX_NAMES[split])
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise UserError(
            f"{folder}: expected n images and n labels, found shapes {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    return Images(images[:, None], labels.long(), [str(c) for c in range(int(labels.max()) + 1)])


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """Read an idx file of unsigned bytes (the format of MNIST), packed by gzip or not."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise UserError(f"{folder} has neither {name} nor {name}.gz")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or cut short ({error}): delete it and fetch it again") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise UserError(f"{path} is not an idx file of unsigned bytes")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", content[4:start]) if len(content) >= start else (0,)
    if len(content) != start + int(np.prod(shape)):
        raise UserError(
            f"{path} is cut short: its header promises {shape}, {start + int(np.prod(shape)):,} bytes, "
            f"and it has {len(content):,}: delete it and fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _image_folder(folder: Path, split: str) -> Images:
    is_split = (folder / "train").is_dir()
    root = folder
    if is_split:
        names = ("train",) if split == "train" else ("test", "val")
        root = next((folder / name for name in names if (folder / name).is_dir()), folder / "test")
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths and split == "train":
        raise UserError(f"{root}: found no images ({', '.join(sorted(IMAGE_SUFFIXES))}) and no idx files in it")
    classes = sorted(p.name for p in (folder / "train" if is_split else folder).iterdir() if p.is_dir())
    if classes and not is_split:
        paths = [p for number, p in enumerate(paths) if (number % 5 == 0) == (split == "test")]
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [numbers.get(p.relative_to(root).parts[0], -1) for p in paths]  # a file outside of folders gets -1
    return Images(paths, torch.tensor(labels, dtype=torch.int64), classes)

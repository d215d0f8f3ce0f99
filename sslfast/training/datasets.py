"""Finding data: `load(name, split)` returns a known data set, a folder of idx files or a folder of image files.

Small sets become one uint8 tensor in memory; of image files only the paths are collected. How a folder of images is
understood is said in `Images.found`, one line for the person who starts a training:

- Folders in the top folder are class folders, unless one of them is called like a training split (`TRAIN_NAMES`, in any
  case) and all others like test splits (`TEST_NAMES`); then class folders are within these.
- Links are followed. Within a class folder each folder is read once, so that links in a circle end.
- Hidden files and folders, files that are no images by their suffix, and folders without images are left out.
"""

import gzip
import math
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslfast.training import UserError, decode

KNOWN = ("digits", "fashion-mnist", "cifar10")  # names of data sets, as against folders
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
FASHION_MNIST_CLASSES = [
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Boot"),
]
IDX_NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation", "eval", "evaluation")  # the first with labels is taken
MAX_UNPACKED = 4_000_000_000


@dataclass
class Images:
    """A split of a data set: ``source`` is a uint8 tensor (N, C, H, W), or the paths of N image files."""

    source: Tensor | list[Path]
    labels: Tensor
    """int64, (N,); -1 where the class is unknown."""
    classes: list[str]
    found: str = ""
    """What was found, and what left out, in one line."""
    background: tuple[int, int, int] = (255, 255, 255)
    """What transparent pixels of image files are laid on."""
    max_pixels: int = decode.MAX_PIXELS
    """Image files of more are not read."""
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


def load(
    name: str,
    split: str,
    download_folder: str = "~/.cache/sslfast",
    background: str = "white",
    max_pixels: int = decode.MAX_PIXELS,
    max_unpacked: int = MAX_UNPACKED,
) -> Images:
    """Return the ``train`` or ``test`` split of ``digits``, ``fashion-mnist``, ``cifar10`` or a directory.

    A directory holds either the four idx files of MNIST's kind (plain or .gz) or images: ``train/CLASS/*.jpg`` and
    ``test/CLASS/*.jpg`` (or other usual names of splits), or only ``CLASS/*.jpg``, of which each fifth image becomes
    the test split. Images that lie in no class folder, or in one that the training split lacks, have no label: one can
    train on them, not evaluate. The test split may be empty.

    ``background`` is a colour, on which transparent pixels are laid; files of more than ``max_pixels`` are not read,
    nor .gz files that unpack to more than ``max_unpacked`` bytes. Raises UserError when something is missing, broken
    or can be understood in two ways.
    """
    colour = decode.colour(background)
    download = Path(download_folder).expanduser()
    folder = Path(name).expanduser()
    if name == "digits":
        images = _digits(split)
    elif name == "fashion-mnist":
        images = _fashion_mnist(split, download, max_unpacked)
    elif name == "cifar10":
        images = _cifar10(split, download)
    elif not name or not folder.is_dir():
        raise UserError(
            f"--data {name or repr(name)}: there is no such directory, and no data set of that name "
            f"(known: {', '.join(KNOWN)})"
        )
    elif any(folder.glob("*-ubyte*")):
        images = _idx_folder(folder, split, max_unpacked)
    else:
        images = _image_folder(folder, split)
    if split == "train" and not len(images):
        raise UserError(f"{name} has no training images")
    if not images.found:
        images.found = f"{name}: {_count(len(images), f'{split} image')} of {_count(len(images.classes), 'class')}"
        images.found = images.found.replace("train image", "training image")
    images.found = printable(images.found)
    images.background, images.max_pixels = colour, max_pixels
    return images


def load_for(settings: Mapping[str, Any], split: str) -> Images:
    """Return a split of the data that a method's settings, or those in a run's config.json, ask for."""
    options = ("background", "max_pixels", "max_unpacked")  # runs of version 0.1 have none of them
    return load(
        settings["data"], split, settings["data_dir"], **{name: settings[name] for name in options if name in settings}
    )


def _digits(split: str) -> Images:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels, enlarged to 16×16; each fifth is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 5 == 0) == (split == "test")
    small = torch.from_numpy(digits.images[chosen]).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    return Images(large.round().byte(), torch.from_numpy(digits.target[chosen]), [str(d) for d in range(10)])


def _fashion_mnist(split: str, download: Path, max_unpacked: int) -> Images:
    folders = [FASHION_MNIST_FOLDER, download / "FashionMNIST" / "raw"]
    for folder in folders:
        if folder.is_dir():
            images = _idx_folder(folder, split, max_unpacked)
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
    return _fashion_mnist(split, download, max_unpacked)


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


# ---------------------------------------------------------------------------------------------------- idx files


def _idx_folder(folder: Path, split: str, max_unpacked: int) -> Images:
    paths = [_idx_path(folder, name) for name in IDX_NAMES[split]]
    if split == "test" and not any(paths) and any(_idx_path(folder, name) for name in IDX_NAMES["train"]):
        return Images(torch.empty(0, 1, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), [])
    for path, name in zip(paths, IDX_NAMES[split], strict=True):
        if path is None:
            raise UserError(f"{folder} has neither {name} nor {name}.gz")
    images, labels = (torch.from_numpy(_read_idx(path, max_unpacked)) for path in paths if path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise UserError(
            f"{folder}: expected n images and n labels, found shapes {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    if len(images) and not images.numel():
        raise UserError(f"{paths[0]}: its images have no pixels, but the shape {tuple(images.shape[1:])}")
    classes = int(labels.max()) + 1 if len(labels) else 0
    return Images(images[:, None], labels.long(), [str(c) for c in range(classes)])


def _idx_path(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(path: Path, max_unpacked: int) -> np.ndarray:
    """Read an idx file of unsigned bytes (the format of MNIST), packed by gzip or not; never more than it promises."""
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08":
                raise UserError(f"{path} is not an idx file of unsigned bytes")
            dimensions = head[3]
            sizes = file.read(4 * dimensions)
            shape = struct.unpack(f">{dimensions}I", sizes) if len(sizes) == 4 * dimensions else (0,)
            start, expected = 4 + 4 * dimensions, math.prod(shape)
            if dimensions > 64 or len(sizes) < 4 * dimensions:
                raise UserError(f"{path} is cut short, or no idx file: its header promises {dimensions} dimensions")
            if packed and start + expected > max_unpacked:
                raise UserError(
                    f"{path} would unpack to {start + expected:,} bytes: expected at most --max-unpacked "
                    f"{max_unpacked:,}"
                )
            if not packed and start + expected != path.stat().st_size:
                raise UserError(_wrong_length(path, shape, start + expected, f"{path.stat().st_size:,}"))
            content = np.empty(expected, np.uint8)
            got = 0
            while got < expected and (part := file.read(min(expected - got, 2**24))):
                content[got : got + len(part)] = np.frombuffer(part, np.uint8)
                got += len(part)
            if got < expected or file.read(1):
                has = f"{start + got:,}" if got < expected else "more"
                raise UserError(_wrong_length(path, shape, start + expected, has))
            return content.reshape(shape)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or cut short ({error}): delete it and fetch it again") from None
    except MemoryError:
        raise UserError(f"{path}: its header promises {shape}, more than fits into memory") from None


def _wrong_length(path: Path, shape: tuple[int, ...], promised: int, has: str) -> str:
    return (
        f"{path} is cut short, or no idx file: its header promises {shape}, {promised:,} bytes, and it has {has}: "
        "delete it and fetch it again"
    )


# ----------------------------------------------------------------------------------------------- folders of images


def _image_folder(folder: Path, split: str) -> Images:
    left_out: Counter[str] = Counter()
    train, tests, notes = _splits(folder)
    if train is None:
        return _class_folders(folder, split, left_out, notes)
    loose = len(_scan(folder, left_out)[1])
    paths, labels, classes = _labelled(train, folder, left_out, notes)
    if not paths and split == "train":
        raise UserError(f"{train}: found no images ({', '.join(sorted(decode.SUFFIXES))}){_listed(left_out)}")
    test_paths: list[Path] = []
    test_labels: list[str] = []
    read = [(test, *_labelled(test, folder, left_out, notes)) for test in tests]
    taken = next((one for one in read if set(one[2]) & set(classes)), read[0] if read else None)
    found = f"{folder}: {_count(len(paths), 'training image')}{_of(classes)} in {train.name}/, "
    if taken:
        test, test_paths, test_labels, _ = taken
        found += f"{_count(len(test_paths), 'test image')} in {test.name}/"
    else:
        found += "no test images"
    unknown = Counter(name for name in test_labels if name and name not in classes)
    if unknown:
        notes.append(
            f"{_count(unknown.total(), 'test image')} of {_count(len(unknown), 'class')} that {train.name}/ lacks "
            f"({_some(unknown)}) have no label"
        )
    for one in read:
        if one is not taken:
            notes.append(f"{one[0].name}/ is not used ({_count(len(one[1]), 'image')})")
    if loose:
        notes.append(f"{_count(loose, 'image')} outside of these folders left out")
    found = "; ".join([found, *notes]) + _listed(left_out)
    numbers = {name: number for number, name in enumerate(classes)}
    if split == "test":
        paths, labels = test_paths, test_labels
    return Images(paths, torch.tensor([numbers.get(name, -1) for name in labels], dtype=torch.int64), classes, found)


def _class_folders(folder: Path, split: str, left_out: Counter[str], notes: list[str]) -> Images:
    paths, labels, classes = _labelled(folder, folder, left_out, notes)
    if not paths and split == "train":
        raise UserError(
            f"{folder}: found no images ({', '.join(sorted(decode.SUFFIXES))}) and no idx files in it"
            f"{_listed(left_out)}"
        )
    held_out = [bool(classes) and number % 5 == 0 for number in range(len(paths))]
    train = [name for name, out in zip(labels, held_out, strict=True) if not out]
    lacking = set(classes) - set(train)
    if lacking:
        notes.append(f"{_count(len(lacking), 'class')} with test images only ({_some(lacking)})")
    found = f"{folder}: {_count(len(train), 'training image')}{_of(classes)}, "
    found += f"{_count(sum(held_out), 'test image')} (each fifth of all)" if classes else "no test images"
    numbers = {name: number for number, name in enumerate(classes)}
    chosen = [out == (split == "test") for out in held_out]
    return Images(
        [path for path, mine in zip(paths, chosen, strict=True) if mine],
        torch.tensor([numbers.get(n, -1) for n, mine in zip(labels, chosen, strict=True) if mine], dtype=torch.int64),
        classes,
        "; ".join([found, *notes]) + _listed(left_out),
    )


def _splits(folder: Path) -> tuple[Path | None, list[Path], list[str]]:
    """Return (the folder of training images, those of test images, remarks), or (None, [], …) for class folders."""
    nothing: Counter[str] = Counter()  # all is counted when it is read
    seen = _above(folder)
    tops = [path for path in _scan(folder, nothing)[0] if _identity(path) not in seen]
    trains = [path for path in tops if path.name.lower() in TRAIN_NAMES]
    tests = sorted(
        (path for path in tops if path.name.lower() in TEST_NAMES),
        key=lambda path: (TEST_NAMES.index(path.name.lower()), path.name),
    )
    others = [path for path in tops if path not in trains + tests and _has_images(path, seen)]
    tests = [path for path in tests if _has_images(path, seen)]
    if not others and (trains or tests):
        if not trains:
            raise UserError(
                f"{folder} has {_names(tests)}, but no folder of training images ({' or '.join(TRAIN_NAMES)}): pass "
                "one of these folders as --data, or rename them if these are classes"
            )
        full = [path for path in trains if _has_images(path, seen)]
        if len(full) > 1:
            raise UserError(f"{folder} has {_names(full)}: either could be the training images; move one away")
        return (full or trains)[0], tests, []
    trains = [path for path in trains if _has_images(path, seen)]
    if not trains:
        return None, [], []
    inner = any(_has_images(path, seen) for path in _scan(trains[0], nothing)[0])
    if tests and inner:
        raise UserError(
            f"{folder}: {_names([*trains, *tests])} look like splits, {_names(others)} like classes beside them. If "
            "the former are splits, move the latter elsewhere; if all are classes, rename the former"
        )
    return None, [], [f"{_names([*trains, *tests])} counted among the classes, since {_names(others)} lie beside"]


def _labelled(
    root: Path, folder: Path, left_out: Counter[str], notes: list[str]
) -> tuple[list[Path], list[str], list[str]]:
    """Return all images below a split's folder, sorted; the class folder of each, or ""; and the sorted classes."""
    above = _above(folder) | {_identity(root)}
    tops, loose = _scan(root, left_out)
    found, empty = [(path, "") for path in loose], []
    for top in tops:
        mine = list(_below(top, set(above), left_out))
        found += [(path, top.name) for path in mine]
        if not mine:
            empty.append(top.name)
    if empty:
        notes.append(f"no images in {_some(empty)}")
    found.sort()
    return [path for path, _ in found], [name for _, name in found], sorted({name for _, name in found} - {""})


def _below(top: Path, seen: set[tuple[int, int]], left_out: Counter[str]) -> Iterator[Path]:
    """Yield the image files in a folder and below it; folders in ``seen``, to which it adds, are not read again."""
    folders, links = [top], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)  # links last: a folder goes by its own name, if it has one
        identity = _identity(folder)
        if identity in seen:
            left_out["link to what is read already"] += 1
            continue
        seen.add(identity)
        inner, files = _scan(folder, left_out)
        for path in inner:
            (links if path.is_symlink() else folders).append(path)
        yield from files


def _has_images(folder: Path, seen: set[tuple[int, int]]) -> bool:
    return any(True for _ in _below(folder, set(seen), Counter()))


def _scan(folder: Path, left_out: Counter[str]) -> tuple[list[Path], list[Path]]:
    """Return (folders, image files) of a folder, links to such included, both sorted; count what is left out."""
    folders, files = [], []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        left_out["folder that cannot be opened"] += 1
        return [], []
    for entry in entries:
        try:
            kind = "folder" if entry.is_dir() else "file" if entry.is_file() else "neither"
        except OSError:  # links in a circle
            kind = "neither"
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            left_out["hidden folder" if kind == "folder" else "hidden file"] += 1
        elif kind == "folder":
            folders.append(folder / entry.name)
        elif kind == "neither":
            left_out["link to nothing" if entry.is_symlink() else "special file"] += 1
        elif suffix in decode.SUFFIXES:
            files.append(folder / entry.name)
        else:
            left_out[f"file of {suffix}" if suffix else "file without a suffix"] += 1
    return folders, files


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _above(folder: Path) -> set[tuple[int, int]]:
    """Return the identities of a folder and of all that hold it: links to these would lead back."""
    real = folder.resolve()
    return {_identity(path) for path in (real, *real.parents)}


# ---------------------------------------------------------------------------------------------- words of `found`


def printable(text: object) -> str:
    """Return a text of names as one line that every terminal takes: names of files may be any bytes."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text))


def _count(number: int, thing: str) -> str:
    """Return "3 images"; plurals are those of the word before " of ", " that " and the like."""
    if number == 1:
        return f"1 {thing}"
    head, *rest = re.split(r"(?= of | that | to | without |, )", thing, maxsplit=1)
    return f"{number:,} {head}{'es' if head.endswith('s') else 's'}{''.join(rest)}"


def _of(classes: list[str]) -> str:
    if not classes:
        return ""
    return f" of {_count(len(classes), 'class')}{f' ({_some(classes)})' if len(classes) <= 6 else ''}"


def _some(names: Iterable[str]) -> str:
    first, *_ = names = sorted(names)
    return ", ".join(names) if len(names) <= 6 else f"{first}, … {names[-1]}"


def _names(paths: Iterable[Path]) -> str:
    return _some(f"{path.name}/" for path in paths)


def _listed(left_out: Counter[str]) -> str:
    """Return "; left out: 20 files of .txt, …", the most frequent first, or "" if there is nothing to say."""
    kinds = [_count(number, thing) for thing, number in left_out.most_common()]
    return f"; left out: {', '.join(kinds[:8])}{', …' if len(kinds) > 8 else ''}" if kinds else ""

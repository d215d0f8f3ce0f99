"""How folders of images and idx files are understood, what is said about them, and what is refused."""

import gzip
import os
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sslfast.evaluation import plots
from sslfast.training import UserError, data, datasets

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding")

IMAGE = "x.png"


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / IMAGE
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    return path


def fill(folder: Path, image: Path, count: int = 5) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        shutil.copy(image, folder / f"{number}.png")


def both(folder: Path) -> tuple[data.Images, data.Images]:
    train, test = (data.load(str(folder), split) for split in ("train", "test"))
    assert train.found == test.found
    assert "\n" not in train.found
    return train, test


def by_class(images: data.Images) -> dict[str, int]:
    names = [images.classes[label] if label >= 0 else "" for label in images.labels.tolist()]
    return {name: names.count(name) for name in sorted(set(names))}


def test_a_class_may_be_called_train(tmp_path, image):
    for name in ("bus", "car", "train", "truck"):
        fill(tmp_path / name, image)
    train, test = both(tmp_path)
    assert by_class(train) == dict.fromkeys(("bus", "car", "train", "truck"), 4)
    assert (len(train), len(test)) == (16, 4)
    assert "16 training images of 4 classes (bus, car, train, truck), 4 test images" in train.found
    assert "train/ counted among the classes, since bus/, car/, truck/ lie beside" in train.found


def test_classes_called_like_both_splits_if_all_are_alike(tmp_path, image):
    for name in ("bus", "train", "test"):
        fill(tmp_path / name, image)
    assert both(tmp_path)[0].classes == ["bus", "test", "train"]


@pytest.mark.parametrize("name", ["train", "Train", "TRAINING", "training"])
@pytest.mark.parametrize("other", ["test", "Testing", "VAL", "valid", "validation", "Eval", "evaluation"])
def test_splits_by_any_usual_name(tmp_path, image, name, other):
    for number, split in enumerate((name, other)):
        for kind in ("a", "b"):
            fill(tmp_path / split / kind, image, 3 - number)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("a folder without images is no class, and no split")
    train, test = both(tmp_path)
    assert (by_class(train), by_class(test)) == ({"a": 3, "b": 3}, {"a": 2, "b": 2})
    assert f"6 training images of 2 classes (a, b) in {name}/, 4 test images in {other}/" in train.found


def test_the_split_with_labels_is_taken_and_others_are_named(tmp_path, image):
    fill(tmp_path / "train" / "a", image)
    fill(tmp_path / "val" / "a", image, 2)
    fill(tmp_path / "test", image, 3)  # as in a competition
    train, test = both(tmp_path)
    assert by_class(test) == {"a": 2}
    assert "test/ is not used (3 images)" in train.found


def test_a_test_class_that_training_lacks_is_told(tmp_path, image):
    fill(tmp_path / "train" / "a", image)
    fill(tmp_path / "test" / "a", image, 2)
    fill(tmp_path / "test" / "new", image, 3)
    train, test = both(tmp_path)
    assert by_class(test) == {"": 3, "a": 2}
    assert "3 test images of 1 class that train/ lacks (new) have no label" in train.found


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["val/a", "test/a"], "has test/, val/, but no folder of training images"),
        (["train/a", "Training/a"], "has Training/, train/: either could be the training images"),
        (
            ["train/a", "train/b", "test/a", "raw"],
            "test/, train/ look like splits, raw/ like classes beside",
        ),
    ],
)
def test_what_can_be_understood_in_two_ways_is_refused(tmp_path, image, folders, message):
    for folder in folders:
        fill(tmp_path / folder, image)
    with pytest.raises(UserError, match=message):
        data.load(str(tmp_path), "train")


def test_what_is_left_out_is_told(tmp_path, image):
    fill(tmp_path / "a", image)
    fill(tmp_path / "b", image)
    (tmp_path / "a" / ".hidden.png").write_bytes(image.read_bytes())
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("")
    (tmp_path / "a" / "more.TXT").write_text("")
    (tmp_path / "a" / "README").write_text("")
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "b" / "itself.png").symlink_to("itself.png")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    (tmp_path / "a" / "folder.png").mkdir()
    train, test = both(tmp_path)
    assert (len(train), len(test)) == (8, 2)
    told = ["2 files of .txt", "1 file without a suffix", "1 hidden file", "1 hidden folder", "2 links to nothing"]
    for text in [*told, "1 special file", "no images in empty"]:
        assert text in train.found


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".webp"])
def test_all_these_suffixes_are_images(tmp_path, suffix):
    for number in range(4):
        path = tmp_path / "a" / f"{number}{suffix}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((6, 6), 40 * number, np.uint8)).save(path)
    images = data.load(str(tmp_path / "a"), "train")
    pixels, ids = next(data.batches(images, [np.arange(4)], square=6))
    assert ids.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(pixels.float().mean((1, 2, 3)), np.arange(4) * 40, atol=3)


def test_links_are_followed_and_circles_end(tmp_path, image):
    fill(tmp_path / "elsewhere" / "a", image)
    fill(tmp_path / "elsewhere" / "b" / "deep", image)
    root = tmp_path / "root"
    fill(root / "c", image)
    (root / "a").symlink_to(tmp_path / "elsewhere" / "a")
    (root / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (root / "c" / "up").symlink_to("..")
    (root / "c" / "further up").symlink_to(tmp_path)
    (root / "c" / "again").symlink_to("again too")
    (root / "c" / "again too").mkdir()
    (root / "c" / "one.png").symlink_to(root / "c" / "0.png")
    (tmp_path / "elsewhere" / "b" / "deep" / "back").symlink_to(tmp_path / "elsewhere" / "b")
    (root / "round").symlink_to(root)
    linked = tmp_path / "linked root"
    linked.symlink_to(root)
    for folder in (root, linked):
        train, test = both(folder)
        counts = {name: by_class(train)[name] + by_class(test)[name] for name in "abc"}
        assert counts == {"a": 5, "b": 5, "c": 6}
        assert train.classes == ["a", "b", "c"]
        assert "5 links to what is read already" in train.found


def test_two_classes_may_be_links_to_one_folder(tmp_path, image):
    fill(tmp_path / "train" / "a", image)
    (tmp_path / "train" / "b").symlink_to("a")
    (tmp_path / "test").symlink_to("train")
    train, test = both(tmp_path)
    assert by_class(train) == by_class(test) == {"a": 5, "b": 5}


NAMES = st.sampled_from(["a", "b", "Train", "train", "test", "valid", ".hidden", "x.png"])
PLACES = st.lists(NAMES, min_size=0, max_size=3).map(lambda parts: "/".join(parts))


@settings(max_examples=60, deadline=None)
@given(files=st.lists(PLACES, min_size=1, max_size=6), links=st.lists(st.tuples(PLACES, NAMES, PLACES), max_size=3))
def test_any_tree_is_understood_or_refused(image, files, links):
    """No image is in both splits, none twice under one class, labels are those of folders, and all ends."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for number, folder in enumerate(files):
            (root / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(image, root / folder / f"{number}.png")
        for where, name, target in links:
            if (root / where).is_dir() and not os.path.lexists(root / where / name):
                (root / where / name).symlink_to(root / target)
        try:
            train, test = both(root)
        except UserError:
            return
        assert not set(train.source) & set(test.source)
        for images in (train, test):
            files_of_classes = set()
            for path, label in zip(images.source, images.labels.tolist(), strict=True):
                assert path.is_file()
                assert not any(part.startswith(".") for part in path.relative_to(root).parts)
                assert label < len(images.classes)
                assert label < 0 or images.classes[label] in path.relative_to(root).parts[:2]
                files_of_classes.add((path.resolve(), label, path.relative_to(root).parts[:-1][:2]))
            assert len(files_of_classes) == len(images)


def test_names_may_be_any_bytes(tmp_path, image, capsys, monkeypatch):
    for name in (b"caf\xe9", b"two\nlines", b"$\\frac", b"_hidden"):
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        fill(folder, image)
    train, _ = both(tmp_path)
    assert len(train.classes) == 4
    train.found.encode()
    train.source[0].write_bytes(b"")
    next(data.batches(train, [np.arange(2)]))
    assert len(capsys.readouterr().out.encode().splitlines()) == 1
    with pytest.raises(UserError) as refused:
        next(data.batches(train, [np.arange(2)], corrupt="stop"))
    str(refused.value).encode()
    monkeypatch.setattr("sklearn.manifold.TSNE.fit_transform", lambda self, points: points[:, :2])
    features = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    plots.embedding_map(features, torch.arange(8) % 4, train.classes, tmp_path / "map.png")
    pixels = torch.zeros(4, 1, 3, 4, 4, dtype=torch.uint8)
    labels = torch.arange(4)
    plots.neighbour_sheet(pixels[:, 0], labels, pixels, labels[:, None], train.classes, tmp_path / "sheet.png")


def test_one_image_is_no_training_set(tmp_path, image):
    fill(tmp_path / "a", image, 1)
    with pytest.raises(UserError, match="has no training images"):
        data.load(str(tmp_path), "train")
    assert len(data.load(str(tmp_path), "test")) == 1


def test_no_name_is_no_folder():
    with pytest.raises(UserError, match="--data '': there is no such directory"):
        data.load("", "train")


def test_what_was_found_in_memory_is_told_too():
    assert data.load("digits", "train").found == "digits: 1,437 training images of 10 classes"


def test_settings_of_a_run_say_how_to_read(tmp_path, image):
    fill(tmp_path / "a", image)
    asked = {"data": str(tmp_path), "data_dir": "~", "background": "black", "max_pixels": 7, "max_unpacked": 9}
    images = data.load_for(asked, "train")
    assert (images.background, images.max_pixels) == ((0, 0, 0), 7)
    old = {"data": str(tmp_path), "data_dir": "~"}  # as version 0.1 wrote it
    assert data.load_for(old, "train").background == (255, 255, 255)
    with pytest.raises(UserError, match="--background"):
        data.load_for({**asked, "background": "nothing"}, "train")


# ---------------------------------------------------------------------------------------------------- idx files


def idx(folder: Path, split: str, images: tuple[int, ...], suffix: str = "") -> None:
    for name, shape in zip(datasets.IDX_NAMES[split], (images, images[:1]), strict=True):
        content = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + bytes(int(np.prod(shape)))
        (folder / (name + suffix)).write_bytes(gzip.compress(content) if suffix else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_of_no_images(tmp_path, suffix):
    idx(tmp_path, "train", (4, 6, 6), suffix=suffix)
    assert len(data.load(str(tmp_path), "test")) == 0  # there are no such files
    idx(tmp_path, "test", (0, 6, 6), suffix=suffix)
    test = data.load(str(tmp_path), "test")
    assert (len(test), test.classes) == (0, [])
    idx(tmp_path, "train", (0, 6, 6), suffix=suffix)
    with pytest.raises(UserError, match="has no training images"):
        data.load(str(tmp_path), "train")
    idx(tmp_path, "train", (4, 0, 6), suffix=suffix)
    with pytest.raises(UserError, match=r"its images have no pixels, but the shape \(0, 6\)"):
        data.load(str(tmp_path), "train")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("shape", [(2**31, 2**31, 4), (2**32 - 1,) * 3, (1,) * 65, (1,) * 255], ids=len)
def test_idx_headers_that_promise_too_much(tmp_path, suffix, shape):
    """The product of the first wraps to 0 in 64 bits; arrays have 64 dimensions at most."""
    idx(tmp_path, "train", (1, 6, 6), suffix=suffix)
    content = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + b"x"
    path = tmp_path / (datasets.IDX_NAMES["train"][0] + suffix)
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(UserError, match=r"its header promises|would unpack to"):
        data.load(str(tmp_path), "train", max_unpacked=2**62)


class Endless:
    """A packed file that never ends: who reads on is noticed."""

    def __init__(self, head: bytes):
        self.head, self.given = head, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self, count: int) -> bytes:
        part, self.head = self.head[:count], self.head[count:]
        self.given += count
        assert self.given < 5000, "read more than the header promises"
        return part + bytes(count - len(part))


def test_a_packed_file_is_read_no_further_than_its_header_says(tmp_path, monkeypatch):
    idx(tmp_path, "train", (1, 6, 6), suffix=".gz")
    monkeypatch.setattr(datasets.gzip, "open", lambda path: Endless(struct.pack(">HBB3I", 0, 8, 3, 4, 32, 32)))
    with pytest.raises(UserError, match="4,112 bytes, and it has more"):
        data.load(str(tmp_path), "train")


def test_what_a_packed_file_may_become_is_limited(tmp_path):
    idx(tmp_path, "train", (10, 6, 6), suffix=".gz")
    assert len(data.load(str(tmp_path), "train", max_unpacked=376)) == 10
    with pytest.raises(UserError, match="would unpack to 376 bytes: expected at most --max-unpacked 375"):
        data.load(str(tmp_path), "train", max_unpacked=375)

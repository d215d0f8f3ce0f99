"""Where data is found, how it is read, and what a person is told when it is missing or broken."""

import gzip
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import write_jpeg, write_png

from sslfast.training import UserError, data, datasets

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding")


def write_idx(path, array):
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx_folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, (images, labels) in datasets.IDX_NAMES.items():
        count = 30 if split == "train" else 10
        write_idx(tmp_path / f"{images}.gz", rng.integers(0, 256, (count, 28, 28), np.uint8))
        write_idx(tmp_path / labels, np.arange(count, dtype=np.uint8) % 3)
    return tmp_path


@pytest.fixture
def image_folder(tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        for shade, name in ((30, "dark"), (220, "light")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                picture = torch.full((3, 20 + number, 30), shade, dtype=torch.uint8)
                write_jpeg(picture, str(tmp_path / split / name / f"{number}.jpg"))
    return tmp_path


def test_digits_need_nothing():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert len(train) + len(test) == 1797
    assert len(test) == 360
    assert train.source.shape[1:] == (1, 16, 16)
    assert train.source.dtype == torch.uint8
    assert train.source.max() == 255
    assert set(test.labels.tolist()) == set(range(10))
    assert train.labels.dtype == torch.int64
    assert not {row.numpy().tobytes() for row in train.source} & {row.numpy().tobytes() for row in test.source}


@pytest.mark.skipif(not datasets.FASHION_MNIST_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian():
    test = data.load("fashion-mnist", "test")
    assert test.source.shape == (10_000, 1, 28, 28)
    assert test.labels.bincount().tolist() == [1000] * 10
    assert test.classes[int(test.labels[0])] == "Boot"


def test_idx_files_packed_or_not(idx_folder):
    train, test = data.load(str(idx_folder), "train"), data.load(str(idx_folder), "test")
    assert train.source.shape == (30, 1, 28, 28)
    assert len(test) == 10
    assert train.classes == ["0", "1", "2"]
    assert torch.equal(train.source[:, 0].float().mean(), train.source.float().mean())
    assert train.source.float().std() > 60


def test_fashion_mnist_by_download(monkeypatch, tmp_path, idx_folder):
    """What torchvision would fetch is used where it puts it; without a network the person learns what to do."""
    monkeypatch.setattr(datasets, "FASHION_MNIST_FOLDER", tmp_path / "nowhere")
    folder = tmp_path / "downloads"

    def download(root, download):
        target = folder / "FashionMNIST" / "raw"
        target.mkdir(parents=True)
        for path in idx_folder.glob("*-ubyte*"):
            (target / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", download)
    assert len(data.load("fashion-mnist", "train", str(folder))) == 30

    def fail(root, download):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", fail)
    with pytest.raises(UserError, match=r"nowhere nor in .*no network(.|\n)*dataset-fashion-mnist"):
        data.load("fashion-mnist", "train", str(tmp_path / "empty"))


def test_cifar10(monkeypatch, tmp_path):
    class Cifar:
        classes = ("cat", "dog")

        def __init__(self, root, train, download):
            if "broken" in root:
                raise RuntimeError("no network")
            self.data, self.targets = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3), [1, 0]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Cifar)
    images = data.load("cifar10", "test", str(tmp_path))
    assert images.source.shape == (2, 3, 32, 32)
    assert images.labels.tolist() == [1, 0]
    assert images.source[1, 2, 5, 7] == Cifar("", True, True).data[1, 5, 7, 2]
    with pytest.raises(UserError, match=r"broken.*no network(.|\n)*cifar-10-python.tar.gz"):
        data.load("cifar10", "train", str(tmp_path / "broken"))


def test_missing_idx_file_is_named(idx_folder):
    (idx_folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"has neither train-labels-idx1-ubyte nor train-labels-idx1-ubyte.gz"):
        data.load(str(idx_folder), "train")


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("keep", [0, 3, 6, 20])
def test_truncated_idx_file_is_named(idx_folder, name, keep):
    path = idx_folder / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{name} is (damaged|cut short|not an idx file)"):
        data.load(str(idx_folder), "train")


def test_images_and_labels_must_agree(idx_folder):
    write_idx(idx_folder / "train-labels-idx1-ubyte", np.zeros(29, np.uint8))
    with pytest.raises(UserError, match=r"found shapes \(30, 28, 28\) and \(29,\)"):
        data.load(str(idx_folder), "train")


def test_unknown_name_and_empty_directory(tmp_path):
    with pytest.raises(UserError, match=r"no such directory, and no data set of that name .known: digits"):
        data.load("fashion-minst", "train")
    with pytest.raises(UserError, match="found no images"):
        data.load(str(tmp_path), "train")


def test_image_folder_with_splits(image_folder):
    train, test = data.load(str(image_folder), "train"), data.load(str(image_folder), "test")
    assert (len(train), len(test)) == (12, 4)
    assert train.classes == ["dark", "light"]
    pixels, ids = next(data.batches(train, [np.array([0, 11, 3])]))
    assert ids.tolist() == [0, 11, 3]
    assert [tuple(p.shape) for p in pixels] == [(3, 20, 30), (3, 25, 30), (3, 23, 30)]
    assert [round(p.float().mean().item()) for p in pixels] == [30, 220, 30]
    assert train.labels[ids].tolist() == [0, 1, 0]


def test_image_folder_without_splits_keeps_every_fifth_for_testing(image_folder):
    train, test = (data.load(str(image_folder / "train"), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (9, 3)
    assert not set(train.source) & set(test.source)
    assert train.classes == test.classes == ["dark", "light"]


def test_image_folder_may_lack_a_test_split(image_folder):
    shutil.rmtree(image_folder / "test")
    assert len(data.load(str(image_folder), "train")) == 12
    assert len(data.load(str(image_folder), "test")) == 0


def test_flat_folder_has_no_labels(image_folder):
    flat = data.load(str(image_folder / "train" / "dark"), "train")
    assert len(flat) == 6
    assert flat.classes == []
    assert flat.labels.tolist() == [-1] * 6


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_decode_the_same_in_the_same_order(image_folder, workers):
    images = data.load(str(image_folder), "train")
    rows = [np.array([4, 2, 9]), np.array([0, 11, 7])]
    got = list(data.batches(images, rows, workers))
    assert [ids.tolist() for _, ids in got] == [[4, 2, 9], [0, 11, 7]]
    assert [len(pixels) for pixels, _ in got] == [3, 3]


def test_reading_leaves_the_random_state_alone(image_folder):
    images = data.load(str(image_folder), "train")
    before = torch.get_rng_state()
    list(data.batches(images, [np.array([0, 1])], workers=1))
    assert torch.equal(before, torch.get_rng_state())


def test_grey_and_transparent_images_become_rgb(tmp_path):
    (tmp_path / "a").mkdir()
    write_png(torch.full((1, 8, 8), 90, dtype=torch.uint8), str(tmp_path / "a" / "grey.png"))
    write_png(torch.full((3, 8, 8), 90, dtype=torch.uint8), str(tmp_path / "a" / "rgb.png"))
    images = data.Images(sorted(tmp_path.rglob("*.png")), torch.zeros(2), ["a"])
    pixels, _ = next(data.batches(images, [np.array([0, 1])], square=8))
    assert pixels.shape == (2, 3, 8, 8)
    assert (pixels == 90).all()


def test_corrupt_file_is_skipped_counted_and_named(image_folder, capsys):
    images = data.load(str(image_folder), "train")
    images.source[1].write_bytes(images.source[1].read_bytes()[:40])
    images.source[7].write_text("this is no picture")
    images.source[8].unlink()
    for _ in range(2):
        got = list(data.batches(images, [np.arange(6), np.arange(6, 12)]))
        assert [ids.tolist() for _, ids in got] == [[0, 2, 3, 4, 5], [6, 9, 10, 11]]
    assert images.skipped == {1, 7, 8}
    said = capsys.readouterr().out
    assert all(said.count(str(images.source[row])) == 1 for row in (1, 7))
    assert "3 skipped so far" in said


def test_corrupt_file_stops_on_demand(image_folder):
    images = data.load(str(image_folder), "train")
    images.source[7].write_text("this is no picture")
    with pytest.raises(UserError, match=str(images.source[7])):
        list(data.batches(images, [np.arange(12)], corrupt="stop"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_without_one_good_file_is_empty(image_folder, workers):
    images = data.load(str(image_folder), "train")
    for row in (0, 1):
        images.source[row].write_text("")
    rows = [np.array([0, 1]), np.array([2, 1])]
    lists = list(data.batches(images, rows, workers))
    assert [(len(pixels), ids.tolist(), ids.dtype) for pixels, ids in lists] == [
        (0, [], torch.int64),
        (1, [2], torch.int64),
    ]
    squares = list(data.batches(images, rows, workers, square=8))
    assert [(tuple(pixels.shape), pixels.dtype) for pixels, _ in squares] == [
        ((0, 3, 8, 8), torch.uint8),
        ((1, 3, 8, 8), torch.uint8),
    ]


def test_square_crops_the_centre():
    wide = torch.zeros(1, 1, 8, 24, dtype=torch.uint8)
    wide[..., 8:16] = 200
    pixels, _ = next(data.batches(data.Images(wide, torch.zeros(1), []), [np.array([0])], square=8))
    assert pixels.shape == (1, 1, 8, 8)
    assert (pixels == 200).all()
    pixels, _ = next(data.batches(data.Images(wide, torch.zeros(1), []), [np.array([0])], square=4))
    assert pixels.shape == (1, 1, 4, 4)
    assert pixels[..., 1:3].min() > 190


@pytest.mark.parametrize("size", [(20_000, 2), (1, 65_000), (3, 1)], ids=str)
def test_a_strip_is_cut_before_it_grows(tmp_path, monkeypatch, size):
    """Of 20,000 × 2 pixels on 224, the whole strip would be 1.5 GB."""
    from torchvision.transforms.v2 import functional

    made = []

    def resize(pixels, *args, **options):
        made.append(functional_resize(pixels, *args, **options))
        return made[-1]

    functional_resize = functional.resize
    monkeypatch.setattr(functional, "resize", resize)
    Image.new("RGB", size, (9, 90, 200)).save(tmp_path / "line.png")
    images = data.load(str(tmp_path), "train")
    pixels, _ = next(data.batches(images, [np.array([0])], square=224))
    assert pixels.shape == (1, 3, 224, 224)
    assert [pixels[0, channel].unique().tolist() for channel in range(3)] == [[9], [90], [200]]
    assert [image.numel() for image in made] == [3 * 224 * 224]


def test_a_worker_sends_one_tensor(image_folder):
    """Each takes a file handle. A batch of 512 files once waited for ever where a process may have 1024."""
    images = data.load(str(image_folder), "train")
    images.source[1].write_bytes(b"")
    files = data._Files(images.source, images.background, images.max_pixels, None, 0)
    rows, pixels = data._pack([files[row] for row in range(3)])
    assert isinstance(pixels, torch.Tensor)
    assert [row for row, _ in rows] == [0, 1, 2]
    assert not any(isinstance(part, torch.Tensor) for row in rows for part in row)
    unpacked = dict(data._unpack(rows, pixels))
    assert unpacked[1] == "the file is empty"
    assert all(torch.equal(unpacked[row], files[row][1]) for row in (0, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_photographs_are_shrunk_for_small_views_only(tmp_path, workers):
    Image.new("RGB", (2400, 1800), (9, 90, 200)).save(tmp_path / "a.png")
    images = data.load(str(tmp_path), "train")
    for size, expected in (
        (None, (3, 1800, 2400)),
        (32, (3, 900, 1200)),
        (225, (3, 900, 1200)),
        (226, (3, 1800, 2400)),
    ):
        pixels, _ = next(data.batches(images, [np.array([0])], workers, size=size))
        assert pixels[0].shape == expected
        assert pixels[0][:, 7, 7].tolist() == [9, 90, 200]


@pytest.mark.parametrize(
    "error", [KeyError(), ValueError("\n"), MemoryError(), RecursionError("deep"), SyntaxError("x\ny")]
)
def test_whatever_a_decoder_raises_only_skips_the_file(image_folder, monkeypatch, capsys, error):
    def fail(path, *_):
        if path.name == "1.jpg":
            raise error
        return torch.zeros(3, 4, 4, dtype=torch.uint8)

    monkeypatch.setattr(data, "decode", fail)
    images = data.load(str(image_folder), "train")
    _, ids = next(data.batches(images, [np.arange(3)]))
    assert ids.tolist() == [0, 2]
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_order_is_a_permutation_given_by_seed_and_epoch():
    order = data.epoch_order(1000, seed=3, epoch=5)
    assert sorted(order) == list(range(1000))
    assert (order == data.epoch_order(1000, 3, 5)).all()
    assert (order != data.epoch_order(1000, 3, 6)).any()
    assert (order != data.epoch_order(1000, 5, 3)).any()

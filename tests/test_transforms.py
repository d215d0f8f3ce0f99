"""sslfast.transforms: the recipes of the papers, calls on batches, DataLoader workers, pickling and printing."""

import dataclasses
import multiprocessing
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from sslfast import _C
from sslfast.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MoCoV1Transform,
    MoCoV2Transform,
    MoCoV3Transform,
    RandomAugment,
    SimCLRTransform,
)

RECIPES = [SimCLRTransform, MoCoV1Transform, MoCoV2Transform, MoCoV3Transform]
SHARED = {"ratio": (3 / 4, 4 / 3), "flip_p": 0.5, "grayscale_p": 0.2, "sigma": (0.1, 2.0)}
EXPECTED = {  # the papers' own code; facebookresearch/moco and moco-v3, google-research/simclr
    "SimCLR": (
        SimCLRTransform(224),
        {"scale": (0.08, 1.0), "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "jitter_p": 0.8}
        | {"blur_p": 0.5, "solarize_p": 0.0, "order": ("jitter", "grayscale", "blur", "solarize")},
        {},
        (23, None),
    ),
    "SimCLR on CIFAR": (
        SimCLRTransform(32, strength=0.5),
        {"scale": (0.08, 1.0), "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "jitter_p": 0.8}
        | {"blur_p": 0.0, "solarize_p": 0.0},
        {},
        (3, None),
    ),
    "MoCo v1": (
        MoCoV1Transform(224),
        {"scale": (0.2, 1.0), "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.4, "jitter_p": 1.0}
        | {"blur_p": 0.0, "solarize_p": 0.0, "order": ("grayscale", "jitter", "blur", "solarize")},
        {},
        (23, IMAGENET_MEAN),
    ),
    "MoCo v2": (
        MoCoV2Transform(224),
        {"scale": (0.2, 1.0), "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "jitter_p": 0.8}
        | {"blur_p": 0.5, "solarize_p": 0.0},
        {},
        (23, IMAGENET_MEAN),
    ),
    "MoCo v3": (
        MoCoV3Transform(224),
        {"scale": (0.08, 1.0), "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "jitter_p": 0.8}
        | {"blur_p": 1.0, "solarize_p": 0.0},
        {"blur_p": 0.1, "solarize_p": 0.2, "solarize_threshold": 128 / 255},
        (23, IMAGENET_MEAN),
    ),
}


def photos(n=4, height=40, width=36, channels=3):
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=torch.manual_seed(0))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", list(EXPECTED))
def test_recipes_are_the_papers(name):
    transform, first, second, (kernel_size, mean) = EXPECTED[name]
    views = [dataclasses.asdict(view) for view in transform.distributions]
    assert len(views) == 2
    for view, expected in zip(views, (SHARED | first, SHARED | first | second), strict=True):
        assert expected.items() <= view.items()
    assert transform.kernel_size == kernel_size
    assert transform.applied["mean"] == mean
    assert transform.applied["std"] == (IMAGENET_STD if mean else None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_views_of_each_image(recipe):
    views = recipe(24, seed=1)(photos())
    assert len(views) == 2
    assert all(view.shape == (4, 3, 24, 24) and view.dtype == torch.float32 for view in views)
    assert not torch.equal(*views)


def test_arguments_replace_a_recipes_values():
    transform = MoCoV3Transform(24, blur_p=0.3, scale=(0.5, 0.6), mean=None, std=None, dtype=torch.bfloat16)
    assert [view.blur_p for view in transform.distributions] == [0.3, 0.3]
    assert [view.solarize_p for view in transform.distributions] == [0.0, 0.2]
    assert {view.scale for view in transform.distributions} == {(0.5, 0.6)}
    assert transform(photos())[0].dtype == torch.bfloat16
    assert len(SimCLRTransform(24, views=4)(photos())) == 4


def test_batch_list_numpy_and_layout_are_the_same_images():
    transform, images = SimCLRTransform(24, seed=3), photos()
    expected = transform(images)
    hwc = images.movedim(1, -1).contiguous()
    assert same(transform(hwc), expected)
    assert same(transform(list(images)), expected)
    assert same(transform(hwc.numpy()), expected)
    assert same(transform([image.numpy() for image in hwc]), expected)
    mirrored = [image.numpy()[:, ::-1] for image in hwc]
    assert mirrored[0].strides[1] < 0
    assert same(transform(mirrored), transform(images.flip(-1)))
    assert same(transform(hwc.numpy()[::-1, ::-1]), transform(images.flip(0, 2)))


def test_seed_epoch_and_ids_decide():
    transform, images = SimCLRTransform(24, seed=3), photos()
    expected = transform(images, [10, 11, 12, 13])
    assert same(transform(images[[2]], [12]), [view[[2]] for view in expected])
    assert same(SimCLRTransform(24, seed=3)(images, torch.tensor([10, 11, 12, 13])), expected)
    assert same(transform(images), transform(images, range(4)))
    assert not same(transform(images, range(4)), expected)
    assert not same(transform(images, [10, 11, 12, 13], epoch=1), expected)
    transform.set_epoch(1)
    assert same(transform(images, [10, 11, 12, 13]), SimCLRTransform(24, seed=3)(images, range(10, 14), epoch=1))
    assert same(transform(images, [10, 11, 12, 13], epoch=0), expected)


def test_without_a_seed_the_generator_decides():
    images = photos()
    torch.manual_seed(5)
    transform = SimCLRTransform(24)
    first, second = transform(images), transform(images)
    assert not same(first, second)
    torch.manual_seed(5)
    assert same(transform(images), first)
    own = SimCLRTransform(24, generator=torch.Generator().manual_seed(9))
    state = torch.random.get_rng_state()
    drawn = own(images)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(SimCLRTransform(24, generator=torch.Generator().manual_seed(9))(images), drawn)


def test_drawn_parameters_can_be_edited_before_they_are_applied():
    transform, images = SimCLRTransform(24, seed=3), photos()
    params = transform.draw(images, [7, 8, 9, 10])
    assert same(transform.apply_params(images, params), transform(images, [7, 8, 9, 10]))
    params.brightness[1, 2] = 0.0
    params.order[1, 2] = torch.tensor([1, 2, 3, 4, 5, 6, 0])
    assert (transform.apply_params(images, params)[1][2] == 0).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_pickled_copy_does_the_same(recipe):
    transform, images = recipe(24, seed=3), photos()
    transform.set_epoch(4)
    assert same(pickle.loads(pickle.dumps(transform))(images), transform(images))


def test_printed_form_says_what_it_does():
    text = repr(MoCoV3Transform(24, seed=3))
    for part in ("MoCoV3Transform", "size=(24, 24)", "seed=3", "blur_p=0.1", "solarize_p=0.2", "view 1"):
        assert part in text


class Images(Dataset):
    """A picklable dataset of 12 images; items are images, or (image, label, index)."""

    def __init__(self, labelled):
        self.images, self.labelled = photos(12), labelled

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return (self.images[i], i % 3, i) if self.labelled else self.images[i]


class Threads:
    """A collate_fn that also reports how many threads a worker computes with."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, items):
        return self.transform(items), torch.get_num_threads()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_collate_fn_in_workers_uses_one_thread_each(method):
    context = multiprocessing.get_context(method)
    transform, data = SimCLRTransform(24, seed=3), Images(labelled=False)
    transform(data.images)  # the parent's thread pool exists when workers fork
    loader = DataLoader(data, 4, collate_fn=Threads(transform), num_workers=2, multiprocessing_context=context)
    for batch, (views, threads) in enumerate(loader):
        assert threads == 1
        assert same(views, transform(data.images[4 * batch : 4 * batch + 4]))


def test_collate_fn_of_labelled_items():
    transform, data = SimCLRTransform(24, seed=3), Images(labelled=True)
    views, labels, indices = next(iter(DataLoader(data, 5, collate_fn=transform)))
    assert same(views, transform(data.images[:5]))
    assert labels.tolist() == [0, 1, 2, 0, 1]
    assert indices.tolist() == [0, 1, 2, 3, 4]


def test_workers_without_a_seed_draw_differently():
    data = [torch.full((3, 30, 30), 7, dtype=torch.uint8) for _ in range(8)]
    transform = RandomAugment(24, brightness=0.8)
    batches = [views[0] for views in DataLoader(data, 4, collate_fn=transform, num_workers=2)]
    assert not torch.equal(*batches)


def test_images_smaller_and_larger_than_the_view():
    transform = SimCLRTransform(48, seed=0)
    ragged = [photos(1, h, w)[0] for h, w in ((1, 1), (2, 90), (300, 5), (48, 48), (500, 400))]
    for view in transform(ragged):
        assert view.isfinite().all()
    pixels = photos(2, 1, 1)
    out = SimCLRTransform(8, seed=0, layout="CHW")(pixels)
    expected = SimCLRTransform(8, seed=0)(pixels.expand(2, 3, 5, 5))
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="say layout="):
        SimCLRTransform(8)(pixels)


@pytest.mark.parametrize("capability", _C.available_cpu_capabilities())
def test_environment_chooses_the_instruction_set(capability):
    code = """if True:
        import torch
        from sslfast import _C
        from sslfast.transforms import SimCLRTransform
        images = torch.arange(2 * 3 * 400).view(2, 3, 20, 20).to(torch.uint8)
        print(_C.cpu_capability(), *(view.sum().item() for view in SimCLRTransform(16, seed=0)(images)))
    """
    environment = os.environ | {"SSLFAST_CPU_CAPABILITY": capability}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    name, *sums = run.stdout.split()
    images = torch.arange(2 * 3 * 400).view(2, 3, 20, 20).to(torch.uint8)
    expected = [view.sum().item() for view in SimCLRTransform(16, seed=0)(images)]
    assert name == capability
    assert [float(s) for s in sums] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size"),
        ({"size": "big"}, TypeError, "size"),
        ({"size": 24, "views": 0}, ValueError, "views"),
        ({"size": 24, "kernel_size": 4}, ValueError, "kernel_size"),
        ({"size": 2, "blur_p": 0.5, "kernel_size": 5}, ValueError, "kernel_size // 2 below the size"),
        ({"size": 24, "sigma": 0}, ValueError, "sigma"),
        ({"size": 24, "seed": 1, "generator": torch.Generator()}, ValueError, "seed and generator"),
        ({"size": 24, "seed": "1"}, TypeError, "seed"),
        ({"size": 24, "interpolation": "area"}, ValueError, "interpolation"),
        ({"size": 24, "dtype": torch.float64}, TypeError, "dtype"),
        ({"size": 24, "mean": (0.5,)}, ValueError, "mean and std"),
        ({"size": 24, "std": (0.5,), "mean": (0.0,)}, ValueError, "mean: expected 3"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        RandomAugment(**arguments)(photos())


def test_one_bad_entry_of_a_list_is_named():
    images = [*photos(3), photos(1, channels=1)[0].expand(4, -1, -1)]
    with pytest.raises(ValueError, match=r"images\[3\]: expected 1 or 3 channels"):
        SimCLRTransform(24)(images)
    with pytest.raises(TypeError, match=r"images\[1\]: expected a tensor, got NoneType"):
        SimCLRTransform(24)([photos()[0], None])


def test_ids_of_another_length_are_refused():
    with pytest.raises(ValueError, match="sample_ids: expected one id for each of the 4 images"):
        SimCLRTransform(24)(photos(), [1, 2, 3])


def collated(transform, seed: int = 1, epochs: int = 2, **options) -> list[float]:
    """A number for each batch of same images, from two workers."""
    images = [photos(1)[0]] * 8
    torch.manual_seed(seed)
    loader = DataLoader(images, 2, num_workers=2, collate_fn=transform, **options)
    return [round(float(views[0].sum()), 3) for _ in range(epochs) for views in loader]


@pytest.mark.parametrize(
    ("method", "persistent"), [("fork", False), ("fork", True), ("spawn", False), ("forkserver", True)]
)
def test_workers_and_epochs_never_draw_the_same_from_a_copied_generator(method, persistent):
    transform = SimCLRTransform(24, generator=torch.Generator().manual_seed(0))
    epochs = 1 if method == "spawn" else 2  # where workers begin slowly
    found = collated(transform, epochs=epochs, multiprocessing_context=method, persistent_workers=persistent)
    assert len(set(found)) == len(found) == 4 * epochs


def test_what_workers_draw_follows_from_the_generator_and_from_torchs_seed():
    transform, other = (SimCLRTransform(24, generator=torch.Generator().manual_seed(n)) for n in (0, 7))
    found = collated(transform, seed=1, epochs=1)
    assert collated(transform, seed=1, epochs=1) == found
    assert not set(collated(transform, seed=2, epochs=1)) & set(found)
    assert not set(collated(other, seed=1, epochs=1)) & set(found)


def test_workers_never_draw_the_same_without_generator_and_seed():
    found = collated(SimCLRTransform(24))
    assert len(set(found)) == len(found) == 8


@pytest.mark.parametrize("persistent", [False, True])
def test_the_epoch_reaches_workers_also_those_that_live_on(persistent):
    transform = SimCLRTransform(24, seed=0)
    loader = DataLoader([photos(1)[0]] * 2, 2, num_workers=1, collate_fn=transform, persistent_workers=persistent)
    found = []
    for epoch in range(3):
        transform.set_epoch(epoch)
        (views,) = loader
        found.append(views)
    expected = SimCLRTransform(24, seed=0)
    assert all(same(views, expected([photos(1)[0]] * 2, epoch=epoch)) for epoch, views in enumerate(found))


def draw_in_process(transform, results) -> None:
    torch.set_num_threads(1)  # as a DataLoader does: OpenMP's threads do not survive a fork
    try:
        transform(photos())
        results.put("drawn")
    except RuntimeError as error:
        results.put(str(error))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_do_not_draw_from_a_copied_generator(method):
    context = multiprocessing.get_context(method)
    own, without = SimCLRTransform(24, generator=torch.Generator().manual_seed(0)), SimCLRTransform(24)
    found = []
    for transform in (own, without):
        results = context.Queue()
        process = context.Process(target=draw_in_process, args=(transform, results))
        process.start()
        found.append(results.get(timeout=100))
        process.join()
    assert found[0].startswith("generator: this process has a copy of it, which would give the same views")
    assert found[1] == "drawn"


def test_a_generator_that_was_saved_goes_on_in_another_program(tmp_path):
    transform = SimCLRTransform(24, generator=torch.Generator().manual_seed(0))
    torch.save({"transform": transform}, tmp_path / "checkpoint.pt")
    code = (
        "import sys, torch; from sslfast.transforms import SimCLRTransform\n"
        "transform = torch.load(sys.argv[1], weights_only=False)['transform']\n"
        "images = torch.arange(4 * 3 * 900).view(4, 3, 30, 30).to(torch.uint8)\n"
        "print(transform(images)[0].sum().item())\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "checkpoint.pt")]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    images = torch.arange(4 * 3 * 900).view(4, 3, 30, 30).to(torch.uint8)
    assert float(run.stdout) == pytest.approx(transform(images)[0].sum().item(), rel=1e-5)


@pytest.mark.parametrize(("generator", "error"), [(3, TypeError), ("cpu", TypeError)])
def test_what_is_no_generator(generator, error):
    with pytest.raises(error, match=r"generator: expected a torch.Generator, got"):
        SimCLRTransform(24, generator=generator)

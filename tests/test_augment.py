"""The fused augmentation against torchvision's functional ops, and against the reference in float64."""

import io
import itertools
import math
from functools import partial

import cuda_emulation
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from sslfast import reference
from sslfast.ops.augment import STEPS, AugmentDistribution, AugmentParams, augment, draw_params, image_sizes

CAPABILITIES = ("default", "avx2", "avx512")  # those that have kernels of this op: conftest.py reads it
INTERPOLATIONS = {"bilinear": TF.InterpolationMode.BILINEAR, "bicubic": TF.InterpolationMode.BICUBIC}
SIMCLR = AugmentDistribution(
    brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=0.8, grayscale_p=0.2, blur_p=0.5
)
EVERYTHING = AugmentDistribution(
    brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5, grayscale_p=0.3, blur_p=0.5, solarize_p=0.5
)


def photos(n, height, width, channels=3, seed=0):
    """(n, channels, height, width) uint8 with smooth areas, edges, noise, and black, white and grey patches."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, height // 8 + 2, width // 8 + 2, generator=generator)
    x = F.interpolate(coarse, (height, width), mode="bicubic") * 1.2 - 0.1
    x = x + 0.1 * torch.randn(x.shape, generator=generator)
    x[:, :, : height // 4, : width // 4] = torch.rand(n, 1, 1, 1, generator=generator)
    x[:, :, -(height // 5 + 1) :, : width // 5 + 1] = torch.tensor([0.0, 1.0]).repeat(n)[:n].view(n, 1, 1, 1)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def neutral(n, height, width, **changes):
    """Parameters of one view that take the whole image and do nothing, but for `changes` (a value for all images)."""
    params = AugmentParams(
        crop=torch.tensor([0, 0, height, width], dtype=torch.int32).repeat(1, n, 1),
        flip=torch.zeros(1, n, dtype=torch.bool),
        order=torch.arange(7, dtype=torch.int8).repeat(1, n, 1),
        brightness=torch.ones(1, n),
        contrast=torch.ones(1, n),
        saturation=torch.ones(1, n),
        hue=torch.zeros(1, n),
        grayscale=torch.zeros(1, n, dtype=torch.bool),
        sigma=torch.zeros(1, n),
        solarize=torch.full((1, n), math.inf),
    )
    for name, value in changes.items():
        getattr(params, name)[:] = torch.as_tensor(value)
    return params


def replay(images, params, size, interpolation="bilinear", antialias=True, kernel_size=3, mean=None, std=None):
    """What torchvision's functional ops, on float images, make of the same parameters."""
    views = []
    for v, n in itertools.product(range(len(params.crop)), range(len(images))):
        at = (v, n)
        x = TF.to_dtype(images[n], torch.float32, scale=True)
        x = TF.resized_crop(x, *params.crop[at].tolist(), size, INTERPOLATIONS[interpolation], antialias)
        x = TF.horizontal_flip(x) if params.flip[at] else x
        for step in params.order[at].tolist():
            name = STEPS[step]
            if name in STEPS[:4] and (value := getattr(params, name)[at].item()) != (0 if name == "hue" else 1):
                x = getattr(TF, f"adjust_{name}")(x, value)
            elif name == "grayscale" and params.grayscale[at]:
                x = TF.rgb_to_grayscale(x, num_output_channels=len(x))
            elif name == "blur" and params.sigma[at] > 0:
                x = TF.gaussian_blur(x, [kernel_size] * 2, [params.sigma[at].item()] * 2)
            elif name == "solarize" and params.solarize[at] < math.inf:
                x = TF.solarize(x, params.solarize[at].item())
        views.append(x if mean is None else TF.normalize(x, mean, std))
    return torch.stack(views).unflatten(0, (len(params.crop), len(images)))


def assert_equal_images(ours, theirs):
    difference = (ours.double() - theirs.double()).abs()
    assert difference.max() <= 1 / 255, difference.max()
    assert difference.mean() <= 1e-3, difference.mean()
    assert difference.max() <= 2e-5, difference.max()  # what float32 gives; the two lines above are what is promised


# ------------------------------------------------------------------------------------------------------ parity


RESIZES = {  # output size, crop: top, left, height, width of a 67 × 83 image
    "up": ((40, 56), (20, 30, 23, 31)),
    "down": ((17, 24), (1, 2, 64, 80)),
    "down_far": ((9, 5), (0, 0, 67, 83)),
    "up_and_down": ((60, 19), (3, 5, 40, 61)),
    "same": ((40, 50), (5, 6, 40, 50)),
    "from_one_pixel": ((7, 9), (66, 82, 1, 1)),
    "to_one_pixel": ((1, 1), (0, 0, 67, 83)),
    "one_row": ((33, 33), (66, 0, 1, 83)),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", list(INTERPOLATIONS))
@pytest.mark.parametrize("resize", list(RESIZES))
def test_crop_and_resize_like_torchvision(backend, resize, interpolation, antialias, channels):
    size, crop = RESIZES[resize]
    images = photos(2, 67, 83, channels)
    params = neutral(2, 67, 83, crop=crop)
    params.flip[0, 1] = True
    arguments = {"interpolation": interpolation, "antialias": antialias}
    theirs = replay(images, params, size, **arguments)
    assert_equal_images(augment(images, params, size, **arguments), theirs)
    assert_equal_images(augment(images.movedim(1, -1), params, size, **arguments, layout="HWC"), theirs)


STEP_VALUES = [
    *(("brightness", x) for x in (0.0, 0.3, 1.7)),
    *(("contrast", x) for x in (0.0, 0.3, 1.7)),
    *(("saturation", x) for x in (0.0, 0.3, 1.7)),
    *(("hue", x) for x in (-0.5, -0.2, 0.01, 1 / 3, 0.5)),
    ("grayscale", True),
    *(("sigma", x) for x in (0.1, 0.7, 2.0, 50.0)),
    *(("solarize", x) for x in (0.0, 0.5, 128 / 255, 1.0)),
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "value"), STEP_VALUES)
def test_every_step_alone_like_torchvision(backend, name, value, channels):
    images = photos(3, 31, 45, channels)
    params = neutral(3, 31, 45, **{name: value})
    ours = augment(images, params, (31, 45), kernel_size=9)
    assert_equal_images(ours, replay(images, params, (31, 45), kernel_size=9))
    changes_something = channels == 3 or name not in ("saturation", "hue", "grayscale")
    unchanged = augment(images, neutral(3, 31, 45), (31, 45))
    assert torch.equal(ours, unchanged) != (changes_something and (name, value) != ("sigma", 0.1))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_every_order_of_jitter_like_torchvision(backend, order):
    images = photos(4, 32, 32)
    params = neutral(4, 32, 32, brightness=[1.6, 0.5, 1.2, 0.9], contrast=[0.4, 1.7, 1.1, 0.8])
    params.saturation[:] = torch.tensor([1.8, 0.3, 0.9, 1.3])
    params.hue[:] = torch.tensor([0.2, -0.2, 0.05, -0.5])
    params.order[..., :4] = torch.tensor(order)
    assert_equal_images(augment(images, params, 32), replay(images, params, (32, 32)))


@pytest.mark.parametrize("order", list(itertools.permutations((1, 4, 5, 6))))
def test_steps_may_come_in_any_order(backend, order):
    """Contrast needs the mean of the image as it is then, wherever blur, greyscale and solarisation stand."""
    images = photos(2, 40, 44)
    params = neutral(2, 40, 44, contrast=1.5, grayscale=[True, False], sigma=1.2, solarize=0.6)
    params.order[:] = torch.tensor((*order, 0, 2, 3))
    # Solarisation is a jump: a pixel within rounding of the threshold may fall on either side.
    ours, theirs = augment(images, params, (40, 44), kernel_size=5), replay(images, params, (40, 44), kernel_size=5)
    assert ((ours - theirs).abs() > 2e-5).float().mean() < 1e-3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", list(INTERPOLATIONS))
@pytest.mark.parametrize(("source", "size"), [((256, 256), (96, 96)), ((40, 37), (64, 64)), ((32, 32), (32, 32))])
def test_whole_chain_like_torchvision(backend, source, size, interpolation, channels):
    images = photos(24, *source, channels)
    params = draw_params([SIMCLR] * 2, image_sizes(images), seed=7)
    arguments = {"interpolation": interpolation, "kernel_size": 9}
    if interpolation == "bicubic":
        images = images // 2 + 60  # torchvision's adjust_hue divides by a maximum that overshoot can bring to 0
    ours = augment(images, params, size, **arguments)
    assert_equal_images(ours, replay(images, params, size, **arguments))


@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_chain_at_224_like_torchvision(backend, channels):
    images = photos(6, 256, 256, channels)
    params = draw_params([SIMCLR] * 2, image_sizes(images), seed=11)
    arguments = {"kernel_size": 23, "mean": [0.45, 0.5, 0.4][:channels], "std": [0.23, 0.22, 0.24][:channels]}
    ours = augment(images, params, 224, **arguments)
    theirs = replay(images, params, (224, 224), **arguments)
    assert_equal_images(ours * 0.22, theirs * 0.22)  # back in units of the image


# ------------------------------------------------------------------------------------------------------ the op


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_like_the_reference_in_float64(backend, data):
    channels, layout = data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from(["CHW", "HWC"]))
    sides = st.integers(1, 70)
    images = [photos(1, data.draw(sides), data.draw(sides), channels)[0] for _ in range(data.draw(st.integers(1, 4)))]
    size = (data.draw(sides), data.draw(sides))
    assume(size[1] > 1)  # torch 2.14's antialiased interpolate is wrong for one output column; see the next test
    radius = data.draw(st.integers(0, min(12, min(size) - 1)))
    params = draw_params([EVERYTHING, SIMCLR], image_sizes(images, "CHW"), seed=data.draw(st.integers(0, 2**63)))
    params.solarize[params.solarize < 2] = 0.0  # invert everything: no jump for rounding to decide
    arguments = {
        "interpolation": data.draw(st.sampled_from(["bilinear", "bicubic"])),
        "antialias": data.draw(st.booleans()),
        "kernel_size": 2 * radius + 1,
    }
    ours = augment(
        [x if layout == "CHW" else x.movedim(0, -1).contiguous() for x in images],
        params,
        size,
        layout=layout,
        **arguments,
    )
    truth = reference.augment.augment(images, params, size, **arguments, dtype=torch.float64)
    if arguments["interpolation"] == "bicubic":  # values below 0 may turn into 1 - x by solarisation or not
        close = ((ours - truth).abs() <= 1e-4).double().mean() > 0.98
        assert close or ours.numel() < 100
    else:
        assert (ours - truth).abs().max() <= 2e-5


def test_one_output_column_is_one_output_row_turned(backend):
    images = photos(3, 23, 31)
    ours = augment(images, neutral(3, 23, 31), (40, 1))
    turned = augment(images.mT, neutral(3, 31, 23), (1, 40))
    assert (ours.mT - turned).abs().max() <= 1e-6
    assert_equal_images(turned, replay(images.mT, neutral(3, 31, 23), (1, 40)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 3])
def test_output_dtype_and_memory_format(backend, channels, dtype, memory_format):
    images = photos(5, 40, 40, channels)
    params = draw_params([SIMCLR] * 2, image_sizes(images), seed=3)
    arguments = {"kernel_size": 3, "mean": [0.5] * channels, "std": [0.001] * channels}
    expected = augment(images, params, (29, 31), **arguments)
    out = augment(images, params, (29, 31), **arguments, dtype=dtype, memory_format=memory_format)
    assert all(view.is_contiguous(memory_format=memory_format) for view in out)
    assert torch.equal(out, expected.to(dtype))


def test_half_conversion_is_torchs_for_every_magnitude(backend):
    """Subnormal, overflowing and tied values too: the normalisation carries them through the output conversion."""
    images = torch.arange(2048, 4096).view(1, 1, 32, 64) / 4096  # every second one is a tie in float16
    for power in range(-40, 30):
        arguments = {"mean": [0.0], "std": [2.0**-power]}
        exact = augment(images, neutral(1, 32, 64), (32, 64), **arguments)
        assert torch.equal(exact[0], images * 2.0**power)
        for dtype in (torch.float16, torch.bfloat16):
            out = augment(images, neutral(1, 32, 64), (32, 64), **arguments, dtype=dtype)
            assert torch.equal(out, exact.to(dtype)), (power, dtype)


def test_float_images_give_what_bytes_give(backend):
    images = photos(4, 50, 60)
    params = draw_params([SIMCLR], image_sizes(images), seed=5)
    expected = augment(images, params, 40)
    assert_equal_images(augment(images / 255, params, 40), expected)
    assert_equal_images(augment((images / 255).movedim(1, -1).contiguous(), params, 40), expected)


def test_ragged_list_is_image_by_image(backend):
    images = [photos(1, h, w, seed=h)[0] for h, w in ((70, 50), (33, 120), (9, 9), (1, 40), (200, 300))]
    params = draw_params([SIMCLR] * 2, image_sizes(images), seed=9)
    out = augment(images, params, (48, 40), kernel_size=5)
    for i, image in enumerate(images):
        alone = AugmentParams(*(value[:, i : i + 1] for value in params))
        assert torch.equal(out[:, i : i + 1], augment(image[None], alone, (48, 40), kernel_size=5))


@pytest.mark.parametrize("channels", [1, 3])
def test_strides_do_not_matter(backend, channels):
    images = photos(3, 40, 42, channels)
    params = draw_params([SIMCLR], image_sizes(images, "CHW"), seed=13)
    expected = augment(images, params, 32)
    wide = photos(3, 80, 84, channels)
    wide[:, :, ::2, ::2] = images
    assert torch.equal(augment(wide[:, :, ::2, ::2], params, 32), expected)
    rows = torch.empty(3, channels, 40, 60, dtype=torch.uint8)
    rows[..., 9:51] = images
    assert torch.equal(augment(rows[..., 9:51], params, 32), expected)
    assert torch.equal(augment(images.contiguous(memory_format=torch.channels_last), params, 32), expected)
    assert torch.equal(augment(images.movedim(1, -1), params, 32, layout="HWC"), expected)


def test_no_images(backend):
    images = photos(2, 24, 24)
    params = draw_params([SIMCLR] * 2, image_sizes(images), seed=1)
    none = AugmentParams(*(value[:, :0] for value in params))
    assert augment(images[:0], none, 16).shape == (2, 0, 3, 16, 16)


def test_nan_stays_nan_and_does_not_spread_to_other_images(backend):
    images = photos(2, 24, 24) / 255
    images[0, 1, 5, 5] = math.nan
    params = draw_params([SIMCLR], image_sizes(images), seed=1)
    params.crop[:] = torch.tensor([0, 0, 24, 24])
    out = augment(images, params, 24)
    assert out[0, 0].isnan().any()
    assert not out[0, 1].isnan().any()


def test_same_bits_on_any_number_of_threads_and_in_any_batch(backend):
    images = photos(9, 64, 64)
    params = draw_params([SIMCLR] * 2, image_sizes(images), seed=2)
    expected = augment(images, params, 48, kernel_size=5)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(augment(images, params, 48, kernel_size=5), expected)
    finally:
        torch.set_num_threads(threads)
    part = AugmentParams(*(value[:, [7, 2]] for value in params))
    assert torch.equal(augment(images[[7, 2]], part, 48, kernel_size=5), expected[:, [7, 2]])


def test_memory_of_an_output_is_reused_only_when_nobody_holds_it():
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    make = partial(augment, images, neutral(4, 8, 8), 64)
    first, second = make(), make()
    held = {first.data_ptr(): first[0, 1], second.data_ptr(): second.numpy()}  # a view and an array hold the memory
    del first, second
    images += 255
    outputs = [make() for _ in range(4)]
    assert not {out.data_ptr() for out in outputs} & set(held)
    assert all((part == 0).all() for part in held.values())
    assert len({out.data_ptr() for out in outputs}) == 4
    addresses = {out.data_ptr() for out in outputs}
    del outputs
    assert make().data_ptr() in addresses


# ------------------------------------------------------------------------------------------------------ only CUDA


# The three ways of csrc/ops/cuda/augment_kernel.cu: size and kernel size; sigmas are drawn from 0.1 … 2, or large.
WAYS = {"whole": ((40, 44), 9, 1), "tiles": ((70, 131), 23, 1), "scratch": ((130, 132), 101, 12)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("way", list(WAYS))
def test_cuda_gives_the_pixels_of_the_cpu_in_any_order_of_threads(emulator, monkeypatch, way, channels):
    size, kernel_size, wider = WAYS[way]
    images = photos(5, 90, 110, channels)
    params = draw_params([EVERYTHING, SIMCLR], image_sizes(images), seed=21)
    params.sigma.mul_(wider)
    params.order[0, 1] = torch.tensor([5, 0, 2, 1, 3, 4, 6])  # the contrast looks at the blurred image
    params.sigma[0, 1], params.contrast[0, 1] = 1.7 * wider, 0.6
    params.solarize[params.solarize < 2] = 0.0  # no jump for rounding to decide
    make = partial(augment, images, params, size, kernel_size=kernel_size)
    views = []
    for order in cuda_emulation.ORDERS:
        emulator.set_order(order)
        views.append(make())
    assert all(torch.equal(view, views[0]) for view in views)
    counts = emulator.counters()
    assert ("augment_grey" in counts) == (way != "whole")
    assert (counts["augment_forward"]["read_bytes"] > 30 * views[0].nbytes) == (way == "scratch")
    monkeypatch.undo()
    assert (views[0] - make()).abs().max() <= 1e-5


@cuda_emulation.on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("way", ["tiles", "scratch"])
def test_every_way_rounds_to_the_output_dtype(backend, way, channels, dtype):
    size, kernel_size, wider = WAYS[way]
    images = photos(1, 50, 60, channels)
    params = neutral(1, 50, 60, crop=[5, 3, 40, 50], contrast=0.6, sigma=1.5 * wider)
    expected = augment(images, params, size, kernel_size=kernel_size)
    assert torch.equal(augment(images, params, size, kernel_size=kernel_size, dtype=dtype), expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_is_near_input_and_output_once(emulator, dtype):
    images = photos(6, 256, 256)
    params = draw_params([SIMCLR] * 2, image_sizes(images), seed=4)
    emulator.reset_counters()
    views = augment(images, params, 224, kernel_size=23, dtype=dtype)
    counts = emulator.counters().values()
    moved = sum(c["read_bytes"] + c["written_bytes"] for c in counts)
    crops = params.crop[..., 2].double() * params.crop[..., 3]
    sums_of_grey = 4 * 4 * 7 * params.crop[..., 0].numel()
    floor = 3 * crops.sum() + views.numel() * dtype.itemsize + sums_of_grey
    assert sum(c["written_bytes"] for c in counts) <= views.numel() * dtype.itemsize + sums_of_grey
    assert moved <= 1.5 * floor, moved / floor


def test_more_elements_than_fit_an_int(emulator):
    """Of the source and of the output. Only the blocks at the ends of each grid run."""
    emulator.run_corners(set())
    images = emulator.device_tensor([1, 3, 40_000, 30_000], torch.uint8)  # zeros: it is that large
    images[..., -50:, -60:] = 255
    params = neutral(1, 40_000, 30_000, crop=[39_950, 29_940, 50, 60])
    assert_equal_images(augment(images, params, 32), torch.ones(1, 1, 3, 32, 32))
    many = torch.full((1, 3, 8, 8), 51, dtype=torch.uint8).expand(15_000, 3, 8, 8)
    views = augment(many, neutral(15_000, 8, 8, brightness=0.5), 224)
    assert views.numel() > 2**31
    assert_equal_images(views[0, -1, :, -1, -1], torch.full((3,), 0.1))


def test_images_on_a_cuda_device(cuda_device):
    """The other tests hand CPU tensors to the CUDA kernels; this one goes the way of a user."""
    images = photos(4, 60, 70)
    params = draw_params([SIMCLR] * 2, image_sizes(images), seed=6)
    views = augment(images.to(cuda_device), params, 224, kernel_size=23)
    assert views.device.type == "cuda"
    assert (views.cpu() - augment(images, params, 224, kernel_size=23)).abs().max() <= 1e-5


# ------------------------------------------------------------------------------------------------------ torch


def test_opcheck():
    images = photos(2, 20, 20)
    params = list(draw_params([SIMCLR] * 2, image_sizes(images), seed=0))
    for channels_last in (False, True):
        arguments = (True, 16, 16, "bilinear", True, 3, [0.0] * 3, [1.0] * 3, "float32", channels_last)
        torch.library.opcheck(torch.ops.sslfast.augment_forward.default, ([images], params, *arguments))
        torch.library.opcheck(torch.ops.sslfast.augment_forward.default, (list(images), params, *arguments))


def test_compiles_without_graph_breaks():
    images = photos(2, 20, 20)
    params = draw_params([SIMCLR] * 2, image_sizes(images), seed=0)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def augmented(x):
        return augment(x, params, 16) * 2

    assert torch.equal(augmented(images), augment(images, params, 16) * 2)


# ------------------------------------------------------------------------------------------------------ drawing


def test_draws_depend_on_seed_epoch_sample_and_view_alone():
    sizes = [(64, 48)] * 100
    params = draw_params([EVERYTHING] * 2, sizes, seed=1, epoch=3)
    again = draw_params([EVERYTHING] * 2, sizes[:10], seed=1, epoch=3, sample_ids=torch.arange(99, 89, -1))
    for whole, part in zip(params, again, strict=True):
        assert torch.equal(whole[:, 90:].flip(1), part)
    others = {
        "seed": draw_params([EVERYTHING] * 2, sizes, seed=2, epoch=3),
        "epoch": draw_params([EVERYTHING] * 2, sizes, seed=1, epoch=4),
        "sample": draw_params([EVERYTHING] * 2, sizes, seed=1, epoch=3, sample_ids=range(100, 200)),
        "high word of the sample": draw_params(
            [EVERYTHING] * 2, sizes, seed=1, epoch=3, sample_ids=[i + 2**32 for i in range(100)]
        ),
        "high word of the seed": draw_params([EVERYTHING] * 2, sizes, seed=1 + 2**32, epoch=3),
        "view": AugmentParams(*(value.flip(0) for value in params)),
    }
    for name, other in others.items():
        assert (params.brightness != other.brightness).float().mean() > 0.95, name
        assert (params.crop != other.crop).any(-1).float().mean() > 0.95, name


def test_switching_a_step_off_changes_no_other():
    sizes = [(64, 48)] * 200
    with_all = draw_params(EVERYTHING, sizes, seed=1)
    without = draw_params(AugmentDistribution(blur_p=0.5, grayscale_p=0.3), sizes, seed=1)
    for name in ("crop", "flip", "sigma", "grayscale"):
        assert torch.equal(getattr(with_all, name), getattr(without, name)), name
    for name in ("brightness", "contrast", "saturation"):
        assert (getattr(without, name) == 1).all(), name


def test_params_can_be_saved_edited_and_replayed(backend):
    images = photos(3, 30, 30)
    params = draw_params([SIMCLR] * 2, image_sizes(images), seed=4)
    file = io.BytesIO()
    torch.save(params._asdict(), file)
    file.seek(0)
    loaded = AugmentParams(**torch.load(file, weights_only=True))
    assert torch.equal(augment(images, params, 20), augment(images, loaded, 20))
    loaded.brightness[0, 1] = 0.0
    loaded.order[0, 1] = torch.tensor([1, 2, 3, 4, 5, 6, 0])
    edited = augment(images, loaded, 20)
    assert (edited[0, 1] == 0).all()
    assert torch.equal(edited[1], augment(images, params, 20)[1])


DRAWS = 20_000


@pytest.fixture(scope="module")
def drawn():
    """Ours for two image shapes, and the same number of torchvision's own draws."""
    torch.manual_seed(0)
    distribution = AugmentDistribution(brightness=0.8, contrast=0.6, saturation=(0.5, 2.0), hue=0.2, blur_p=1.0)
    ours = {s: draw_params(distribution, [s] * DRAWS, seed=123, sample_ids=range(DRAWS)) for s in ((60, 90), (30, 200))}
    crop = v2.RandomResizedCrop(8)
    theirs = {}
    for height, width in ours:
        image = torch.zeros(1, height, width)
        draws = [crop.make_params([image]) for _ in range(DRAWS // 4)]
        theirs[height, width] = torch.tensor([[d["top"], d["left"], d["height"], d["width"]] for d in draws])
    return ours, theirs


P_VALUE = 1e-4  # seeds are fixed: a correct generator passes for ever, a wrong distribution of 20,000 fails by far


@pytest.mark.parametrize("shape", [(60, 90), (30, 200)])
def test_crops_are_distributed_like_torchvisions(drawn, shape):
    ours, theirs = drawn[0][shape].crop[0].double().numpy(), drawn[1][shape].double().numpy()

    def features(crop):
        top, left, height, width = crop.T
        slack = lambda free, at: (at + 0.5) / (free + 1)  # noqa: E731  position within its range
        return {
            "area": height * width,
            "ratio": width / height,
            "top": slack(shape[0] - height, top),
            "left": slack(shape[1] - width, left),
        }

    for (name, a), b in zip(features(ours).items(), features(theirs).values(), strict=True):
        assert stats.ks_2samp(a, b).pvalue > P_VALUE, name
    fallback = [(x[:, 2:] == [30, 40]).all(1).sum() for x in (ours, theirs)] if shape == (30, 200) else [0, 0]
    assert abs(fallback[0] / len(ours) - fallback[1] / len(theirs)) < 0.02


def test_factors_and_sigma_are_uniform_like_torchvisions(drawn):
    params = drawn[0][60, 90]
    ranges = {"brightness": (0.2, 1.8), "contrast": (0.4, 1.6), "saturation": (0.5, 2.0), "hue": (-0.2, 0.2)}
    jitter = v2.ColorJitter(brightness=0.8, contrast=0.6, saturation=(0.5, 2.0), hue=0.2)
    for name, (low, high) in (ranges | {"sigma": (0.1, 2.0)}).items():
        values = getattr(params, name)[0].numpy()
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > P_VALUE, name
        if name != "sigma":
            theirs = [jitter.make_params([])[f"{name}_factor"] for _ in range(2000)]
            assert stats.ks_2samp(values, theirs).pvalue > P_VALUE, name
    factors = np.corrcoef([getattr(params, name)[0].numpy() for name in (*ranges, "sigma")])
    assert np.abs(factors - np.eye(5)).max() < 0.03


def test_every_order_of_jitter_is_as_likely(drawn):
    orders = drawn[0][60, 90].order[0]
    counts = {}
    for order in orders[:, :4].tolist():
        counts[tuple(order)] = counts.get(tuple(order), 0) + 1
    assert set(counts) == set(itertools.permutations(range(4)))
    assert stats.chisquare(list(counts.values())).pvalue > P_VALUE
    assert (orders[:, 4:] == torch.tensor([4, 5, 6])).all()


def test_choices_have_their_probabilities_and_are_independent():
    distribution = AugmentDistribution(
        brightness=0.8, jitter_p=0.8, flip_p=0.5, grayscale_p=0.2, blur_p=0.1, solarize_p=0.3, solarize_threshold=0.7
    )
    params = draw_params(distribution, [(32, 32)] * DRAWS, seed=77)
    happened = {
        "jitter_p": params.brightness[0] != 1,
        "flip_p": params.flip[0],
        "grayscale_p": params.grayscale[0],
        "blur_p": params.sigma[0] > 0,
        "solarize_p": params.solarize[0] < math.inf,
    }
    for name, yes in happened.items():
        assert stats.binomtest(int(yes.sum()), DRAWS, getattr(distribution, name)).pvalue > P_VALUE, name
    for a, b in itertools.combinations(happened.values(), 2):
        table = [[int((x & y).sum()) for y in (b, ~b)] for x in (a, ~a)]
        assert stats.chi2_contingency(table).pvalue > P_VALUE
    assert (params.solarize[0][happened["solarize_p"]] == torch.tensor(0.7)).all()


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_probability_0_never_and_1_always(p):
    distribution = AugmentDistribution(flip_p=p, grayscale_p=p, blur_p=p, solarize_p=p, jitter_p=p, hue=0.5)
    params = draw_params(distribution, [(9, 9)] * DRAWS, seed=0)
    for yes in (params.flip, params.grayscale, params.sigma > 0, params.solarize < math.inf, params.hue != 0):
        assert yes.float().mean().round(decimals=3) == p


# ------------------------------------------------------------------------------------------------------ bad input


def call(images=None, params=None, size=16, **arguments):
    images = photos(2, 20, 20) if images is None else images
    params = draw_params([SIMCLR], [(20, 20)] * len(images), seed=0) if params is None else params
    return augment(images, params, size, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": torch.zeros(2, 4, 20, 20, dtype=torch.uint8)}, ValueError, r"1 or 3 channels .* \(4, 20, 20\)"),
        ({"images": torch.zeros(2, 3, 20, 20, dtype=torch.int64)}, TypeError, "uint8 .* float32"),
        ({"images": torch.zeros(2, 3, 20, 20, dtype=torch.float64)}, TypeError, "uint8 .* float32"),
        ({"images": torch.full((2, 3, 20, 20), 1.5)}, ValueError, r"\[0, 1\], got 1.5"),
        ({"images": torch.full((2, 3, 20, 20), -0.5)}, ValueError, r"\[0, 1\], got -0.5"),
        ({"images": torch.zeros(3, 20, 20, dtype=torch.uint8)}, ValueError, "images: expected a 4-D batch"),
        ({"images": torch.zeros(2, 3, 0, 20, dtype=torch.uint8)}, ValueError, "at least one pixel"),
        ({"images": torch.zeros(2, 3, 20, 3, dtype=torch.uint8)}, ValueError, "CHW and as HWC; say layout="),
        ({"images": [torch.zeros(3, 20, 20, dtype=torch.uint8), "cat"]}, TypeError, r"images\[1\]: .* str"),
        (
            {"images": [torch.zeros(3, 20, 20, dtype=torch.uint8), torch.zeros(20, 20)]},
            ValueError,
            r"images\[1\]: .* 3-D",
        ),
        (
            {"images": [torch.zeros(3, 20, 20, dtype=torch.uint8), torch.zeros(3, 20, 20)]},
            ValueError,
            r"images\[1\]: expected the dtype",
        ),
        (
            {"images": [torch.zeros(3, 20, 20, dtype=torch.uint8), torch.zeros(1, 20, 20, dtype=torch.uint8)]},
            ValueError,
            "same number of channels",
        ),
        (
            {"images": [torch.zeros(3, 20, 20, dtype=torch.uint8), torch.zeros(4, 20, 20, dtype=torch.uint8)]},
            ValueError,
            r"images\[1\]: expected 1 or 3 channels",
        ),
        ({"images": []}, ValueError, "at least one image"),
        ({"size": 0}, ValueError, "size: expected at least 1"),
        ({"size": (16, -1)}, ValueError, "size: expected at least 1"),
        ({"size": 16.0}, TypeError, "size: expected an int"),
        ({"size": (16, 16, 16)}, TypeError, "size: expected an int"),
        ({"interpolation": "nearest"}, ValueError, "interpolation: expected"),
        ({"kernel_size": 4}, ValueError, "kernel_size: expected an odd number"),
        ({"kernel_size": 33}, ValueError, "kernel_size // 2 below the output size"),
        ({"mean": [0.5]}, ValueError, "mean and std: expected both"),
        ({"mean": [0.5], "std": [0.5]}, ValueError, "mean: expected 3"),
        ({"mean": [0.5] * 3, "std": [0.5, 0.0, 0.5]}, ValueError, "std: expected positive"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected float32"),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format"),
        ({"layout": "NCHW"}, ValueError, "layout: expected"),
        ({"layout": "HWC"}, ValueError, "1 or 3 channels"),
        ({"params": {}}, TypeError, "params: expected AugmentParams"),
    ],
)
def test_wrong_arguments_of_augment_are_named(arguments, error, message):
    if arguments.get("kernel_size") == 33:
        arguments["params"] = neutral(2, 20, 20, sigma=1.0)
    if "images" in arguments:
        arguments["params"] = neutral(len(arguments["images"]), 20, 20)
    with pytest.raises(error, match=message):
        call(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": [0, 0, 21, 20]}, "params.crop: .* inside the 20×20"),
        ({"crop": [-1, 0, 5, 5]}, "params.crop"),
        ({"crop": [0, 16, 5, 5]}, "params.crop"),
        ({"crop": [0, 0, 0, 5]}, "params.crop"),
        ({"crop": [2**31 - 1, 0, 2**31 - 1, 5]}, "params.crop"),
        ({"order": [0, 1, 2, 3, 4, 5, 5]}, "params.order: expected a permutation"),
        ({"order": [0, 1, 2, 3, 4, 5, 7]}, "params.order: expected a permutation"),
        ({"order": [0, 1, 2, 3, 4, 5, -1]}, "params.order: expected a permutation"),
        ({"brightness": -0.1}, "params.brightness"),
        ({"contrast": math.nan}, "params.contrast"),
        ({"saturation": math.inf}, "params.saturation"),
        ({"hue": 0.6}, "params.hue"),
        ({"sigma": -1.0}, "params.sigma"),
        ({"solarize": math.nan}, "params.solarize"),
    ],
)
def test_wrong_parameters_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(params=neutral(2, 20, 20, **changes))


def test_parameters_of_another_batch_are_refused(backend):
    with pytest.raises(ValueError, match=r"params.crop: expected shape \[1, 2, 4\]"):
        call(params=neutral(3, 20, 20))
    with pytest.raises(TypeError, match=r"params.hue: expected Float"):
        call(params=neutral(2, 20, 20)._replace(hue=torch.zeros(1, 2, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sample_ids": [1, 2]}, ValueError, "sample_ids: expected one id for each of the 3 images"),
        ({"sample_ids": [1.0, 2.0, 3.0]}, TypeError, "sample_ids: expected integers"),
        ({"seed": 2**64}, ValueError, "seed: expected -9223372036854775808 to "),
        ({"seed": 1.5}, TypeError, "seed: expected an int"),
        ({"epoch": -1}, ValueError, "epoch"),
        ({"image_sizes": [(5, 5), (5, 0), (5, 5)]}, ValueError, "image_sizes"),
    ],
)
def test_wrong_arguments_of_draw_params_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        draw_params(**({"distributions": SIMCLR, "image_sizes": [(8, 8)] * 3, "seed": 0} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.5, 1.2)}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"flip_p": 1.5}, "flip_p"),
        ({"brightness": -1}, "brightness"),
        ({"contrast": (-0.5, 1.0)}, "contrast"),
        ({"hue": 0.6}, "hue"),
        ({"sigma": 0}, "sigma"),
        ({"sigma": (2.0, 1.0)}, "sigma"),
        ({"sigma": (0.1, 1.0, 2.0)}, "sigma"),
        ({"solarize_threshold": math.nan}, "solarize_threshold"),
        ({"order": ("jitter", "blur")}, "order"),
    ],
)
def test_wrong_distributions_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        AugmentDistribution(**arguments)

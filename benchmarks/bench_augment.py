"""The augmentation of SimCLR, two views of each image: ours, torchvision v2, kornia, albumentations."""

from functools import partial

import peers
import pytest
import torch
import torch.nn.functional as F
from measure import copy_ceiling, matmul_ceiling, seconds

from sslfast.transforms import SimCLRTransform

CASES = {  # size, chain: images in a batch, (height, width) of an image or several, channels, strength, kernel size
    (28, "CIFAR, grey"): (512, [(28, 28)], 1, 0.5, 0),
    (32, "CIFAR"): (512, [(32, 32)], 3, 0.5, 0),
    (96, "SimCLR"): (64, [(96, 96)], 3, 1.0, 9),
    (224, "SimCLR"): (32, [(256, 256)], 3, 1.0, 23),
    (224, "SimCLR of JPEG sizes"): (32, [(375, 500), (500, 375), (333, 500), (400, 400)], 3, 1.0, 23),
}


def photo(height: int, width: int, channels: int, seed: int) -> torch.Tensor:
    """(channels, height, width) uint8: smooth areas with some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, height // 16 + 2, width // 16 + 2, generator=generator)
    x = F.interpolate(coarse, (height, width), mode="bicubic")[0]
    return ((x + 0.03 * torch.randn(x.shape, generator=generator)).clamp(0, 1) * 255).to(torch.uint8)


def floor(views: int, size: int, pixels: float, channels: int, kernel_size: int):
    """The longer of what memory and arithmetic need at least; `pixels`: of a source image.

    Memory: the crop, which is 54 % of an image on average, read as bytes, and the view written as float32. Arithmetic
    per pixel of a view: bilinear resizing 8 a channel; brightness, contrast and saturation 3 a channel and 10 for two
    greys, hue 45, all with probability 0.8; grey 5 with 0.2; blur, with 0.5, 2 · (1 + 12 taps that matter on average)
    a channel and direction.
    """
    colours = channels == 3
    traffic = views * channels * (0.54 * pixels + 4 * size**2)
    flops = 8 * channels + 0.8 * (9 * channels + 55 if colours else 6) + (1 if colours else 0)
    flops += 0.5 * 2 * channels * 2 * 13 if kernel_size else 0
    floors = [(traffic, copy_ceiling()), (views * size**2 * flops, matmul_ceiling(torch.float32))]
    return max(floors, key=lambda floor: floor[0] / floor[1].amount * seconds(floor[1].run, 3))


@pytest.mark.parametrize(("size", "chain"), list(CASES))
def test_augment(race, quick, size, chain):
    if quick and size != 32:
        pytest.skip("not in the quick selection")
    batch, shapes, channels, strength, kernel_size = CASES[size, chain]
    batch = 4 if quick else batch
    images = [photo(*shapes[i % len(shapes)], channels, seed=i) for i in range(batch)]
    ours = SimCLRTransform(size, strength=strength, kernel_size=kernel_size or None, blur_p=0.5 if kernel_size else 0.0)
    arguments = (size, channels, strength, kernel_size)
    others = {"torchvision v2": partial(peers.augment_torchvision(*arguments), images)}
    if len(shapes) == 1:  # kornia wants one tensor
        others["kornia"] = partial(peers.augment_kornia(*arguments), images)
    others["albumentations"] = partial(peers.augment_albumentations(*arguments), images)
    two = peers.InTwoProcesses(peers.augment_albumentations, arguments, images)
    others["albumentations, 2 processes"] = two
    pixels = sum(h * w for h, w in shapes) / len(shapes)
    try:
        race(
            {"size": size, "chain": chain},
            partial(ours, torch.stack(images) if len(shapes) == 1 else images),
            others,
            floor=floor(2 * batch, size, pixels, channels, kernel_size),
            headline=True,
            items=(2 * batch, "views"),
        )
    finally:
        two.close()

"""Fused augmentation of a batch of images, with parameters that are drawn first and are data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sslfast import _C, reference
from sslfast.ops._check import check_choice, check_dense, check_integer, check_number, dtype_of, name_of
from sslfast.ops._route import DEVICES, refuse_other_derivatives

STEPS = ("brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize")
"""What `AugmentParams.order` counts: 0 is brightness, …, 6 is solarize."""

_JITTER = STEPS[:4]
_STAGES = {"jitter": _JITTER, "grayscale": ("grayscale",), "blur": ("blur",), "solarize": ("solarize",)}


@dataclass(frozen=True, kw_only=True)
class AugmentDistribution:
    """What the parameters of one view are drawn from, in torchvision's terms.

    Attributes:
        scale: (min, max) area of the crop as a fraction of the image's.
        ratio: (min, max) width / height of the crop, log-uniform.
        flip_p: probability of a horizontal flip.
        brightness, contrast, saturation: a number x for a factor in [max(0, 1 - x), 1 + x], or (min, max); 0 is off.
        hue: a number x ≤ 0.5 for a shift in [-x, x] of a full turn, or (min, max).
        jitter_p: probability of the four of them together.
        grayscale_p, blur_p, solarize_p: probabilities of these steps.
        sigma: a number or (min, max): standard deviation of the blur in output pixels.
        solarize_threshold: values from here on are inverted; images are in [0, 1].
        order: the order of the stages jitter, grayscale, blur and solarize; within the jitter it is drawn.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float = 0.5
    brightness: float | tuple[float, float] = 0.0
    contrast: float | tuple[float, float] = 0.0
    saturation: float | tuple[float, float] = 0.0
    hue: float | tuple[float, float] = 0.0
    jitter_p: float = 1.0
    grayscale_p: float = 0.0
    sigma: float | tuple[float, float] = (0.1, 2.0)
    blur_p: float = 0.0
    solarize_threshold: float = 0.5
    solarize_p: float = 0.0
    order: tuple[str, ...] = ("jitter", "grayscale", "blur", "solarize")

    def __post_init__(self):
        _check_range("scale", self.scale, above=0.0, at_most=1.0)
        _check_range("ratio", self.ratio, above=0.0)
        for name in ("flip_p", "jitter_p", "grayscale_p", "blur_p", "solarize_p"):
            if not 0.0 <= check_number(name, getattr(self, name)) <= 1.0:
                raise ValueError(f"{name}: expected a probability from 0 to 1, got {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            _check_range(name, _factors(name, getattr(self, name)), at_least=0.0)
        _check_range("hue", _factors("hue", self.hue), at_least=-0.5, at_most=0.5)
        _check_range("sigma", _pair(self.sigma), above=0.0)
        check_number("solarize_threshold", self.solarize_threshold)
        if not isinstance(self.order, (tuple, list)) or sorted(map(str, self.order)) != sorted(_STAGES):
            raise ValueError(f"order: expected an order of {tuple(_STAGES)}, got {self.order!r}")

    def _packed(self) -> tuple[list[float], list[int]]:
        """The numbers and the order as csrc/ops/augment.cpp reads them."""
        ranges = [*self.scale, *self.ratio, self.flip_p, self.jitter_p]
        for name in _JITTER:
            ranges += _factors(name, getattr(self, name))
        ranges += [self.grayscale_p, self.blur_p, *_pair(self.sigma), self.solarize_p, self.solarize_threshold]
        return [float(x) for x in ranges], [STEPS.index(step) for stage in self.order for step in _STAGES[stage]]


class AugmentParams(NamedTuple):
    """What happens to each image, as CPU tensors (views, images, …): print, save (torch.save, `_asdict`), edit, replay.

    Attributes:
        crop: (…, 4) int32: top, left, height, width in source pixels.
        flip: bool, left to right.
        order: (…, 7) int8, a permutation of the indices of `STEPS`: the order in which the steps are applied.
        brightness, contrast, saturation: float32 factors; 1 leaves the image as it is.
        hue: float32 fraction of a turn from -0.5 to 0.5; 0 leaves the image as it is.
        grayscale: bool.
        sigma: float32 standard deviation of the blur in output pixels; 0 is no blur.
        solarize: float32 threshold from which on values are inverted; inf is never.
    """

    crop: Tensor
    flip: Tensor
    order: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    grayscale: Tensor
    sigma: Tensor
    solarize: Tensor


def draw_params(
    distributions: AugmentDistribution | Sequence[AugmentDistribution],
    image_sizes: Tensor | Sequence[tuple[int, int]],
    *,
    seed: int,
    epoch: int = 0,
    sample_ids: Tensor | Sequence[int] | None = None,
) -> AugmentParams:
    """Draws the parameters of each view (one distribution each) of each image.

    What is drawn is a function of (seed, epoch, sample id, view) alone: Philox 4x32-10 in `csrc/common/philox.h`. The
    crop follows `torchvision.transforms.v2.RandomResizedCrop`, the factors and their order `ColorJitter`.

    Args:
        distributions: one a view.
        image_sizes: (images, 2): height and width in pixels.
        seed: any integer of 64 bits.
        epoch: 0 … 2³² - 1.
        sample_ids: one a image; the position in the batch by default.

    Raises:
        ValueError, TypeError: if a number is out of its range or the lengths differ.
    """
    views = list(distributions) if isinstance(distributions, Sequence) else [distributions]
    for view in views:
        if not isinstance(view, AugmentDistribution):
            raise TypeError(f"distributions: expected one AugmentDistribution a view, got {type(view).__name__}")
    sizes = _integers("image_sizes", image_sizes)
    if sizes.numel() % 2:
        raise ValueError(f"image_sizes: expected shape (images, 2), got {tuple(sizes.shape)}")
    sizes = sizes.reshape(-1, 2)
    check_integer("seed", seed, -(2**63), 2**64 - 1)
    check_integer("epoch", epoch, 0, 2**32 - 1)
    return AugmentParams(
        *_C.augment_draw(sizes, _ids(sample_ids, len(sizes)), [v._packed() for v in views], seed % 2**64, epoch)
    )


def augment(
    images: Tensor | Sequence[Tensor],
    params: AugmentParams,
    size: int | tuple[int, int],
    *,
    interpolation: str = "bilinear",
    antialias: bool = True,
    kernel_size: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    layout: str | None = None,
) -> Tensor:
    """Applies drawn parameters to a batch: crop, resize, flip, then the steps in the order that `params` says, then
    (x - mean) / std. Each step equals torchvision's functional op on a float image.

    Args:
        images: uint8 (0 … 255) or float32 (0 … 1), 1 or 3 channels: (images, channels, height, width) or (images,
            height, width, channels), or a list of (channels, height, width) or (height, width, channels) of any sizes.
            On a GPU the values of float32 images are not checked, since that would wait for the device.
        params: from `draw_params`, (views, images, …).
        size: height and width of the output, or one number for both.
        interpolation: "bilinear" or "bicubic" (which may leave [0, 1], as torchvision's does on float images).
        antialias: whether shrinking averages over the source pixels that an output pixel covers.
        kernel_size: taps of the Gaussian blur, odd.
        mean, std: one number a channel; no normalisation by default.
        dtype: float32, bfloat16 or float16. Arithmetic is float32.
        memory_format: of each view, contiguous or channels_last.
        layout: "CHW" or "HWC"; found from the shapes by default, an error if both fit.

    Returns:
        (views, images, channels, height, width).

    Raises:
        ValueError, TypeError: naming the argument, before anything is computed.
    """
    height, width = check_size(size)
    tensors, channels_first, channels = _images(images, layout)
    check_choice("interpolation", interpolation, ("bilinear", "bicubic"))
    check_kernel_size(kernel_size)
    mean, std = _mean_std(mean, std, channels)
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    check_choice("memory_format", memory_format, (torch.contiguous_format, torch.channels_last))
    if not isinstance(params, AugmentParams):
        raise TypeError(f"params: expected AugmentParams, got {type(params).__name__}")
    channels_last = memory_format == torch.channels_last
    if tensors[0].device.type not in DEVICES:
        if len({image.device for image in tensors}) > 1:
            raise ValueError(f"images: expected one device, got {tensors[0].device} and others")
        batch = [x if channels_first else x.movedim(-1, 0) for x in (tensors[0] if tensors[0].dim() == 4 else tensors)]
        out = reference.augment.augment(
            batch, params, (height, width), interpolation, antialias, kernel_size, mean, std
        ).to(dtype)
        return out.movedim(2, -1).contiguous().movedim(-1, 2) if channels_last else out
    return torch.ops.sslfast.augment_forward(
        tensors,
        list(params),
        channels_first,
        height,
        width,
        interpolation,
        antialias,
        kernel_size,
        mean,
        std,
        name_of(dtype),
        channels_last,
    )


def image_sizes(images: Tensor | Sequence[Tensor], layout: str | None = None) -> Tensor:
    """(images, 2) int64: height and width of each image of a batch or a list, as `augment` reads it."""
    tensors, channels_first, _ = _images(images, layout)
    at = slice(-2, None) if channels_first else slice(-3, -1)
    if len(tensors) == 1 and tensors[0].dim() == 4:
        return torch.tensor(tensors[0].shape[at]).expand(len(tensors[0]), 2)
    return torch.tensor([image.shape[at] for image in tensors]).reshape(-1, 2)


def check_size(size) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(isinstance(n, int) for n in pair):
        raise TypeError(f"size: expected an int or (height, width), got {size!r}")
    if min(pair) < 1 or math.prod(pair) >= 2**31:
        raise ValueError(f"size: expected at least 1 pixel and less than 2³¹, got {size!r}")
    return pair


def check_kernel_size(kernel_size: int) -> None:
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0 or kernel_size > 255:
        raise ValueError(f"kernel_size: expected an odd number from 1 to 255, got {kernel_size!r}")


# ------------------------------------------------------------------------------------------------------ registration


@torch.library.custom_op("sslfast::augment_forward", mutates_args=(), device_types=DEVICES)
def _forward(
    images: list[Tensor],
    params: list[Tensor],
    channels_first: bool,
    height: int,
    width: int,
    interpolation: str,
    antialias: bool,
    kernel_size: int,
    mean: list[float],
    std: list[float],
    dtype: str,
    channels_last: bool,
) -> Tensor:
    arguments = channels_first, height, width, interpolation, antialias, kernel_size, mean, std
    return _C.augment_forward(images, params, *arguments, dtype_of(dtype), channels_last)


refuse_other_derivatives(_forward)


@_forward.register_fake
def _(images, params, channels_first, height, width, _i, _a, _k, _m, _s, dtype, channels_last):
    batch, views = images[0].dim() == 4, params[0].shape[0]
    samples, channels = images[0].shape[0] if batch else len(images), images[0].shape[-3 if channels_first else -1]
    if channels_last:
        return images[0].new_empty((views, samples, height, width, channels), dtype=dtype_of(dtype)).movedim(-1, 2)
    return images[0].new_empty((views, samples, channels, height, width), dtype=dtype_of(dtype))


# ------------------------------------------------------------------------------------------------------ arguments


def _pair(value) -> tuple[float, float]:
    return tuple(value) if isinstance(value, Sequence) else (value, value)


def _factors(name: str, value) -> tuple[float, float]:
    """The range that torchvision's ColorJitter makes of one number."""
    if isinstance(value, Sequence):
        return tuple(value)
    if check_number(name, value) < 0:
        raise ValueError(f"{name}: expected a number ≥ 0 or (min, max), got {value}")
    return (-value, value) if name == "hue" else (max(0.0, 1.0 - value), 1.0 + value)


def _check_range(name, values, *, above=-math.inf, at_least=-math.inf, at_most=math.inf):
    if len(values) != 2:
        raise ValueError(f"{name}: expected (min, max), got {values!r}")
    low, high = (check_number(name, value) for value in values)
    if not (above < low <= high <= at_most and low >= at_least and math.isfinite(high)):
        bounds = [f"> {above:g}"] * math.isfinite(above) + [f"≥ {at_least:g}"] * math.isfinite(at_least)
        bounds += [f"≤ {at_most:g}"] * math.isfinite(at_most)
        raise ValueError(f"{name}: expected min ≤ max, each {' and '.join(bounds)}, got {values!r}")


def _integers(name: str, value) -> Tensor:
    """`value` as an int64 tensor on the CPU, or raise."""
    try:
        t = torch.as_tensor(value, device=None if isinstance(value, Tensor) else "cpu")
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name}: expected integers of 64 bits, got {type(value).__name__} ({error})") from None
    check_dense(name, t)
    if t.numel() and (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool):
        raise TypeError(f"{name}: expected integers, got {t.dtype}")
    if t.is_meta:
        raise ValueError(f"{name}: expected a tensor with values, got one on meta")
    return t.to("cpu", torch.int64).contiguous()


def _ids(sample_ids, count: int) -> Tensor:
    if sample_ids is None:
        return torch.arange(count)
    ids = _integers("sample_ids", sample_ids)
    if ids.shape != (count,):
        raise ValueError(f"sample_ids: expected one id for each of the {count} images, got shape {tuple(ids.shape)}")
    return ids


def _mean_std(mean, std, channels: int) -> tuple[list[float], list[float]]:
    if (mean is None) != (std is None):
        raise ValueError("mean and std: expected both or neither")
    mean = [0.0] * channels if mean is None else [float(x) for x in mean]
    std = [1.0] * channels if std is None else [float(x) for x in std]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels or not all(math.isfinite(x) for x in values):
            raise ValueError(f"{name}: expected {channels} finite numbers, one a channel, got {values}")
    if min(std) <= 0:
        raise ValueError(f"std: expected positive numbers, got {std}")
    return mean, std


def _images(images, layout: str | None) -> tuple[list[Tensor], bool, int]:
    """The images as a list (of one 4-D batch, or of 3-D images), whether channels come first, and their number."""
    if layout not in (None, "CHW", "HWC"):
        raise ValueError(f'layout: expected "CHW", "HWC" or None, got {layout!r}')
    if isinstance(images, Tensor):
        check_dense("images", images)
        if images.dim() != 4:
            raise ValueError(f"images: expected a 4-D batch or a list of 3-D images, got shape {tuple(images.shape)}")
        tensors = [images]
    else:
        tensors = list(images)
        for i, image in enumerate(tensors):
            if not isinstance(image, Tensor) or image.is_nested or image.layout is not torch.strided:
                check_dense(f"images[{i}]", image)
            if image.dim() != 3:
                raise ValueError(f"images[{i}]: expected a 3-D image, got shape {tuple(image.shape)}")
        if not tensors:
            raise ValueError("images: expected at least one image, got an empty list")
    shape = tensors[0].shape[-3:]
    first = {image.shape[-3] for image in tensors} == {shape[0]} and shape[0] in (1, 3)
    last = {image.shape[-1] for image in tensors} == {shape[2]} and shape[2] in (1, 3)
    if layout is None and first and last:
        raise ValueError(
            f'images: shape {tuple(shape)} can be read as CHW and as HWC; say layout="CHW" or layout="HWC"'
        )
    channels_first = layout == "CHW" if layout else first or not last
    if not (first if channels_first else last):
        _explain_channels(tensors, layout)
    return tensors, channels_first, shape[0] if channels_first else shape[2]


def _explain_channels(tensors: list[Tensor], layout: str | None):
    where = {"CHW": (0,), "HWC": (2,), None: (0, 2)}[layout]
    for i, image in enumerate(tensors):
        shape = tuple(image.shape[-3:])
        name = "images" if image.dim() == 4 else f"images[{i}]"
        if not any(shape[at] in (1, 3) for at in where):
            raise ValueError(f"{name}: expected 1 or 3 channels first or last, got shape {shape}")
    shapes = sorted({tuple(image.shape[-3:]) for image in tensors})
    raise ValueError(f"images: expected the same number of channels in the same place in all images, got {shapes[:4]}")

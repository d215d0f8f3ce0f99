"""The augmentation in plain PyTorch, image by image: the truth in tests, and the documentation of every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(
    images,
    params,
    size: tuple[int, int],
    interpolation: str = "bilinear",
    antialias: bool = True,
    kernel_size: int = 3,
    mean=None,
    std=None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(views, images, channels, height, width) from (channels, height, width) images and `AugmentParams`."""
    views = []
    for view in range(len(params.crop)):
        batch = []
        for i, image in enumerate(images):
            x = image.to(dtype) / (255 if image.dtype == torch.uint8 else 1)
            top, left, height, width = params.crop[view, i].tolist()
            x = x[:, top : top + height, left : left + width]
            # Three channels, channels_last: with antialias torch resizes contiguous images to one column wrongly.
            wide = x[None].expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            wide = F.interpolate(wide, size, mode=interpolation, align_corners=False, antialias=antialias)
            x = wide[0, : len(x)].contiguous()
            if params.flip[view, i]:
                x = x.flip(-1)
            for step in params.order[view, i].tolist():
                name, apply = _STEPS[step]
                if name == "blur":
                    x = apply(x, params.sigma[view, i].item(), kernel_size)
                else:
                    x = apply(x, getattr(params, name)[view, i].item())
            if mean is not None:
                x = (x - x.new_tensor(mean).view(-1, 1, 1)) / x.new_tensor(std).view(-1, 1, 1)
            batch.append(x)
        views.append(torch.stack(batch))
    return torch.stack(views)


def _grey(x: Tensor) -> Tensor:
    """(1, height, width); an image of one channel is its own grey."""
    return x if len(x) == 1 else 0.2989 * x[:1] + 0.587 * x[1:2] + 0.114 * x[2:]


def _brightness(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else (factor * x).clamp(0, 1)


def _contrast(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else (factor * x + (1 - factor) * _grey(x).mean()).clamp(0, 1)


def _saturation(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 or len(x) == 1 else (factor * x + (1 - factor) * _grey(x)).clamp(0, 1)


def _hue(x: Tensor, shift: float) -> Tensor:
    if shift == 0 or len(x) == 1:
        return x
    r, g, b = x
    value, chroma = x.amax(0), x.amax(0) - x.amin(0)
    safe = torch.where(chroma == 0, 1, chroma)
    sextant = torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    sextant = torch.where(value == r, (g - b) / safe, sextant) + 6 * shift
    ramp = torch.stack([(sextant + n) % 6 for n in (5, 3, 1)])
    ramp = torch.minimum(ramp, 4 - ramp).clamp(0, 1)
    return torch.where(ramp == 0, value, (value - chroma * ramp).clamp(0, 1))


def _grayscale(x: Tensor, applied: bool) -> Tensor:
    return _grey(x).expand_as(x) if applied else x


def _blur(x: Tensor, sigma: float, kernel_size: int) -> Tensor:
    radius = kernel_size // 2
    if sigma == 0 or radius == 0:
        return x
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    taps = (-0.5 * (offsets / sigma) ** 2).softmax(0)
    x = F.pad(x[:, None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(x, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))[:, 0]


def _solarize(x: Tensor, threshold: float) -> Tensor:
    return torch.where(x >= threshold, 1 - x, x)


_STEPS: tuple[tuple[str, Callable[..., Tensor]], ...] = (
    ("brightness", _brightness),
    ("contrast", _contrast),
    ("saturation", _saturation),
    ("hue", _hue),
    ("grayscale", _grayscale),
    ("blur", _blur),
    ("solarize", _solarize),
)

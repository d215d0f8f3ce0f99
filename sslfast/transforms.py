"""Augmentations of self-supervised learning that take a whole batch: one fused call, every view at once.

    transform = SimCLRTransform(size=224, seed=0)
    views = transform(images, sample_ids)      # list of two (N, 3, 224, 224) float32 tensors

`images` is a uint8 batch, (N, H, W, C) or (N, C, H, W), or a list of images of different sizes. Call it on the batch in
the main process, which is the fast way, or hand it to a DataLoader as `collate_fn`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate, get_worker_info

from sslfast.ops.augment import (
    AugmentDistribution,
    AugmentParams,
    augment,
    check_kernel_size,
    check_size,
    draw_params,
    image_sizes,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MoCoV1Transform",
    "MoCoV2Transform",
    "MoCoV3Transform",
    "RandomAugment",
    "SimCLRTransform",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class RandomAugment(nn.Module):
    """Random crop, flip, colour jitter, greyscale, blur, solarisation and normalisation of a batch, in one pass.

    Args:
        size: height and width of a view in pixels, or one number for both.
        scale, ratio: area (fraction) and aspect ratio of the crop, as in torchvision's `RandomResizedCrop`.
        interpolation, antialias: "bilinear" or "bicubic"; whether shrinking averages.
        flip_p: probability of a horizontal flip.
        brightness, contrast, saturation, hue, jitter_p: as in `ColorJitter`, applied with probability `jitter_p`.
        grayscale_p: as in `RandomGrayscale`.
        kernel_size, sigma, blur_p: as in `GaussianBlur`; None is the odd number next to a tenth of the size.
        solarize_threshold, solarize_p: as in `RandomSolarize`, of images in [0, 1].
        order: the order of the stages after the crop; the flip commutes with all of them.
        mean, std: one number a channel; None is no normalisation, and images stay in [0, 1].
        views: how many views of each image a call returns.
        dtype, memory_format: of a view: float32, bfloat16 or float16; contiguous or channels_last.
        seed: with it, a view is a function of (seed, epoch, sample id, view) alone. Without, every call draws its seed
            from `generator` (by default torch's own, which each DataLoader worker seeds differently).
        generator: a torch.Generator on the CPU; not together with `seed`. In a DataLoader worker, which has a copy of
            it, it is mixed with the worker's own seed, so that workers and epochs differ; runs are the same if torch
            (or the DataLoader's generator) is seeded too. In other processes that got a copy it is refused.
        layout: "CHW" or "HWC"; found from the shapes by default.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: at the call, for a generator in a process that has a copy of it.

    Objects can be pickled with every protocol, copied, and saved with torch.save. A copy by copy.copy shares the
    generator; other copies have one of their own in the same state.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = "bilinear",
        antialias: bool = True,
        flip_p: float = 0.5,
        brightness: float | tuple[float, float] = 0.0,
        contrast: float | tuple[float, float] = 0.0,
        saturation: float | tuple[float, float] = 0.0,
        hue: float | tuple[float, float] = 0.0,
        jitter_p: float = 1.0,
        grayscale_p: float = 0.0,
        kernel_size: int | None = None,
        sigma: float | tuple[float, float] = (0.1, 2.0),
        blur_p: float = 0.0,
        solarize_threshold: float = 0.5,
        solarize_p: float = 0.0,
        order: tuple[str, ...] = ("jitter", "grayscale", "blur", "solarize"),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        views: int = 1,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        layout: str | None = None,
    ):
        super().__init__()
        if seed is not None and generator is not None:
            raise ValueError("seed and generator: expected at most one of them")
        if not isinstance(views, int) or views < 1:
            raise ValueError(f"views: expected an int of at least 1, got {views!r}")
        distribution = AugmentDistribution(
            scale=scale,
            ratio=ratio,
            flip_p=flip_p,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            jitter_p=jitter_p,
            grayscale_p=grayscale_p,
            sigma=sigma,
            blur_p=blur_p,
            solarize_threshold=solarize_threshold,
            solarize_p=solarize_p,
            order=tuple(order),
        )
        self.distributions = (distribution,) * views
        self.size = check_size(size)
        self.kernel_size = max(3, int(min(self.size) * 0.1) | 1) if kernel_size is None else kernel_size
        check_kernel_size(self.kernel_size)
        if blur_p > 0 and self.kernel_size // 2 >= min(self.size):
            raise ValueError(
                f"kernel_size: expected kernel_size // 2 below the size {self.size}, got {self.kernel_size} "
                "(the blur reflects at the border)"
            )
        self.applied: dict[str, Any] = {
            "interpolation": interpolation,
            "antialias": antialias,
            "mean": mean,
            "std": std,
            "dtype": dtype,
            "layout": layout,
        }
        if memory_format not in (torch.contiguous_format, torch.channels_last):
            raise ValueError(f"memory_format: expected contiguous_format or channels_last, got {memory_format}")
        self.channels_last = memory_format == torch.channels_last  # since a torch.memory_format cannot be pickled
        self.seed = seed
        self.generator = generator
        self._epoch = _shared(0)

    @property
    def generator(self) -> torch.Generator | None:
        return self._seeds.generator

    @generator.setter
    def generator(self, generator: torch.Generator | None) -> None:
        self._seeds = _Seeds.of(generator)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __copy__(self) -> RandomAugment:
        copied = type(self).__new__(type(self))
        copied.__dict__ |= self.__dict__ | {"_epoch": _shared(self.epoch)}
        return copied

    def set_epoch(self, epoch: int) -> None:
        """With a seed: the epoch that later calls draw for, also those in workers of a DataLoader that live on."""
        self.epoch = epoch

    def draw(self, images, sample_ids=None, epoch: int | None = None) -> AugmentParams:
        """The parameters of a call, (views, images) each: to look at, save, or edit and hand to `apply_params`."""
        seed = self._seeds.draw() if self.seed is None else self.seed
        sizes = image_sizes(images, self.applied["layout"])
        epoch = self.epoch if epoch is None else epoch
        return draw_params(self.distributions, sizes, seed=seed, epoch=epoch, sample_ids=sample_ids)

    def apply_params(self, images, params: AugmentParams) -> list[Tensor]:
        """One (N, C, height, width) tensor a view, made with these parameters."""
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        applied = {"kernel_size": self.kernel_size, "memory_format": memory_format, **self.applied}
        return list(augment(images, params, self.size, **applied).unbind())

    def forward(self, images, sample_ids=None, epoch: int | None = None) -> list[Any]:
        """One (N, C, height, width) tensor a view.

        Args:
            images: (N, C, H, W) or (N, H, W, C), uint8 or float32 in [0, 1]; or a list of images of any sizes, as
                tensors or NumPy arrays; or a list of (image, label, …) tuples, as a DataLoader hands it to its
                `collate_fn`: the labels are collated and follow the views.
            sample_ids: (N) integers; the position in the batch by default. With a seed and without ids, images at the
                same position of two batches of an epoch get the same parameters.
            epoch: instead of the one that `set_epoch` set.
        """
        rest = []
        if not isinstance(images, (Tensor, np.ndarray)) and len(images) and isinstance(images[0], (tuple, list)):
            images, *columns = zip(*images, strict=True)
            rest = [default_collate(list(column)) for column in columns]
        if not isinstance(images, Tensor):
            images = _tensor(images) if isinstance(images, np.ndarray) else [_tensor(image) for image in images]
        views = self.apply_params(images, self.draw(images, sample_ids, epoch))
        return [views, *rest] if rest else views

    def extra_repr(self) -> str:
        shown = {"size": self.size, "views": len(self.distributions), "kernel_size": self.kernel_size, **self.applied}
        shown |= {"channels_last": self.channels_last or None, "seed": self.seed, "epoch": self.epoch}
        lines = [", ".join(f"{name}={value}" for name, value in shown.items() if value is not None)]
        lines += [f"view {i}: {view}" for i, view in enumerate(self.distributions)]
        return "\n".join(dict.fromkeys(lines) if len(set(self.distributions)) > 1 else lines[:2])


class _Seeds:
    """Draws a seed for each call from a generator, or from torch's own, but never from a copy as if it were the one.

    Processes that get a copy of an object would otherwise all draw the same. There is one object for each generator, so
    that transforms which share it still do after they were pickled together.
    """

    @classmethod
    def of(cls, generator: torch.Generator | None) -> _Seeds:
        seeds = _of_generator.get(id(generator))
        if seeds is None or seeds.generator is not generator:
            seeds = _of_generator[id(generator)] = cls(generator)
        return seeds

    def __init__(self, generator: torch.Generator | None):
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator: expected one on the CPU, got one on {generator.device}")
        self.generator, self.owner = generator, _process()

    def draw(self) -> int:
        if self.generator is not None and self.owner != _process():
            self._adopt()
        return int(torch.randint(2**63 - 1, (), generator=self.generator))

    def _adopt(self) -> None:
        """Make a copied generator this process's own."""
        worker = get_worker_info()
        if worker is not None:
            drawn = int(torch.randint(2**62, (), generator=self.generator))
            self.generator = torch.Generator().manual_seed((drawn + worker.seed) % 2**63)
        elif self.owner[0] == _process()[0]:  # a relative, which may draw from it too
            raise RuntimeError(
                "generator: this process has a copy of it, which would give the same views as in the others; make a "
                "generator of its own in each process (transform.generator = …), or use seed= and sample ids"
            )
        self.owner = _process()

    def __getstate__(self) -> dict[str, Any]:
        state = None if self.generator is None else self.generator.get_state().numpy().tobytes()
        return {"state": state, "owner": self.owner}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.generator, self.owner = None, saved["owner"]
        if saved["state"] is not None:
            state = torch.frombuffer(bytearray(saved["state"]), dtype=torch.uint8)
            self.generator = torch.Generator()
            self.generator.set_state(state)


_of_generator: weakref.WeakValueDictionary[int, _Seeds] = weakref.WeakValueDictionary()


def _shared(number: int) -> Tensor:
    """A whole number that a process and its workers see alike."""
    tensor = torch.tensor(number)
    try:
        return tensor.share_memory_()
    except RuntimeError:  # without shared memory there are no workers either
        return tensor


def _process() -> tuple[str, int]:
    """(what all processes of a program share, what this one has alone)"""
    return hashlib.sha256(multiprocessing.current_process().authkey).hexdigest(), os.getpid()


class SimCLRTransform(RandomAugment):
    """The augmentation of SimCLR (Chen et al. 2020, arXiv 2002.05709): two views.

    Args:
        size: height and width of a view.
        strength: s of the paper: jitter of (0.8 s, 0.8 s, 0.8 s, 0.2 s); 0.5 is its setting for CIFAR.
        blur_p: 0.5 by default, and 0 for sizes up to 32, as for CIFAR in the paper.
        others: what `RandomAugment` takes; they replace the paper's values.
    """

    def __init__(
        self, size: int | tuple[int, int] = 224, *, strength: float = 1.0, blur_p: float | None = None, **others
    ):
        if blur_p is None:
            blur_p = 0.5 if max(check_size(size)) > 32 else 0.0
        jitter: dict[str, Any] = {name: 0.8 * strength for name in ("brightness", "contrast", "saturation")}
        defaults: dict[str, Any] = {
            "scale": (0.08, 1.0),
            **jitter,
            "hue": 0.2 * strength,
            "jitter_p": 0.8,
            "grayscale_p": 0.2,
            "views": 2,
        }
        super().__init__(size, blur_p=blur_p, **(defaults | others))


class MoCoV1Transform(RandomAugment):
    """The augmentation of MoCo (He et al. 2019, arXiv 1911.05722): two views, ImageNet's mean and std.

    Args:
        size: height and width of a view.
        others: what `RandomAugment` takes; they replace the paper's values.
    """

    def __init__(self, size: int | tuple[int, int] = 224, **others):
        jitter: dict[str, Any] = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.4)
        defaults: dict[str, Any] = {
            "scale": (0.2, 1.0),
            "grayscale_p": 0.2,
            "order": ("grayscale", "jitter", "blur", "solarize"),
        }
        super().__init__(size, **(defaults | jitter | _IMAGENET | others))


class MoCoV2Transform(RandomAugment):
    """The augmentation of MoCo v2 (Chen et al. 2020, arXiv 2003.04297): two views, ImageNet's mean and std.

    Args:
        size: height and width of a view.
        others: what `RandomAugment` takes; they replace the paper's values.
    """

    def __init__(self, size: int | tuple[int, int] = 224, **others):
        jitter: dict[str, Any] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "jitter_p": 0.8}
        defaults: dict[str, Any] = {"scale": (0.2, 1.0), "grayscale_p": 0.2, "blur_p": 0.5}
        super().__init__(size, **(defaults | jitter | _IMAGENET | others))


class MoCoV3Transform(RandomAugment):
    """The augmentation of MoCo v3 (Chen et al. 2021, arXiv 2104.02057): two unlike views, ImageNet's mean and std.

    The first view is always blurred; the second is blurred with probability 0.1 and solarised with probability 0.2.

    Args:
        size: height and width of a view.
        others: what `RandomAugment` takes except `views`; they replace the paper's values in both views.
    """

    def __init__(self, size: int | tuple[int, int] = 224, **others):
        jitter: dict[str, Any] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "jitter_p": 0.8}
        defaults: dict[str, Any] = {"grayscale_p": 0.2, "blur_p": 1.0, "solarize_threshold": 128 / 255}
        super().__init__(size, **(defaults | jitter | _IMAGENET | others))
        second: dict[str, Any] = {"blur_p": 0.1, "solarize_p": 0.2}
        unlike = {name: value for name, value in second.items() if name not in others}
        self.distributions = (self.distributions[0], dataclasses.replace(self.distributions[0], **unlike))


_IMAGENET: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "views": 2}


def _tensor(image) -> Tensor:
    """NumPy arrays of any strides become tensors; other things are left for `augment` to name."""
    return torch.from_numpy(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image

"""What the benchmarks compare with: the same job done by other libraries or by plain PyTorch."""

import multiprocessing
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.5


def nt_xent_cross_entropy(z1: Tensor, z2: Tensor) -> Tensor:
    """NT-Xent by F.cross_entropy, with as few (2·batch)² matrices as plain PyTorch allows."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z / TEMPERATURE) @ z.T
    logits.fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))


def nt_xent_lightly() -> Callable[[Tensor, Tensor], Tensor]:
    from lightly.loss import NTXentLoss

    return NTXentLoss(TEMPERATURE)


def nt_xent_compiled() -> Callable[[Tensor, Tensor], Tensor]:
    torch.compiler.reset()
    return torch.compile(nt_xent_cross_entropy, dynamic=False)


# Losses of normalised vectors with the temperature 0.1.


def moco(query: Tensor, own: Tensor, queue: Tensor) -> Tensor:
    logits = torch.cat([(query * own).sum(1, keepdim=True), query @ queue.T], dim=1)
    return F.cross_entropy(logits * 10.0, torch.zeros(len(query), dtype=torch.int64, device=query.device))


def info_nce() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from info_nce import InfoNCE

    return InfoNCE(0.1)


def clip() -> Callable[[Tensor, Tensor], Tensor]:
    from open_clip.loss import ClipLoss

    loss, scale = ClipLoss(), torch.tensor(10.0, requires_grad=True)
    return lambda images, texts: loss(images, texts, scale)


def siglip() -> Callable[[Tensor, Tensor], Tensor]:
    from open_clip.loss import SigLipLoss

    loss, scale, bias = SigLipLoss(), torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    return lambda images, texts: loss(images, texts, scale, bias)


def supcon() -> Callable[[Tensor, Tensor], Tensor]:
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(0.1)


def dcl() -> Callable[[Tensor, Tensor], Tensor]:
    from lightly.loss import DCLLoss

    return DCLLoss(0.1)


# Augmentation: the SimCLR chain, without blur where kernel_size is 0, of one-channel images without what needs colours.
# Each takes a list of (C, H, W) uint8 images and returns two (N, C, size, size) float32 tensors in [0, 1].


def augment_torchvision(size: int, channels: int, strength: float, kernel_size: int) -> Callable:
    from torchvision.transforms import v2

    jitter = [0.8 * strength] * 2 + ([0.8 * strength, 0.2 * strength] if channels == 3 else [])
    steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.RandomApply([v2.ColorJitter(*jitter)], p=0.8)]
    steps += [v2.RandomGrayscale(0.2)] if channels == 3 else []
    steps += [v2.RandomApply([v2.GaussianBlur(kernel_size)], p=0.5)] if kernel_size else []
    chain = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])
    return lambda images: [torch.stack([chain(image) for image in images]) for _ in range(2)]


def augment_kornia(size: int, channels: int, strength: float, kernel_size: int) -> Callable:
    from kornia import augmentation as K

    jitter = [0.8 * strength] * 2 + ([0.8 * strength, 0.2 * strength] if channels == 3 else [])
    steps = [K.RandomResizedCrop((size, size)), K.RandomHorizontalFlip(), K.ColorJitter(*jitter, p=0.8)]
    steps += [K.RandomGrayscale(p=0.2)] if channels == 3 else []
    steps += [K.RandomGaussianBlur((kernel_size, kernel_size), (0.1, 2.0), p=0.5)] if kernel_size else []
    chain = torch.nn.Sequential(*steps)

    @torch.no_grad()
    def augment(images):
        batch = torch.stack(list(images)).float() / 255
        return [chain(batch) for _ in range(2)]

    return augment


def augment_albumentations(size: int, channels: int, strength: float, kernel_size: int) -> Callable:
    import albumentations as A
    import cv2

    cv2.setNumThreads(1)
    saturation, hue = (0.8 * strength, 0.2 * strength) if channels == 3 else (0, 0)
    steps = [A.RandomResizedCrop((size, size)), A.HorizontalFlip()]
    steps += [A.ColorJitter(0.8 * strength, 0.8 * strength, saturation, hue, p=0.8)]
    steps += [A.ToGray(p=0.2)] if channels == 3 else []
    steps += [A.GaussianBlur((kernel_size, kernel_size), (0.1, 2.0), p=0.5)] if kernel_size else []
    chain = A.Compose(steps)

    def augment(images):
        pixels = [np.ascontiguousarray(image.numpy().transpose(1, 2, 0)) for image in images]
        views = [np.stack([chain(image=image)["image"] for image in pixels]) for _ in range(2)]
        return [torch.from_numpy(view).permute(0, 3, 1, 2).contiguous().float() / 255 for view in views]

    return augment


class InTwoProcesses:
    """An augmentation of `images`, half of them in each of two processes that write into shared memory."""

    def __init__(self, make: Callable, arguments: tuple, images: list[Tensor]):
        size, channels = arguments[:2]
        self.views = torch.empty(2, len(images), channels, size, size).share_memory_()
        context, half = multiprocessing.get_context("spawn"), len(images) // 2
        self.pipes = []
        for part in (slice(None, half), slice(half, None)):
            pipe, other = context.Pipe()
            own = (other, make, arguments, images[part], self.views[:, part])
            context.Process(target=self._serve, args=own, daemon=True).start()
            self.pipes.append(pipe)

    @staticmethod
    def _serve(pipe, make: Callable, arguments: tuple, images: list[Tensor], out: Tensor) -> None:
        torch.set_num_threads(1)
        augment = make(*arguments)
        while pipe.recv():
            for view, made in zip(out, augment(images), strict=True):
                view.copy_(made)
            pipe.send(True)

    def __call__(self) -> Tensor:
        for pipe in self.pipes:
            pipe.send(True)
        for pipe in self.pipes:
            pipe.recv()
        return self.views

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(False)


# Rotation: each takes images (n, C, S, S) and returns all four rotations (4·n, C, S, S) and their labels.


def rotate4_rot90(images: Tensor) -> tuple[Tensor, Tensor]:
    rotated = torch.cat([torch.rot90(images, k, (2, 3)) for k in range(4)])
    return rotated, torch.arange(4).repeat_interleave(len(images))


def rotate4_loop(images: Tensor) -> tuple[Tensor, Tensor]:
    """Image by image, by transposing and flipping, as mimicry's SSGAN turns the images of a batch."""
    turn = [
        lambda image: image,
        lambda image: image.transpose(2, 3).flip(2),
        lambda image: image.flip(2).flip(3),
        lambda image: image.transpose(2, 3).flip(3),
    ]
    rotated, labels = [], []
    for k in range(4):
        for image in images:
            rotated.append(turn[k](image.unsqueeze(0)))
            labels.append(torch.from_numpy(np.array([k])))
    return torch.cat(rotated), torch.cat(labels)


ROTATE4 = {"torch.rot90": rotate4_rot90, "image by image": rotate4_loop}

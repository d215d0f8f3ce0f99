"""`rotate4` in plain PyTorch: the truth in tests, the documentation, and what runs on devices without a kernel."""

import torch
from torch import Tensor


def rotate4(images: Tensor) -> tuple[Tensor, Tensor]:
    rotated = torch.cat([torch.rot90(images, k, (2, 3)) for k in range(4)])
    return rotated, torch.arange(4, device=images.device).repeat_interleave(len(images))

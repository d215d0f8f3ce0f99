"""What the benchmarks compare with: the same job done by other libraries or by plain PyTorch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.5


def nt_xent_cross_entropy(z1: Tensor, z2: Tensor) -> Tensor:
    """NT-Xent by F.cross_entropy, with as few (2·batch)² matrices as plain PyTorch allows."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z / TEMPERATURE) @ z.T
    logits.fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z1)))


def nt_xent_lightly() -> Callable[[Tensor, Tensor], Tensor]:
    from lightly.loss import NTXentLoss

    return NTXentLoss(TEMPERATURE)


def nt_xent_compiled() -> Callable[[Tensor, Tensor], Tensor]:
    torch.compiler.reset()
    return torch.compile(nt_xent_cross_entropy, dynamic=False)

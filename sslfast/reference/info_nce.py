"""`info_nce` in plain PyTorch: the truth in tests, the documentation, and what runs on devices without a kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.5, reduction: str = "mean") -> Tensor:
    batch, compute = z1.shape[0], torch.float64 if z1.dtype == torch.float64 else torch.float32
    z = F.normalize(torch.cat([z1, z2]).to(compute), dim=1)
    diagonal = torch.eye(2 * batch, dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).to(compute).masked_fill(diagonal, float("-inf"))
    positives = torch.arange(2 * batch, device=z.device).roll(batch)
    return F.cross_entropy(logits, positives, reduction=reduction)

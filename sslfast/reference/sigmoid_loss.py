"""`sigmoid_loss` in plain PyTorch: the truth in tests, the documentation, and what runs where there is no kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss(
    queries: Tensor, keys: Tensor, scale: float | Tensor, bias: float | Tensor = 0.0, first_key: int = 0
) -> Tensor:
    """Σ_ij −log σ(y_ij·(scale·⟨q_i, k_j⟩ + bias)), y_ij = 1 for j = first_key + i and −1 otherwise; float64."""
    compute = torch.float64 if queries.dtype == torch.float64 else torch.float32
    logits = scale * (queries.to(compute) @ keys.to(compute).T) + bias
    rows, columns = (torch.arange(len(t), device=logits.device) for t in (queries, keys))
    own = columns == first_key + rows[:, None]
    return -F.logsigmoid(torch.where(own, logits, -logits)).sum(dtype=torch.float64)

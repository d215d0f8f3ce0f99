"""The moving average of a model's weights: a teacher, a key encoder, or what is better to sample from."""

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · model, in place; buffers (running statistics, counters) are copied.

    The two modules must be alike. Raises ValueError for a decay outside of [0, 1].
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected a number in [0, 1], got {decay}")
    get_ema_multi_avg_fn(decay)(list(average.parameters()), list(model.parameters()), None)
    for old, new in zip(average.buffers(), model.buffers(), strict=True):
        old.copy_(new)

"""Parameter groups, LARS, and the learning rate over time."""

import math

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return two groups: matrices and filters with weight decay, biases and normalisation parameters without."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, tensor by tensor, to the norm of the weights (arXiv 1708.03888).

    For each tensor w of two or more dimensions with gradient g, using weight decay d and trust coefficient η::

        g ← (g + d·w) · η·|w| / (|g| + d·|w|)
        v ← momentum·v + g
        w ← w − lr·v

    Tensors of one dimension (biases, normalisation) take the plain step, as in SimCLR. Where |w| or |g| is 0 the scale
    is 1. As in PyTorch's SGD, the learning rate multiplies v, so that a new rate acts at once.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001):
        if lr < 0 or momentum < 0 or weight_decay < 0 or trust <= 0:
            raise ValueError(
                "LARS takes lr, momentum and weight_decay of at least 0 and trust above 0, "
                f"not lr={lr}, momentum={momentum}, weight_decay={weight_decay}, trust={trust}"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient = weight.grad.add(weight, alpha=group["weight_decay"])
                if weight.ndim > 1:
                    weight_norm, gradient_norm = weight.norm(), weight.grad.norm()
                    scale = group["trust"] * weight_norm / (gradient_norm + group["weight_decay"] * weight_norm)
                    gradient *= torch.where((weight_norm > 0) & (gradient_norm > 0), scale, 1.0)
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                weight.add_(velocity, alpha=-group["lr"])
        return loss


def build(name: str, model: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return "sgd" or "lars" over the two `parameter_groups` of a model."""
    kind = {"sgd": torch.optim.SGD, "lars": LARS}[name]
    return kind(parameter_groups(model, weight_decay), lr=lr, momentum=momentum)


def warmup_cosine(step: int, total_steps: int, warmup_steps: int) -> float:
    """Return the factor of the learning rate at ``step`` (from 0): a linear rise to 1, then half a cosine down to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group of ``optimizer`` the learning rate ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate

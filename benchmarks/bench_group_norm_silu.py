"""Group normalisation + SiLU, forward and backward: ours, PyTorch's pair, and the same compiled."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measure import copy_ceiling
from torch import Tensor

from sslfast.ops import group_norm_silu

GROUPS = 32


def pair(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias))


def step(function: Callable, x: Tensor, grad: Tensor) -> Callable[[], tuple]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    weight, bias = torch.randn(2, x.shape[1])
    leaves = (x, weight.requires_grad_(), bias.requires_grad_())
    return lambda: torch.autograd.grad(function(x, GROUPS, *leaves[1:]), leaves, grad)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 64, 32), (64, 128, 16), (64, 256, 8), (16, 128, 64)], ids=str)
def test_group_norm_silu(race, quick, shape, dtype, layout):
    samples, channels, size = (2, 32, 8) if quick else shape
    x, grad = torch.randn(2, samples, channels, size, size).to(getattr(torch, dtype))
    if layout == "channels_last":
        x, grad = (t.to(memory_format=torch.channels_last) for t in (x, grad))
    race(
        {"shape": f"{samples}×{channels}×{size}×{size}", "dtype": dtype, "layout": layout},
        step(group_norm_silu, x, grad),
        {"PyTorch": step(pair, x, grad)},
        # Forward reads x and writes the output; backward reads x and a gradient and writes one.
        floor=(5 * x.nbytes, copy_ceiling()),
        headline=shape[0] == 64,
    )

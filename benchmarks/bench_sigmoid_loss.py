"""SigLIP, forward and backward: ours, open_clip's, and open_clip's compiled."""

from collections.abc import Callable

import peers
import pytest
import torch
import torch.nn.functional as F
from measure import matmul_ceiling, peak_memory

from sslfast.losses import SigLipLoss


def ours() -> Callable:
    loss, scale, bias = SigLipLoss(), torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    return lambda images, texts: loss(images, texts, scale, bias)


LOSSES = {"sslfast": ours, "open_clip": peers.siglip, "torch.compile": lambda: torch.compile(peers.siglip())}


def step(name: str, batch: int, dim: int, dtype: str) -> Callable[[], tuple]:
    """The loss and its gradients on random unit vectors."""
    generator = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(batch, dim, generator=generator)) for _ in range(2)]
    leaves = [t.to(getattr(torch, dtype)).requires_grad_() for t in features]
    loss = LOSSES[name]()
    return lambda: torch.autograd.grad(loss(*leaves), leaves)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [256, 1024, 4096])
def test_sigmoid_loss(race, quick, batch, dtype):
    sizes = (64, 64, dtype) if quick else (batch, 512, dtype)
    if quick and (batch, dtype) != (256, "float32"):
        pytest.skip("not in the quick selection")
    memory = {}
    if batch == 4096:
        for name in LOSSES:
            small = batch if name == "torch.compile" else 64  # to compile takes memory of its own
            memory[name] = peak_memory(step, name, *sizes, warm_up=(name, small, *sizes[1:]))
    race(
        {"batch": sizes[0], "dim": sizes[1], "dtype": dtype},
        step("sslfast", *sizes),
        {name: step(name, *sizes) for name in LOSSES if name != "sslfast"},
        # The similarities, of which the gradient is made at once; two gradients.
        floor=(3 * 2 * sizes[0] ** 2 * sizes[1], matmul_ceiling(getattr(torch, dtype))),
        headline=True,
        memory=memory,
    )

"""The losses that are made of similarity_lse, forward and backward, against the libraries that define them."""

from collections.abc import Callable

import peers
import pytest
import torch
import torch.nn.functional as F
from measure import matmul_ceiling, peak_memory
from torch import Tensor

from sslfast import losses
from sslfast.ops import similarity_lse

SCALE = 10.0


def moco(query: Tensor, own: Tensor, queue: Tensor) -> Tensor:
    """MoCo's loss of normalised vectors, as `sslfast moco` computes it."""
    return F.softplus(similarity_lse(query, queue, SCALE) - SCALE * (query * own).sum(1)).mean()


# loss: (ours, its peers, matrix products of batch × others × dim that it takes at least)
LOSSES = {
    # The similarities, and the keys' weighted sum.
    "MoCo": (lambda: moco, {"plain PyTorch": lambda: peers.moco}, 2),
    "InfoNCE": (lambda: losses.InfoNCE(1 / SCALE), {"library": peers.info_nce}, 2),
    # The similarities, the same again, two gradients.
    "CLIP": (lambda: partial_scale(losses.ClipLoss()), {"library": peers.clip}, 4),
    # Half of each, by symmetry.
    "SupCon": (lambda: losses.SupConLoss(1 / SCALE), {"library": peers.supcon}, 2),
    "DCL": (lambda: losses.DCLLoss(1 / SCALE), {"library": peers.dcl}, 2),
}


def partial_scale(loss: Callable) -> Callable:
    """A loss of images and texts with a scale that wants a gradient."""
    scale = torch.tensor(SCALE, requires_grad=True)
    return lambda images, texts: loss(images, texts, scale)


def step(name: str, peer: str, batch: int, others: int, dim: int, dtype: str) -> Callable[[], tuple]:
    """The loss and its gradients, ours if there is no `peer`, on random vectors."""
    generator = torch.Generator().manual_seed(0)
    vectors = [F.normalize(torch.randn(n, dim, generator=generator)) for n in (batch, batch, others)]
    first, second, rest = (t.to(getattr(torch, dtype)) for t in vectors)
    first.requires_grad_()
    make = LOSSES[name][1][peer] if peer else LOSSES[name][0]
    loss = make()
    if name in ("MoCo", "InfoNCE"):
        return lambda: torch.autograd.grad(loss(first, second, rest), first)
    if name == "SupCon":
        labels = torch.randint(0, 100, (batch,), generator=generator)
        return lambda: torch.autograd.grad(loss(first, labels), first)
    second.requires_grad_()
    return lambda: torch.autograd.grad(loss(first, second), (first, second))


CASES = [("MoCo", 256, 4096, 128), ("MoCo", 256, 65536, 128), ("InfoNCE", 256, 65536, 128)]
CASES += [("CLIP", n, n, 512) for n in (512, 1024, 4096)]
CASES += [("SupCon", n, n, 128) for n in (512, 4096)] + [("DCL", n, 2 * n, 128) for n in (256, 1024, 4096)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("loss", "batch", "others", "dim"), CASES, ids=lambda value: str(value))
def test_losses(race, quick, loss, batch, others, dim, dtype):
    if quick:
        if batch == 4096 or others == 65536 or dtype != "float32":
            pytest.skip("not in the quick selection")
        batch, others = 64, 64
    if dtype == "bfloat16" and loss not in ("MoCo", "CLIP"):
        pytest.skip("float32 inside")
    _, against, products = LOSSES[loss]
    sizes = (batch, others, dim, dtype)
    memory = {}
    if max(batch, others) >= 4096 and not quick and dtype == "float32":
        small = (64, 64, dim, dtype)
        for name in ("", *against):
            memory[name or "sslfast"] = peak_memory(step, loss, name, *sizes, warm_up=(loss, name, *small))
    rows = 2 * batch if loss == "DCL" else batch
    race(
        {"loss": loss, "batch": batch, "others": others, "dim": dim, "dtype": dtype},
        step(loss, "", *sizes),
        {name: step(loss, name, *sizes) for name in against},
        floor=(products * 2 * rows * others * dim, matmul_ceiling(getattr(torch, dtype))),
        headline=batch * others >= 2**24 or (loss, batch) in {("DCL", 1024), ("MoCo", 256)},
        memory=memory,
    )

"""NT-Xent, forward and backward: ours, lightly, F.cross_entropy, and the same compiled."""

from collections.abc import Callable

import peers
import pytest
import torch
from measure import matmul_ceiling, peak_memory

from sslfast.losses import NTXentLoss

LOSSES = {
    "sslfast": lambda: NTXentLoss(peers.TEMPERATURE),
    "lightly": peers.nt_xent_lightly,
    "F.cross_entropy": lambda: peers.nt_xent_cross_entropy,
    "torch.compile": peers.nt_xent_compiled,
}


SMALL = (2, 128, "float32")


def step(name: str, batch: int, dim: int, dtype: str) -> Callable[[], tuple]:
    """The loss called `name` and its gradients, on random vectors."""
    views = torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    z1, z2 = (view.clone().requires_grad_() for view in views)
    loss = LOSSES[name]()
    return lambda: torch.autograd.grad(loss(z1, z2), (z1, z2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [128, 64, 256])
@pytest.mark.parametrize("batch", [64, 256, 512, 1024, 2048, 4096])
def test_nt_xent(race, quick, batch, dim, dtype):
    if quick and (batch > 64 or dim != 128):
        pytest.skip("not in the quick selection")
    case = {"batch": batch, "dim": dim, "dtype": dtype}
    names = ["lightly", "F.cross_entropy"]
    if dim == 128 and not quick:  # each case is compiled for itself, which takes a while
        names.append("torch.compile")
    memory = {}
    if batch == 4096 and dim == 128:
        for name in ["sslfast", *names]:
            warm_up = case.values() if name == "torch.compile" else SMALL  # to compile takes memory of its own
            memory[name] = peak_memory(step, name, *case.values(), warm_up=(name, *warm_up))
    race(
        case,
        step("sslfast", *case.values()),
        {name: step(name, *case.values()) for name in names},
        # Symmetry leaves two products of (2·batch)²·dim: half of one for S, half to have S again, one for the gradient.
        floor=(2 * 2 * (2 * batch) ** 2 * dim, matmul_ceiling(getattr(torch, dtype))),
        headline=dim == 128,
        memory=memory,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nt_xent_of_65536_rows(race, quick, dtype):
    """One similarity matrix would take 16 GiB here; nobody else is asked."""
    batch = 64 if quick else 32768
    case = {"batch": batch, "dim": 128, "dtype": dtype}
    ours = step("sslfast", *case.values())
    floor = (2 * 2 * (2 * batch) ** 2 * 128, matmul_ceiling(getattr(torch, dtype)))
    memory = {"sslfast": peak_memory(step, "sslfast", *case.values(), warm_up=("sslfast", *SMALL))}
    race(case, ours, {}, floor=floor, headline=True, memory=memory)

"""The same input gives the same bits, on any number of threads and run after run: all losses, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sslfast import losses
from sslfast.losses._common import add_rows, losses_of, mean, take_rows, total


def triplets(rows: int) -> tuple[torch.Tensor, ...]:
    anchors = torch.arange(rows)
    return anchors, (anchors + 1) % rows, (anchors + 2) % rows


# By name: (loss of the rows a and b and the scalar s), with labels of `classes` kinds.
CALLS = {
    "NTXentLoss": lambda a, b, s, labels: losses.NTXentLoss(0.3)(a, b),
    "NTXentLoss of a tensor": lambda a, b, s, labels: losses.NTXentLoss(s)(a, b),
    "NTXentLoss, negative": lambda a, b, s, labels: losses.NTXentLoss(-0.3)(a, b),
    "NTXentLoss with a bank": lambda a, b, s, labels: with_bank(a, b),
    "DCLLoss": lambda a, b, s, labels: losses.DCLLoss(s)(a, b),
    "DCLWLoss": lambda a, b, s, labels: losses.DCLWLoss(0.3)(a, b),
    "InfoNCE": lambda a, b, s, labels: losses.InfoNCE(s)(a, b),
    "InfoNCE unpaired": lambda a, b, s, labels: losses.InfoNCE(s)(a, b, (a - b)[: len(a) // 2]),
    "InfoNCE paired": lambda a, b, s, labels: losses.InfoNCE(s, negative_mode="paired")(
        a, b, a.flip(0)[:, None] + b[:, None] * torch.arange(5)[:, None]
    ),
    "InfoNCE sum": lambda a, b, s, labels: losses.InfoNCE(0.3, "sum")(a, b),
    "ClipLoss": lambda a, b, s, labels: losses.ClipLoss()(a, b, s, s),
    "SigLipLoss": lambda a, b, s, labels: losses.SigLipLoss()(a, b, s, s),
    "SupConLoss": lambda a, b, s, labels: losses.SupConLoss(s)(a, labels),
    "SupConLoss ref": lambda a, b, s, labels: losses.SupConLoss(0.3)(a, labels, None, b, labels.flip(0)),
    "SupConLoss views": lambda a, b, s, labels: losses.SupConLoss(0.3)(a, labels, None, b),
    "SupConLoss pairs": lambda a, b, s, labels: losses.SupConLoss(s)(a, None, triplets(len(a)), b),
}


def with_bank(a, b):
    loss = losses.NTXentLoss(0.3, (40, a.shape[1]))
    loss.bank.copy_(F.normalize(torch.arange(loss.bank.numel()).view(loss.bank.shape).sin()))
    return loss(a, b) + loss(b, a)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check_bits(call, *inputs) -> None:
    """That loss and gradients are the same on 1, 2, 3 and 4 threads, and every time."""
    expected = None
    for number in (1, 2, 3, 4, 4):
        torch.set_num_threads(number)
        leaves = [t.clone().requires_grad_() for t in inputs]
        value = call(*leaves)
        found = [value, *torch.autograd.grad(value.sum(), leaves, allow_unused=True)]
        expected = expected or found
        for output, (a, b) in enumerate(zip(expected, found, strict=True)):
            assert a is b is None or torch.equal(a, b), f"output {output} differs on {number} threads"


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=6, deadline=None)
@given(
    rows=st.integers(3, 130),
    dim=st.integers(1, 140),
    classes=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**16),
)
@example(rows=511, dim=129, classes=5, dtype=torch.float32, seed=0)
def test_every_loss(name, rows, dim, classes, dtype, seed):
    a, b = torch.randn(2, rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    labels = torch.arange(rows) % classes
    scale = torch.tensor(0.7, dtype=torch.float64)
    check_bits(lambda x, y, s: CALLS[name](x, y, s, labels), a, b, scale)


def test_batches_that_torch_shares_out_among_threads():
    """From 32768 numbers on, torch's own sums and softplus depend on where the share of a thread begins."""
    generator = torch.Generator().manual_seed(0)
    a, b, keys = torch.randn(3, 40_001, 3, dtype=torch.float64, generator=generator)
    scale = torch.tensor(0.7, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        check_bits(lambda x, y, s, r=reduction: losses.InfoNCE(s, r)(x, y, keys[:4]), a, b, scale)
    many = a[:, None] + torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    check_bits(lambda x, y, s: losses.InfoNCE(s, negative_mode="paired")(x, y, many), a, b, scale)
    labels = torch.arange(40_001) % 3
    check_bits(lambda x, s: losses.SupConLoss(s)(x, labels, None, keys[:8], labels[:8]), a, scale)


def test_what_losses_end_with():
    generator = torch.Generator().manual_seed(0)
    others, dots = 5 * torch.randn(2, 100_003, dtype=torch.float64, generator=generator)
    scale = torch.tensor(0.7, dtype=torch.float64)
    check_bits(lambda o, s, p: mean(losses_of(o, s, p)), others, scale, dots)
    torch.testing.assert_close(losses_of(others, scale, dots), F.softplus(others - scale * dots))
    torch.testing.assert_close(mean(others), others.mean())
    torch.testing.assert_close(total(others), others.sum())
    index = torch.randint(0, 9, (2000,), generator=generator)
    rows, few = torch.randn(2000, 30, generator=generator), torch.randn(9, 30, generator=generator)
    check_bits(lambda t: take_rows(t, index).cos(), few)
    check_bits(lambda t: add_rows(few, index, t).cos(), rows)
    torch.testing.assert_close(add_rows(few, index, rows), torch.stack([rows[index == i].sum(0) for i in range(9)]))

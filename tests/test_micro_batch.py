"""Encoding in slices gives the gradient of the loss over the whole batch."""

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn

from sslfast import reference
from sslfast.training import micro_batch


def model_with(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *layers, nn.Tanh(), nn.Linear(8, 5)).double()


def batch(rows: int = 12) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss_of(parts: list[Tensor]) -> Tensor:
    return reference.info_nce.nt_xent(*torch.cat(parts).chunk(2), 0.3)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("rows", [1, 4, 5, 12])
def test_without_batchnorm_the_gradient_is_that_of_the_whole_batch(rows):
    sliced, whole = model_with(), model_with()
    loss = micro_batch.backward(sliced, sliced, batch().split(rows), loss_of)
    expected = loss_of([whole(batch())])
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients(sliced), gradients(whole), rtol=1e-11, atol=1e-13)


def test_gradients_are_added_to_those_that_are_there():
    model = model_with()
    micro_batch.backward(model, model, batch().split(5), loss_of)
    once = [gradient.clone() for gradient in gradients(model)]
    micro_batch.backward(model, model, batch().split(5), loss_of)
    torch.testing.assert_close(gradients(model), [2 * gradient for gradient in once], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.Dropout(0.4)], ids=["BatchNorm", "Dropout"])
def test_batchnorm_and_dropout_are_those_of_the_slices(layer):
    """As if the graphs of all slices had been kept: same gradient, same running statistics, same random numbers."""
    sliced, kept = model_with(copy.deepcopy(layer)), model_with(copy.deepcopy(layer))
    torch.manual_seed(7)
    loss = micro_batch.backward(sliced, sliced, batch().split(4), loss_of)
    after = torch.rand(3)
    torch.manual_seed(7)
    expected = loss_of([kept(part) for part in batch().split(4)])
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients(sliced), gradients(kept), rtol=1e-11, atol=1e-13)
    assert all(torch.equal(a, b) for a, b in zip(sliced.buffers(), kept.buffers(), strict=True))
    assert torch.equal(after, torch.rand(3))


def test_one_graph_at_a_time():
    """What a slice's graph keeps is gone before the next slice is encoded."""
    model, graphs, most = model_with(), weakref.WeakSet(), 0

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def encode(part: Tensor) -> Tensor:
        nonlocal most
        vectors = Watched.apply(model(part))
        if vectors.grad_fn is not None:
            graphs.add(vectors.grad_fn)
        most = max(most, len(graphs))
        return vectors

    micro_batch.backward(model, encode, batch().split(3), loss_of)
    assert most == 1

"""The moving average of weights against its formula."""

import copy

import pytest
import torch
from torch import nn

from sslfast.training.average import update_average


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0])
def test_average_follows_its_formula(decay):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for old in average.parameters():
        nn.init.normal_(old)
    model[1].running_mean.fill_(5)
    pairs = zip(average.parameters(), model.parameters(), strict=True)
    expected = [decay * a.double() + (1 - decay) * b.double() for a, b in pairs]
    kept = [b.clone() for b in model.parameters()]
    update_average(average, model, decay)
    for found, value in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach().double(), value.detach(), rtol=1e-6, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept, strict=True)), (
        "the model itself must not change"
    )
    assert (average[1].running_mean == 5).all()
    assert all(old.grad is None for old in average.parameters())


def test_a_decay_out_of_range_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="decay"):
        update_average(model, model, 1.5)

"""LARS against its formula in float64 and against lightly's; the schedule at its corners."""

import numpy as np
import pytest
import torch

from sslfast.training.optimizers import LARS, parameter_groups, warmup_cosine


def lars_in_numpy(weight, gradients, rates, momentum, decay, trust):
    velocity = np.zeros_like(weight)
    for gradient, rate in zip(gradients, rates, strict=True):
        ratio = 1.0
        if weight.ndim > 1:
            weight_norm, gradient_norm = np.linalg.norm(weight), np.linalg.norm(gradient)
            if weight_norm > 0 and gradient_norm > 0:
                ratio = trust * weight_norm / (gradient_norm + decay * weight_norm)
        velocity = momentum * velocity + ratio * (gradient + decay * weight)
        weight = weight - rate * velocity
    return weight


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 3, 3), (9,), ()], ids=str)
@pytest.mark.parametrize("start_at_zero", [False, True])
def test_lars_is_its_formula(shape, start_at_zero):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape) * (0 if start_at_zero else 1)
    gradients = rng.standard_normal((6, *shape))
    gradients[2] = 0  # a step without gradient
    rates = [0.5, 0.5, 0.4, 0.3, 0.1, 0.0]
    parameter = torch.nn.Parameter(torch.tensor(weight))
    optimizer = LARS([parameter], lr=1.0, momentum=0.9, weight_decay=1e-2, trust=0.02)
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    expected = lars_in_numpy(weight, gradients, rates, 0.9, 1e-2, 0.02)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12)


def test_lars_agrees_with_lightly():
    lightly_lars = pytest.importorskip("lightly.utils.lars").LARS
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(8, 6)), torch.nn.Parameter(torch.randn(4, 3, 3, 3))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.7, "momentum": 0.9, "weight_decay": 1e-3}
    optimizers = [LARS(ours, trust=0.001, **settings), lightly_lars(theirs, trust_coefficient=0.001, **settings)]
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"trust": 0.0}, {"weight_decay": -1e-4}, {"momentum": -0.1}], ids=str)
def test_lars_refuses_bad_settings(bad):
    with pytest.raises(ValueError, match=f"not .*{next(iter(bad))}={next(iter(bad.values()))}"):
        LARS([torch.nn.Parameter(torch.zeros(2, 2))], **{"lr": 1.0, **bad})


def test_only_matrices_and_filters_decay():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    decayed, plain = parameter_groups(model, 0.1)
    assert [p.ndim for p in decayed["params"]] == [4]
    assert decayed["weight_decay"] == 0.1
    assert [p.ndim for p in plain["params"]] == [1, 1, 1]
    assert plain["weight_decay"] == 0


def test_warmup_then_cosine():
    factors = [warmup_cosine(step, total_steps=110, warmup_steps=10) for step in range(110)]
    np.testing.assert_allclose(factors[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(factors[10:], np.cos(np.pi * np.arange(100) / 200) ** 2, atol=1e-12)
    assert warmup_cosine(0, 5, 0) == 1

"""Encoders and heads: shapes, stems, and the same weights from the same seed."""

import pytest
import torch

from sslfast.models import build_encoder, projection_head


@pytest.mark.parametrize(
    ("name", "channels", "size", "features"),
    [
        ("small", 1, 16, 768),
        ("small", 1, 28, 768),
        ("small", 3, 32, 768),
        ("small", 3, 64, 768),
        ("resnet18-cifar", 3, 32, 512),
        ("resnet18", 1, 64, 512),
        ("resnet50", 3, 64, 2048),
        ("resnet50-cifar", 1, 16, 2048),
    ],
)
def test_encoder_shapes(name, channels, size, features):
    encoder, width = build_encoder(name, channels)
    out = encoder(torch.randn(2, channels, size, size))
    assert out.shape == (2, width)
    assert width == features
    assert out.isfinite().all()


def test_cifar_stem_keeps_the_resolution():
    assert build_encoder("resnet18-cifar", 3)[0].conv1.stride == (1, 1)
    assert build_encoder("resnet18", 3)[0].conv1.stride == (2, 2)


def test_the_seed_decides_the_weights():
    weights = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        weights.append(build_encoder("small", 1)[0].state_dict())
    first, second, third = weights
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(first[k], third[k]) for k in first)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_head(layers):
    head = projection_head(40, 24, 16, layers)
    assert head(torch.randn(5, 40)).shape == (5, 16)
    assert sum(isinstance(m, torch.nn.Linear) for m in head) == layers


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"encoder must be one of small, .*not 'vgg'"):
        build_encoder("vgg", 3)
    with pytest.raises(ValueError, match="layers must be at least 1, not 0"):
        projection_head(4, 4, 4, 0)

"""Encoders and projection heads."""

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

EncoderName = Literal["small", "resnet18-cifar", "resnet18", "resnet50-cifar", "resnet50"]


def conv_bn_relu(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class SmallEncoder(nn.Module):
    """A fast convolutional encoder for images of 16 to 64 pixels: (N, C, H, W) -> (N, 16 * width) features.

    H and W must be even. The first layer folds each 2×2 block of pixels into channels, because convolutions with one or
    three input channels at full resolution cost more than all that follows. The last averages over quadrants rather
    than the whole image: where something is matters in small, centred pictures.
    """

    def __init__(self, in_channels: int, width: int = 48):
        super().__init__()
        self.features = 16 * width
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(2),
            conv_bn_relu(4 * in_channels, width),
            conv_bn_relu(width, width),
            conv_bn_relu(width, 2 * width, stride=2),
            conv_bn_relu(2 * width, 2 * width),
            conv_bn_relu(2 * width, 4 * width, stride=2),
        )

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.layers(images), 2).flatten(1)


def build_encoder(name: str, in_channels: int) -> tuple[nn.Module, int]:
    """Return (encoder, F): an untrained encoder that maps images (N, in_channels, H, W) to features (N, F).

    ``name`` is an ``EncoderName``. ResNets are torchvision's; their ``-cifar`` form has the stem of SimCLR's CIFAR-10
    experiments (arXiv 2002.05709, appendix B.9): a 3×3 convolution of stride 1 and no max-pooling.
    """
    if name == "small":
        encoder = SmallEncoder(in_channels)
        return encoder, encoder.features
    if name not in get_args(EncoderName):
        raise ValueError(f"encoder must be one of {', '.join(get_args(EncoderName))}, not {name!r}")
    import torchvision

    kind, _, stem = name.partition("-")
    resnet = getattr(torchvision.models, kind)(weights=None)
    features, resnet.fc = resnet.fc.in_features, nn.Identity()
    if stem == "cifar":
        resnet.conv1 = nn.Conv2d(in_channels, 64, 3, stride=1, padding=1, bias=False)
        resnet.maxpool = nn.Identity()
    elif in_channels != 3:
        resnet.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    return resnet, features


def projection_head(in_features: int, hidden: int, out_features: int, layers: int = 2) -> nn.Sequential:
    """Return SimCLR's MLP head (N, in_features) -> (N, out_features): 2 layers as in v1, 3 in v2 (arXiv 2006.10029)."""
    if layers < 1:
        raise ValueError(f"layers must be at least 1, not {layers}")
    modules: list[nn.Module] = []
    for _ in range(layers - 1):
        modules += [nn.Linear(in_features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        in_features = hidden
    return nn.Sequential(*modules, nn.Linear(in_features, out_features, bias=False), nn.BatchNorm1d(out_features))

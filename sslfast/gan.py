"""Generator and discriminator of a GAN: the ResNets of SNGAN (Miyato et al., arXiv 1802.05957), for 16 to 64 pixels."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

GanName = Literal["small", "resnet"]

LOWEST = 7  # pixels: resolutions are halved while they are larger than this, and even


class GeneratorBlock(nn.Module):
    """Two convolutions beside a shortcut, at twice the resolution: (N, in, H, W) -> (N, out, 2H, 2W)."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels_in), nn.BatchNorm2d(channels_out)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(self.norm1(x)), scale_factor=2))
        h = self.conv2(F.relu(self.norm2(h)))
        return h + F.interpolate(self.shortcut(x), scale_factor=2)


class Generator(nn.Module):
    """Latent vectors (N, latent), standard normal -> images (N, channels, size, size) in [-1, 1].

    ``widths``: channels at the lowest resolution and after each block, which doubles it. With ``patch`` 2 the last
    layer unfolds its channels to 2×2 pixels each, so that nothing is computed at full resolution.
    """

    def __init__(self, size: int, channels: int, latent: int, widths: list[int], patch: int = 1):
        super().__init__()
        self.latent, self.patch = latent, patch
        self.lowest = size // patch >> (len(widths) - 1)
        self.start = nn.Linear(latent, widths[0] * self.lowest**2)
        self.blocks = nn.Sequential(*map(GeneratorBlock, widths, widths[1:]))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.last = nn.Conv2d(widths[-1], channels * patch**2, 3, padding=1)
        self.apply(_initialise)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.start(latents).unflatten(1, (self.lowest, self.lowest, -1)).permute(0, 3, 1, 2)  # channels_last
        x = self.last(F.relu(self.norm(self.blocks(x))))
        return torch.tanh(F.pixel_shuffle(x, self.patch))


class DiscriminatorBlock(nn.Module):
    """Two convolutions beside a shortcut, at half the resolution if ``down``; the ``first`` begins without ReLU."""

    def __init__(self, channels_in: int, channels_out: int, down: bool, first: bool = False):
        super().__init__()
        self.down, self.first = down, first
        hidden = channels_out if first else channels_in
        self.conv1 = spectral_norm(nn.Conv2d(channels_in, hidden, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(hidden, channels_out, 3, padding=1))
        with_shortcut = down or channels_in != channels_out
        self.shortcut = spectral_norm(nn.Conv2d(channels_in, channels_out, 1)) if with_shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if not self.down:
            return h + self.shortcut(x)
        if self.first:  # pooling and a 1×1 convolution can change places: the cheaper order
            return F.avg_pool2d(h, 2) + self.shortcut(F.avg_pool2d(x, 2))
        return F.avg_pool2d(h + self.shortcut(x), 2)


class Discriminator(nn.Module):
    """Images (N, channels, size, size) in [-1, 1] -> (scores (N,) or None, class logits (N, classes) or None).

    All weights are under spectral normalisation. ``widths``: channels after each block, of which the first ``downs``
    halve the resolution; ``patch`` folds that many pixels square into channels first. ``score`` and ``classes``: which
    heads there are.
    """

    def __init__(
        self, channels: int, widths: list[int], downs: int, patch: int = 1, score: bool = True, classes: int = 0
    ):
        super().__init__()
        ins = [channels * patch**2, *widths]
        self.patch = patch
        self.blocks = nn.Sequential(
            *(DiscriminatorBlock(ins[i], ins[i + 1], i < downs, i == 0) for i in range(len(widths)))
        )
        self.score = spectral_norm(nn.Linear(widths[-1], 1)) if score else None
        self.classes = spectral_norm(nn.Linear(widths[-1], classes)) if classes else None
        self.apply(_initialise)

    def features(self, images: Tensor) -> Tensor:
        """Return the last layer before the heads, (N, widths[-1])."""
        return F.relu(self.blocks(F.pixel_unshuffle(images, self.patch))).sum((2, 3))

    def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        features = self.features(images)
        scores = None if self.score is None else self.score(features).squeeze(1)
        return scores, None if self.classes is None else self.classes(features)


def build_gan(
    name: str, size: int, channels: int, latent: int = 128, score: bool = True, classes: int = 0
) -> tuple[Generator, Discriminator]:
    """Return an untrained (generator, discriminator) for images of ``size`` pixels square.

    ``name`` is a ``GanName``: "resnet" has the widths of SNGAN's networks for 32, 48 and 64 pixels, "small" trains on
    two CPU cores. ``score``, ``classes``: the discriminator's heads. Raises ValueError for another name or a size that
    cannot be halved to 4 … 7 pixels.
    """
    if name not in get_args(GanName):
        raise ValueError(f"networks must be one of {', '.join(get_args(GanName))}, not {name!r}")
    patch = 2 if name == "small" else 1
    lowest, doublings = size // patch, 0
    while lowest > LOWEST and lowest % 2 == 0:
        lowest, doublings = lowest // 2, doublings + 1
    if size % patch or not 4 <= lowest <= LOWEST or doublings == 0:
        raise ValueError(f"the size must be 4 to 7 times a power of two, such as 16, 28, 32, 48 or 64, not {size}")
    if name == "small":
        generator = Generator(size, channels, latent, [128] + [96] * doublings, patch)
        return generator, Discriminator(channels, [64] + [128] * (doublings + 1), doublings, patch, score, classes)
    if size <= 32:
        generator = Generator(size, channels, latent, [256] * (doublings + 1))
        return generator, Discriminator(channels, [128] * 4, 2, patch, score, classes)
    widths = [64 << level for level in range(doublings + 1)]
    generator = Generator(size, channels, latent, widths[::-1])
    return generator, Discriminator(channels, widths, doublings, patch, score, classes)


def _initialise(module: nn.Module) -> None:
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        return
    weights = dict(module.named_parameters())  # under spectral normalisation the weight itself has another name
    nn.init.xavier_uniform_(weights.get("parametrizations.weight.original", weights.get("weight")))  # type: ignore[arg-type]


def differentiable_augmentation(images: Tensor, random: torch.Generator) -> Tensor:
    """Return images (N, C, H, W) with random colours, shifts and holes, through which gradients flow.

    Per image, drawn from the CPU generator ``random``: brightness ± 0.5, saturation × 0 … 2, contrast × 0.5 … 1.5, a
    shift by up to an eighth of the size, and a grey hole of half the size. DiffAugment (Zhao et al., arXiv 2006.10738).
    """
    n, _, height, width = images.shape
    brightness, saturation, contrast = torch.rand(3, n, 1, 1, 1, generator=random).to(images.device)
    shift_y, shift_x, hole_y, hole_x = torch.rand(4, n, 1, generator=random).to(images.device)
    x = images + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + 2 * saturation * (x - grey)
    grey = x.mean((1, 2, 3), keepdim=True)
    x = grey + (0.5 + contrast) * (x - grey)

    rows, columns = (torch.arange(length, device=images.device) for length in (height, width))
    margin_y, margin_x = (round(length / 8) for length in (height, width))
    from_y = rows + (shift_y * (2 * margin_y + 1)).long()  # in the padded image
    from_x = columns + (shift_x * (2 * margin_x + 1)).long()
    padded = F.pad(x, (margin_x, margin_x, margin_y, margin_y))
    number = torch.arange(n, device=images.device)[:, None, None]
    x = padded.permute(0, 2, 3, 1)[number, from_y[:, :, None], from_x[:, None, :]].permute(0, 3, 1, 2)

    in_y = (rows - (hole_y * (height + 1)).long()).abs() <= height // 4
    in_x = (columns - (hole_x * (width + 1)).long()).abs() <= width // 4
    return x * ~(in_y[:, None, :, None] & in_x[:, None, None, :])

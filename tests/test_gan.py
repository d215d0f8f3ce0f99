"""The networks of the GANs: shapes, spectral normalisation, and augmentation that lets gradients through."""

import pytest
import torch

from sslfast.gan import Discriminator, build_gan, differentiable_augmentation


@pytest.mark.parametrize("size", [16, 28, 48])
@pytest.mark.parametrize(("name", "channels", "classes"), [("small", 1, 0), ("small", 3, 8), ("resnet", 3, 4)])
def test_shapes(name, channels, classes, size):
    with torch.device("meta" if name == "resnet" else "cpu"):
        generator, discriminator = build_gan(name, size, channels, 20, classes=classes)
        images = generator(torch.randn(2, 20))
        scores, logits = discriminator(images)
    assert images.shape == (2, channels, size, size)
    assert scores.shape == (2,)
    assert logits is None if classes == 0 else logits.shape == (2, classes)
    assert discriminator.features(images).shape == (2, discriminator.score.in_features)
    if images.device.type == "cpu":
        assert images.abs().max() <= 1


def test_heads():
    _, discriminator = build_gan("small", 28, 1, score=False, classes=8)
    scores, logits = discriminator(torch.zeros(3, 1, 28, 28))
    assert scores is None
    assert logits.shape == (3, 8)


@pytest.mark.parametrize("size", [8, 30, 35, 36, 100])
def test_sizes_that_cannot_be_halved(size):
    with pytest.raises(ValueError, match=f"4 to 7 times a power of two, such as .* not {size}"):
        build_gan("small", size, 1)


def test_unknown_networks():
    with pytest.raises(ValueError, match=r"networks must be one of small, resnet, not 'big'"):
        build_gan("big", 32, 3)


def test_every_weight_of_the_discriminator_has_spectral_norm_1():
    torch.manual_seed(0)
    _, discriminator = build_gan("small", 28, 1, classes=4)
    for _ in range(60):  # power iterations
        discriminator(torch.zeros(1, 1, 28, 28))
    discriminator.eval()
    layers = [m for m in discriminator.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == 2 + 3 * 2 + 2, "two heads; three blocks of two, two with a shortcut"
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_the_discriminator_is_lipschitz_where_a_plain_network_is_not():
    """A large step of the weights leaves the scores' slope bounded."""
    torch.manual_seed(0)
    _, discriminator = build_gan("small", 16, 1)
    images = torch.randn(4, 1, 16, 16, requires_grad=True)
    before = torch.autograd.grad(discriminator(images)[0].sum(), images)[0].norm()
    with torch.no_grad():
        for weight in discriminator.parameters():
            if weight.dim() > 1:
                weight.mul_(100)
    after = torch.autograd.grad(discriminator(images)[0].sum(), images)[0].norm()
    assert after < 3 * before


def test_augmentation_is_differentiable_and_drawn_for_each_image():
    images = (0.1 * torch.randn(64, 3, 32, 32)).requires_grad_()
    made = differentiable_augmentation(images, torch.Generator().manual_seed(1))
    again = differentiable_augmentation(images, torch.Generator().manual_seed(1))
    other = differentiable_augmentation(images, torch.Generator().manual_seed(2))
    assert made.shape == images.shape
    assert torch.equal(made, again)
    assert not torch.equal(made, other)
    holes = (made == 0).all(1).flatten(1).float().mean(1)
    assert 0.1 < holes.mean() < 0.4, "a hole of half the size is a quarter of the image, less at its edge"
    (gradient,) = torch.autograd.grad(made.square().sum(), images)
    assert gradient.flatten(1).norm(dim=1).gt(0).all()


def test_augmentation_shifts_by_up_to_an_eighth():
    images = torch.zeros(200, 1, 32, 32)
    images[:, :, 16, 16] = 100.0
    made = differentiable_augmentation(images, torch.Generator().manual_seed(0))
    place = made.flatten(1).argmax(1)
    bright = made.flatten(1).amax(1) > 20  # else the hole took it
    rows, columns = place[bright] // 32, place[bright] % 32
    assert {16 - 4, 16 + 4} <= set(rows.tolist()) <= set(range(12, 21))
    assert {16 - 4, 16 + 4} <= set(columns.tolist()) <= set(range(12, 21))


def test_widths_of_sngan():
    with torch.device("meta"):
        generator, discriminator = build_gan("resnet", 32, 3)
    assert [block.conv1.in_channels for block in generator.blocks] == [256] * 3
    assert isinstance(discriminator, Discriminator)
    assert [block.conv2.out_channels for block in discriminator.blocks] == [128] * 4

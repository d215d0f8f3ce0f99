"""The U-Net against diffusers' UNet2DModel, whose weights it reads and writes."""

import diffusers
import pytest
import torch

from sslfast.unet import UNet, from_diffusers, save_diffusers

# Of the paper's own code, as converted by diffusers: google/ddpm-cifar10-32, but narrower.
PAPER = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
SMALL = {
    "in_channels": 1,
    "out_channels": 2,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "norm_num_groups": 16,
}
CLASSES = SMALL | {"num_class_embeds": 7, "dropout": 0.1}


def theirs(settings: dict) -> diffusers.UNet2DModel:
    """A UNet2DModel whose every parameter is random: biases, and what usually begins as 0 or 1, too."""
    model = diffusers.UNet2DModel(**settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(model, size: int = 16) -> tuple:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, model.config.in_channels, size, size, generator=generator)
    classes = torch.tensor([0, 6, 2]) if model.config.num_class_embeds else None
    return images, torch.tensor([0, 500, 999]), classes


@pytest.mark.parametrize("settings", [PAPER, SMALL, CLASSES], ids=["paper", "small", "classes"])
def test_reads_and_writes_models_of_diffusers(settings, tmp_path):
    model = theirs(settings)
    images, timesteps, classes = inputs(model)
    with torch.no_grad():
        expected = model(images, timesteps, classes).sample
        ours = from_diffusers(model).eval()
        torch.testing.assert_close(ours(images, timesteps, classes), expected, rtol=0, atol=1e-5)
        last = ours.to(memory_format=torch.channels_last)
        moved = images.to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(moved, timesteps, classes), expected, rtol=0, atol=1e-5)

        save_diffusers(ours, tmp_path, sample_size=16)
        again = diffusers.UNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
        torch.testing.assert_close(again(images, timesteps, classes).sample, expected, rtol=0, atol=1e-5)
        assert from_diffusers(tmp_path).settings == ours.settings

        model.save_pretrained(tmp_path / "theirs")
        folder = from_diffusers(tmp_path / "theirs").eval()
        torch.testing.assert_close(folder(images, timesteps, classes), expected, rtol=0, atol=1e-5)


def test_gradients_are_those_of_diffusers():
    model = theirs(SMALL)
    ours = from_diffusers(model).to(memory_format=torch.channels_last)
    images, timesteps, _ = inputs(model)
    model(images, timesteps).sample.square().mean().backward()
    ours(images.to(memory_format=torch.channels_last), timesteps).square().mean().backward()
    expected = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        scale = expected[name].grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4 * scale + 1e-8)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"act_fn": "relu"}, "act_fn"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, "attention at the same levels"),
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, "SkipDownBlock2D"),
    ],
)
def test_models_that_a_unet_cannot_be_are_refused(change, name):
    with pytest.raises(ValueError, match=name):
        from_diffusers(diffusers.UNet2DModel(**SMALL | change))


@pytest.mark.parametrize(
    "wrong",
    [{"widths": (44,)}, {"widths": ()}, {"attention": (True,)}, {"blocks": 0}, {"dropout": 1.0}, {"classes": -1}],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        UNet(1, **{"widths": (32, 64), **wrong})


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="head_width"):
        UNet(1, widths=(32, 32), head_width=20)


def test_heads_that_diffusers_cannot_have_are_not_exported(tmp_path):
    with pytest.raises(ValueError, match="heads of 32 at 16"):
        save_diffusers(UNet(1, widths=(16, 64), attention=(True, True), head_width=32), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("widths", [(16, 32), (64, 16)])
def test_single_heads_are_exported_as_such(widths, tmp_path):
    ours = UNet(2, widths=widths, head_width=32).eval()
    torch.nn.init.normal_(ours.conv_out.weight, std=0.1)
    save_diffusers(ours, tmp_path)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    images = torch.randn(2, 2, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images, 9).sample, ours(images, 9), rtol=0, atol=1e-5)


def test_begins_as_zero_and_every_residual_branch_too():
    unet = UNet(1, widths=(32, 32), blocks=1)
    out = unet(torch.randn(2, 1, 8, 8), torch.tensor([3, 900]))
    assert out.shape == (2, 1, 8, 8)
    assert (out == unet.conv_out.bias[None, :, None, None]).all()


def test_a_timestep_for_all_is_as_one_for_each():
    torch.manual_seed(0)
    unet = from_diffusers(theirs(SMALL)).eval()
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = unet(images, torch.tensor([40, 40]))
        torch.testing.assert_close(unet(images, 40), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(unet(images, torch.tensor(40)), expected, rtol=0, atol=1e-5)
        assert not torch.allclose(unet(images, 400), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(7, 7), (9, 14), (1, 3)])
def test_any_size_of_image(size):
    unet = UNet(1, widths=(32, 32, 32), blocks=1)
    assert unet(torch.randn(2, 1, *size), 5).shape == (2, 1, *size)
    assert unet.middle(torch.randn(2, 1, *size), 5).shape == (2, 32, -(-size[0] // 4), -(-size[1] // 4))


def test_classes_are_asked_for_and_refused():
    images = torch.randn(2, 1, 8, 8)
    with pytest.raises(ValueError, match="classes"):
        UNet(1, widths=(32,), classes=3)(images, 5)
    with pytest.raises(ValueError, match="classes"):
        UNet(1, widths=(32,))(images, 5, torch.tensor([0, 1]))


def test_bfloat16_is_near_float32():
    unet = from_diffusers(theirs(SMALL)).eval().to(memory_format=torch.channels_last)
    images = torch.randn(4, 1, 16, 16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = unet(images, 100)
        with torch.autocast("cpu", torch.bfloat16):
            found = unet(images, 100)
    assert (found.float() - expected).abs().max() < 0.03 * expected.abs().max()
    assert found.is_contiguous(memory_format=torch.channels_last)

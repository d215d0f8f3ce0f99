"""The U-Net of DDPM (Ho et al., arXiv 2006.11239, appendix B), with the parameter names of diffusers' `UNet2DModel`.

Residual blocks of GroupNorm + SiLU + 3×3 convolution, at a falling and then a rising resolution, with skips between
the two; self-attention at chosen levels; the timestep, and the class where there are classes, enter every residual
block as a bias per channel. The state dicts of `UNet` and `UNet2DModel` are interchangeable, key by key:
`from_diffusers` and `save_diffusers` translate the settings.
"""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslfast.ops import group_norm_silu


class UNet(nn.Module):
    """Predict noise (or x0, or v) from noisy images: (N, C, H, W), timesteps, classes -> (N, out_channels, H, W).

    Args:
        in_channels, out_channels: of the images; out_channels is in_channels by default.
        widths: channels at each level; each level has half the height and width of the one before. On CPUs with AMX,
            powers of two are fast.
        blocks: residual blocks of each level on the way down; one more on the way up.
        attention: for each level, whether it has self-attention; by default only the last has. The middle always has.
        classes: rows of the class embedding, 0 for none.
        dropout: probability, within residual blocks.
        head_width: channels of an attention head; at most the channels there.
        groups, eps: of every group normalisation. With one channel a group (as 32 groups at 32 channels) it would
            subtract what timestep and class have added.
        downsample_padding: 1, or 0 for the asymmetric padding of the paper's own code.
        flip_sin_to_cos, freq_shift: order and frequencies of the timestep's sines and cosines.

    Raises:
        ValueError: widths that groups do not divide, or an argument out of range.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        *,
        widths: tuple[int, ...] = (64, 128, 128),
        blocks: int = 2,
        attention: tuple[bool, ...] | None = None,
        classes: int = 0,
        dropout: float = 0.0,
        head_width: int = 64,
        groups: int = 8,
        eps: float = 1e-5,
        downsample_padding: int = 1,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
    ):
        super().__init__()
        if attention is None:
            attention = (False,) * (len(widths) - 1) + (True,)
        if not widths or any(width < 1 or width % groups for width in widths):
            raise ValueError(f"widths: expected positive multiples of groups, {groups}, got {tuple(widths)}")
        if len(attention) != len(widths):
            raise ValueError(f"attention: expected a flag for each of {len(widths)} levels, got {tuple(attention)}")
        if blocks < 1 or classes < 0 or not 0 <= dropout < 1 or downsample_padding not in (0, 1):
            raise ValueError(
                "blocks must be at least 1, classes at least 0, dropout in [0, 1) and downsample_padding 0 or 1, "
                f"not {blocks}, {classes}, {dropout} and {downsample_padding}"
            )
        self.settings: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": in_channels if out_channels is None else out_channels,
            "widths": tuple(widths),
            "blocks": blocks,
            "attention": tuple(map(bool, attention)),
            "classes": classes,
            "dropout": dropout,
            "head_width": head_width,
            "groups": groups,
            "eps": eps,
            "downsample_padding": downsample_padding,
            "flip_sin_to_cos": flip_sin_to_cos,
            "freq_shift": freq_shift,
        }
        condition = 4 * widths[0]

        def residual(channels_in: int, channels_out: int) -> ResidualBlock:
            return ResidualBlock(channels_in, channels_out, condition, dropout, groups, eps)

        def attend(channels: int) -> Attention:
            return Attention(channels, min(head_width, channels), groups, eps)

        self.time_embedding = nn.ModuleDict(
            {"linear_1": nn.Linear(widths[0], condition), "linear_2": nn.Linear(condition, condition)}
        )
        self.class_embedding = nn.Embedding(classes, condition) if classes else None
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips, channels = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            residuals = [residual(channels if i == 0 else width, width) for i in range(blocks)]
            attentions = [attend(width) for _ in range(blocks if attention[level] else 0)]
            last = level == len(widths) - 1
            self.down_blocks.append(
                Down(residuals, attentions, None if last else Downsample(width, downsample_padding))
            )
            skips += [width] * (blocks if last else blocks + 1)
            channels = width
        self.mid_block = Middle([residual(channels, channels) for _ in range(2)], [attend(channels)])
        for level, width in reversed(list(enumerate(widths))):
            residuals = [residual((channels if i == 0 else width) + skips.pop(), width) for i in range(blocks + 1)]
            attentions = [attend(width) for _ in range(blocks + 1 if attention[level] else 0)]
            self.up_blocks.append(Up(residuals, attentions, Upsample(width) if level > 0 else None))
            channels = width
        self.conv_norm_out = GroupNormSiLU(groups, channels, eps)
        self.conv_out = nn.Conv2d(channels, self.settings["out_channels"], 3, padding=1)
        for module in self.modules():  # every residual branch begins as 0, as in the paper's code
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, images: Tensor, timesteps: Tensor | float, classes: Tensor | None = None) -> Tensor:
        """images (N, C, H, W); timesteps and classes (N,), or a scalar for all; -> (N, out_channels, H, W)."""
        x, skips, condition = self._descend(images, timesteps, classes)
        for up in self.up_blocks:
            x = up(x, condition, skips)
        return self.conv_out(self.conv_norm_out(x))

    def middle(self, images: Tensor, timesteps: Tensor | float, classes: Tensor | None = None) -> Tensor:
        """Return what the middle block makes of images: the features (N, widths[-1], h, w) at the lowest resolution."""
        return self._descend(images, timesteps, classes)[0]

    def _descend(self, images: Tensor, timesteps, classes: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        condition = self._condition(timesteps, classes, images.device)
        x = self.conv_in(images)
        skips = [x]
        for down in self.down_blocks:
            x = down(x, condition, skips)
        return self.mid_block(x, condition), skips, condition

    def _condition(self, timesteps, classes: Tensor | None, device: torch.device) -> Tensor:
        """Timesteps and classes as one vector a sample, SiLU applied: (N, 4·widths[0]), or (1, …) for all alike."""
        if classes is None and self.class_embedding is not None:
            raise ValueError("classes: expected a class for each image, got None")
        if classes is not None and self.class_embedding is None:
            raise ValueError("classes: this network has no class embedding")
        width, shift = self.settings["widths"][0], self.settings["freq_shift"]
        half = width // 2
        exponents = torch.arange(half, dtype=torch.float32, device=device) / (half - shift)
        timesteps = torch.as_tensor(timesteps, device=device).reshape(-1, 1)
        angles = timesteps * (-math.log(10000.0) * exponents).exp()
        waves = [angles.cos(), angles.sin()] if self.settings["flip_sin_to_cos"] else [angles.sin(), angles.cos()]
        embedding = self.time_embedding["linear_1"](torch.cat(waves, dim=1))
        embedding = self.time_embedding["linear_2"](F.silu(embedding))
        if self.class_embedding is not None and classes is not None:
            embedding = embedding + self.class_embedding(classes.reshape(-1))
        return F.silu(embedding)


class GroupNormSiLU(nn.GroupNorm):
    """Group normalisation and SiLU in one pass; the parameters are those of `nn.GroupNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)


class Down(nn.Module):
    """A level on the way down; appends to ``skips`` what the way up will need. An empty ``attentions``: it has none."""

    def __init__(self, residuals: list, attentions: list, downsample: nn.Module | None):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(residuals), nn.ModuleList(attentions)
        self.downsamplers = None if downsample is None else nn.ModuleList([downsample])

    def forward(self, x: Tensor, condition: Tensor, skips: list[Tensor]) -> Tensor:
        for block, attend in itertools.zip_longest(self.resnets, self.attentions):
            x = block(x, condition)
            x = attend(x) if attend else x
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, residuals: list, attentions: list):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(residuals), nn.ModuleList(attentions)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, condition))
        return self.resnets[1](x, condition)


class Up(nn.Module):
    """A level on the way up; takes from ``skips`` what the way down left, last first."""

    def __init__(self, residuals: list, attentions: list, upsample: nn.Module | None):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(residuals), nn.ModuleList(attentions)
        self.upsamplers = None if upsample is None else nn.ModuleList([upsample])

    def forward(self, x: Tensor, condition: Tensor, skips: list[Tensor]) -> Tensor:
        for block, attend in itertools.zip_longest(self.resnets, self.attentions):
            x = block(torch.cat([x, skips.pop()], dim=1), condition)
            x = attend(x) if attend else x
        if self.upsamplers is not None:
            x = self.upsamplers[0](x, skips[-1].shape[-2:])
        return x


class ResidualBlock(nn.Module):
    """(N, channels_in, H, W), condition (N or 1, D) -> (N, channels_out, H, W)."""

    def __init__(self, channels_in: int, channels_out: int, condition: int, dropout: float, groups: int, eps: float):
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, channels_in, eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(condition, channels_out)
        self.norm2 = GroupNormSiLU(groups, channels_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        hidden = self.conv1(self.norm1(x)) + self.time_emb_proj(condition)[:, :, None, None]
        hidden = self.conv2(self.dropout(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention over the positions of an image, with a residual connection: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int, head_width: int, groups: int, eps: float):
        super().__init__()
        if channels % head_width:
            raise ValueError(f"head_width: expected a divisor of the {channels} channels, got {head_width}")
        self.heads = channels // head_width
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = self.group_norm(x).permute(0, 2, 3, 1).reshape(n, h * w, c)  # free of copies in channels_last
        split = (n, h * w, self.heads, c // self.heads)
        q, k, v = (project(tokens).view(split).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        return x + self.to_out[0](attended).view(n, h, w, c).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """A convolution of stride 2: half the height and width, rounded up."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Repeat pixels up to ``size``, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


# What of a UNet2DModel's settings has another value than these, and is not a setting of UNet, cannot be expressed here.
_ONLY: dict[str, Any] = {
    "act_fn": "silu",
    "add_attention": True,
    "attn_norm_num_groups": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_type": "conv",
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}


def from_diffusers(source) -> UNet:
    """Return a UNet with the settings and weights of a diffusers `UNet2DModel`, or of a folder that it was saved to.

    Raises ValueError for a model that a UNet cannot be, naming the setting.
    """
    if isinstance(source, (str, Path)):
        config = json.loads((Path(source) / "config.json").read_text())
        weights = safetensors.torch.load_file(Path(source) / "diffusion_pytorch_model.safetensors")
    else:
        config, weights = dict(source.config), source.state_dict()
    for name, only in _ONLY.items():
        if config.get(name, only) != only:
            raise ValueError(f"source: a UNet has {name}={only!r}, this model has {config[name]!r}")
    kinds = {"DownBlock2D": False, "AttnDownBlock2D": True, "UpBlock2D": False, "AttnUpBlock2D": True}
    names = [*config["down_block_types"], *config["up_block_types"]]
    if not set(names) <= kinds.keys():
        raise ValueError(f"source: expected blocks among {', '.join(kinds)}, got {', '.join(names)}")
    attention = tuple(kinds[name] for name in config["down_block_types"])
    if attention != tuple(kinds[name] for name in reversed(config["up_block_types"])):
        raise ValueError("source: a UNet has attention at the same levels on the way down and up, this model has not")
    head_width = config["attention_head_dim"]
    unet = UNet(
        config["in_channels"],
        config["out_channels"],
        widths=tuple(config["block_out_channels"]),
        blocks=config["layers_per_block"],
        attention=attention,
        classes=config["num_class_embeds"] or 0,
        dropout=config["dropout"],
        head_width=max(config["block_out_channels"]) if head_width is None else head_width,
        groups=config["norm_num_groups"],
        eps=config["norm_eps"],
        downsample_padding=config["downsample_padding"],
        flip_sin_to_cos=config["flip_sin_to_cos"],
        freq_shift=config["freq_shift"],
    )
    unet.load_state_dict(weights)
    return unet


def save_diffusers(unet: UNet, folder: Path | str, sample_size: int | None = None) -> None:
    """Write a UNet as a folder from which diffusers' `UNet2DModel.from_pretrained(folder)` loads the same network.

    Raises ValueError for heads wider than the channels at some levels only, which no UNet2DModel has.
    """
    settings = unet.settings
    levels = zip(settings["widths"], settings["attention"], strict=True)
    attending = {width for width, attention in levels if attention} | {settings["widths"][-1]}
    one_head = settings["head_width"] >= max(attending)
    if not one_head and settings["head_width"] > min(attending):
        raise ValueError(f"unet: diffusers has no heads of {settings['head_width']} at {min(attending)} channels")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ["Attn" if attention else "" for attention in settings["attention"]]
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": sample_size,
        "in_channels": settings["in_channels"],
        "out_channels": settings["out_channels"],
        "block_out_channels": settings["widths"],
        "layers_per_block": settings["blocks"],
        "down_block_types": [kind + "DownBlock2D" for kind in kinds],
        "up_block_types": [kind + "UpBlock2D" for kind in reversed(kinds)],
        "num_class_embeds": settings["classes"] or None,
        "dropout": settings["dropout"],
        "attention_head_dim": None if one_head else settings["head_width"],
        "norm_num_groups": settings["groups"],
        "norm_eps": settings["eps"],
        "downsample_padding": settings["downsample_padding"],
        "flip_sin_to_cos": settings["flip_sin_to_cos"],
        "freq_shift": settings["freq_shift"],
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in unet.state_dict().items()}
    temporary = folder / "diffusion_pytorch_model.safetensors.unfinished"
    safetensors.torch.save_file(weights, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "diffusion_pytorch_model.safetensors")
    temporary = folder / "config.json.unfinished"
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    temporary.replace(folder / "config.json")

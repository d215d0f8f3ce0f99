"""Images from a trained DDPM: sampling, inpainting, and the way from one image to another.

An image is a function of its own seed, alone or in any batch (up to the rounding of the network, which may add up in
another order in batches of another size).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sslfast.evaluation.sheets import to_uint8
from sslfast.ops import diffusion_noise
from sslfast.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from sslfast.training import UserError, checkpoint
from sslfast.unet import UNet

Sampler = Literal["ddim", "ddpm", "dpm-solver++"]
Model = Callable[[Tensor, int], Tensor]
"""A function (x_t, t) -> prediction, both images (N, C, H, W) float32."""
Callback = Callable[[int, Tensor], None]
"""Called after each step with the number of steps done in this batch, and the images as they are now."""

ANOTHER_SEED = 2**40 + 435  # seed + k · this is far from the seeds that people choose


def load_config(run: Path) -> dict[str, Any]:
    """Return the settings of a DDPM run; raise UserError for a run of another method."""
    return checkpoint.load_config(run, "ddpm")


def build_unet(config: dict[str, Any]) -> UNet:
    """Return the untrained network of a run's settings; with classes, its last class stands for none."""
    return UNet(
        config["channels"] * config["patch"] ** 2,
        widths=tuple(config["widths"]),
        blocks=config["blocks"],
        attention=tuple(level in config["attention"] for level in range(len(config["widths"]))),
        classes=len(config["classes"]) + 1 if config["conditional"] else 0,
        dropout=config["dropout"],
    )


def load_unet(run: Path, weights: Literal["average", "raw", "untrained"] = "average") -> UNet:
    """Return the network of a run in evaluation mode on the CPU: with averaged weights, with the last, or untrained."""
    config = load_config(run)
    with torch.random.fork_rng():
        torch.manual_seed(config["seed"])
        try:
            unet = build_unet(config)
        except ValueError as error:
            raise UserError(f"{run / 'config.json'} is damaged: {error}") from None
    if weights != "untrained":
        checkpoint.load_weights(run, **{"average" if weights == "average" else "unet": unet})
    return unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def noise_shape(config: dict[str, Any]) -> tuple[int, int, int]:
    """Return (C, H, W) of what the network of a run takes."""
    patch = config["patch"]
    return config["channels"] * patch**2, config["size"] // patch, config["size"] // patch


def to_pixels(x: Tensor, patch: int) -> Tensor:
    """Return what the network makes, (N, C·patch², H, W) in [-1, 1], as images (N, C, H·patch, W·patch) uint8."""
    return to_uint8(F.pixel_shuffle(x.float(), patch)).cpu()


def make_scheduler(config: dict[str, Any], sampler: Sampler, steps: int):
    """Return the scheduler of a run's noise schedule for so many steps. Raises UserError for a number out of range."""
    if not 1 <= steps <= config["timesteps"]:
        raise UserError(f"--steps must be between 1 and the {config['timesteps']} of the training, not {steps}")
    schedule = {
        "num_train_timesteps": config["timesteps"],
        "beta_schedule": config["schedule"],
        "prediction_type": config["prediction"],
        "timestep_spacing": "trailing",
    }
    scheduler: DDIMScheduler | DDPMScheduler | DPMSolverMultistepScheduler
    if sampler == "ddim":
        scheduler = DDIMScheduler(**schedule)
    elif sampler == "ddpm":
        scheduler = DDPMScheduler(**schedule)
    else:  # it clips only by thresholding, which with sample_max_value 1 is the same
        scheduler = DPMSolverMultistepScheduler(**schedule, thresholding=True, sample_max_value=1.0)
    scheduler.set_timesteps(steps)
    return scheduler


def predictor(unet: UNet, precision: str, classes: Tensor | None = None, guidance: float = 1.0) -> Model:
    """Return the function that samplers call: the network in this precision, guided towards classes (N,).

    Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): none + guidance · (class - none).
    """
    nothing = None if classes is None else torch.full_like(classes, unet.settings["classes"] - 1)

    def model(x: Tensor, t: int) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            if classes is None or nothing is None or guidance == 1:
                return unet(x, t, classes).float()
            wanted, free = unet(x.repeat(2, 1, 1, 1), t, torch.cat([classes, nothing])).float().chunk(2)
        return free + guidance * (wanted - free)

    return model


@torch.inference_mode()
def generate(
    model: Model,
    scheduler,
    noise: Tensor,
    seeds: Tensor | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Return images (N, C, H, W) in [-1, 1]: a scheduler's whole way from ``noise``, on the device of noise.

    ``seeds`` (N,) int64 are those of the noise that ddpm, and ddim with ``eta``, add on the way.
    """
    scheduler.set_timesteps(len(scheduler.timesteps), device=noise.device)  # dpm-solver++ forgets the batch before
    options: dict[str, Any] = {"eta": eta} if isinstance(scheduler, DDIMScheduler) else {}
    x = noise
    for done, t in enumerate(scheduler.timesteps.tolist(), 1):
        x = scheduler.step(model(x, t), t, x, seeds=seeds, **options).prev_sample
        if callback is not None:
            callback(done, x)
    return x


@torch.inference_mode()
def inpaint(
    model: Model,
    scheduler,
    known: Tensor,
    mask: Tensor,
    seeds: Tensor,
    visits: int = 5,
    callback: Callback | None = None,
) -> Tensor:
    """Return images (N, C, H, W) that are ``known`` where ``mask`` (1 or C, H, W) is true, and invented elsewhere.

    RePaint (Lugmayr et al., arXiv 2201.09865): each step joins the known part, noised as the step wants it, with the
    model's; then the noise of the step is added again, and the step taken anew, ``visits`` times, so that both parts
    come to fit. The scheduler is a `DDPMScheduler`, or a `DDIMScheduler`, which runs with η = 1.
    """
    options: dict[str, Any] = {"eta": 1.0} if isinstance(scheduler, DDIMScheduler) else {}
    shape, alphas = known.shape[1:], scheduler.alphas_cumprod.tolist()
    timesteps = scheduler.timesteps.tolist()
    x = scheduler.initial_noise(seeds, shape)
    for done, t in enumerate(timesteps, 1):
        alpha = alphas[timesteps[done]] if done < len(timesteps) else 1.0  # after this step
        for visit in range(visits if done < len(timesteps) else 1):
            new = seeds + (3 * visit + 1) * ANOTHER_SEED
            x = scheduler.step(model(x, t), t, x, seeds=new, **options).prev_sample
            noised = math.sqrt(alpha) * known + math.sqrt(1 - alpha) * diffusion_noise(
                new + ANOTHER_SEED, shape, step=t
            )
            x = torch.where(mask, noised, x)
            if callback is not None:
                callback(done, x)
            if visit < visits - 1 and done < len(timesteps):
                kept = alphas[t] / alpha
                again = diffusion_noise(new + 2 * ANOTHER_SEED, shape, step=t)
                x = math.sqrt(kept) * x + math.sqrt(1 - kept) * again
    return x


def between(first: Tensor, second: Tensor, n: int) -> Tensor:
    """Return n noises on the great circle from one to the other, ends included: (C, H, W) twice -> (n, C, H, W).

    Each keeps the length that noise has, which points on the straight line would not.
    """
    cosine = F.cosine_similarity(first.flatten(), second.flatten(), dim=0).clamp(-1, 1)
    angle = cosine.acos()
    share = torch.linspace(0, 1, n, device=first.device).reshape(-1, 1, 1, 1)
    if angle < 1e-4:
        return first + share * (second - first)
    return (((1 - share) * angle).sin() * first + (share * angle).sin() * second) / angle.sin()

"""Noise schedules, and which of their timesteps a sampler visits."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sslfast.schedulers._config import Config


def betas(config: Config) -> Tensor:
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float32)
        if betas.shape != (count,):
            raise ValueError(f"trained_betas: expected num_train_timesteps = {count} numbers, got {tuple(betas.shape)}")
    elif config.beta_schedule == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    elif config.beta_schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    elif config.beta_schedule == "squaredcos_cap_v2":
        betas = betas_from(lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2, count)
    elif config.beta_schedule == "laplace" and "variance_type" in config and "solver_order" not in config:
        betas = betas_from(laplace_alpha_bar, count)
    elif config.beta_schedule == "sigmoid" and "variance_type" in config and "solver_order" not in config:
        betas = torch.sigmoid(torch.linspace(-6, 6, count)) * (end - start) + start
    else:
        raise NotImplementedError(f"beta_schedule={config.beta_schedule!r} is not implemented for {config._class_name}")
    if config.rescale_betas_zero_snr:  # Lin et al., arXiv 2305.08891, algorithm 1
        root = torch.cumprod(1.0 - betas, dim=0).sqrt()
        first, last = root[0].clone(), root[-1].clone()
        alpha_bar = ((root - last) * (first / (first - last))) ** 2
        betas = 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return betas


def betas_from(alpha_bar, count: int) -> Tensor:
    """The betas whose products follow alpha_bar(t), t from 0 to 1; at most 0.999."""
    betas = [min(1 - alpha_bar((i + 1) / count) / alpha_bar(i / count), 0.999) for i in range(count)]
    return torch.tensor(betas, dtype=torch.float32)


def laplace_alpha_bar(t: float) -> float:
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def check_steps(steps: int, config: Config) -> None:
    if steps < 1 or steps > config.num_train_timesteps:
        raise ValueError(
            f"num_inference_steps: expected 1 to num_train_timesteps = {config.num_train_timesteps}, got {steps}"
        )


def spaced(config: Config, steps: int) -> np.ndarray:
    """Falling timesteps of DDPM and DDIM: table 2 of Lin et al., arXiv 2305.08891, rounded as diffusers does."""
    check_steps(steps, config)
    count = config.num_train_timesteps
    if config.timestep_spacing == "linspace":
        return np.linspace(0, count - 1, steps).round()[::-1].astype(np.int64)
    if config.timestep_spacing == "leading":
        return (np.arange(steps) * (count // steps))[::-1].astype(np.int64) + config.steps_offset
    return np.round(np.arange(count, 0, -count / steps)).astype(np.int64) - 1


def spaced_dpm(config: Config, steps: int, lambda_t: Tensor) -> np.ndarray:
    """Falling timesteps of DPM-Solver, one of which diffusers leaves out at the end; from λ = lambda_min_clipped on."""
    check_steps(steps, config)
    last = config.num_train_timesteps - int(torch.searchsorted(lambda_t.flip(0), config.lambda_min_clipped))
    if config.timestep_spacing == "linspace":
        return np.linspace(0, last - 1, steps + 1).round()[:0:-1].astype(np.int64)
    if config.timestep_spacing == "leading":
        return (np.arange(steps + 1) * (last // (steps + 1)))[:0:-1].astype(np.int64) + config.steps_offset
    return np.arange(last, 0, -config.num_train_timesteps / steps).round().astype(np.int64) - 1


def is_custom(num_inference_steps: int | None, timesteps: list[int] | None) -> bool:
    if (num_inference_steps is None) == (timesteps is None):
        raise ValueError("num_inference_steps: expected either num_inference_steps or timesteps")
    return timesteps is not None


def falling(timesteps: list[int], count: int) -> np.ndarray:
    steps = np.array(timesteps, dtype=np.int64)
    if not len(steps) or (np.diff(steps) >= 0).any() or steps[0] >= count or steps[-1] < 0:
        raise ValueError(f"timesteps: expected a falling list of numbers from {count - 1} to 0, got {timesteps}")
    return steps


def sigmas_between(choice: str, largest: float, smallest: float, steps: int) -> np.ndarray:
    """Falling sigmas: Karras et al., arXiv 2206.00364, equation 5 with ρ = 7; or even steps of ln σ."""
    if choice == "use_karras_sigmas":
        ends = float(largest) ** (1 / 7), float(smallest) ** (1 / 7)
        return np.linspace(*ends, steps) ** 7
    return np.exp(np.linspace(math.log(largest), math.log(smallest), steps))


def sigma_to_t(chosen: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """The timesteps at which training has these sigmas, between whole ones by interpolation in ln σ."""
    return np.interp(np.log(np.maximum(chosen, 1e-10)), np.log(sigmas), np.arange(len(sigmas)))


def is_zero(timestep) -> bool:
    """Whether it is known without waiting for a GPU that this is the last step, which takes no noise."""
    on_host = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"
    return on_host and bool((torch.as_tensor(timestep) == 0).all())


def row_of(table: Tensor, timestep, sample: Tensor) -> Tensor:
    """The coefficients of a timestep, or of one a sample; a timestep on a GPU is looked up there."""
    if isinstance(timestep, Tensor) and (timestep.device.type != "cpu" or timestep.numel() > 1):
        return table.index_select(0, timestep.to(table.device).reshape(-1)).expand(sample.shape[0], -1)
    t = int(timestep)
    if not 0 <= t < table.shape[0]:
        raise ValueError(f"timestep: expected 0 to {table.shape[0] - 1}, got {t}")
    row = table[t]
    if table.device.type == "cpu" and row[0].isnan():
        raise ValueError(f"timestep: expected one of scheduler.timesteps, got {t}")
    return row


def randn(shape, generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    """torch.randn as diffusers calls it: on a CPU generator's CPU, and image by image for a list of generators."""
    if isinstance(generator, (list, tuple)):
        if len(generator) == 1:
            return randn(shape, generator[0], device, dtype)
        return torch.cat([randn((1, *shape[1:]), g, device, dtype) for g in generator[: shape[0]]])
    source = device if generator is None else generator.device
    if generator is not None and source.type == "cuda" and device.type != "cuda":
        raise ValueError(f"generator: expected one on {device} or the CPU, got {source}")
    return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)

"""Noise schedules, and which of their timesteps a sampler visits."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def betas(config, class_name: str, more_schedules: tuple[str, ...]) -> Tensor:
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    schedule = config.beta_schedule
    if config.trained_betas is not None:  # any number of them
        betas = torch.tensor(config.trained_betas, dtype=torch.float32)
        if betas.dim() != 1 or not len(betas):
            raise ValueError(f"trained_betas: expected a list of numbers, got shape {tuple(betas.shape)}")
    elif schedule == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    elif schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    elif schedule == "squaredcos_cap_v2":
        betas = betas_from(lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2, count)
    elif schedule == "laplace" and schedule in more_schedules:
        betas = betas_from(laplace_alpha_bar, count)
    elif schedule == "sigmoid" and schedule in more_schedules:
        betas = torch.sigmoid(torch.linspace(-6, 6, count)) * (end - start) + start
    else:
        raise NotImplementedError(f"beta_schedule={schedule!r} is not implemented for {class_name}")
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


def spaced(config, steps: int | None) -> np.ndarray:
    """Falling timesteps of DDPM and DDIM: table 2 of Lin et al., arXiv 2305.08891, rounded as diffusers does."""
    count = config.num_train_timesteps
    if steps is None or not 1 <= steps <= count:
        raise ValueError(f"num_inference_steps: expected 1 to num_train_timesteps = {count}, got {steps}")
    if config.timestep_spacing == "linspace":
        return np.linspace(0, count - 1, steps).round()[::-1].astype(np.int64)
    if config.timestep_spacing == "leading":
        return (np.arange(steps) * (count // steps))[::-1].astype(np.int64) + config.steps_offset
    return np.round(np.arange(count, 0, -count / steps)).astype(np.int64) - 1


def spaced_dpm(config, steps: int, lambda_t: Tensor) -> np.ndarray:
    """Falling timesteps of DPM-Solver, one of which diffusers leaves out at the end; from λ = lambda_min_clipped on."""
    if steps < 1:
        raise ValueError(f"num_inference_steps: expected at least 1, got {steps}")
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


def falling(timesteps, count: int) -> np.ndarray:
    steps = np.array(timesteps, dtype=np.int64)
    if not len(steps) or (np.diff(steps) >= 0).any() or steps[0] >= count or steps[-1] < 0:
        raise ValueError(f"timesteps: expected a falling list of numbers from {count - 1} to 0, got {timesteps}")
    return steps


def sigmas_between(choice: str, config, sigmas: np.ndarray, steps: int) -> np.ndarray:
    """Falling sigmas: Karras et al., arXiv 2206.00364, equation 5 with ρ = 7; even steps of ln σ; or the quantiles
    of a beta distribution, Lee et al., arXiv 2407.12173."""
    share = np.linspace(0, 1, steps)
    if choice == "use_lu_lambdas":  # of the logarithms that are float32
        first, last = np.log(sigmas[-1]).item(), np.log(sigmas[0]).item()
        return np.exp(first + share * (last - first))
    largest = getattr(config, "sigma_max", None)  # of another class, such as Euler's
    smallest = getattr(config, "sigma_min", None)
    largest = sigmas[-1].item() if largest is None else largest
    smallest = sigmas[0].item() if smallest is None else smallest
    if choice == "use_karras_sigmas":
        first, last = largest ** (1 / 7), smallest ** (1 / 7)
        return (first + share * (last - first)) ** 7
    if choice == "use_beta_sigmas":
        from scipy.stats import beta  # here, because it is slow to import

        return smallest + beta.ppf(1 - share, 0.6, 0.6) * (largest - smallest)
    return np.exp(np.linspace(math.log(largest), math.log(smallest), steps))


def sigma_to_t(chosen: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """The timesteps at which training has these sigmas, between whole ones by interpolation in ln σ.

    The ends are met exactly: 999, not 998.99…, which would become 998.
    """
    log_sigmas, log_chosen = np.log(sigmas), np.log(np.maximum(chosen, 1e-10))
    below = log_sigmas[:, None] <= log_chosen  # not sorted where the last sigma stands in for infinity
    last_below = np.where(below.any(0), len(sigmas) - 1 - below[::-1].argmax(0), 0)
    low = last_below.clip(max=len(sigmas) - 2)
    share = (log_sigmas[low] - log_chosen) / (log_sigmas[low] - log_sigmas[low + 1])
    share = share.clip(0, 1)
    return (1 - share) * low + share * (low + 1)

"""`diffusion` in plain PyTorch: the truth in tests, the documentation, and what runs on devices without a kernel."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """The numbers of one step of a sampler, in the order of `StepCoefficients` in csrc/common/schedule.h.

    x0 = predict_scale · (predict_sample · x_t + predict_model · model), then clipped;
    x_s = x0 · x0' + sample · x_t + model · model + history0 · x0 of one step ago + history1 · x0 of two steps ago
          + noise · normal numbers [· their standard deviation from the model, between the two logarithms of variances]
    """

    predict_sample: Tensor
    predict_model: Tensor
    predict_scale: Tensor
    x0: Tensor
    sample: Tensor
    model: Tensor
    history0: Tensor
    history1: Tensor
    noise: Tensor
    log_variance_min: Tensor
    log_variance_max: Tensor
    noise_step: Tensor


def diffusion_noise(seeds: Tensor, elements: int, step: int = 0) -> Tensor:
    """(samples, elements) float64: the numbers of csrc/common/normal.h, of words from csrc/common/philox.h."""
    groups, low = -(-elements // 64), 2**32 - 1
    c1 = c0 = torch.zeros(len(seeds), 16 * groups, dtype=torch.int64, device=seeds.device)
    c2, c3 = c0 + step, (2 << 24) + torch.arange(16 * groups, device=seeds.device).expand_as(c0)
    key0, key1 = seeds[:, None] & low, seeds[:, None] >> 32 & low
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            product1 >> 32 & low ^ c1 ^ key0,
            product1 & low,
            product0 >> 32 & low ^ c3 ^ key1,
            product0 & low,
        )
        key0, key1 = key0 + 0x9E3779B9 & low, key1 + 0xBB67AE85 & low
    numbers = []
    for radius, angle in ((c0, c1), (c2, c3)):
        length = (-2 * (((radius >> 1).float() + 0.5).double() / 2**31).log()).sqrt()
        turn = 2 * math.pi / 2**32 * angle.double()
        numbers += [length * turn.cos(), length * turn.sin()]
    return torch.stack([n.view(-1, groups, 16) for n in numbers], dim=2).flatten(1)[:, :elements]


def diffusion_step(model_output, sample, coefficients, clip, threshold, history, noise, variance):
    dtype, compute = sample.dtype, _compute_dtype(sample)
    c = Coefficients(*_per_sample(coefficients, sample).unbind(0))
    model, deviation = model_output.to(compute), torch.ones((), dtype=compute, device=sample.device)
    if variance != "fixed":
        model, learned = model.chunk(2, dim=1)
        if variance == "learned":
            deviation = learned.sqrt()
        else:
            share = (learned + 1) / 2
            deviation = torch.exp((share * c.log_variance_max + (1 - share) * c.log_variance_min) / 2)
    x = sample.to(compute)
    x0 = (c.predict_sample * x + c.predict_model * model) * c.predict_scale
    if threshold is not None:
        limit = threshold.to(compute).reshape(-1, *[1] * (sample.dim() - 1))
        x0 = x0.clamp(-limit, limit) / limit
    elif clip is not None:
        x0 = x0.clamp(-clip, clip)
    previous = c.x0 * x0 + c.sample * x + c.model * model
    for weight, old in zip((c.history0, c.history1), history, strict=False):
        previous = previous + weight * old.to(compute)
    if noise is not None:
        previous = torch.where(c.noise == 0, previous, previous + c.noise * deviation * noise.to(compute))
    return previous.to(dtype), x0.to(dtype)


def q_sample(x0, timesteps, alphas_cumprod, noise, prediction_type):
    alpha = alphas_cumprod.to(_compute_dtype(x0))[timesteps].reshape(-1, *[1] * (x0.dim() - 1))
    x, noise = x0.to(alpha.dtype), noise.to(alpha.dtype)
    noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * x if prediction_type == "v_prediction" else noise
    return noisy.to(x0.dtype), (x0 if prediction_type == "sample" else target.to(x0.dtype))


def diffusion_loss(prediction, target, timesteps, alphas_cumprod, prediction_type, snr_gamma, reduction):
    compute = _compute_dtype(prediction)
    losses = (prediction.to(compute) - target.to(compute)).square().reshape(len(prediction), -1).mean(1)
    losses = losses * loss_weights(alphas_cumprod.to(compute)[timesteps], prediction_type, snr_gamma)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def loss_weights(alphas_cumprod, prediction_type, snr_gamma):
    if snr_gamma is None:
        return torch.ones_like(alphas_cumprod)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    kept = snr.clamp(max=snr_gamma)
    if prediction_type == "epsilon":
        return torch.where(snr == 0, 1.0, kept / snr)
    return kept / (snr + 1) if prediction_type == "v_prediction" else kept


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_sample(coefficients: Tensor, sample: Tensor) -> Tensor:
    """(fields, samples or 1, 1, …, 1)"""
    c = coefficients.to(_compute_dtype(sample)).reshape(-1, coefficients.shape[-1])
    return c.T.reshape(coefficients.shape[-1], -1, *[1] * (sample.dim() - 1))

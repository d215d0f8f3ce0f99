"""The sampler of DDIM."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sslfast import _C
from sslfast.schedulers._base import Scheduler
from sslfast.schedulers._fused import (
    Output,
    alike,
    fused,
    inputs_of,
    number_in,
    number_of,
    on_host,
    randn,
    row_of,
    table_of,
)
from sslfast.schedulers._mixins import register_to_config
from sslfast.schedulers._schedules import spaced


class DDIMScheduler(Scheduler):
    """DDIM's sampling, with the arguments and results of diffusers' DDIMScheduler; `step` takes `seeds` besides.

    Source: Song et al., "Denoising Diffusion Implicit Models", arXiv 2010.02502; diffusers.
    """

    _parts = frozenset({"_get_variance", "_threshold_sample"})

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas=None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ):
        self._check_config()
        self._make_betas()
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self._set(np.arange(num_train_timesteps)[::-1].copy(), None)

    def set_timesteps(self, num_inference_steps: int, device=None):
        """Choose how many steps to take."""
        self._set(spaced(self.config, num_inference_steps), device)
        self.num_inference_steps = num_inference_steps  # the stride, where "trailing" rounds to another number

    def step(
        self,
        model_output: Tensor,
        timestep,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator=None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        seeds: Tensor | None = None,
    ):
        """The sample of the next timestep, num_train_timesteps // num_inference_steps lower, and x0.

        Args:
            model_output, sample: (samples, channels, …). They broadcast; the dtype is the common one.
            timestep: an int or a tensor with one element, or with one a sample.
            eta: 0 adds no noise, 1 as much as DDPM.
            use_clipped_model_output: whether the noise follows from x0 after clipping.
            generator: one, or a list of one a sample: torch.randn's noise, as diffusers'.
            variance_noise: the noise itself.
            seeds: (samples,) int64: noise that depends on a sample's seed and the timestep alone.
        """
        self._check_parts()
        options = eta, use_clipped_model_output, generator, variance_noise, seeds
        previous, x0 = step(self, model_output, timestep, sample, *options)
        return Output(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        """The variance of the noise with eta = 1 in the step from one timestep to another, a tensor of one element."""
        alpha_t = self.alphas_cumprod[timestep]
        alpha_s = self.alphas_cumprod[prev_timestep] if prev_timestep >= 0 else self.final_alpha_cumprod
        return (1 - alpha_s) / (1 - alpha_t) * (1 - alpha_t / alpha_s)


def step(
    scheduler,
    model_output: Tensor,
    timestep,
    sample: Tensor,
    eta: float,
    use_clipped_model_output: bool,
    generator,
    variance_noise: Tensor | None,
    seeds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """DDIMScheduler.step of a scheduler, ours or diffusers'."""
    if scheduler.num_inference_steps is None:
        raise ValueError("num_inference_steps: call set_timesteps before step")
    if eta > 0 and variance_noise is not None and generator is not None:
        raise ValueError("variance_noise: expected variance_noise or generator, got both")
    model, x = inputs_of(model_output, sample)
    noise = variance_noise if eta > 0 and seeds is None else None
    if noise is not None:
        model, x, noise = alike("model_output, sample, variance_noise", model, x, noise)
    t = number_of(timestep, scheduler.timesteps)
    row = row_of(*_table(scheduler, x.device, float(eta), bool(use_clipped_model_output)), t, timestep, len(x))
    if noise is None and eta > 0 and seeds is None:
        noise = randn(model_output.shape, generator, x.device, model_output.dtype)
    config = scheduler.config
    clip = config.clip_sample_range if config.clip_sample else None
    previous, x0 = fused(config, model, x, row, clip=clip, noise=noise, seeds=seeds if eta > 0 else None)
    if config.prediction_type == "sample":
        x0 = x0[: len(model_output)].to(model_output.dtype)  # it is the model's output
    elif variance_noise is not None:
        x0 = x0.to(torch.promote_types(model_output.dtype, sample.dtype))
    return previous, x0


def _table(scheduler, device: torch.device, eta: float, use_clipped_model_output: bool) -> tuple[Tensor, np.ndarray]:
    """A row for each timestep."""
    config, alphas, final = (
        scheduler.config,
        on_host(scheduler.alphas_cumprod),
        number_in(scheduler.final_alpha_cumprod),
    )
    stride = config.num_train_timesteps // scheduler.num_inference_steps

    def make() -> Tensor:
        t = np.arange(len(alphas))
        of_next = np.where(t >= stride, alphas[(t - stride).clip(0)], final)
        pairs = torch.from_numpy(np.stack([alphas, of_next], 1).astype(np.float32))
        return _C.ddim_coefficients(pairs, torch.from_numpy(t), config.prediction_type, eta, use_clipped_model_output)

    key = (alphas.tobytes(), final, stride, config.prediction_type, eta, use_clipped_model_output)
    return table_of(scheduler, "step", device, key, make)

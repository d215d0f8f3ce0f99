"""The sampler of DDIM."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sslfast import _C
from sslfast.schedulers._base import Scheduler
from sslfast.schedulers._config import Output
from sslfast.schedulers._schedules import randn, row_of, spaced


class DDIMScheduler(Scheduler):
    """DDIM's sampling, with the arguments and results of diffusers' DDIMScheduler; `step` takes `seeds` besides.

    Source: Song et al., "Denoising Diffusion Implicit Models", arXiv 2010.02502; diffusers.
    """

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
        self._register(locals())
        self._make_betas()
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self._set(np.arange(num_train_timesteps)[::-1].copy(), None)
        self.num_inference_steps = None

    def set_timesteps(self, num_inference_steps: int, device=None):
        """Choose how many steps to take."""
        self._set(spaced(self.config, num_inference_steps), device)
        self.num_inference_steps = num_inference_steps  # diffusers' stride, where "trailing" rounds to another number

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
            model_output, sample: (samples, channels, …).
            timestep: an int or a tensor with one element, or with one a sample.
            eta: 0 adds no noise, 1 as much as DDPM.
            use_clipped_model_output: whether the noise follows from x0 after clipping.
            generator: one, or a list of one a sample: torch.randn's noise, as diffusers'.
            variance_noise: the noise itself.
            seeds: (samples,) int64: noise that depends on a sample's seed and the timestep alone.
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps: call set_timesteps before step")
        if eta > 0 and variance_noise is not None and generator is not None:
            raise ValueError("variance_noise: expected variance_noise or generator, got both")
        key = ("ddim", float(eta), bool(use_clipped_model_output))
        row = row_of(self._on(sample.device, key, lambda: self._table(*key[1:])), timestep, sample)
        noise = None
        if eta > 0 and seeds is None:
            noise = variance_noise
            if noise is None:
                noise = randn(sample.shape, generator, sample.device, model_output.dtype)
            noise = noise.to(sample.dtype)
        previous, x0 = self._fused(model_output, sample, row, noise, seeds if eta > 0 else None)
        return Output(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    def _table(self, eta: float, use_clipped_model_output: bool) -> Tensor:
        steps = torch.arange(len(self))
        previous = steps - len(self) // (self.num_inference_steps or len(self))
        alpha_s = torch.where(previous >= 0, self.alphas_cumprod[previous.clamp(min=0)], self.final_alpha_cumprod)
        pairs = torch.stack([self.alphas_cumprod, alpha_s], 1)
        return _C.ddim_coefficients(pairs, steps, self.config.prediction_type, eta, use_clipped_model_output)

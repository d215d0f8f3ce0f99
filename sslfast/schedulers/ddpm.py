"""The sampler of DDPM."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sslfast import _C
from sslfast.schedulers._base import Scheduler
from sslfast.schedulers._config import Output
from sslfast.schedulers._schedules import falling, is_custom, is_zero, randn, row_of, spaced


class DDPMScheduler(Scheduler):
    """DDPM's ancestral sampling, with the arguments and results of diffusers' DDPMScheduler.

    Differences: `step` takes `seeds`, and "fixed_large_log", for which diffusers' `step` gives NaN, is the standard
    deviation √β. Learned variances take a model with twice the channels.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239; diffusers.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas=None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ):
        self._register(locals())
        self._make_betas()
        self.variance_type = variance_type
        self.custom_timesteps = False
        self._set(np.arange(num_train_timesteps)[::-1].copy(), None)
        self.num_inference_steps = None

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, timesteps: list[int] | None = None):
        """Choose how many steps to take, or which: a falling list of timesteps."""
        self.custom_timesteps = is_custom(num_inference_steps, timesteps)
        if timesteps is not None:
            self._set(falling(timesteps, self.config.num_train_timesteps), device)
        elif num_inference_steps is not None:
            self._set(spaced(self.config, num_inference_steps), device)

    def previous_timestep(self, timestep):
        """The timestep that follows `timestep` in sampling; -1 after the last."""
        index = np.flatnonzero(self._steps == int(timestep))
        if not len(index):
            raise ValueError(f"timestep: expected one of scheduler.timesteps, got {int(timestep)}")
        return int(self._steps[index[0] + 1]) if index[0] + 1 < len(self._steps) else -1

    def step(
        self, model_output: Tensor, timestep, sample: Tensor, generator=None, return_dict: bool = True, *, seeds=None
    ):
        """The sample at the timestep before `timestep`, and x0, from the model's output.

        Args:
            model_output: the shape of `sample`, or twice its channels for a learned variance.
            timestep: an int or a tensor with one element, or with one a sample.
            sample: (samples, channels, …).
            generator: one, or a list of one a sample: torch.randn's noise, as diffusers'.
            seeds: (samples,) int64: noise that depends on a sample's seed and the timestep alone.
        """
        learned = self.variance_type.startswith("learned") and model_output.shape[1] == 2 * sample.shape[1]
        variance = self.variance_type if learned else "fixed"
        row = row_of(self._on(sample.device, "ddpm", self._table), timestep, sample)
        noise = None
        if seeds is None and not is_zero(timestep):
            noise = randn(sample.shape, generator, sample.device, model_output.dtype).to(sample.dtype)
        previous, x0 = self._fused(model_output, sample, row, noise, seeds, variance=variance)
        return Output(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    def _table(self) -> Tensor:
        """A row for each timestep; NaN where sampling does not come by."""
        steps = torch.from_numpy(self._steps)
        alpha_s = torch.cat([self.alphas_cumprod[steps[1:]], torch.ones(1)])
        pairs = torch.stack([self.alphas_cumprod[steps], alpha_s], 1)
        rows = _C.ddpm_coefficients(pairs, steps, self.config.prediction_type, self.variance_type)
        return torch.full((len(self), rows.shape[1]), math.nan).index_copy(0, steps, rows)

    def _get_variance(self, t: int, predicted_variance: Tensor | None = None, variance_type: str | None = None):
        """The variance at timestep `t` as a tensor of one element; see `step` for how it is used."""
        kind = variance_type or self.config.variance_type
        alpha_t, previous = self.alphas_cumprod[t], self.previous_timestep(t)
        alpha_s = self.alphas_cumprod[previous] if previous >= 0 else torch.tensor(1.0)
        beta = 1 - alpha_t / alpha_s
        posterior = ((1 - alpha_s) / (1 - alpha_t) * beta).clamp(min=1e-20)
        if kind.startswith("learned") and predicted_variance is None:
            raise ValueError(f"predicted_variance: expected a tensor for {kind!r}, got None")
        if kind == "learned":
            return predicted_variance
        if kind == "learned_range":
            share = (torch.as_tensor(predicted_variance) + 1) / 2
            return share * beta.log() + (1 - share) * posterior.log()
        return {
            "fixed_small": posterior,
            "fixed_small_log": posterior.sqrt(),
            "fixed_large": beta,
            "fixed_large_log": beta.log(),
        }[kind]

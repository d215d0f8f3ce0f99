"""The sampler of DDPM."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sslfast import _C
from sslfast.schedulers._base import Scheduler
from sslfast.schedulers._fused import Output, fused, inputs_of, number_in, number_of, on_host, randn, row_of, table_of
from sslfast.schedulers._mixins import register_to_config
from sslfast.schedulers._schedules import falling, is_custom, spaced

LEARNED = ("learned", "learned_range")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", *LEARNED)


class DDPMScheduler(Scheduler):
    """DDPM's ancestral sampling, with the arguments and results of diffusers' DDPMScheduler.

    Differences: `step` takes `seeds`, and "fixed_large_log", for which diffusers' `step` gives NaN, is the standard
    deviation √β. Learned variances take a model with twice the channels.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239; diffusers.
    """

    _parts = frozenset({"previous_timestep", "_get_variance", "_threshold_sample"})

    @register_to_config
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
        self._check_config()
        self._make_betas("laplace", "sigmoid")
        self.one = torch.tensor(1.0)
        self.custom_timesteps = False
        self._set(np.arange(num_train_timesteps)[::-1].copy(), None)

    @property
    def variance_type(self) -> str:
        """That of the config; setting it changes the config."""
        return self.config.variance_type

    @variance_type.setter
    def variance_type(self, value: str) -> None:
        self.register_to_config(variance_type=value)

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, timesteps: list[int] | None = None):
        """Choose how many steps to take, or which: a falling list of timesteps."""
        if is_custom(num_inference_steps, timesteps):
            self._set(falling(timesteps, self.config.num_train_timesteps), device)
            self.custom_timesteps = True
        else:
            self._set(spaced(self.config, num_inference_steps), device)
            self.num_inference_steps, self.custom_timesteps = num_inference_steps, False

    def previous_timestep(self, timestep):
        """The timestep that follows `timestep` in sampling, as a tensor; -1 after the last.

        Before `set_timesteps` it is timestep - 1.
        """
        if not (self.custom_timesteps or self.num_inference_steps):
            return timestep - 1
        index = np.flatnonzero(on_host(self.timesteps) == number_of(timestep, self.timesteps, wait=True))
        if not len(index):
            raise ValueError(f"timestep: expected one of scheduler.timesteps, got {int(timestep)}")
        return self.timesteps[index[0] + 1] if index[0] + 1 < len(self.timesteps) else torch.tensor(-1)

    def step(
        self, model_output: Tensor, timestep, sample: Tensor, generator=None, return_dict: bool = True, *, seeds=None
    ):
        """The sample at the timestep before `timestep`, and x0, from the model's output.

        Args:
            model_output: the shape of `sample`, or twice its channels for a learned variance.
            timestep: an int or a tensor with one element, or with one a sample.
            sample: (samples, channels, …). Its batch and that of `model_output` broadcast; the dtype is the common one.
            generator: one, or a list of one a sample: torch.randn's noise, as diffusers'.
            seeds: (samples,) int64: noise that depends on a sample's seed and the timestep alone.
        """
        self._check_parts()
        previous, x0 = step(self, model_output, timestep, sample, generator, seeds)
        return Output(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    def _get_variance(self, t: int, predicted_variance: Tensor | None = None, variance_type: str | None = None):
        """The variance at timestep `t` as a tensor of one element; see `step` for how it is used."""
        kind = variance_type or self.config.variance_type
        alpha_t, previous = self.alphas_cumprod[t], self.previous_timestep(t)
        alpha_s = self.alphas_cumprod[previous] if previous >= 0 else self.one
        beta = 1 - alpha_t / alpha_s
        posterior = ((1 - alpha_s) / (1 - alpha_t) * beta).clamp(min=1e-20)
        if kind in LEARNED and predicted_variance is None:
            raise ValueError(f"predicted_variance: expected a tensor for {kind!r}, got None")
        if kind == "learned":
            return predicted_variance
        if kind == "learned_range":
            share = (torch.as_tensor(predicted_variance) + 1) / 2
            return share * beta.log() + (1 - share) * posterior.log()
        values = {"fixed_small_log": posterior.sqrt(), "fixed_large": beta, "fixed_large_log": beta.log()}
        return values.get(kind, posterior)


def step(scheduler, model_output: Tensor, timestep, sample: Tensor, generator, seeds) -> tuple[Tensor, Tensor]:
    """DDPMScheduler.step of a scheduler, ours or diffusers'."""
    config, kind = scheduler.config, scheduler.variance_type
    t = number_of(timestep, scheduler.timesteps, wait=seeds is None)
    mean, learned = model_output, False
    if kind in LEARNED:
        mean = model_output[:, : sample.shape[1]]
        learned = model_output.shape[1] == 2 * sample.shape[1]
        if not learned and t != 0:
            raise ValueError(
                f"model_output: expected twice the channels of sample, {tuple(sample.shape)}, for "
                f"variance_type={kind!r}, got {tuple(model_output.shape)}"
            )
    model, x = inputs_of(mean, sample)
    if learned:
        model = model_output.to(x.dtype).expand(x.shape[0], 2 * x.shape[1], *x.shape[2:])
    row = row_of(*_table(scheduler, x.device), t, timestep, len(x))
    noise = None
    if seeds is None and t != 0:
        noise = randn(mean.shape, generator, x.device, mean.dtype)
    previous, x0 = fused(
        config,
        model,
        x,
        row,
        clip=config.clip_sample_range if config.clip_sample else None,
        noise=noise,
        seeds=seeds,
        variance=kind if learned else "fixed",
    )
    if config.prediction_type == "sample":
        x0 = x0[: len(mean)].to(mean.dtype)  # it is the model's output
    return previous, x0


def _table(scheduler, device: torch.device) -> tuple[Tensor, np.ndarray]:
    """A row for each timestep; NaN where sampling does not come by."""
    config, alphas, one = scheduler.config, on_host(scheduler.alphas_cumprod), number_in(scheduler.one)
    steps = None
    if scheduler.custom_timesteps or scheduler.num_inference_steps:
        steps = on_host(scheduler.timesteps)
    variance = config.variance_type if config.variance_type in VARIANCES else "fixed_small"

    def make() -> Tensor:
        t = np.arange(len(alphas))[::-1] if steps is None else steps.astype(np.int64)
        after = np.append(t[1:], -1)
        known = (t >= 0) & (t < len(alphas)) & (after < len(alphas))
        t, after = t[known][::-1].copy(), after[known][::-1]  # so that the first of the same timestep counts
        of_after = np.where(after >= 0, alphas[after.clip(0)], one)
        pairs = torch.from_numpy(np.stack([alphas[t], of_after], 1).astype(np.float32))
        rows = _C.ddpm_coefficients(pairs, torch.from_numpy(t), config.prediction_type, variance)
        table = torch.full((len(alphas), rows.shape[1]), torch.nan, device=rows.device)
        table[t] = rows
        return table

    key = (alphas.tobytes(), steps is not None and steps.tobytes(), one, config.prediction_type, variance)
    return table_of(scheduler, "step", device, key, make)

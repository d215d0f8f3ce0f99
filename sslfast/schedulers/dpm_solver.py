"""The sampler of DPM-Solver++."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sslfast import _C, ops
from sslfast.schedulers._base import Scheduler
from sslfast.schedulers._config import Output
from sslfast.schedulers._schedules import is_custom, randn, sigma_to_t, sigmas_between, spaced_dpm


class DPMSolverMultistepScheduler(Scheduler):
    """DPM-Solver++ in its multistep form, with the arguments and results of diffusers' DPMSolverMultistepScheduler.

    The algorithms "dpmsolver++" (orders 1 to 3) and "sde-dpmsolver++" (1 and 2), epsilon, sample and v prediction,
    Karras', exponential and uniform-logSNR sigmas. What else diffusers has raises NotImplementedError.

    Source: Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", arXiv
    2211.01095; diffusers.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas=None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -float("inf"),
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ):
        self._register(locals())
        for name in ("use_beta_sigmas", "use_flow_sigmas", "use_dynamic_shifting"):
            if self.config[name]:
                raise NotImplementedError(f"{name}=True is not implemented")
        if algorithm_type not in ("dpmsolver++", "sde-dpmsolver++"):
            raise NotImplementedError(f"algorithm_type={algorithm_type!r} is not implemented; 'dpmsolver++' is")
        if algorithm_type.startswith("sde") and solver_order == 3:
            raise NotImplementedError("solver_order=3 is not implemented for algorithm_type='sde-dpmsolver++'")
        if use_karras_sigmas + use_exponential_sigmas + use_lu_lambdas > 1:
            raise ValueError("use_karras_sigmas: expected at most one choice of sigmas")
        self._make_betas()
        if rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = 2**-24  # diffusers' stand-in for 0, so that the first sigma is finite
        self.alpha_t, self.sigma_t = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        self.lambda_t = self.alpha_t.log() - self.sigma_t.log()
        self.sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        self._set(np.arange(num_train_timesteps)[::-1].copy(), None)
        self.num_inference_steps = None
        self.set_begin_index(None)
        self._restart()

    def set_timesteps(
        self, num_inference_steps: int | None = None, device=None, mu=None, timesteps: list[int] | None = None
    ):
        """Choose how many steps to take, or which timesteps."""
        if mu is not None:
            raise NotImplementedError("mu: dynamic shifting is not implemented")
        is_custom(num_inference_steps, timesteps)
        sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy()
        choice = [c for c in ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas") if self.config[c]]
        if timesteps is not None:
            if choice:
                raise ValueError(f"timesteps: expected None with {choice[0]}=True")
            steps = np.array(timesteps, dtype=np.int64)
        else:
            steps = spaced_dpm(self.config, num_inference_steps or 0, self.lambda_t)
        if choice:
            chosen = sigmas_between(choice[0], sigmas[-1], sigmas[0], len(steps))
            steps = sigma_to_t(chosen, sigmas)
            if choice[0] != "use_exponential_sigmas" and self.config.beta_schedule != "squaredcos_cap_v2":
                steps = steps.round()
        else:
            chosen = np.interp(steps, np.arange(len(sigmas)), sigmas)
        last = 0.0 if self.config.final_sigmas_type == "zero" else sigmas[0]
        self.sigmas = torch.from_numpy(np.append(chosen, last).astype(np.float32))
        self._set(steps, device)
        self.set_begin_index(None)
        self._restart()

    def _restart(self) -> None:
        self._history: list[Tensor] = []
        self._step_index: int | None = None
        self._taken = 0  # steps, up to solver_order

    @property
    def step_index(self) -> int | None:
        """The index of the next step in `timesteps`; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int | None = 0) -> None:
        """Begin with the step of this index instead of the one that the first timestep names."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep, schedule_timesteps=None) -> int:
        """The index of a timestep; the second, where it occurs several times; the last, where it does not occur."""
        steps = self._steps if schedule_timesteps is None else np.asarray(schedule_timesteps.cpu())
        index = np.flatnonzero(steps == int(timestep))
        return len(self._steps) - 1 if not len(index) else int(index[min(1, len(index) - 1)])

    def step(
        self,
        model_output: Tensor,
        timestep,
        sample: Tensor,
        generator=None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        seeds: Tensor | None = None,
    ):
        """The sample of the next timestep; call it once for each of `timesteps`, in order.

        Args:
            model_output, sample: (samples, channels, …).
            timestep: an int or a tensor with one element; only the first is looked at.
            generator, variance_noise, seeds: the noise of "sde-dpmsolver++", as in `DDIMScheduler.step`.
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps: call set_timesteps before step")
        index = self._step_index
        if index is None:
            index = self._first_index(timestep) if self._begin_index is None else self._begin_index
        if index >= len(self._steps):
            raise ValueError(f"timestep: sampling is over after {len(self._steps)} steps; call set_timesteps again")
        if self.config.variance_type in ("learned", "learned_range"):
            model_output = model_output[:, : sample.shape[1]]
        order = self._order_of_step(index)
        table = self._on(sample.device, ("dpm", order), lambda: self._table(order))
        noise = None
        if self.config.algorithm_type.startswith("sde") and seeds is None:
            noise = variance_noise
            if noise is None:
                noise = randn(sample.shape, generator, sample.device, torch.float32)
            noise = noise.to(sample.device, sample.dtype)
        row, history = table[index], self._history[: order - 1]
        previous, x0 = self._fused(model_output, sample, row, noise, seeds, history)
        self._history = [x0, *self._history][: self.config.solver_order - 1]
        self._step_index = index + 1
        self._taken = min(self._taken + 1, self.config.solver_order)
        return Output(prev_sample=previous) if return_dict else (previous,)

    def _first_index(self, timestep) -> int:
        """Where sampling begins, without waiting for the GPU if `timestep` is an element of `timesteps`."""
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            of_ours = timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr()
            if of_ours and len(np.unique(self._steps)) == len(self._steps):
                return int(timestep.storage_offset() - self.timesteps.storage_offset())
        return self.index_for_timestep(timestep)

    def _order_of_step(self, index: int) -> int:
        """Lower in the first steps, for lack of history, and where the configuration asks for it in the last ones."""
        config, left = self.config, len(self._steps) - 1 - index
        few = config.lower_order_final and len(self._steps) < 15
        if left == 0 and (config.euler_at_final or few or config.final_sigmas_type == "zero"):
            return 1
        highest = 2 if left == 1 and few else 3
        return min(config.solver_order, self._taken + 1, highest)

    def _table(self, order: int) -> Tensor:
        """A row for each step as one of `order`; NaN where it has no history."""
        ratios = torch.full((len(self._steps), 4), math.nan, dtype=torch.float64)
        for behind in range(-1, order):
            column = self.sigmas.double().roll(behind)[: len(self._steps)]
            ratios[max(behind, 0) :, behind + 1] = column[max(behind, 0) :]
        config, indices = self.config, torch.arange(len(self._steps))
        return _C.dpm_coefficients(
            ratios, indices, config.prediction_type, order, config.solver_type, config.algorithm_type
        )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """α·x0 + σ·noise at each sample's timestep, which after `set_timesteps` is one of `timesteps`."""
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps.tolist()]
        else:
            start = self._begin_index if self._step_index is None else self._step_index
            indices = [start] * timesteps.shape[0]
        sigmas = self.sigmas if self.num_inference_steps is not None else self.sigmas.flip(0)
        alphas_cumprod = (1 / (sigmas**2 + 1)).to(original_samples.device)
        t = torch.tensor(indices, device=original_samples.device)
        return ops.q_sample(original_samples, t, alphas_cumprod, noise=noise.to(original_samples.dtype))[0]

"""The sampler of DPM-Solver++."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sslfast import _C, ops
from sslfast.schedulers._base import Scheduler, q_sample
from sslfast.schedulers._fused import Output, alike, fused, inputs_of, number_of, on_host, randn, table_of
from sslfast.schedulers._mixins import register_to_config
from sslfast.schedulers._schedules import is_custom, sigma_to_t, sigmas_between, spaced_dpm


class DPMSolverMultistepScheduler(Scheduler):
    """DPM-Solver++ in its multistep form, with the arguments and results of diffusers' DPMSolverMultistepScheduler.

    The algorithms "dpmsolver++" (orders 1 to 3) and "sde-dpmsolver++" (1 and 2), epsilon, sample and v prediction,
    Karras', exponential, beta and uniform-logSNR sigmas. What else diffusers has raises NotImplementedError.

    Source: Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", arXiv
    2211.01095; diffusers.
    """

    _parts = frozenset(
        {
            "convert_model_output",
            "dpm_solver_first_order_update",
            "multistep_dpm_solver_second_order_update",
            "multistep_dpm_solver_third_order_update",
            "_sigma_to_alpha_sigma_t",
            "_threshold_sample",
        }
    )

    @register_to_config
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
        for name in ("use_flow_sigmas", "use_dynamic_shifting"):
            if self.config[name]:
                raise NotImplementedError(f"{name}=True is not implemented")
        if prediction_type == "flow_prediction":
            raise NotImplementedError("prediction_type='flow_prediction' is not implemented")
        if algorithm_type == "deis":  # DEIS and UniPC lead to what is nearest to them
            self.register_to_config(algorithm_type="dpmsolver++")
        elif algorithm_type not in ("dpmsolver++", "sde-dpmsolver++"):
            raise NotImplementedError(f"algorithm_type={algorithm_type!r} is not implemented; 'dpmsolver++' is")
        if solver_type in ("logrho", "bh1", "bh2"):
            self.register_to_config(solver_type="midpoint")
        elif solver_type not in ("midpoint", "heun"):
            raise NotImplementedError(f"solver_type={solver_type!r} is not implemented; 'midpoint' and 'heun' are")
        if algorithm_type.startswith("sde") and solver_order == 3:
            raise NotImplementedError("solver_order=3 is not implemented for algorithm_type='sde-dpmsolver++'")
        if use_karras_sigmas + use_exponential_sigmas + use_beta_sigmas > 1:
            raise ValueError("use_karras_sigmas: expected at most one of Karras', exponential and beta sigmas")
        self._check_config(solver_order=(1, 2, 3), final_sigmas_type=("zero", "sigma_min"))
        self._make_betas()
        if rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = 2**-24  # diffusers' stand-in for 0, so that the first sigma is finite
        self.alpha_t, self.sigma_t = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        self.lambda_t = self.alpha_t.log() - self.sigma_t.log()
        self.sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self._restart()

    def set_timesteps(
        self, num_inference_steps: int | None = None, device=None, mu=None, timesteps: list[int] | None = None
    ):
        """Choose how many steps to take, or which timesteps."""
        if mu is not None:
            raise NotImplementedError("mu: dynamic shifting is not implemented")
        sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().cpu().numpy()
        choices = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas")
        choice = next((name for name in choices if self.config[name]), None)
        if is_custom(num_inference_steps, timesteps):
            if choice:
                raise ValueError(f"timesteps: expected None with {choice}=True")
            steps = np.array(timesteps, dtype=np.int64)
        else:
            steps = spaced_dpm(self.config, num_inference_steps or 0, self.lambda_t)
        if choice:
            chosen = sigmas_between(choice, self.config, sigmas, num_inference_steps or 0)
            steps = sigma_to_t(chosen, sigmas)
            if choice in choices[:2] and self.config.beta_schedule != "squaredcos_cap_v2":
                steps = steps.round()
        else:
            chosen = np.interp(steps, np.arange(len(sigmas)), sigmas)
        last = 0.0 if self.config.final_sigmas_type == "zero" else sigmas[0]
        self.sigmas = torch.from_numpy(np.append(chosen, last).astype(np.float32))
        self._set(steps, device)
        self.num_inference_steps = len(steps)
        self._restart()

    def _restart(self) -> None:
        self.model_outputs: list = [None] * self.config.solver_order  # x0 of the last steps
        self.lower_order_nums = 0  # steps taken, up to solver_order
        self._step_index: int | None = None
        self._begin_index: int | None = None

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
        steps = on_host(self.timesteps if schedule_timesteps is None else schedule_timesteps)
        number = timestep.item() if isinstance(timestep, Tensor) else timestep
        index = np.flatnonzero(steps == number)
        return len(self.timesteps) - 1 if not len(index) else int(index[min(1, len(index) - 1)])

    def _init_step_index(self, timestep) -> None:
        if self._begin_index is not None:
            self._step_index = self._begin_index
            return
        t = number_of(timestep, self.timesteps)  # without waiting for a GPU, where it is an element of timesteps
        self._step_index = self.index_for_timestep(timestep if t is None else t)

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
            model_output, sample: (samples, channels, …). They broadcast; the dtype is the common one.
            timestep: an int or a tensor with one element; only the first is looked at.
            generator, variance_noise, seeds: the noise of "sde-dpmsolver++", as in `DDIMScheduler.step`.
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps: call set_timesteps before step")
        self._check_parts()
        if self._step_index is None:
            self._init_step_index(timestep)
        config, order = self.config, self._order()
        model_output = self._mean(model_output, sample)
        model, x = inputs_of(model_output, sample)
        row = self._row(config.prediction_type, order, x.device)
        noise = None
        if seeds is None and config.algorithm_type == "sde-dpmsolver++":
            noise = variance_noise
            if noise is None:
                noise = randn(model_output.shape, generator, x.device, torch.float32)
            noise = noise.to(x.device)
        history = [x0.to(x.dtype) for x0 in self.model_outputs[:-order:-1]]  # newest first
        previous, x0 = fused(config, model, x, row, noise=noise, seeds=seeds, history=history)
        if config.prediction_type == "sample":
            previous, x0 = previous.to(model_output.dtype), x0.to(model_output.dtype)
        self.model_outputs = [*self.model_outputs[1:], x0]
        self.lower_order_nums = min(self.lower_order_nums + 1, config.solver_order)
        self._step_index = self._index() + 1
        return Output(prev_sample=previous) if return_dict else (previous,)

    def _mean(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The model's output without the variance that it may have learned."""
        learned = self.config.variance_type in ("learned", "learned_range")
        return model_output[:, : sample.shape[1]] if learned else model_output

    def _order(self) -> int:
        """Lower in the first steps, for lack of history, and where the configuration asks for it in the last ones."""
        config, count = self.config, len(self.timesteps)
        left = count - 1 - self._index()
        if left < 0:
            raise ValueError(f"timestep: sampling is over after {count} steps; call set_timesteps again")
        few = config.lower_order_final and count < 15
        if left == 0 and (config.euler_at_final or few or config.final_sigmas_type == "zero"):
            return 1
        highest = 2 if left == 1 and few else 3
        return min(config.solver_order, self.lower_order_nums + 1, highest)

    def _index(self) -> int:
        if self._step_index is None:
            raise ValueError("step_index: expected the index of a step, got None; `step` sets it")
        return self._step_index

    def _row(self, prediction_type: str, order: int, device: torch.device) -> Tensor:
        """The coefficients of the step at step_index; NaN where it has no history."""
        config, sigmas = self.config, on_host(self.sigmas)
        count = len(sigmas) - 1

        def make() -> Tensor:
            rows, indices = [], torch.arange(count, device="cpu")
            column = torch.from_numpy(sigmas.astype(np.float64))
            ratios = torch.full((count, 4), torch.nan, dtype=torch.float64, device="cpu")
            for behind in range(-1, 3):
                ratios[max(behind, 0) :, behind + 1] = column.roll(behind)[max(behind, 0) : count]
                if behind == 0:  # no step back by a rounding, of which an SDE would make the root
                    target, source = ratios[:, 0], ratios[:, 1]
                    target.copy_(torch.where((target - source).abs() <= 3e-7 * source, source, target))
                if behind >= 0:  # rows of order 1, 2 and 3
                    rows.append(
                        _C.dpm_coefficients(
                            ratios, indices, prediction_type, behind + 1, config.solver_type, config.algorithm_type
                        )
                    )
            return torch.cat(rows)

        key = (sigmas.tobytes(), prediction_type, config.solver_type, config.algorithm_type)
        table, _ = table_of(self, f"step {prediction_type}", device, key, make)
        return table[(order - 1) * count + self._index()]

    # ------------------------------------------------------------------------------------------ parts of a step

    def convert_model_output(self, model_output: Tensor, *args, sample: Tensor | None = None, **kwargs) -> Tensor:
        """x0, thresholded where the config asks for it, from the model's output in the step at `step_index`.

        `args` may be (timestep, sample), as in diffusers' older versions.
        """
        sample = _sample_of(sample, args, 1)
        model_output = self._mean(model_output, sample)
        model, x = alike("model_output, sample", model_output, sample)
        x0 = fused(self.config, model, x, self._row(self.config.prediction_type, 1, x.device))[1]
        return x0.to(model_output.dtype) if self.config.prediction_type == "sample" else x0

    def dpm_solver_first_order_update(
        self, model_output: Tensor, *args, sample: Tensor | None = None, noise: Tensor | None = None, **kwargs
    ) -> Tensor:
        """The next sample from x0, what `convert_model_output` returns, in a step of first order.

        `args` may be (timestep, prev_timestep, sample), as in diffusers' older versions; `noise` is that of the
        "sde-" algorithms.
        """
        return self._update([model_output], _sample_of(sample, args, 2), noise)

    def multistep_dpm_solver_second_order_update(
        self,
        model_output_list: list[Tensor],
        *args,
        sample: Tensor | None = None,
        noise: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """The next sample from x0 of the last two steps, the newest last."""
        return self._update(model_output_list[-2:], _sample_of(sample, args, 2), noise)

    def multistep_dpm_solver_third_order_update(
        self,
        model_output_list: list[Tensor],
        *args,
        sample: Tensor | None = None,
        noise: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """The next sample from x0 of the last three steps, the newest last."""
        return self._update(model_output_list[-3:], _sample_of(sample, args, 2), noise)

    def _update(self, x0s: list[Tensor], sample: Tensor, noise: Tensor | None) -> Tensor:
        if self.config.algorithm_type.startswith("sde") and noise is None:
            raise ValueError(f"noise: expected a tensor for algorithm_type={self.config.algorithm_type!r}, got None")
        x, x0, *history = alike("model_output, sample", sample, *reversed(x0s))
        row = self._row("sample", len(x0s), x.device)
        return ops.diffusion_step(x0, x, row, history=history, noise=None if noise is None else noise.to(x.dtype))[0]

    def _sigma_to_alpha_sigma_t(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ, whose squares add up to 1, from their ratio."""
        alpha = 1 / (sigma**2 + 1) ** 0.5
        return alpha, sigma * alpha

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """α·x0 + σ·noise at each sample's timestep, which after `set_timesteps` is one of `timesteps`.

        Samples, noise and (samples,) timesteps broadcast; the dtype is the common one of samples and noise.
        """
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps.reshape(-1).tolist()]
        else:
            start = self._begin_index if self._step_index is None else self._step_index
            indices = [start] * timesteps.numel()
        sigmas = self.sigmas if self.num_inference_steps is not None else self.sigmas.flip(0)
        alphas_cumprod = (1 / (sigmas.float() ** 2 + 1)).to(original_samples.device)
        return q_sample(alphas_cumprod, original_samples, noise, torch.tensor(indices))[0]


def _sample_of(sample: Tensor | None, args: tuple, place: int) -> Tensor:
    if sample is None and len(args) <= place:
        raise ValueError("sample: expected a tensor, got None")
    return args[place] if sample is None else sample

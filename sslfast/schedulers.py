"""Schedulers with the names, arguments and results of diffusers', on the fused steps of `sslfast.ops`.

    scheduler = DDIMScheduler()                                  # was: from diffusers import DDIMScheduler
    scheduler.set_timesteps(50, device=device)
    x = scheduler.initial_noise(seeds, (3, 32, 32))              # one seed an image
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, seeds=seeds).prev_sample

Beyond diffusers: with `seeds` an image depends on its own seed alone, whatever batch it is drawn in; the coefficients
of all steps are computed once and lie on the device, so that a step neither waits for a GPU nor indexes on the host.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslfast import _C, ops
from sslfast.ops import diffusion_noise, diffusion_step

CONFIG_NAME = "scheduler_config.json"
_COMPATIBLE = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler")


class Output(dict):
    """What `step` returns: attributes, keys, or a tuple by `to_tuple()` or an integer index."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key):
        return self.to_tuple()[key] if isinstance(key, (int, slice)) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Tensor, ...]:
        return tuple(self.values())


class Config(dict):
    """The arguments of a scheduler, as keys and as attributes."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _Scheduler:
    """What the schedulers have in common: configuration, beta schedule, noising."""

    config_name = CONFIG_NAME
    order = 1
    init_noise_sigma = 1.0
    config: Config
    timesteps: Tensor
    _arguments: list[str]
    num_inference_steps: int | None

    # ------------------------------------------------------------------------------------------ configuration

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._arguments = list(inspect.signature(cls.__init__).parameters)[1:]

    def _register(self, arguments: dict) -> None:
        config = {name: arguments[name] for name in self._arguments}
        if isinstance(config["trained_betas"], (np.ndarray, Tensor)):
            config["trained_betas"] = config["trained_betas"].tolist()
        self.config = Config(config, _class_name=type(self).__name__, _diffusers_version="0.42.1")
        _check_config(self.config)

    @classmethod
    def from_config(cls, config, return_unused_kwargs: bool = False, **kwargs):
        """A scheduler from the `config` of one, ours or diffusers': what it does not know is left out."""
        if not isinstance(config, dict):
            raise TypeError(f"config: expected a dict such as scheduler.config, got {type(config).__name__}")
        given = {name: value for name, value in config.items() if not name.startswith("_")} | kwargs
        scheduler = cls(**{name: value for name, value in given.items() if name in cls._arguments})
        unused = {name: value for name, value in given.items() if name not in cls._arguments}
        return (scheduler, unused) if return_unused_kwargs else scheduler

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder: str | None = None, **kwargs):
        """A scheduler from a folder that ours or diffusers' `save_pretrained` wrote, its own or a pipeline's."""
        path = Path(pretrained_model_name_or_path, subfolder or "", CONFIG_NAME)
        if not path.is_file():
            raise FileNotFoundError(f"pretrained_model_name_or_path: expected a folder with {CONFIG_NAME}, got {path}")
        return cls.from_config(json.loads(path.read_text()), **kwargs)

    def save_pretrained(self, save_directory, **_kwargs) -> None:
        """Write scheduler_config.json, which diffusers reads too, into `save_directory`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{CONFIG_NAME}.{os.getpid()}"
        temporary.write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        temporary.replace(folder / CONFIG_NAME)

    @property
    def compatibles(self) -> list[type]:
        """The schedulers here that `from_config` can make of this one's config."""
        return [globals()[name] for name in _COMPATIBLE]

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.config, indent=2, sort_keys=True)}\n"

    # ------------------------------------------------------------------------------------------ schedule

    def _make_betas(self) -> None:
        self.betas = _betas(self.config)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.num_inference_steps = None
        self._tables: dict = {}

    def _on(self, device: torch.device, key, make) -> Tensor:
        """The table make() on `device`, made and copied once."""
        if (key, device) not in self._tables:
            self._tables[key, device] = make().to(device)
        return self._tables[key, device]

    def _set(self, timesteps: np.ndarray, device) -> None:
        self.num_inference_steps = len(timesteps)
        self.timesteps = torch.from_numpy(timesteps.astype(np.int64)).to(device)
        self._steps = timesteps.astype(np.int64)
        self._tables = {key: table for key, table in self._tables.items() if key[0] == "alphas_cumprod"}

    def follow(self, scheduler):
        """Take the timesteps of a scheduler of diffusers; returns itself."""
        self._set(scheduler.timesteps.cpu().numpy(), scheduler.timesteps.device)
        self.num_inference_steps = scheduler.num_inference_steps
        return self

    # ------------------------------------------------------------------------------------------ use

    def scale_model_input(self, sample: Tensor, timestep=None) -> Tensor:
        """`sample` as it is: these samplers do not scale what the model sees."""
        return sample

    def initial_noise(self, seeds: Tensor, shape, dtype: torch.dtype = torch.float32) -> Tensor:
        """x_T for one seed an image: (samples, *shape), where `step(…, seeds=seeds)` begins."""
        return diffusion_noise(seeds, shape, step=self.config.num_train_timesteps, dtype=dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ·x0 + √(1 - ᾱ)·noise at each sample's timestep; `ops.q_sample` draws the noise in the same pass."""
        return ops.q_sample(*self._noising(original_samples, timesteps), noise=noise.to(original_samples.dtype))[0]

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ·noise - √(1 - ᾱ)·x0, the target of v-prediction."""
        inputs = self._noising(sample, timesteps)
        return ops.q_sample(*inputs, noise=noise.to(sample.dtype), prediction_type="v_prediction")[1]

    def _noising(self, x0: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alphas = self._on(x0.device, "alphas_cumprod", lambda: self.alphas_cumprod)
        return x0, timesteps.to(x0.device, torch.int64).reshape(-1).expand(x0.shape[0]), alphas

    def _fused(self, model_output, sample, row, noise=None, seeds=None, history=(), variance="fixed"):
        """One fused step, with the x0 limits that the configuration asks for."""
        clip, threshold = None, None
        model_output = model_output.to(sample.dtype)
        if self.config.thresholding:
            model = model_output.chunk(2, dim=1)[0] if variance != "fixed" else model_output
            x0 = diffusion_step(model, sample, row)[1]
            threshold = torch.quantile(x0.float().flatten(1).abs(), self.config.dynamic_thresholding_ratio, dim=1)
            threshold = threshold.clamp(min=1, max=self.config.sample_max_value)
        elif self.config.get("clip_sample", False):
            clip = self.config.clip_sample_range
        return diffusion_step(
            model_output,
            sample,
            row,
            clip=clip,
            threshold=threshold,
            history=history,
            noise=noise,
            seeds=seeds,
            variance=variance,
        )


class DDPMScheduler(_Scheduler):
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
        self.custom_timesteps = _is_custom(num_inference_steps, timesteps)
        if timesteps is not None:
            self._set(_falling(timesteps, self.config.num_train_timesteps), device)
        elif num_inference_steps is not None:
            self._set(_spaced(self.config, num_inference_steps), device)

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
        row = _row(self._on(sample.device, "ddpm", self._table), timestep, sample)
        noise = None
        if seeds is None and not _is_zero(timestep):
            noise = _randn(sample.shape, generator, sample.device, model_output.dtype).to(sample.dtype)
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


class DDIMScheduler(_Scheduler):
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
        self._set(_spaced(self.config, num_inference_steps), device)
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
        row = _row(self._on(sample.device, key, lambda: self._table(*key[1:])), timestep, sample)
        noise = None
        if eta > 0 and seeds is None:
            noise = variance_noise
            if noise is None:
                noise = _randn(sample.shape, generator, sample.device, model_output.dtype)
            noise = noise.to(sample.dtype)
        previous, x0 = self._fused(model_output, sample, row, noise, seeds if eta > 0 else None)
        return Output(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    def _table(self, eta: float, use_clipped_model_output: bool) -> Tensor:
        steps = torch.arange(len(self))
        previous = steps - len(self) // (self.num_inference_steps or len(self))
        alpha_s = torch.where(previous >= 0, self.alphas_cumprod[previous.clamp(min=0)], self.final_alpha_cumprod)
        pairs = torch.stack([self.alphas_cumprod, alpha_s], 1)
        return _C.ddim_coefficients(pairs, steps, self.config.prediction_type, eta, use_clipped_model_output)


class DPMSolverMultistepScheduler(_Scheduler):
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
        _is_custom(num_inference_steps, timesteps)
        sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy()
        choice = [c for c in ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas") if self.config[c]]
        if timesteps is not None:
            if choice:
                raise ValueError(f"timesteps: expected None with {choice[0]}=True")
            steps = np.array(timesteps, dtype=np.int64)
        else:
            steps = _spaced_dpm(self.config, num_inference_steps or 0, self.lambda_t)
        if choice:
            chosen = _sigmas_between(choice[0], sigmas[-1], sigmas[0], len(steps))
            steps = _sigma_to_t(chosen, sigmas)
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
                noise = _randn(sample.shape, generator, sample.device, torch.float32)
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


# ---------------------------------------------------------------------------------------------------- helpers


def _check_config(config: Config) -> None:
    """Raise ValueError naming the argument."""
    choices = {
        "prediction_type": ops.diffusion.PREDICTION_TYPES,
        "timestep_spacing": ("linspace", "leading", "trailing"),
        "final_sigmas_type": ("zero", "sigma_min"),
        "solver_type": ("midpoint", "heun"),
        "solver_order": (1, 2, 3),
    }
    for name, allowed in choices.items():
        if name in config and config[name] not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, got {config[name]!r}")
    if config.num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps: expected at least 1, got {config.num_train_timesteps}")


def _betas(config: Config) -> Tensor:
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
        betas = _betas_from(lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2, count)
    elif config.beta_schedule == "laplace" and "variance_type" in config and "solver_order" not in config:
        betas = _betas_from(_laplace_alpha_bar, count)
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


def _betas_from(alpha_bar, count: int) -> Tensor:
    """The betas whose products follow alpha_bar(t), t from 0 to 1; at most 0.999."""
    betas = [min(1 - alpha_bar((i + 1) / count) / alpha_bar(i / count), 0.999) for i in range(count)]
    return torch.tensor(betas, dtype=torch.float32)


def _laplace_alpha_bar(t: float) -> float:
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def _check_steps(steps: int, config: Config) -> None:
    if steps < 1 or steps > config.num_train_timesteps:
        raise ValueError(
            f"num_inference_steps: expected 1 to num_train_timesteps = {config.num_train_timesteps}, got {steps}"
        )


def _spaced(config: Config, steps: int) -> np.ndarray:
    """Falling timesteps of DDPM and DDIM: table 2 of Lin et al., arXiv 2305.08891, rounded as diffusers does."""
    _check_steps(steps, config)
    count = config.num_train_timesteps
    if config.timestep_spacing == "linspace":
        return np.linspace(0, count - 1, steps).round()[::-1].astype(np.int64)
    if config.timestep_spacing == "leading":
        return (np.arange(steps) * (count // steps))[::-1].astype(np.int64) + config.steps_offset
    return np.round(np.arange(count, 0, -count / steps)).astype(np.int64) - 1


def _spaced_dpm(config: Config, steps: int, lambda_t: Tensor) -> np.ndarray:
    """Falling timesteps of DPM-Solver, one of which diffusers leaves out at the end; from λ = lambda_min_clipped on."""
    _check_steps(steps, config)
    last = config.num_train_timesteps - int(torch.searchsorted(lambda_t.flip(0), config.lambda_min_clipped))
    if config.timestep_spacing == "linspace":
        return np.linspace(0, last - 1, steps + 1).round()[:0:-1].astype(np.int64)
    if config.timestep_spacing == "leading":
        return (np.arange(steps + 1) * (last // (steps + 1)))[:0:-1].astype(np.int64) + config.steps_offset
    return np.arange(last, 0, -config.num_train_timesteps / steps).round().astype(np.int64) - 1


def _is_custom(num_inference_steps: int | None, timesteps: list[int] | None) -> bool:
    if (num_inference_steps is None) == (timesteps is None):
        raise ValueError("num_inference_steps: expected either num_inference_steps or timesteps")
    return timesteps is not None


def _falling(timesteps: list[int], count: int) -> np.ndarray:
    steps = np.array(timesteps, dtype=np.int64)
    if not len(steps) or (np.diff(steps) >= 0).any() or steps[0] >= count or steps[-1] < 0:
        raise ValueError(f"timesteps: expected a falling list of numbers from {count - 1} to 0, got {timesteps}")
    return steps


def _sigmas_between(choice: str, largest: float, smallest: float, steps: int) -> np.ndarray:
    """Falling sigmas: Karras et al., arXiv 2206.00364, equation 5 with ρ = 7; or even steps of ln σ."""
    if choice == "use_karras_sigmas":
        ends = float(largest) ** (1 / 7), float(smallest) ** (1 / 7)
        return np.linspace(*ends, steps) ** 7
    return np.exp(np.linspace(math.log(largest), math.log(smallest), steps))


def _sigma_to_t(chosen: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """The timesteps at which training has these sigmas, between whole ones by interpolation in ln σ."""
    return np.interp(np.log(np.maximum(chosen, 1e-10)), np.log(sigmas), np.arange(len(sigmas)))


def _is_zero(timestep) -> bool:
    """Whether it is known without waiting for a GPU that this is the last step, which takes no noise."""
    on_host = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"
    return on_host and bool((torch.as_tensor(timestep) == 0).all())


def _row(table: Tensor, timestep, sample: Tensor) -> Tensor:
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


def _randn(shape, generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    """torch.randn as diffusers calls it: on a CPU generator's CPU, and image by image for a list of generators."""
    if isinstance(generator, (list, tuple)):
        if len(generator) == 1:
            return _randn(shape, generator[0], device, dtype)
        return torch.cat([_randn((1, *shape[1:]), g, device, dtype) for g in generator[: shape[0]]])
    source = device if generator is None else generator.device
    if generator is not None and source.type == "cuda" and device.type != "cuda":
        raise ValueError(f"generator: expected one on {device} or the CPU, got {source}")
    return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)

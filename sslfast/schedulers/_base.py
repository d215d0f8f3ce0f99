"""What the schedulers have in common: configuration, saving, the noise schedule, noising."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslfast import ops
from sslfast.ops import diffusion_noise
from sslfast.schedulers._fused import alike, on_host, put_on, table_of
from sslfast.schedulers._mixins import COMPATIBLE, ConfigMixin, SchedulerMixin
from sslfast.schedulers._schedules import betas

CONFIG_NAME = "scheduler_config.json"


class Scheduler(SchedulerMixin, ConfigMixin):
    """A SchedulerMixin and ConfigMixin of diffusers', where diffusers is installed."""

    config_name = CONFIG_NAME
    _compatibles = COMPATIBLE
    order = 1
    timesteps: Tensor
    num_inference_steps: int | None
    _parts: frozenset[str]  # methods that diffusers' step is made of, and that ours does not call
    _changed_parts: frozenset[str]

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__mro__[: next(i for i, base in enumerate(cls.__mro__) if "_parts" in vars(base))]
        cls._changed_parts = frozenset(name for base in own for name in cls._parts if name in vars(base))

    def _check_parts(self) -> None:
        """Raise NotImplementedError where a subclass or a script has changed what `step` would leave out."""
        if self._changed_parts or not vars(self).keys().isdisjoint(self._parts):
            changed = ", ".join(sorted(self._changed_parts.union(self._parts & vars(self).keys())))
            raise NotImplementedError(f"step: ours does not call {changed}, which was changed; override step, too")

    # ------------------------------------------------------------------------------------------ configuration

    def to_json_file(self, json_file_path) -> None:
        """Write the config; the file is there as a whole or not at all."""
        path = Path(json_file_path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(self.to_json_string(), encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        from sslfast import schedulers

        ours = [schedulers.DDPMScheduler, schedulers.DDIMScheduler, schedulers.DPMSolverMultistepScheduler]
        names = {each.__name__ for each in ours}
        return [*ours, *(each for each in super()._get_compatibles() if each.__name__ not in names)]

    def _check_config(self, **more_choices: tuple) -> None:
        """Raise ValueError unless each argument has one of the values that are allowed."""
        choices = {
            "prediction_type": ops.diffusion.PREDICTION_TYPES,
            "timestep_spacing": ("linspace", "leading", "trailing"),
        }
        for name, allowed in (choices | more_choices).items():
            if self.config[name] not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {self.config[name]!r}")
        if self.config.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps: expected at least 1, got {self.config.num_train_timesteps}")

    # ------------------------------------------------------------------------------------------ schedule

    def _make_betas(self, *more_schedules: str) -> None:
        if isinstance(self.config.trained_betas, Tensor):  # which JSON does not know
            self.register_to_config(trained_betas=self.config.trained_betas.tolist())
        self.betas = betas(self.config, type(self).__name__, more_schedules)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None

    def _set(self, timesteps: np.ndarray, device) -> None:
        self.timesteps = put_on(device, timesteps.astype(np.int64))

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ------------------------------------------------------------------------------------------ use

    def scale_model_input(self, sample: Tensor, *args, **kwargs) -> Tensor:
        """`sample` as it is: these samplers do not scale what the model sees."""
        return sample

    def initial_noise(self, seeds: Tensor, shape, dtype: torch.dtype = torch.float32) -> Tensor:
        """x_T for one seed an image: (samples, *shape), where `step(…, seeds=seeds)` begins."""
        return diffusion_noise(seeds, shape, step=self.config.num_train_timesteps, dtype=dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ·x0 + √(1 - ᾱ)·noise at each sample's timestep; `ops.q_sample` draws the noise in the same pass.

        Samples, noise and (samples,) timesteps broadcast; the dtype is the common one of samples and noise.
        """
        return q_sample(self._alphas_on(original_samples.device), original_samples, noise, timesteps)[0]

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ·noise - √(1 - ᾱ)·x0, the target of v-prediction. Shapes and dtype are as in `add_noise`."""
        return q_sample(self._alphas_on(sample.device), sample, noise, timesteps, "v_prediction")[1]

    def _alphas_on(self, device: torch.device) -> Tensor:
        alphas = self.alphas_cumprod
        if device.type == alphas.device.type == "cpu":
            return alphas.float()
        numbers = on_host(alphas)
        return table_of(
            self, "alphas", device, numbers.tobytes(), lambda: torch.from_numpy(numbers.astype(np.float32))
        )[0]


def q_sample(alphas: Tensor, x0: Tensor, noise: Tensor, timesteps: Tensor, prediction_type: str = "epsilon"):
    """ops.q_sample of samples, noise and timesteps that may broadcast and have different dtypes."""
    t = timesteps.to(x0.device, torch.int64).reshape(-1)
    if x0.shape != noise.shape or x0.dtype != noise.dtype or len(t) != len(x0):
        of_samples = (len(t), *[1] * (x0.dim() - 1))
        x0, noise = alike("samples, noise, timesteps", x0, noise, shape=of_samples)
        t = t.expand(len(x0))
    return ops.q_sample(x0, t, alphas, noise=noise, prediction_type=prediction_type)

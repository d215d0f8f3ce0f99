"""What the schedulers have in common: configuration, saving, noise, and the fused step."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslfast import ops
from sslfast.ops import diffusion_noise, diffusion_step
from sslfast.schedulers._config import CONFIG_NAME, Config, check_config
from sslfast.schedulers._schedules import betas

_COMPATIBLE = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler")


class Scheduler:
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
        check_config(self.config)

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
        from sslfast import schedulers

        return [getattr(schedulers, name) for name in _COMPATIBLE]

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.config, indent=2, sort_keys=True)}\n"

    # ------------------------------------------------------------------------------------------ schedule

    def _make_betas(self) -> None:
        self.betas = betas(self.config)
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

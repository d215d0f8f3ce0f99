"""Steps of diffusers' own schedulers with our kernels: what `sslfast.patch("diffusers")` puts into their classes.

Our steps read all that they need from the scheduler, so one of diffusers' may take the place of ours. What they cannot
do as diffusers does raises NotImplementedError, before anything was changed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from sslfast.schedulers import ddim, ddpm
from sslfast.schedulers._fused import number_of

PARTS = {"previous_timestep", "_get_variance", "_threshold_sample"}  # of diffusers' steps


def ddpm_step(scheduler, model_output: Tensor, timestep, sample: Tensor, generator=None, return_dict: bool = True):
    if scheduler.config.variance_type == "fixed_large_log":
        raise NotImplementedError("variance_type: fixed_large_log is NaN in diffusers")
    if scheduler.variance_type != scheduler.config.variance_type:
        raise NotImplementedError("variance_type: the scheduler has another one than its config")
    t = _check(scheduler, model_output, timestep, sample)

    def step():
        return ddpm.step(scheduler, model_output, t, sample, generator, None)

    found = _with_generators_kept(step, generator, model_output.device)
    return DDPMSchedulerOutput(*found) if return_dict else found


def ddim_step(
    scheduler,
    model_output: Tensor,
    timestep,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator=None,
    variance_noise: Tensor | None = None,
    return_dict: bool = True,
):
    t = _check(scheduler, model_output, timestep, sample)
    options = eta, use_clipped_model_output, generator, variance_noise, None

    def step():
        return ddim.step(scheduler, model_output, t, sample, *options)

    found = _with_generators_kept(step, generator, model_output.device) if eta > 0 else step()
    return DDIMSchedulerOutput(*found) if return_dict else found


def _check(scheduler, model_output: Tensor, timestep, sample: Tensor) -> int:
    """The timestep, if a step of ours can take it."""
    kind = type(scheduler)
    parts = (getattr(kind, name, None) for name in PARTS)
    if not PARTS.isdisjoint(vars(scheduler)) or not all(
        part is None or part.__module__.startswith("diffusers.") for part in parts
    ):
        raise NotImplementedError("a scheduler whose methods were changed")
    if scheduler.alphas_cumprod.dtype != torch.float32:
        raise NotImplementedError(f"alphas_cumprod: expected float32, got {scheduler.alphas_cumprod.dtype}")
    if model_output.dtype != sample.dtype:
        raise NotImplementedError(f"model_output: {model_output.dtype} with a sample of {sample.dtype}")
    if sample.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"sample: expected the CPU or a CUDA device, got {sample.device}")
    t = number_of(timestep, scheduler.timesteps, wait=True)
    if t is None:
        raise NotImplementedError(f"timestep: expected one, got {tuple(timestep.shape)}")
    return t


def _with_generators_kept(step: Callable, generator, device: torch.device):
    """step(); if it fails, the generators are as they were, so that diffusers' own step draws the same noise."""
    default = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
    generators = generator if isinstance(generator, list) else [generator]
    generators = [default if each is None else each for each in generators]
    if not all(isinstance(each, torch.Generator) for each in generators):
        raise NotImplementedError(f"generator: expected one, or a list of them, got {generator}")
    states = [(each, each.get_state()) for each in generators]
    try:
        return step()
    except BaseException:
        for each, state in states:
            each.set_state(state)
        raise

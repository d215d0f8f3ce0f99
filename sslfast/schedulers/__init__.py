"""Schedulers with the names, arguments and results of diffusers', on the fused steps of `sslfast.ops`.

    scheduler = DDIMScheduler()                                  # was: from diffusers import DDIMScheduler
    scheduler.set_timesteps(50, device=device)
    x = scheduler.initial_noise(seeds, (3, 32, 32))              # one seed an image
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, seeds=seeds).prev_sample

Beyond diffusers: with `seeds` an image depends on its own seed alone, whatever batch it is drawn in; the coefficients
of all steps are computed once and lie on the device, so that a step neither waits for a GPU nor indexes on the host.

Where diffusers is installed, importing this module imports it: our schedulers are of its classes.
"""

from sslfast.schedulers._base import CONFIG_NAME
from sslfast.schedulers._mixins import SchedulerMixin  # pipelines look for it here when they load a scheduler of ours
from sslfast.schedulers.ddim import DDIMScheduler
from sslfast.schedulers.ddpm import DDPMScheduler
from sslfast.schedulers.dpm_solver import DPMSolverMultistepScheduler

__all__ = ["CONFIG_NAME", "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "SchedulerMixin"]

for _scheduler in (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler):
    _scheduler.__module__ = __name__  # the name that pickles and the pipelines of diffusers write down

"""The classes that a scheduler is made of: those of diffusers, or what stands in for them where it is not installed."""

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
    from diffusers.utils import BaseOutput

    COMPATIBLE = [each.name for each in KarrasDiffusionSchedulers]
except ImportError:
    from sslfast.schedulers._stand_ins import (  # type: ignore[assignment]
        BaseOutput,
        ConfigMixin,
        SchedulerMixin,
        register_to_config,
    )

    COMPATIBLE = ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"]

__all__ = ["COMPATIBLE", "BaseOutput", "ConfigMixin", "SchedulerMixin", "register_to_config"]

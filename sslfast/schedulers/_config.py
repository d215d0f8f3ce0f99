"""What a scheduler was made with, as diffusers keeps it, and what a step returns."""

from __future__ import annotations

from torch import Tensor

from sslfast import ops

CONFIG_NAME = "scheduler_config.json"


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


def check_config(config: Config) -> None:
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

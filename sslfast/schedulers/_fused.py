"""What the steps share. `scheduler` is one of ours or of diffusers: all is read from its attributes, at each step.

So whatever a script changes on a scheduler is seen at the next step. Only tables of coefficients are kept, each with
the numbers that it was computed from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sslfast import ops
from sslfast.schedulers._mixins import BaseOutput

_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor on a GPU: (its version, its numbers)
_tables: WeakKeyDictionary[Any, dict[str, tuple]] = WeakKeyDictionary()  # scheduler: {name: (key, table, copy)}


class Output(BaseOutput):
    """What `step` returns: attributes, keys, or a tuple by `to_tuple()` or an integer index."""

    def __init__(self, **tensors: Tensor):
        for name, value in tensors.items():
            OrderedDict.__setitem__(self, name, value)
        self.__dict__.update(tensors)


# ------------------------------------------------------------------------------------------ numbers on the host


def on_host(t: Tensor) -> np.ndarray:
    """The numbers of a small tensor; one on a GPU is read once, and again when it was changed."""
    if t.dtype is torch.bfloat16:
        t = t.float()
    if t.is_cpu:
        return t.detach().numpy() if t.requires_grad else t.numpy()
    version = None if t.is_inference() else t._version
    known = _copies.get(t)
    if known is None or version is None or known[0] != version:
        known = _copies[t] = (version, t.detach().cpu().numpy())
    return known[1]


def number_in(t: Tensor) -> float:
    """The number of a tensor with one element; see `on_host`."""
    return t.item() if t.is_cpu else on_host(t).item()


def put_on(device, numbers: np.ndarray) -> Tensor:
    """A tensor of these numbers on a device, which `on_host` need not read back."""
    with torch.inference_mode(False):  # else its changes could not be seen
        t = torch.from_numpy(numbers).to(device)
    if t.device.type != "cpu":
        _copies[t] = (t._version, numbers)
    return t


def number_of(timestep: Any, timesteps: Tensor, wait: bool = False) -> int | None:
    """A timestep as an int; None if each sample has its own, or it lies on a GPU and only waiting could tell.

    An element of `timesteps` is known by its place in memory.
    """
    if isinstance(timestep, Tensor):
        if timestep.numel() != 1:
            return None
        if not timestep.is_cpu:
            index = timestep.storage_offset() - timesteps.storage_offset()
            same = timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
            if same and timesteps.stride() == (1,) and 0 <= index < len(timesteps):
                return int(on_host(timesteps)[index])
            if not wait:
                return None
        timestep = timestep.item()
    t = int(timestep)
    if t != timestep:
        raise ValueError(f"timestep: expected a whole number, got {timestep}")
    return t


# ------------------------------------------------------------------------------------------ tables


def table_of(
    scheduler, name: str, device: torch.device, key: Hashable, make: Callable[[], Tensor]
) -> tuple[Tensor, np.ndarray]:
    """make() on `device` and on the CPU, where `key` holds all that it depends on. The last one is kept."""
    tables = _tables.get(scheduler)
    if tables is None:
        tables = _tables[scheduler] = {}
    known = tables.get(name)
    if known is None or known[0] != key or known[1].device != device:
        table = make()
        known = tables[name] = (key, table.to(device), table.numpy())
    return known[1], known[2]


def row_of(table: Tensor, copy: np.ndarray, t: int | None, timestep, samples: int) -> Tensor:
    """The coefficients of timestep t; where that is None, those of each sample's, looked up on the device."""
    if t is not None:
        if not 0 <= t < len(copy):
            raise ValueError(f"timestep: expected 0 to {len(copy) - 1}, got {t}")
        if copy[t, -1] != t:
            raise ValueError(f"timestep: expected one of scheduler.timesteps, got {t}")
        return table[t]
    if timestep.numel() not in (1, samples):
        raise ValueError(f"timestep: expected one, or one for each of {samples} samples, got {tuple(timestep.shape)}")
    if timestep.device.type == "cpu":
        for each in timestep.reshape(-1).tolist():
            row_of(table, copy, number_of(each, table), None, samples)
    return table.index_select(0, timestep.to(table.device, torch.int64).reshape(-1)).expand(samples, -1)


# ------------------------------------------------------------------------------------------ the step


def alike(names: str, *tensors: Tensor, shape: tuple[int, ...] = ()) -> Sequence[Tensor]:
    """The tensors in their common dtype, broadcast to their common shape and `shape`, as in torch's arithmetic."""
    first, dtype = tensors[0], tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
        if t.device != first.device:
            raise ValueError(f"{names}: expected one device, got {first.device} and {t.device}")
    try:
        shape = torch.broadcast_shapes(*(t.shape for t in tensors), shape)
    except RuntimeError:
        found = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"{names}: expected shapes that broadcast, got {found}") from None
    return [t.to(dtype).expand(shape) for t in tensors]


def inputs_of(model_output: Tensor, sample: Tensor) -> Sequence[Tensor]:
    """The two alike."""
    if (
        model_output.shape == sample.shape
        and model_output.dtype == sample.dtype
        and model_output.device == sample.device
    ):
        return model_output, sample
    return alike("model_output, sample", model_output, sample)


def fused(
    config,
    model_output: Tensor,
    sample: Tensor,
    row: Tensor,
    *,
    clip: float | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    history: Sequence[Tensor] = (),
    variance: str = "fixed",
) -> tuple[Tensor, Tensor]:
    """One fused step of inputs that are alike, with the x0 limits that the configuration asks for."""
    threshold = None
    if config.thresholding:
        mean = model_output if variance == "fixed" else model_output.chunk(2, dim=1)[0]
        size = ops.diffusion_step(mean, sample, row)[1].flatten(1).abs()
        size = size if size.dtype == torch.float64 else size.float()
        threshold = torch.quantile(size, config.dynamic_thresholding_ratio, dim=1)
        clip, threshold = None, threshold.clamp(min=1, max=config.sample_max_value)
    if noise is not None and (noise.dtype != sample.dtype or noise.shape != sample.shape):
        noise = noise.to(sample.dtype).expand(sample.shape)
    return ops.diffusion_step(
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


def randn(shape, generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    """torch.randn as diffusers calls it: on a CPU generator's CPU, and image by image for a list of generators."""
    if isinstance(generator, list | tuple) and len(generator) == 1:
        generator = generator[0]
    if isinstance(generator, list | tuple):
        if len(generator) < shape[0]:
            raise ValueError(f"generator: expected one for each of {shape[0]} samples, got {len(generator)}")
        return torch.cat([randn((1, *shape[1:]), each, device, dtype) for each in generator[: shape[0]]])
    source = device if generator is None else generator.device
    if source.type == "cuda" and device.type != "cuda":
        raise ValueError(f"generator: expected one on {device} or the CPU, got {source}")
    noise = torch.randn(shape, generator=generator, device=source, dtype=dtype)
    return noise if source.type == device.type else noise.to(device)

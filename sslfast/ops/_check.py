"""Argument checks that the ops share: ValueError or TypeError that names the argument."""

import math
import numbers

import torch
from torch import Tensor

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def name_of(dtype: torch.dtype) -> str:
    """What an op takes for a dtype: where an op's argument is a dtype, torch crashes by a number that is none."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name, or raise ValueError."""
    check_choice("dtype", name, tuple(map(name_of, ROW_DTYPES)))
    return getattr(torch, name)


def largest_number(like: Tensor | None) -> float:
    """The largest finite number of the arithmetic for `like`, which is float32 at least."""
    return torch.finfo(torch.float64 if like is None or like.dtype == torch.float64 else torch.float32).max


def check_dense(name: str, t: Tensor) -> None:
    """Raise TypeError unless it is a dense tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.is_nested or t.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {'a nested one' if t.is_nested else t.layout}")


def check_floating(**tensors: Tensor) -> None:
    """Raise TypeError unless each is a dense float32, bfloat16, float16 or float64 tensor."""
    for name, t in tensors.items():
        check_dense(name, t)
        if t.dtype not in ROW_DTYPES:
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {t.dtype}")


def check_like(name: str, t: Tensor, like_name: str, like: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Raise unless `t` has the dtype and device of `like`, and its shape or the one given."""
    check_floating(**{name: t})
    if t.dtype != like.dtype:
        raise TypeError(f"{name}: expected the dtype of {like_name}, {like.dtype}, got {t.dtype}")
    if tuple(t.shape) != tuple(like.shape if shape is None else shape):
        expected = f"the shape of {like_name}, {tuple(like.shape)}" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"{name}: expected {expected}, got {tuple(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected the device of {like_name}, {like.device}, got {t.device}")


def check_rows(queries: Tensor, keys: Tensor) -> None:
    """Raise unless both are non-empty floating-point matrices of one width, dtype and device."""
    for name, t in (("queries", queries), ("keys", keys)):
        check_floating(**{name: t})
        if t.dim() != 2:
            raise ValueError(f"{name}: expected shape (rows, dim), got {tuple(t.shape)}")
        if t.shape[0] == 0 or t.shape[1] == 0:
            raise ValueError(f"{name}: expected at least one row and one column, got shape {tuple(t.shape)}")
        if t.shape[1] != queries.shape[1]:
            raise ValueError(f"keys: expected {queries.shape[1]} columns, as queries, got shape {tuple(t.shape)}")
        if t.dtype != queries.dtype:
            raise TypeError(f"keys: expected the dtype of queries, {queries.dtype}, got {t.dtype}")
        if t.device != queries.device:
            raise ValueError(f"keys: expected the device of queries, {queries.device}, got {t.device}")


def check_scalar(name: str, value: float | Tensor, like: Tensor | None = None) -> None:
    """Raise unless it is a number, finite in the arithmetic for `like`, or a floating-point tensor with one element."""
    if isinstance(value, Tensor):
        check_floating(**{name: value})
        if value.numel() != 1:
            raise ValueError(f"{name}: expected one element, got shape {tuple(value.shape)}")
        if value.is_meta and like is not None and not like.is_meta:
            raise ValueError(f"{name}: expected a tensor with a value, got one on meta")
    elif abs(check_number(name, value)) > largest_number(like):
        raise ValueError(f"{name}: expected at most {largest_number(like):g}, got {value}")


def check_number(name: str, value: object, *, positive: bool = False) -> float:
    """`value` as a float, or raise unless it is a finite number, or a positive one."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not -math.inf < number < math.inf or (positive and number <= 0):  # which tracing knows, unlike math.isfinite
        raise ValueError(f"{name}: expected a {'positive' if positive else 'finite'} number, got {value}")
    return number


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Raise unless it is one of the choices, which are all of one type."""
    if not isinstance(value, type(choices[0])):
        raise TypeError(f"{name}: expected one of {choices}, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_integer(name: str, value: int, low: int, high: int) -> None:
    """Raise unless it is an int from `low` to `high`."""
    if not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")


def as_tensor(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a float64 tensor (float32 on CUDA, which is what kernels take there), or a tensor, on the device of
    `like`."""
    if isinstance(value, Tensor):
        return value.to(like.device)
    dtype = torch.float32 if like.is_cuda and like.dtype != torch.float64 else torch.float64
    return torch.full((), float(value), dtype=dtype, device=like.device)

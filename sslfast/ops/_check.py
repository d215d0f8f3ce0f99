"""Argument checks that the ops share: ValueError or TypeError that names the argument."""

from torch import Tensor


def check_floating(**tensors: Tensor) -> None:
    """Raise TypeError unless each is a float32, bfloat16, float16 or float64 tensor."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {t.dtype}")
        if t.itemsize == 1:
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

"""Fused group normalisation + SiLU. The formulas: csrc/ops/group_norm_silu.h, or the reference of the same name."""

import torch
from torch import Tensor

from sslfast import _C, reference
from sslfast.ops._check import check_floating, check_number
from sslfast.ops._route import DEVICES, KERNEL, REFERENCE, has_kernel, refuse_other_derivatives, route


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """SiLU of a group normalisation in one pass; for the gradient it keeps x and two numbers a group.

    Args:
        x: (samples, channels, …), float32, bfloat16, float16 or float64, contiguous or channels_last. Sums and
            statistics are float32 (float64 for float64).
        num_groups: a divisor of the channels.
        weight, bias: (channels,), float32 or the dtype of x; 1 and 0 by default.
        eps: added to the variance, at least 0.

    Returns:
        silu(group_norm(x)) in x's dtype and memory format.

    Raises:
        TypeError, ValueError: naming the argument.

    The same input gives the same bits on any number of threads. Forward mode and the transforms of torch.func run plain
    PyTorch. No second derivative otherwise.

    Sources: Wu and He, arXiv 1803.08494; Ho et al., arXiv 2006.11239, whose network has it before every convolution.
    """
    _check(x, num_groups, weight, bias, eps)
    way = route(x, weight, bias)
    if way == REFERENCE or not has_kernel(x):
        return reference.group_norm_silu.group_norm_silu(x, num_groups, weight, bias, eps)
    if way == KERNEL:
        return _GroupNormSilu.apply(x, num_groups, weight, bias, eps)
    return torch.ops.sslfast.group_norm_silu_forward(x, num_groups, weight, bias, eps)[0]


def _check(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_floating(x=x)
    if x.dim() < 2:
        raise ValueError(f"x: expected (samples, channels, …), got shape {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"x: expected at least one element, got shape {tuple(x.shape)}")
    if not isinstance(num_groups, int):
        raise TypeError(f"num_groups: expected an int, got {type(num_groups).__name__}")
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"num_groups: expected a divisor of the {x.shape[1]} channels, got {num_groups}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        check_floating(**{name: t})
        if t.dtype not in (torch.float32, x.dtype):
            raise TypeError(f"{name}: expected float32 or the dtype of x, {x.dtype}, got {t.dtype}")
        if t.shape != x.shape[1:2]:
            raise ValueError(f"{name}: expected shape ({x.shape[1]},), got {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {t.device}")
    if check_number("eps", eps) < 0:
        raise ValueError(f"eps: expected a number from 0 on, got {eps}")


@torch.library.custom_op("sslfast::group_norm_silu_forward", mutates_args=(), device_types=DEVICES)
def _forward(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _C.group_norm_silu_forward(x, num_groups, weight, bias, eps)


def _like(x: Tensor) -> Tensor:
    """Empty, in the memory format that the kernels choose: channels_last if x is, else contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = x.dim() in formats and torch._prims_common.suggest_memory_format(x) == formats[x.dim()]
    return torch.empty_like(x, memory_format=formats[x.dim()] if last else torch.contiguous_format)


@_forward.register_fake
def _(x, num_groups, weight, bias, eps):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return _like(x), *(x.new_empty((x.shape[0], num_groups), dtype=dtype) for _ in range(2))


@torch.library.custom_op("sslfast::group_norm_silu_backward", mutates_args=(), device_types=DEVICES)
def _backward(
    grad_out: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _C.group_norm_silu_backward(grad_out, x, num_groups, weight, bias, mean, rstd)


@_backward.register_fake
def _(grad_out, x, num_groups, weight, bias, mean, rstd):
    return _like(x), *(mean.new_empty(x.shape[1]) for _ in range(2))


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.num_groups, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _grads(ctx, backward, grad_out: Tensor):
    x, weight, bias, mean, rstd = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = backward(grad_out, x, ctx.num_groups, weight, bias, mean, rstd)
    return (
        grad_x if ctx.needs_input_grad[0] else None,
        None,
        grad_weight.to(weight.dtype) if ctx.needs_input_grad[2] else None,
        grad_bias.to(bias.dtype) if ctx.needs_input_grad[3] else None,
        None,
    )


def _backward_of_forward(ctx, grad_out: Tensor, _grad_mean: None, _grad_rstd: None):
    return _grads(ctx, torch.ops.sslfast.group_norm_silu_backward, grad_out)


_forward.register_autograd(_backward_of_forward, setup_context=_setup_context)
refuse_other_derivatives(_forward, _backward)


class _GroupNormSilu(torch.autograd.Function):
    """The same without the dispatcher."""

    @staticmethod
    def forward(ctx, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        out, mean, rstd = _C.group_norm_silu_forward(x, num_groups, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.num_groups = num_groups
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError("group_norm_silu has no second derivative: call backward without create_graph=True")
        plain = route(grad_out) == KERNEL
        run = _C.group_norm_silu_backward if plain else torch.ops.sslfast.group_norm_silu_backward
        return _grads(ctx, run, grad_out)

"""Fused InfoNCE losses. The formulas: csrc/ops/info_nce.h, or sslfast/reference/info_nce.py in plain PyTorch."""

import torch
from torch import Tensor

from sslfast import _C, reference
from sslfast.ops._check import check_choice, check_floating, check_number, check_scalar, largest_number
from sslfast.ops._route import DEVICES, KERNEL, REFERENCE, has_kernel, refuse_other_derivatives, route

_CUDA_MAX_DIM = 4096  # kInfoNceCudaMaxDim
REDUCTIONS = ("mean", "sum", "none")


def nt_xent(z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.5, reduction: str = "mean") -> Tensor:
    """NT-Xent, the contrastive loss of SimCLR, without the (2·batch)² similarity matrix.

    Row i of `z1` and row i of `z2` are two views of one sample. Rows are L2-normalised (eps 1e-12); for each of the
    2·batch rows the loss is the cross-entropy of its similarities to all other rows, divided by `temperature`, with the
    other view as the target.

    Args:
        z1, z2: (batch, dim) with batch ≥ 1 and dim ≥ 1, both of one dtype (float32, bfloat16, float16, or float64 on
            the CPU) and device. Sums and softmax statistics are float32 (float64 for float64).
        temperature: positive number, or a tensor with one element, which gets a gradient. On a GPU the value of a
            tensor is not checked, since that would wait for the device.
        reduction: "mean" over the 2·batch rows, "sum", or "none".

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or (2·batch,) for "none", the rows of `z1` first.

    Raises:
        TypeError: inputs that are not floating-point tensors of one dtype.
        ValueError: another shape, a second device, a temperature that is not positive, or an unknown reduction.

    Forward mode and the transforms of torch.func (grad, jvp, jacfwd, …) run plain PyTorch, which stores the matrix. No
    second derivative otherwise.

    Two calls with the same input give the same bits, on any number of threads. Memory grows with batch·dim. A loss near
    0 keeps its digits, and so does its gradient (relative errors on a CPU: about 2e-6 and 2e-5). On CPUs with AMX,
    float32 products are made of bfloat16 ones, of as many terms as that takes; SSLFAST_CPU_CAPABILITY=avx512 computes
    all in float32.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", arXiv 2002.05709.
    """
    check_views(z1, z2, temperature, reduction)
    if not isinstance(temperature, Tensor):
        temperature = float(temperature)
    way = route(z1, z2, temperature)
    if way == REFERENCE or not _has_kernel(z1):
        return reference.info_nce.nt_xent(z1, z2, temperature, reduction)
    if way == KERNEL:
        if isinstance(temperature, Tensor):
            temperature = temperature.to(z1.device)
        else:  # stays on the host, which saves kernels on a GPU
            temperature = torch.full((), temperature, dtype=torch.float64)
        return _C.nt_xent(z1, z2, temperature, reduction)  # without the dispatcher, which takes 60 µs a step
    if not isinstance(temperature, Tensor):  # on a GPU full() is a kernel, where tensor() would wait for a copy
        temperature = torch.full((), temperature, dtype=torch.float64, device=z1.device)
    temperature = temperature.to(z1.device)
    return torch.ops.sslfast.info_nce_forward(z1, z2, temperature, reduction)[0]


def check_views(z1: Tensor, z2: Tensor, temperature: float | Tensor, reduction: str = "mean") -> None:
    """Raise TypeError or ValueError for what `nt_xent` does not take."""
    for name, z in (("z1", z1), ("z2", z2)):
        check_floating(**{name: z})
        if z.dim() != 2:
            raise ValueError(f"{name}: expected shape (batch, dim), got {tuple(z.shape)}")
    if z1.shape != z2.shape:
        raise ValueError(f"z2: expected the shape of z1, {tuple(z1.shape)}, got {tuple(z2.shape)}")
    if z1.shape[0] == 0 or z1.shape[1] == 0:
        raise ValueError(f"z1: expected at least one row and one column, got shape {tuple(z1.shape)}")
    if z1.dtype != z2.dtype:
        raise TypeError(f"z2: expected the dtype of z1, {z1.dtype}, got {z2.dtype}")
    if z1.device != z2.device:
        raise ValueError(f"z2: expected the device of z1, {z1.device}, got {z2.device}")
    check_choice("reduction", reduction, REDUCTIONS)
    if isinstance(temperature, Tensor):
        check_scalar("temperature", temperature, z1)
    elif check_number("temperature", temperature, positive=True) < 1 / largest_number(z1):  # kernels take the inverse
        raise ValueError(f"temperature: expected a positive number of finite inverse, got {temperature}")


def _has_kernel(z: Tensor) -> bool:
    return has_kernel(z) and (z.device.type == "cpu" or z.shape[1] <= _CUDA_MAX_DIM)


def _loss_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


@torch.library.custom_op("sslfast::info_nce_forward", mutates_args=(), device_types=DEVICES)
def _forward(z1: Tensor, z2: Tensor, temperature: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    return _C.info_nce_forward(z1, z2, temperature, reduction)


@_forward.register_fake
def _(z1: Tensor, z2: Tensor, temperature: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    rows = z1.new_empty(2 * z1.shape[0], dtype=_loss_dtype(z1))
    return (rows if reduction == "none" else rows.new_empty(())), rows.new_empty(rows.shape, dtype=torch.float64)


@torch.library.custom_op("sslfast::info_nce_backward", mutates_args=(), device_types=DEVICES)
def _backward(
    grad_loss: Tensor, z1: Tensor, z2: Tensor, temperature: Tensor, lse: Tensor, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _C.info_nce_backward(grad_loss, z1, z2, temperature, lse, reduction)


@_backward.register_fake
def _(grad_loss, z1, z2, temperature, lse, reduction):
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(z1, memory_format=contiguous),
        torch.empty_like(z2, memory_format=contiguous),
        torch.empty_like(temperature),
    )


def _setup_context(ctx, inputs, output) -> None:
    z1, z2, temperature, ctx.reduction = inputs
    ctx.save_for_backward(z1, z2, temperature, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_of_forward(ctx, grad_loss: Tensor, _grad_lse: None):
    z1, z2, temperature, lse = ctx.saved_tensors
    grads = torch.ops.sslfast.info_nce_backward(grad_loss, z1, z2, temperature, lse, ctx.reduction)
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[:3], strict=True)), None


_forward.register_autograd(_backward_of_forward, setup_context=_setup_context)
refuse_other_derivatives(_forward, _backward)

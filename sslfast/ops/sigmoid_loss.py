"""The sigmoid loss of all pairs, of which SigLIP is made, without the matrix of similarities.

The formulas: csrc/ops/sigmoid_loss.h, or sslfast/reference/sigmoid_loss.py in plain PyTorch.
"""

import torch
from torch import Tensor

from sslfast import _C, reference
from sslfast.ops._check import as_tensor, check_integer, check_rows, check_scalar
from sslfast.ops._route import DEVICES, KERNEL, REFERENCE, has_kernel, refuse_other_derivatives, route


def sigmoid_loss(
    queries: Tensor, keys: Tensor, scale: float | Tensor, bias: float | Tensor = 0.0, *, first_key: int = 0
) -> Tensor:
    """Σ_ij −log σ(y_ij·(scale·⟨q_i, k_j⟩ + bias)), y_ij = 1 for row i's own key and −1 for the others.

    The similarities are computed tile by tile and never stored, once for the loss and all gradients. Nothing is
    normalised here.

    Args:
        queries: (M, D) with M ≥ 1 and D ≥ 1, float32, bfloat16, float16, or float64 on the CPU.
        keys: (N, D) with N ≥ 1, of the same dtype and device.
        scale: a number, or a tensor with one element, which gets a gradient.
        bias: likewise.
        first_key: row i's own key is number first_key + i. Rows for which there is no such key have none: with keys of
            other ranks, N leaves all rows without.

    Returns:
        A scalar, float64: the sum, for any divisor.

    Raises:
        TypeError: tensors of another kind.
        ValueError: another shape or device, a scale or bias that is not finite.

    Forward mode and the transforms of torch.func (grad, jvp, jacfwd, …) run plain PyTorch, which stores the matrix. No
    second derivative otherwise.

    Two calls with the same input give the same bits, on any number of threads. Memory grows with (M + N)·D.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343.
    """
    check_rows(queries, keys)
    for name, value in (("scale", scale), ("bias", bias)):
        check_scalar(name, value, queries)
    check_integer("first_key", first_key, -(2**63), 2**63 - 1)
    way = route(queries, keys, scale, bias)
    inputs = queries, keys, as_tensor(scale, queries), as_tensor(bias, queries)
    if way == REFERENCE or not has_kernel(queries):
        return reference.sigmoid_loss.sigmoid_loss(*inputs, first_key)
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if way == KERNEL:
        return _SigmoidLoss.apply(*inputs, first_key, gradients)
    return torch.ops.sslfast.sigmoid_loss_forward(*inputs, first_key, gradients)[0]


@torch.library.custom_op("sslfast::sigmoid_loss_forward", mutates_args=(), device_types=DEVICES)
def _forward(
    queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, first_key: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, and the gradients of queries, keys, scale and bias; those of queries and keys empty unless asked for)."""
    return _C.sigmoid_loss_forward(queries, keys, scale, bias, first_key, gradients)


@_forward.register_fake
def _(queries, keys, scale, bias, first_key, gradients):
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    scalars = [queries.new_empty((), dtype=torch.float64) for _ in range(3)]
    matrices = [t.new_empty(t.shape if gradients else (0,), dtype=dtype) for t in (queries, keys)]
    return scalars[0], *matrices, *scalars[1:]


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.likes = [(t.dtype, t.shape) for t in inputs[:4]]


def _setup_context(ctx, inputs, output) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss: Tensor, *_none):
    if torch.is_grad_enabled():
        raise RuntimeError("sigmoid_loss has no second derivative: call it without create_graph=True")
    gradients = zip(ctx.saved_tensors, ctx.likes, ctx.needs_input_grad[:4], strict=True)
    scaled = ((t * grad_loss).to(dtype).reshape(shape) if needed else None for t, (dtype, shape), needed in gradients)
    return *scaled, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)
refuse_other_derivatives(_forward)


class _SigmoidLoss(torch.autograd.Function):
    """The same without the dispatcher, which costs tens of microseconds a step. It returns the loss alone: autograd
    would make zeros as the gradients of other outputs."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _C.sigmoid_loss_forward(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_backward)

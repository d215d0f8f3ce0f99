"""The four rotations of a batch of images. The formulas: csrc/ops/rotate4.h."""

import torch
from torch import Tensor

from sslfast import _C, reference
from sslfast.ops._check import check_dense
from sslfast.ops._route import DEVICES, KERNEL, REFERENCE, has_kernel, refuse_other_derivatives, route

DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rotate4(images: Tensor) -> tuple[Tensor, Tensor]:
    """All four rotations of square images, and which is which: the batch of rotation prediction, in one pass.

    Args:
        images: (n, C, S, S), uint8, float32, bfloat16, float16 or float64, contiguous or channels_last. A part of a
            batch, such as ``images[: len(images) // 4]``, is read where it lies.

    Returns:
        rotated: (4·n, C, S, S) in the dtype and memory format of `images`. Images k·n … (k+1)·n are those of `images`,
            in their order, turned counter-clockwise by k·90° as ``torch.rot90(images, k, (2, 3))`` does.
        labels: (4·n,) int64: k.

    Raises:
        TypeError: no tensor, or another dtype.
        ValueError: another number of dimensions, or images that are not square.

    Gradients of the four are turned back and added, in float32 at least, rounded once.

    Source: Gidaris et al., "Unsupervised Representation Learning by Predicting Image Rotations", arXiv 1803.07728; for
    GANs Chen et al., "Self-Supervised GANs via Auxiliary Rotation Loss", arXiv 1811.11212.
    """
    _check(images)
    way = route(images)
    if way == REFERENCE or not has_kernel(images) or images.numel() == 0:
        return reference.rotate4.rotate4(images)
    if way == KERNEL:
        return _Rotate4.apply(images)
    return torch.ops.sslfast.rotate4_forward(images)


def _check(images: Tensor) -> None:
    check_dense("images", images)
    if images.dtype not in DTYPES:
        raise TypeError(f"images: expected uint8, float32, bfloat16, float16 or float64, got {images.dtype}")
    if images.dim() != 4:
        raise ValueError(f"images: expected shape (n, channels, size, size), got {tuple(images.shape)}")
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images: expected square images, got shape {tuple(images.shape)}")


def _memory_format(images: Tensor) -> torch.memory_format:
    """The format in which one image is dense, contiguous first, as csrc/ops/rotate4.cpp chooses it."""
    first = images[:1]
    last = not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


@torch.library.custom_op("sslfast::rotate4_forward", mutates_args=(), device_types=DEVICES)
def _forward(images: Tensor) -> tuple[Tensor, Tensor]:
    return _C.rotate4_forward(images)


@_forward.register_fake
def _(images: Tensor) -> tuple[Tensor, Tensor]:
    shape = (4 * images.shape[0], *images.shape[1:])
    rotated = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=_memory_format(images))
    return rotated, images.new_empty(4 * images.shape[0], dtype=torch.int64)


@torch.library.custom_op("sslfast::rotate4_backward", mutates_args=(), device_types=DEVICES)
def _backward(grad: Tensor) -> Tensor:
    return _C.rotate4_backward(grad)


@_backward.register_fake
def _(grad: Tensor) -> Tensor:
    shape = (grad.shape[0] // 4, *grad.shape[1:])
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=_memory_format(grad))


# Rotating is linear: the gradient of the gradient rotates again.
_forward.register_autograd(
    lambda ctx, grad, _labels: torch.ops.sslfast.rotate4_backward(grad),
    setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(output[1]),
)
_backward.register_autograd(lambda ctx, grad: torch.ops.sslfast.rotate4_forward(grad)[0])
refuse_other_derivatives(_forward, _backward)


class _Rotate4(torch.autograd.Function):
    """The same without the dispatcher, which costs more than turning a small batch."""

    @staticmethod
    def forward(ctx, images: Tensor):
        rotated, labels = _C.rotate4_forward(images)
        ctx.mark_non_differentiable(labels)
        ctx.set_materialize_grads(False)  # of the labels
        return rotated, labels

    @staticmethod
    def backward(ctx, grad: Tensor | None, _labels: None):
        if grad is None:
            return None
        return _Rotate4Backward.apply(grad) if route(grad) == KERNEL else torch.ops.sslfast.rotate4_backward(grad)


class _Rotate4Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad: Tensor):
        return _C.rotate4_backward(grad)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rotate = _Rotate4.apply if route(grad) == KERNEL else torch.ops.sslfast.rotate4_forward
        return rotate(grad)[0]

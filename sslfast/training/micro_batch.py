"""One loss over a whole batch, with an encoder that only ever holds a slice of it (GradCache, arXiv 2101.06983).

A contrastive loss needs all vectors of a batch at once, but its gradient reaches the encoder through each vector alone.
So the slices are encoded without a graph, the loss gives each vector its gradient, and the slices are encoded a second
time, one after the other, now with a graph, to hand these gradients on. Memory is that of a slice; a step costs one
more forward pass.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def backward(
    model: nn.Module,
    encode: Callable[[Tensor], Tensor],
    slices: Sequence[Tensor],
    loss_of: Callable[[list[Tensor]], Tensor],
) -> Tensor:
    """Add the gradient of ``loss_of([encode(slice), …])`` to the parameters of ``model``, and return the loss.

    The gradient is that of ``loss_of(…).backward()`` with all graphs kept, at the memory of one slice. What differs
    from the whole batch in one piece is BatchNorm: its mean and variance are those of a slice, and its running
    statistics move once per slice. Random layers such as dropout draw the same numbers in both passes.

    Args:
        model: with the parameters and buffers that ``encode`` uses; as DistributedDataParallel it averages once, with
            the last slice.
        encode: a slice to its vectors, calling ``model``.
        slices: of the batch; with several ranks, equally many on each.
        loss_of: the vectors of all slices, in order, to a scalar.
    """
    if len(slices) == 1:
        loss = loss_of([encode(slices[0])])
        loss.backward()
        return loss.detach()
    buffers = [buffer.clone() for buffer in model.buffers()]
    gpus = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(gpus):
        vectors = [encode(part) for part in slices]
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    for vector in vectors:
        vector.requires_grad_()
    loss = loss_of(vectors)
    loss.backward()
    unaveraged = model.no_sync if isinstance(model, nn.parallel.DistributedDataParallel) else contextlib.nullcontext
    for number, (part, vector) in enumerate(zip(slices, vectors, strict=True), start=1):
        with unaveraged() if number < len(slices) else contextlib.nullcontext():
            encode(part).backward(vector.grad)
    return loss.detach()

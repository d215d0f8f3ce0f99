"""What the losses share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslfast import distributed
from sslfast.ops._route import KERNEL, route

NORM_EPS = 1e-12  # that of F.normalize


def compute_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def normalize(t: Tensor) -> Tensor:
    """Unit length along the last dimension, in float32 at least."""
    t = t.to(compute_dtype(t))
    return _Normalize.apply(t) if route(t) == KERNEL else F.normalize(t, dim=-1)


class _Normalize(torch.autograd.Function):
    """F.normalize(t, dim=-1) with half as many operations in its gradient."""

    @staticmethod
    def forward(ctx, t: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(t, dim=-1, keepdim=True).clamp_min_(NORM_EPS)
        unit = t / norm
        ctx.save_for_backward(t, norm)
        return unit

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        t, norm = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative, which needs the graph of the norm
            return torch.autograd.grad(F.normalize(t, dim=-1), t, grad, create_graph=True)[0]
        unit = t / norm
        along = (unit * grad).sum(-1, keepdim=True).masked_fill_(norm <= NORM_EPS, 0)  # there the norm is a constant
        return torch.addcmul(grad, unit, along, value=-1) / norm


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """⟨a_i, b_i⟩ in float64."""
    dtype = compute_dtype(a)
    return (a.to(dtype) * b).sum(1, dtype=torch.float64)


def reduce(losses: Tensor, reduction: str) -> Tensor:
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")


def check_matrix(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.dim() != 2 or t.shape[0] == 0 or t.shape[1] == 0:
        raise ValueError(f"{name}: expected shape (batch, dim), neither of them 0, got {tuple(t.shape)}")


def check_pairs(first: tuple[str, Tensor], second: tuple[str, Tensor]) -> None:
    """Two tensors of which row i and row i belong together."""
    for name, t in (first, second):
        check_matrix(name, t)
    (name, a), (other, b) = first, second
    if a.shape != b.shape:
        raise ValueError(f"{other}: expected the shape of {name}, {tuple(a.shape)}, got {tuple(b.shape)}")
    if a.dtype != b.dtype:
        raise TypeError(f"{other}: expected the dtype of {name}, {a.dtype}, got {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"{other}: expected the device of {name}, {a.device}, got {b.device}")


def check_ranks(rank: int, world_size: int) -> None:
    """That what a loss was told of the process group is so."""
    found = distributed.rank(), distributed.world_size()
    if world_size > 1 and (rank, world_size) != found:
        raise ValueError(
            f"rank, world_size: expected those of torch.distributed's process group, {found[0]} and {found[1]}, "
            f"got {rank} and {world_size}"
        )


def check_labels(name: str, labels: Tensor | None, rows: Tensor) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(labels).__name__}")
    if labels.shape != rows.shape[:1]:
        raise ValueError(f"{name}: expected shape ({rows.shape[0]},), a label a vector, got {tuple(labels.shape)}")
    return labels

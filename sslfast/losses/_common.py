"""What the losses share."""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslfast import distributed
from sslfast.ops._check import check_scalar
from sslfast.ops._route import KERNEL, route
from sslfast.ops.similarity_lse import similarity_lse

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


def by_blocks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` of the rows of tensors, (N, …) -> (N,), block by block on a CPU.

    Where torch shares a tensor out among threads (from 2¹⁵ elements on), the bits of some functions depend on where
    the shares begin, and so on the number of threads. A block is below that.
    """
    if all(_is_one_block(t) for t in tensors):
        return function(*tensors)
    rows = max(1, _BLOCK // max(t.numel() // len(t) for t in tensors))
    return torch.cat([function(*block) for block in zip(*(t.split(rows) for t in tensors), strict=True)])


_BLOCK = 2**14


def _is_one_block(t: Tensor) -> bool:
    return t.numel() <= _BLOCK or t.device.type != "cpu"


def losses_of(others: Tensor, scale: float | Tensor, positives: Tensor) -> Tensor:
    """log(1 + exp(others_i − scale·positives_i)): cross-entropy, where `others` is the lse of all but the positive."""
    return by_blocks(lambda o, p: F.softplus(o - scale * p), others, positives)


def mean(losses: Tensor) -> Tensor:
    return losses.mean() if _is_one_block(losses) else total(losses) / len(losses)


def total(losses: Tensor) -> Tensor:
    """Σ losses_i, in an order that does not depend on the number of threads."""
    return losses.sum() if _is_one_block(losses) else torch.stack([b.sum() for b in losses.split(_BLOCK)]).sum()


def lse_of_other_samples(first: Tensor, second: Tensor, scale: float | Tensor, gather: bool, ring: bool) -> Tensor:
    """(2·batch,): the lse of each view over the views of all other samples, with `gather` over those of all ranks."""
    views = torch.cat(same_dtype(first, second))
    partners = torch.arange(len(views), device=views.device).roll(len(first))
    if gather:
        return distributed.similarity_lse(views, None, scale, exclude=partners, ring=ring)
    return similarity_lse(views, None, scale, exclude=partners)


def reduce(losses: Tensor, reduction: str) -> Tensor:
    return losses if reduction == "none" else mean(losses) if reduction == "mean" else total(losses)


def take_rows(t: Tensor, index: Tensor) -> Tensor:
    """t[index], whose gradient has the same bits in every run: each device has another op of which that is true."""
    return t.index_select(0, index) if t.device.type == "cpu" else t[index]


def add_rows(like: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Zeros of the shape of `like`, to which row i is added at index[i]; the same bits in every run."""
    zeros = torch.zeros_like(like)
    return zeros.index_add(0, index, rows) if like.device.type == "cpu" else zeros.index_put((index,), rows, True)


def check_temperature(temperature: float | Tensor) -> None:
    """A number by which similarities can be divided; as in the libraries, it may be negative, or a tensor."""
    check_scalar("temperature", temperature)
    if isinstance(temperature, Tensor):
        if temperature.device.type != "cpu" or torch.compiler.is_compiling():
            return  # its value is not at hand
        temperature = temperature.item()
    if temperature == 0 or not 0 < abs(float(1 / temperature)) < math.inf:
        raise ValueError(f"temperature: expected a positive number, or a negative one, got {temperature}")


def inverse(temperature: float | Tensor) -> float | Tensor:
    return 1 / temperature if isinstance(temperature, Tensor) else float(1 / temperature)


def as_scalar(name: str, value: float | Tensor | None) -> float | Tensor:
    """0 for None; a tensor with one element without dimensions, as float64 if it has integers."""
    if isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex():
        value = value.double()
    check_scalar(name, 0.0 if value is None else value)
    return 0.0 if value is None else value.reshape(()) if isinstance(value, Tensor) else value


def overrides(loss: nn.Module, base: type, *names: str) -> bool:
    """Whether a loss has methods of these names other than those of `base`."""
    return any(name in vars(loss) or getattr(type(loss), name) is not getattr(base, name) for name in names)


def check_gather(gather_distributed: bool) -> None:
    if gather_distributed and not torch.distributed.is_available():
        raise ValueError("gather_distributed: expected False where torch.distributed is not available, got True")


def check_floating(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")


def check_matrix(name: str, t: Tensor) -> None:
    check_floating(name, t)
    if t.dim() != 2 or t.shape[0] == 0 or t.shape[1] == 0:
        raise ValueError(f"{name}: expected shape (batch, dim), neither of them 0, got {tuple(t.shape)}")


def check_pairs(first: tuple[str, Tensor], second: tuple[str, Tensor], *, mixed: bool = False) -> None:
    """Two tensors of which row i and row i belong together; of different dtypes only if `mixed` or within autocast."""
    for name, t in (first, second):
        check_matrix(name, t)
    (name, a), (other, b) = first, second
    if a.shape != b.shape:
        raise ValueError(f"{other}: expected the shape of {name}, {tuple(a.shape)}, got {tuple(b.shape)}")
    if not mixed:
        check_dtypes(first, second)
    if a.device != b.device:
        raise ValueError(f"{other}: expected the device of {name}, {a.device}, got {b.device}")


def check_dtypes(first: tuple[str, Tensor], second: tuple[str, Tensor]) -> None:
    """One dtype, or within autocast any two of those that it casts, which are all but float64."""
    (name, a), (other, b) = first, second
    if a.dtype != b.dtype and (torch.float64 in (a.dtype, b.dtype) or not within_autocast(a)):
        raise TypeError(f"{other}: expected the dtype of {name}, {a.dtype}, got {b.dtype}")


def within_autocast(t: Tensor) -> bool:
    device = t.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def same_dtype(*tensors: Tensor) -> list[Tensor]:
    """All in the widest of their dtypes."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return [t.to(dtype) for t in tensors]


def check_ranks(rank: int, world_size: int) -> None:
    """That what a loss was told of the process group is so."""
    found = distributed.rank(), distributed.world_size()
    if world_size > 1 and (rank, world_size) != found:
        raise ValueError(
            f"rank, world_size: expected those of torch.distributed's process group, {found[0]} and {found[1]}, "
            f"got {rank} and {world_size}"
        )

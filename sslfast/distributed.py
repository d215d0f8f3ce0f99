"""Losses over the batches of all ranks, for one process of several under torch.distributed (gloo or NCCL).

Each rank calls with its own rows and gets the loss of these rows against the keys of every rank. The mean of that over
the ranks is the loss of the whole batch, and what DistributedDataParallel makes of the gradients (their average over
the ranks) is its gradient: on the way back each key collects the gradients of all ranks, as a sum.

Every collective is preceded by a comparison of shapes, so that an uneven batch raises ValueError on all ranks
instead of hanging. Without a process group, or with one rank, all functions here work on the own rows alone.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sslfast import ops
from sslfast.ops.info_nce import check_views

if TYPE_CHECKING or dist.is_available():
    Group = dist.ProcessGroup | None
    """A process group; None is the default one."""

    # The names before and after torch 2.14.
    _all_gather: Callable = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    _reduce_scatter: Callable = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
else:  # torch can be built without torch.distributed: one process needs none of it
    Group = None


def rank(group: Group = None) -> int:
    """Return the number of this process, 0 without a process group."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def world_size(group: Group = None) -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


class UnevenError(ValueError):
    """Ranks brought rows of different shapes; raised on all of them."""


def all_gather(tensor: Tensor, group: Group = None, check: bool = True) -> Tensor:
    """Return the rows of all ranks, (n, …) -> (world·n, …) in the order of ranks; the gradient goes back to the owner.

    The gradient of a row is the sum over what all ranks did with it. Raises ValueError on all ranks where shapes
    differ, unless `check` is False, for shapes that cannot.
    """
    if world_size(group) == 1:
        return tensor
    if check:
        check_same_shape(tensor, group)
    return _AllGather.apply(tensor, group)


def check_same_shape(tensor: Tensor, group: Group = None) -> None:
    """Raise UnevenError on all ranks unless `tensor` has one shape on all of them (at most 7 dimensions)."""
    own = torch.zeros(8, dtype=torch.int64)
    own[: tensor.dim() + 1] = torch.tensor([tensor.dim(), *tensor.shape])
    own = own.to(tensor.device)
    shapes = own.new_empty(world_size(group) * 8)
    _all_gather(shapes, own, group)
    found = [tuple(row[1 : row[0] + 1]) for row in shapes.view(-1, 8).tolist()]
    if len(set(found)) > 1:
        listing = ", ".join(f"{shape} on rank {number}" for number, shape in enumerate(found))
        raise UnevenError(f"expected rows of one shape on all ranks, got {listing}: drop the uneven last batch")


def nt_xent(
    z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.5, *, ring: bool = False, group: Group = None
) -> Tensor:
    """`sslfast.ops.nt_xent` of this rank's pairs among the views of all ranks: the mean over this rank's 2·batch rows.

    Args, errors: as `sslfast.ops.nt_xent`, and `ring` and `group` as `similarity_lse`. Returns a float32 scalar
    (float64 for float64 input).
    """
    if world_size(group) == 1:
        return ops.nt_xent(z1, z2, temperature)
    check_views(z1, z2, temperature)
    z = torch.cat([z1, z2])
    wide = _wide(z.dtype)
    z = F.normalize(z.to(wide), dim=1).to(z.dtype)
    partner = torch.arange(z.shape[0], device=z.device).roll(z1.shape[0])
    positive = (z * z.roll(z1.shape[0], 0)).sum(1, dtype=wide) / temperature
    negatives = similarity_lse(z, None, 1 / temperature, exclude=partner, ring=ring, group=group)
    return F.softplus(negatives - positive).mean().to(wide)


def similarity_lse(
    queries: Tensor,
    keys: Tensor | None,
    scale: float | Tensor,
    *,
    exclude: Tensor | None = None,
    ring: bool = False,
    group: Group = None,
) -> Tensor:
    """`sslfast.ops.similarity_lse` of this rank's queries against the keys of all ranks: log Σ_j exp(scale·⟨q_i, k_j⟩).

    Args:
        queries: (M, D), this rank's rows.
        keys: (N, D), this rank's keys, as many on each rank. None: the queries are the keys, and row i leaves out i.
        scale: number, or a tensor with one element.
        exclude: int64 (M,) or (M, E): of this rank's own keys, those that row i leaves out.
        ring: False gathers all keys, while this rank's own are worked on. True passes them from rank to rank instead,
            forward and backward: a rank holds a few blocks of them, however many ranks there are.
        group: the process group.

    Returns:
        (M,), float64. Gradients reach the queries, the keys of all ranks and the scale.

    Raises:
        ValueError: on all ranks where the keys' shapes differ; otherwise as the op.

    Source of the ring: Cheng et al., "Breaking the Memory Barrier" (Inf-CL), arXiv 2410.17243.
    """
    if world_size(group) == 1:
        return _lse(queries, keys, scale, exclude)
    check_same_shape(queries if keys is None else keys, group)
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float64, device=queries.device)
    return (_RingLSE if ring else _GatherLSE).apply(queries, keys, scale, exclude, group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        rows = tensor.contiguous()
        gathered = rows.new_empty(world_size(group) * rows.shape[0], *rows.shape[1:])
        _all_gather(gathered, rows, group)
        return gathered

    @staticmethod
    def backward(ctx, gradient: Tensor):
        own = gradient.new_empty(gradient.shape[0] // world_size(ctx.group), *gradient.shape[1:])
        _reduce_scatter(own, gradient.contiguous(), group=ctx.group)
        return own, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which gradients of several blocks are added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _lse(queries: Tensor, keys: Tensor | None, scale: float | Tensor, exclude: Tensor | None = None) -> Tensor:
    lse = ops.similarity_lse(queries, keys, scale, exclude=exclude)
    assert isinstance(lse, Tensor)
    return lse


class _GatherLSE(torch.autograd.Function):
    """Holds the keys of all ranks. The own block is computed while the others travel, in both directions."""

    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor | None, scale: Tensor, exclude: Tensor | None, group: Group):
        own = (queries if keys is None else keys).contiguous()
        everyones = own.new_empty(world_size(group) * own.shape[0], own.shape[1])
        transfer = _all_gather(everyones, own, group, async_op=True)
        lse = _lse(queries, keys, scale, exclude)
        transfer.wait()
        for others in _around(everyones, group):
            lse = torch.logaddexp(lse, _lse(queries, others, scale))
        ctx.save_for_backward(queries, keys, scale, exclude, everyones, lse)
        ctx.group = group
        return lse

    @staticmethod
    def backward(ctx, grad_lse: Tensor):
        queries, keys, scale, exclude, everyones, lse = ctx.saved_tensors
        total = _Gradients(queries, keys, scale, lse, grad_lse)
        grad_everyones = torch.zeros_like(everyones, dtype=total.queries.dtype)
        for others, grad_others in zip(_around(everyones, ctx.group), _around(grad_everyones, ctx.group), strict=True):
            grad_others.copy_(total.add(others))
        from_others = grad_everyones.new_empty((queries if keys is None else keys).shape)
        transfer = _reduce_scatter(from_others, grad_everyones, group=ctx.group, async_op=True)
        from_own = total.add(keys, exclude)
        transfer.wait()
        return *total.of_inputs(from_own, from_others), None, None


class _RingLSE(torch.autograd.Function):
    """Holds one block of keys and receives the next one while it computes. Going back, each block travels once around
    the ring, followed by its gradient, to which every rank adds its part, and which comes home complete."""

    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor | None, scale: Tensor, exclude: Tensor | None, group: Group):
        blocks = _blocks_of_the_ring(queries if keys is None else keys, group)
        next(blocks)
        lse = _lse(queries, keys, scale, exclude)
        for block in blocks:
            lse = torch.logaddexp(lse, _lse(queries, block, scale))
        ctx.save_for_backward(queries, keys, scale, exclude, lse)
        ctx.group = group
        return lse

    @staticmethod
    def backward(ctx, grad_lse: Tensor):
        queries, keys, scale, exclude, lse = ctx.saved_tensors
        total = _Gradients(queries, keys, scale, lse, grad_lse)
        blocks = _blocks_of_the_ring(queries if keys is None else keys, ctx.group)
        own = next(blocks)
        from_own = total.add(keys, exclude)
        follower = _Exchange(torch.zeros_like(own, dtype=total.queries.dtype), ctx.group)
        for block in blocks:
            gradient = total.add(block)
            follower = _Exchange(follower.received() + gradient, ctx.group)
        return *total.of_inputs(from_own, follower.received()), None, None


class _Gradients:
    """Sums the gradients of queries and scale over blocks of keys, for a given lse over all of them."""

    def __init__(self, queries: Tensor, keys: Tensor | None, scale: Tensor, lse: Tensor, grad_lse: Tensor):
        self.inputs, self.lse, self.grad_lse = (queries, keys, scale), lse, grad_lse
        self.queries = torch.zeros_like(queries, dtype=_wide(queries.dtype))
        self.scale = torch.zeros_like(scale)

    def add(self, block: Tensor | None, exclude: Tensor | None = None) -> Tensor:
        """Add what a block of keys gives, and return its own gradient; 0 for None, where it is in that of queries."""
        queries, _, scale = self.inputs
        gradients = ops.similarity_lse_backward(queries, block, scale, self.lse, self.grad_lse, exclude=exclude)
        self.queries += gradients[0]
        self.scale += gradients[2]
        return self.queries.new_zeros(()) if gradients[1] is None else gradients[1]

    def of_inputs(self, from_own: Tensor, from_others: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the gradients of queries, keys and scale, given those that the own keys got here and elsewhere."""
        queries, keys, _ = self.inputs
        if keys is None:
            return (self.queries + from_others).to(queries.dtype), None, self.scale
        return self.queries.to(queries.dtype), (from_others + from_own).to(keys.dtype), self.scale


def _around(everyones: Tensor, group: Group) -> Iterator[Tensor]:
    """The rows of the ranks before this one, and of those after it."""
    rows = everyones.shape[0] // world_size(group)
    start = rank(group) * rows
    for part in (everyones[:start], everyones[start + rows :]):
        if part.shape[0]:
            yield part


def _blocks_of_the_ring(own: Tensor, group: Group) -> Iterator[Tensor]:
    """Yield the own block, then that of each rank before; the next one is on its way while the caller works."""
    block = own.contiguous()
    for left in reversed(range(world_size(group))):
        exchange = _Exchange(block, group) if left else None
        yield block
        if exchange:
            block = exchange.received()


class _Exchange:
    """A tensor on its way to the next rank, while that of the rank before arrives."""

    def __init__(self, sent: Tensor, group: Group):
        me, world = rank(group), world_size(group)
        ranks = range(world) if group is None else dist.get_process_group_ranks(group)
        self.sent, self.arriving = sent, torch.empty_like(sent)
        self.transfers = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, ranks[(me + 1) % world], group),
                dist.P2POp(dist.irecv, self.arriving, ranks[(me - 1) % world], group),
            ]
        )

    def received(self) -> Tensor:
        for transfer in self.transfers:
            transfer.wait()
        return self.arriving

"""Training with several processes: what a method's loop asks torchrun's process group for.

    with distributed.session():                  # joins the group that torchrun describes, if any
        model = distributed.wrap(model)          # DistributedDataParallel
        for pixels, ids in ...:                  # this rank's part of each batch: distributed.share(rows)
            ...

Everything works with one process too, and then communicates nothing. The main rank, 0, alone writes logs, checkpoints
and pictures. What decides how the loop goes on (stop, save, log) is agreed upon by all ranks, since a rank that leaves
the loop alone would leave the others waiting for it.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslfast.distributed import all_gather, rank, world_size
from sslfast.training import UserError

T = TypeVar("T")

# How gloo, NCCL and the store say that another rank is gone.
_LOST = ("gloo", "connection closed", "connection reset", "timed out", "timeout", "nccl", "broken pipe")


def rank_timeout() -> float:
    """Return the seconds that a rank waits for another: the environment variable SSLFAST_RANK_TIMEOUT, or 600."""
    wanted = os.environ.get("SSLFAST_RANK_TIMEOUT", "600")
    try:
        seconds = float(wanted)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"SSLFAST_RANK_TIMEOUT: expected a positive number of seconds, got {wanted!r}")
    return seconds


@contextlib.contextmanager
def session(timeout: float | None = None) -> Iterator[None]:
    """Join the process group that torchrun's environment describes, within the block; without torchrun, do nothing.

    CPU tensors travel by gloo, those on a GPU by NCCL. `timeout`: seconds that a rank waits for another, by default
    rank_timeout(). When one dies or is silent for so long, the others raise UserError.
    """
    if dist.is_initialized() or not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield
        return
    me = os.environ["RANK"]
    timeout = rank_timeout() if timeout is None else timeout
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        wait = datetime.timedelta(seconds=timeout)
        store, rank, world = next(dist.rendezvous("env://", timeout=wait))
        # After a restart torchrun's store still holds the addresses of the ranks that died.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
        yield
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if not isinstance(error, dist.DistError) and not any(word in said.lower() for word in _LOST):
            raise
        raise UserError(
            f"rank {me} lost the other ranks: one of them died, or said nothing for {timeout:g} seconds ({said}). "
            "Under `torchrun --max-restarts 3` the run goes on from its last checkpoint."
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def is_main() -> bool:
    """Return whether this process writes logs and checkpoints: one of all does."""
    return rank() == 0


def may_restart() -> bool:
    """Return whether torchrun would start this command again after a rank's death (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def restarted() -> bool:
    """Return whether torchrun has started this command again after a rank's death."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def local_device(name: str) -> torch.device:
    """Return the device that `name` means for this rank: of several ranks on a machine, each takes a GPU of its own."""
    if not name.startswith("cuda") or world_size() == 1:
        return torch.device(name)
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name != "cuda":
        raise UserError(f"--device {name}: under torchrun give --device cuda, and each rank takes a GPU of its own")
    if local >= torch.cuda.device_count():
        raise UserError(f"rank {rank()} is number {local} of its machine, which has {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def share(count: int) -> slice:
    """Return which of `count` rows of a batch are this rank's: an equal part, in the order of ranks."""
    rows = count // world_size()
    return slice(rank() * rows, (rank() + 1) * rows)


def wrap(model: nn.Module, sync_batchnorm: bool = False) -> nn.Module:
    """Return `model` as DistributedDataParallel, which averages gradients over the ranks; with one rank, itself.

    With `sync_batchnorm` the model's BatchNorm layers are first replaced, in place, by ones whose mean and variance
    are of the batch of all ranks. Names of weights stay as they are.
    """
    if world_size() == 1:
        return model
    on_cuda = next(model.parameters()).is_cuda
    if sync_batchnorm and on_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif sync_batchnorm:
        _convert(model)
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether it is true on any rank: the same answer on all of them."""
    if world_size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes)


def smallest(number: int) -> int:
    """Return the smallest of the numbers that the ranks bring."""
    if world_size() == 1:
        return number
    least = torch.tensor(number)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def mean(tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over the ranks, without a gradient."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total / world_size()


def on_main(action: Callable[[], T]) -> T:
    """Call `action` on the main rank alone and return its result, or raise its UserError, on all ranks."""
    if world_size() == 1:
        return action()
    outcome: list = [None, None]
    if is_main():
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


@contextlib.contextmanager
def one_rank_first() -> Iterator[None]:
    """Within the block, one rank of each machine is alone, and the others follow when it is through: for downloads."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        any_rank(False)
    yield
    if first:
        any_rank(False)


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the batch of all ranks, for devices on which torch.nn.SyncBatchNorm does not run, such as CPUs.

    Each rank brings equally many rows.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # any (N, C, …)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [dim for dim in range(x.dim()) if dim != 1]
        own = torch.stack(torch.var_mean(x, dims, correction=0))
        variances, means = all_gather(own[None], check=False).unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        if self.track_running_stats:
            self._follow(mean.detach(), variance.detach(), world_size() * x.numel() // x.shape[1])
        scale = (variance + self.eps).rsqrt()
        scale = scale * self.weight if self.affine else scale
        shift = self.bias - mean * scale if self.affine else -mean * scale
        shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
        return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(input.dtype)

    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (count / max(1, count - 1)), momentum)


def _convert(module: nn.Module) -> None:
    """Replace the BatchNorm layers in `module` by SyncBatchNorm, with the same parameters and buffers."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            synchronised = SyncBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            synchronised._parameters, synchronised._buffers = child._parameters, child._buffers
            setattr(module, name, synchronised.train(child.training))
        else:
            _convert(child)

"""NT-Xent, the loss of SimCLR, with a memory bank as of MoCo."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslfast import distributed
from sslfast.losses._common import (
    check_gather,
    check_pairs,
    check_temperature,
    inverse,
    losses_of,
    lse_of_other_samples,
    mean,
    normalize,
    row_dots,
    same_dtype,
)
from sslfast.ops.info_nce import nt_xent
from sslfast.ops.similarity_lse import similarity_lse


class NTXentLoss(nn.Module):
    """NT-Xent of SimCLR, or with a memory bank the loss of MoCo; a drop-in for `lightly.loss.NTXentLoss`.

    >>> loss = NTXentLoss(temperature=0.5)(z1, z2)  # z1, z2: (batch, dim), two views of the same samples

    Args:
        temperature: number but 0, or a tensor with one positive element, which gets a gradient.
        memory_bank_size: (size, dim): keep the last `size` vectors of `out1` and take them as negatives of `out0`
            instead of the other samples of the batch. What comes in takes the places of the oldest, round and round,
            also where the batch does not divide the size (lightly drops what does not fit at the end). 0: no bank.
        gather_distributed: take the views of all ranks of torch.distributed as negatives. The loss is that of this
            rank's rows: its mean over the ranks is the loss of the whole batch, and the gradients that
            DistributedDataParallel averages are those of the whole batch. With a bank: put the keys of all ranks into
            it, so that it is the same on each.
        ring: with gather_distributed, pass the views from rank to rank instead of holding all of them on each.

    Raises:
        ValueError: a temperature of 0, another memory_bank_size, gather_distributed where torch.distributed is not
            available, or shapes that do not fit.
        TypeError: what is not a floating-point tensor, or dtypes that differ, unless within torch.autocast.

    The bank takes `out1` in after the loss, and only if `out0` needs a gradient. It is in the metadata of a state_dict,
    which torch.save stores with it, and not among the keys: lightly's loss and this one load each other's checkpoints.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | tuple[int, int] = 0,
        gather_distributed: bool = False,
        *,
        ring: bool = False,
    ):
        super().__init__()
        check_temperature(temperature)
        check_gather(gather_distributed)
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if size[:1] != (0,) and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"memory_bank_size: expected (size, dim), or 0 for none, got {memory_bank_size}")
        self.temperature = temperature
        self.memory_bank_size = memory_bank_size
        self.gather_distributed, self.ring = gather_distributed, ring
        self.has_bank = size[0] > 0
        if self.has_bank:
            self.register_buffer("bank", F.normalize(torch.randn(size)), persistent=False)
            self.register_buffer("bank_ptr", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        check_pairs(("out0", out0), ("out1", out1))
        if self.has_bank:
            return self._with_bank(out0, out1)
        out0, out1 = same_dtype(out0, out1)
        if isinstance(self.temperature, Tensor) or self.temperature > 0:
            if self.gather_distributed:
                return distributed.nt_xent(out0, out1, self.temperature, ring=self.ring)
            return nt_xent(out0, out1, self.temperature)
        first, second = normalize(out0), normalize(out1)
        scale = inverse(self.temperature)
        others = lse_of_other_samples(first, second, scale, self.gather_distributed, self.ring)
        positives = row_dots(first, second)
        return mean(losses_of(others, scale, torch.cat([positives, positives]))).to(first.dtype)

    def _with_bank(self, out0: Tensor, out1: Tensor) -> Tensor:
        if out0.shape[1] != self.bank.shape[1]:
            raise ValueError(f"out0: expected {self.bank.shape[1]} columns, as the bank, got shape {tuple(out0.shape)}")
        queries, keys = normalize(out0), normalize(out1)
        scale = inverse(self.temperature)
        bank = self.bank.to(queries.dtype)
        if bank.device.type != "cpu":  # there autograd may keep the bank that is about to change
            bank = bank.clone()
        others = similarity_lse(queries, bank, scale)
        loss = mean(losses_of(others, scale, row_dots(queries, keys)))
        if out0.requires_grad:
            self._put(distributed.all_gather(keys.detach()) if self.gather_distributed else keys.detach())
        return loss.to(queries.dtype)

    @torch.no_grad()
    def _put(self, keys: Tensor) -> None:
        size = self.bank.shape[0]
        places = (self.bank_ptr + torch.arange(len(keys), device=keys.device)) % size
        self.bank[places[-size:]] = keys[-size:].to(self.bank.dtype)
        self.bank_ptr.copy_((self.bank_ptr + len(keys)) % size)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        """As in lightly, the bank has no key, so that either loss loads the other's checkpoints strictly. It is in the
        metadata, where torch keeps versions, and which torch.save stores with the keys."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.has_bank and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["memory_bank"] = {"bank": self.bank, "bank_ptr": self.bank_ptr}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others) -> None:
        """Load the bank where there is one: in the metadata, or as keys, which it had in version 0.1."""
        unsaved = self._non_persistent_buffers_set
        if self.has_bank:
            state_dict |= {prefix + name: t for name, t in local_metadata.get("memory_bank", {}).items()}
            self._non_persistent_buffers_set = {name for name in unsaved if prefix + name not in state_dict}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)
        self._non_persistent_buffers_set = unsaved

    def extra_repr(self) -> str:
        bank = f", memory_bank_size={self.memory_bank_size}" if self.has_bank else ""
        return f"temperature={self.temperature}{bank}"

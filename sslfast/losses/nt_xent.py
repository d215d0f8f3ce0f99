"""NT-Xent, the loss of SimCLR, with a memory bank as of MoCo."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslfast import distributed
from sslfast.losses._common import check_pairs, check_temperature, normalize, row_dots
from sslfast.ops.info_nce import nt_xent
from sslfast.ops.similarity_lse import similarity_lse


class NTXentLoss(nn.Module):
    """NT-Xent of SimCLR, or with a memory bank the loss of MoCo; a drop-in for `lightly.loss.NTXentLoss`.

    >>> loss = NTXentLoss(temperature=0.5)(z1, z2)  # z1, z2: (batch, dim), two views of the same samples

    Args:
        temperature: positive number.
        memory_bank_size: (size, dim): keep the last `size` vectors of `out1` and take them as negatives of `out0`
            instead of the other samples of the batch. What comes in takes the places of the oldest, round and round,
            also where the batch does not divide the size (lightly drops what does not fit at the end). The bank is
            part of the state_dict. 0: no bank.
        gather_distributed: take the views of all ranks of torch.distributed as negatives. The loss is that of this
            rank's rows: its mean over the ranks is the loss of the whole batch, and the gradients that
            DistributedDataParallel averages are those of the whole batch. With a bank: put the keys of all ranks into
            it, so that it is the same on each.
        ring: with gather_distributed, pass the views from rank to rank instead of holding all of them on each.

    Raises:
        ValueError: a temperature that is not positive, or another memory_bank_size.

    The bank takes `out1` in after the loss, and only if `out0` needs a gradient. Without a bank, inputs, result and
    errors of the call are those of `sslfast.ops.nt_xent` with reduction "mean".
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | tuple[int, int] = 0,
        gather_distributed: bool = False,
        *,
        ring: bool = False,
    ):
        super().__init__()
        check_temperature(temperature)
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if size[:1] != (0,) and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"memory_bank_size: expected (size, dim), or 0 for none, got {memory_bank_size}")
        self.temperature = temperature
        self.memory_bank_size = memory_bank_size
        self.gather_distributed, self.ring = gather_distributed, ring
        self.has_bank = size[0] > 0
        if self.has_bank:
            self.register_buffer("bank", F.normalize(torch.randn(size)))
            self.register_buffer("bank_ptr", torch.zeros((), dtype=torch.int64))

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if self.gather_distributed and not self.has_bank:
            return distributed.nt_xent(out0, out1, self.temperature, ring=self.ring)
        if not self.has_bank:
            return nt_xent(out0, out1, self.temperature)
        check_pairs(("out0", out0), ("out1", out1))
        if out0.shape[1] != self.bank.shape[1]:
            raise ValueError(f"out0: expected {self.bank.shape[1]} columns, as the bank, got shape {tuple(out0.shape)}")
        keys, queries = normalize(out1), normalize(out0)
        bank = self.bank.to(queries.dtype)
        if bank.device.type != "cpu":  # there autograd may keep the bank that is about to change
            bank = bank.clone()
        positives = row_dots(queries, keys) / self.temperature
        loss = F.softplus(similarity_lse(queries, bank, 1 / self.temperature) - positives).mean()
        if out0.requires_grad:
            self._put(distributed.all_gather(keys.detach()) if self.gather_distributed else keys.detach())
        return loss.to(queries.dtype)

    @torch.no_grad()
    def _put(self, keys: Tensor) -> None:
        size = self.bank.shape[0]
        places = (self.bank_ptr + torch.arange(len(keys), device=keys.device)) % size
        self.bank[places[-size:]] = keys[-size:].to(self.bank.dtype)
        self.bank_ptr.copy_((self.bank_ptr + len(keys)) % size)

    def extra_repr(self) -> str:
        bank = f", memory_bank_size={self.memory_bank_size}" if self.has_bank else ""
        return f"temperature={self.temperature}{bank}"

"""Contrastive losses as modules, with the signatures that people already use."""

from torch import Tensor, nn

from sslfast import distributed
from sslfast.ops.info_nce import nt_xent


class NTXentLoss(nn.Module):
    """NT-Xent of SimCLR, a drop-in for `lightly.loss.NTXentLoss` without its (2·batch)² matrices.

    >>> loss = NTXentLoss(temperature=0.5)(z1, z2)  # z1, z2: (batch, dim), two views of the same samples

    Args:
        temperature: positive number.
        memory_bank_size: only 0 for now.
        gather_distributed: take the views of all ranks of torch.distributed as negatives. The loss is that of this
            rank's rows: its mean over the ranks is the loss of the whole batch, and the gradients that
            DistributedDataParallel averages are those of the whole batch.
        ring: with gather_distributed, pass the views from rank to rank instead of holding all of them on each.

    Raises:
        ValueError: a temperature that is not positive.
        NotImplementedError: a memory bank.

    The inputs, result and errors of the call are those of `sslfast.ops.nt_xent` with reduction "mean".
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | tuple[int, int] = 0,
        gather_distributed: bool = False,
        *,
        ring: bool = False,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        if memory_bank_size not in (0, (0, 0)) and memory_bank_size != (0,):
            raise NotImplementedError(f"memory_bank_size: only 0 is implemented, got {memory_bank_size}")
        self.temperature = temperature
        self.memory_bank_size = memory_bank_size
        self.gather_distributed, self.ring = gather_distributed, ring

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if self.gather_distributed:
            return distributed.nt_xent(out0, out1, self.temperature, ring=self.ring)
        return nt_xent(out0, out1, self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"

"""Contrastive losses as modules, with the signatures that people already use."""

from torch import Tensor, nn

from sslfast.ops.info_nce import nt_xent


class NTXentLoss(nn.Module):
    """NT-Xent of SimCLR, a drop-in for `lightly.loss.NTXentLoss` without its (2·batch)² matrices.

    >>> loss = NTXentLoss(temperature=0.5)(z1, z2)  # z1, z2: (batch, dim), two views of the same samples

    Args:
        temperature: positive number.
        memory_bank_size: only 0 for now.
        gather_distributed: only False for now.

    Raises:
        ValueError: a temperature that is not positive.
        NotImplementedError: a memory bank, or gathering from other ranks.

    The inputs, result and errors of the call are those of `sslfast.ops.nt_xent` with reduction "mean".
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | tuple[int, int] = 0,
        gather_distributed: bool = False,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        if memory_bank_size not in (0, (0, 0)) and memory_bank_size != (0,):
            raise NotImplementedError(f"memory_bank_size: only 0 is implemented, got {memory_bank_size}")
        if gather_distributed:
            raise NotImplementedError("gather_distributed: only False is implemented, got True")
        self.temperature = temperature
        self.memory_bank_size = memory_bank_size
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        return nt_xent(out0, out1, self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"

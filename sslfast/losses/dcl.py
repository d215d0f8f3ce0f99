"""Decoupled contrastive losses."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from sslfast import distributed
from sslfast.losses._common import (
    check_gather,
    check_pairs,
    check_temperature,
    compute_dtype,
    inverse,
    lse_of_other_samples,
    mean,
    normalize,
    row_dots,
)


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """The weights of DCLW for two (batch, dim) views: 2 − batch·softmax over the batch of ⟨out0_i, out1_i⟩/sigma."""
    similarity = row_dots(out0.detach(), out1.detach()) / sigma
    return (2 - len(out0) * F.softmax(similarity, dim=0)).to(compute_dtype(out0))


class DCLLoss(nn.Module):
    """NT-Xent without the positive in the sum, "decoupled"; a drop-in for `lightly.loss.DCLLoss`.

    >>> loss = DCLLoss(temperature=0.1)(z1, z2)  # z1, z2: (batch, dim), two views of the same samples

    Args:
        temperature: number but 0, or a tensor with one element, which gets a gradient.
        weight_fn: called with the normalised views, (batch, dim) each, and once more with the two exchanged; returns
            the (batch,) weights of the positives' similarities. None: 1.
        gather_distributed: take the views of all ranks of torch.distributed as negatives. The loss is that of this
            rank's rows: its mean over the ranks is the loss of the whole batch, and the gradients that
            DistributedDataParallel averages are those of the whole batch; weight_fn sees the own rows.
        ring: with gather_distributed, pass the views from rank to rank instead of holding all of them on each.

    Raises:
        ValueError: a temperature of 0, views that do not fit or have fewer than two rows, or gather_distributed where
            torch.distributed is not available.
        TypeError: what is not a floating-point tensor, or dtypes that differ, unless within torch.autocast.

    Source: Yeh et al., "Decoupled Contrastive Learning", arXiv 2110.06848.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
        *,
        ring: bool = False,
    ):
        super().__init__()
        check_temperature(temperature)
        check_gather(gather_distributed)
        self.ring = ring
        self.temperature, self.weight_fn, self.gather_distributed = temperature, weight_fn, gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        check_pairs(("out0", out0), ("out1", out1))
        world = distributed.world_size() if self.gather_distributed else 1
        if world * len(out0) < 2:
            raise ValueError(f"out0: expected at least two rows, since negatives are other samples, got {len(out0)}")
        first, second = normalize(out0), normalize(out1)
        scale = inverse(self.temperature)
        lse = lse_of_other_samples(first, second, scale, self.gather_distributed, self.ring)
        positives = row_dots(first, second)
        if self.weight_fn is not None:
            positives = positives * (self.weight_fn(first, second) + self.weight_fn(second, first)) / 2
        return (mean(lse) - scale * mean(positives)).to(first.dtype)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class DCLWLoss(DCLLoss):
    """DCLLoss with negative von-Mises-Fisher weights; a drop-in for `lightly.loss.DCLWLoss`.

    Args:
        temperature: as of DCLLoss.
        sigma: the weights' similarities are divided by it.
        gather_distributed, ring: as of DCLLoss; the weights are those among this rank's rows, as in lightly.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        sigma: float = 0.5,
        gather_distributed: bool = False,
        *,
        ring: bool = False,
    ):
        weights = partial(negative_mises_fisher_weights, sigma=sigma)
        super().__init__(temperature, weights, gather_distributed, ring=ring)

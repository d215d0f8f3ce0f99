"""InfoNCE with each query's own positive key."""

import torch
from torch import Tensor, nn

from sslfast.losses._common import (
    by_blocks,
    check_floating,
    check_pairs,
    check_temperature,
    inverse,
    losses_of,
    normalize,
    reduce,
    row_dots,
    same_dtype,
)
from sslfast.ops.info_nce import REDUCTIONS
from sslfast.ops.similarity_lse import similarity_lse


class InfoNCE(nn.Module):
    """InfoNCE with each query's own positive key; a drop-in for `info_nce.InfoNCE` of info-nce-pytorch.

    >>> loss = InfoNCE(temperature=0.1)(query, positive_key, negative_keys)

    Args:
        temperature: number but 0, or a tensor with one element, which gets a gradient.
        reduction: "mean" over the queries, "sum", or "none".
        negative_mode: "unpaired": negative_keys (M, dim) are those of all queries. "paired": negative_keys (N, M, dim),
            M for each query.

    Call with query and positive_key (N, dim), and negative_keys or None: the positive keys of the other queries. All
    are L2-normalised. M may be 0. Negative keys that need no gradient, such as MoCo's queue, save half of the work.
    Dtypes may differ where there are negative_keys, and within torch.autocast; the widest is that of the loss.

    Raises:
        ValueError: a temperature of 0, an unknown reduction or mode, or shapes that do not fit.
        TypeError: what is not a floating-point tensor, or dtypes that differ.
    """

    def __init__(self, temperature: float | Tensor = 0.1, reduction: str = "mean", negative_mode: str = "unpaired"):
        super().__init__()
        check_temperature(temperature)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
        if negative_mode not in ("unpaired", "paired"):
            raise ValueError(f"negative_mode: expected 'unpaired' or 'paired', got {negative_mode!r}")
        self.temperature, self.reduction, self.negative_mode = temperature, reduction, negative_mode

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        check_pairs(("query", query), ("positive_key", positive_key), mixed=negative_keys is not None)
        if negative_keys is not None:
            self._check_negatives(query, negative_keys)
        scale = inverse(self.temperature)
        queries, positives, *negatives = same_dtype(
            *(normalize(t) for t in (query, positive_key, negative_keys) if t is not None)
        )
        if not negatives:
            own = torch.arange(len(queries), device=queries.device)
            others = similarity_lse(queries, positives, scale, exclude=own)
        elif negatives[0].shape[-2] == 0:
            others = queries.new_full((len(queries),), -torch.inf, dtype=torch.float64)
        elif self.negative_mode == "unpaired":
            others = similarity_lse(queries, negatives[0], scale)
        else:
            with torch.autocast(query.device.type, enabled=False):
                logits = torch.bmm(negatives[0], queries[:, :, None])[:, :, 0]
            others = by_blocks(lambda block: (scale * block).double().logsumexp(1), logits)
        losses = losses_of(others, scale, row_dots(queries, positives))
        return reduce(losses, self.reduction).to(queries.dtype)

    def _check_negatives(self, query: Tensor, keys: Tensor) -> None:
        batch, dim = query.shape
        check_floating("negative_keys", keys)
        paired = self.negative_mode == "paired"
        if keys.dim() != 2 + paired or keys.shape[-1] != dim or (paired and len(keys) != batch):
            expected = f"({batch}, any, {dim})" if paired else f"(any, {dim})"
            raise ValueError(f"negative_keys: expected shape {expected}, got {tuple(keys.shape)}")
        if keys.device != query.device:
            raise ValueError(f"negative_keys: expected the device of query, {query.device}, got {keys.device}")

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, negative_mode={self.negative_mode!r}"

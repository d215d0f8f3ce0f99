"""InfoNCE with each query's own positive key."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslfast.losses._common import check_pairs, check_temperature, normalize, reduce, row_dots
from sslfast.ops.info_nce import REDUCTIONS
from sslfast.ops.similarity_lse import similarity_lse


class InfoNCE(nn.Module):
    """InfoNCE with each query's own positive key; a drop-in for `info_nce.InfoNCE` of info-nce-pytorch.

    >>> loss = InfoNCE(temperature=0.1)(query, positive_key, negative_keys)

    Args:
        temperature: positive number.
        reduction: "mean" over the queries, "sum", or "none".
        negative_mode: "unpaired": negative_keys (M, dim) are those of all queries. "paired": negative_keys (N, M, dim),
            M for each query.

    Call with query and positive_key (N, dim), and negative_keys or None: the positive keys of the other queries. All
    are L2-normalised. Negative keys that need no gradient, such as MoCo's queue, save half of the work.

    Raises:
        ValueError: a temperature that is not positive, an unknown reduction or mode, or shapes that do not fit.
    """

    def __init__(self, temperature: float = 0.1, reduction: str = "mean", negative_mode: str = "unpaired"):
        super().__init__()
        check_temperature(temperature)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
        if negative_mode not in ("unpaired", "paired"):
            raise ValueError(f"negative_mode: expected 'unpaired' or 'paired', got {negative_mode!r}")
        self.temperature, self.reduction, self.negative_mode = temperature, reduction, negative_mode

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        check_pairs(("query", query), ("positive_key", positive_key))
        scale = 1 / self.temperature
        queries, positives = normalize(query), normalize(positive_key)
        if negative_keys is None:
            own = torch.arange(len(queries), device=queries.device)
            others = similarity_lse(queries, positives, scale, exclude=own)
        elif self.negative_mode == "unpaired":
            others = similarity_lse(queries, normalize(negative_keys), scale)
        else:
            if negative_keys.dim() != 3 or negative_keys.shape[::2] != query.shape:
                expected = f"({query.shape[0]}, any, {query.shape[1]})"
                raise ValueError(f"negative_keys: expected shape {expected}, got {tuple(negative_keys.shape)}")
            with torch.autocast(query.device.type, enabled=False):
                logits = torch.bmm(normalize(negative_keys), queries[:, :, None])[:, :, 0]
            others = (scale * logits).double().logsumexp(1)
        loss = F.softplus(others - scale * row_dots(queries, positives))
        return reduce(loss, self.reduction).to(queries.dtype)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, negative_mode={self.negative_mode!r}"

"""`similarity_lse` in plain PyTorch: the truth in tests, the documentation, and what runs where there is no kernel."""

import torch
from torch import Tensor

NO_INDEX = -1  # in `exclude`


def similarity_lse(
    queries: Tensor,
    keys: Tensor | None,
    scale: float | Tensor,
    exclude: Tensor | None = None,
    key_bias: Tensor | None = None,
    columns: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(lse, lse_columns or None), both float64; see sslfast.ops.similarity_lse."""
    logits, out = _logits(queries, keys, scale, exclude, key_bias)
    return _logsumexp(logits, out, 1), _logsumexp(logits, out, 0) if columns else None


def _logits(queries, keys, scale, exclude, key_bias) -> tuple[Tensor, Tensor]:
    """(logits, which of them are left out), float64 and bool."""
    compute = torch.float64 if queries.dtype == torch.float64 else torch.float32
    queries = queries.to(compute)
    logits = scale * (queries @ (queries if keys is None else keys.to(compute)).T)
    out = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    if keys is None:
        out |= torch.eye(len(queries), dtype=torch.bool, device=logits.device)
    if exclude is not None:
        pairs = exclude.view(len(queries), -1)
        out |= torch.zeros(len(queries), logits.shape[1] + 1, dtype=torch.bool, device=logits.device).scatter_(
            1, torch.where(pairs == NO_INDEX, logits.shape[1], pairs), True
        )[:, :-1]
    if key_bias is not None:
        out |= key_bias == float("-inf")
        logits = logits + key_bias.to(logits.dtype).masked_fill(key_bias == float("-inf"), 0)
    return logits.double(), out


def _logsumexp(logits: Tensor, out: Tensor, dim: int) -> Tensor:
    """Over what is not `out`; −∞ with gradient 0 where nothing is left."""
    empty = out.all(dim)
    lse = logits.masked_fill(out & ~empty.unsqueeze(dim), float("-inf")).logsumexp(dim)
    return lse.masked_fill(empty, float("-inf"))


def similarity_lse_backward(
    queries: Tensor,
    keys: Tensor | None,
    scale: Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    exclude: Tensor | None = None,
    key_bias: Tensor | None = None,
    lse_columns: Tensor | None = None,
    grad_columns: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(grad_queries, grad_keys or None, grad_scale) for an lse that may be of a larger set; see sslfast.ops."""
    logits, out = _logits(queries, keys, scale, exclude, key_bias)
    # The gradient of logit_ij. Where nothing was summed, lse is −∞ and all of its row is left out.
    gradient = torch.exp(logits - lse[:, None]) * grad_lse[:, None]
    if lse_columns is not None and grad_columns is not None:
        gradient = gradient + torch.exp(logits - lse_columns) * grad_columns
    gradient = gradient.masked_fill(out, 0.0)
    q, k = queries.double(), (queries if keys is None else keys).double()
    grad_scale = (gradient * (q @ k.T)).sum().reshape(scale.shape).to(scale)
    grad_queries, grad_keys = scale * (gradient @ k), scale * (gradient.T @ q)
    if keys is None:
        return (grad_queries + grad_keys).to(queries.dtype), None, grad_scale
    return grad_queries.to(queries.dtype), grad_keys.to(keys.dtype), grad_scale

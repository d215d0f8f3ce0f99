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
    logits = logits.double()
    return _logsumexp(logits, out, 1), _logsumexp(logits, out, 0) if columns else None


def _logsumexp(logits: Tensor, out: Tensor, dim: int) -> Tensor:
    """Over what is not `out`; −∞ with gradient 0 where nothing is left."""
    empty = out.all(dim)
    lse = logits.masked_fill(out & ~empty.unsqueeze(dim), float("-inf")).logsumexp(dim)
    return lse.masked_fill(empty, float("-inf"))


def _share(own: Tensor, lse: Tensor) -> Tensor:
    return torch.exp((own - lse).masked_fill(lse == float("-inf"), float("-inf")))


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
    compute = torch.float64 if queries.dtype == torch.float64 else torch.float32
    q, s = queries.detach().to(compute).requires_grad_(), scale.detach().double().requires_grad_()
    k = None if keys is None else keys.detach().to(compute).requires_grad_()
    with torch.enable_grad():
        own, own_columns = similarity_lse(q, k, s, exclude, key_bias, lse_columns is not None)
        # d/dx of exp(own − lse) is Σ_j exp(l_ij − lse_i)·dl_ij/dx: nothing else depends on which lse is given.
        total = (_share(own, lse) * grad_lse).sum()
        if own_columns is not None and lse_columns is not None and grad_columns is not None:
            total = total + (_share(own_columns, lse_columns) * grad_columns).sum()
        grad_queries, grad_scale, *grad_keys = torch.autograd.grad(total, (q, s) if k is None else (q, s, k))
    return grad_queries.to(queries.dtype), grad_keys[0].to(queries.dtype) if grad_keys else None, grad_scale.to(scale)

"""similarity_lse against a float64 reference and gradcheck."""

import pytest
import torch

from sslfast.ops import similarity_lse


def vectors(rows: int, dim: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * rows + dim)
    return torch.randn(rows, dim, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("with_keys", ["keys", "fixed keys", "columns", "no keys"])
@pytest.mark.parametrize("shape", [(1, 2, 1), (5, 7, 3)], ids=str)
def test_gradcheck(shape, with_keys):
    rows, keys, dim = shape
    queries = vectors(rows, dim, torch.float64).requires_grad_()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    others = vectors(keys, dim, torch.float64, 1) if with_keys != "no keys" else None
    if with_keys in ("keys", "columns"):
        others.requires_grad_()
    bias = vectors(keys if others is not None else rows, 1, torch.float64)[:, 0]
    for exclude in (None, torch.arange(rows) % keys, torch.tensor([[-1, 1]] + [[0, 2]] * (rows - 1))):
        if rows == 1 and (others is None or exclude is not None):
            continue  # −∞ has no numerical derivative

        def f(q, s, k=others, exclude=exclude):
            return similarity_lse(q, k, s, exclude=exclude, key_bias=bias, columns=with_keys == "columns")

        inputs = (queries, scale) if others is None or not others.requires_grad else (queries, scale, others)
        assert torch.autograd.gradcheck(f, inputs)

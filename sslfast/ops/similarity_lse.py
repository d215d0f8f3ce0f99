"""The log-sum-exp of similarities, of which contrastive losses are made, without the matrix of similarities.

The formulas: csrc/ops/similarity_lse.h, or sslfast/reference/similarity_lse.py in plain PyTorch.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from sslfast import _C, reference
from sslfast.ops._check import as_tensor, check_choice, check_dense, check_floating, check_rows, check_scalar
from sslfast.ops._route import DEVICES, KERNEL, REFERENCE, has_kernel, refuse_other_derivatives, route


@overload
def similarity_lse(
    queries: Tensor,
    keys: Tensor | None,
    scale: float | Tensor,
    *,
    exclude: Tensor | None = None,
    key_bias: Tensor | None = None,
    columns: Literal[False] = False,
) -> Tensor: ...


@overload
def similarity_lse(
    queries: Tensor,
    keys: Tensor | None,
    scale: float | Tensor,
    *,
    exclude: Tensor | None = None,
    key_bias: Tensor | None = None,
    columns: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def similarity_lse(
    queries: Tensor,
    keys: Tensor | None,
    scale: float | Tensor,
    *,
    exclude: Tensor | None = None,
    key_bias: Tensor | None = None,
    columns: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """lse_i = log Σ_j exp(scale·⟨q_i, k_j⟩ + bias_j), with gradients for `queries`, `keys` and `scale`.

    The similarities are computed tile by tile and never stored. Nothing is normalised here.

    Args:
        queries: (M, D) with M ≥ 1 and D ≥ 1, float32, bfloat16, float16, or float64 on the CPU.
        keys: (N, D) with N ≥ 1, of the same dtype and device, or None: the queries against each other, in which
            j = i is left out and each similarity is computed once for both of its rows. Keys that need no gradient,
            such as MoCo's queue, save half of the work: the gradient of the queries is ready with the forward pass.
        scale: a number, or a tensor with one element, which gets a gradient.
        exclude: (M,) or (M, E), int64: the keys j that row i leaves out; −1 leaves out none.
        key_bias: (N,): log-weights of the keys; gets no gradient. −inf leaves a key out for all rows: use it to mask
            padding, which may then hold anything. (What `exclude` alone leaves out must be finite.)
        columns: also return log Σ_i exp(scale·⟨q_i, k_j⟩ + bias_j) of each key, from the same tiles; a pair that
            `exclude` names is left out of both. Not with keys=None, where it would be the same.

    Returns:
        (M,) float64, or with `columns` also (N,) float64. −inf, with gradient 0, where nothing is left to sum.

    Raises:
        TypeError: tensors of another kind, or a key_bias that asks for a gradient.
        ValueError: another shape or device, an index in `exclude` that no key has, a scale that is not finite.

    Forward mode and the transforms of torch.func (grad, jvp, jacfwd, …) run plain PyTorch, which stores the matrix. No
    second derivative otherwise.

    Two calls with the same input give the same bits, on any number of threads. Memory grows with (M + N)·D.
    """
    _check(queries, keys, scale, exclude, key_bias)
    way = route(queries, keys, scale, exclude, key_bias)
    check_choice("columns", columns, (True, False))
    if columns and keys is None:
        raise ValueError("columns: expected False with keys=None, where columns are rows")
    scale = as_tensor(scale, queries)
    if way == REFERENCE or not has_kernel(queries):
        lse, lse_columns = reference.similarity_lse.similarity_lse(queries, keys, scale, exclude, key_bias, columns)
        return (lse, lse_columns) if lse_columns is not None else lse
    # The gradient of the queries alone is ready with the forward pass.
    others = (scale,) if keys is None else (scale, keys)
    key_sum = torch.is_grad_enabled() and queries.requires_grad and not any(t.requires_grad for t in others)
    key_sum = key_sum and keys is not None and not columns
    arguments = queries, keys, scale, exclude, key_bias, columns, key_sum
    if way == KERNEL:
        return _SimilarityLse.apply(*arguments)
    lse, lse_columns, _ = torch.ops.sslfast.similarity_lse_forward(*arguments)
    return (lse, lse_columns) if columns else lse


def similarity_lse_backward(
    queries: Tensor,
    keys: Tensor | None,
    scale: float | Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    *,
    exclude: Tensor | None = None,
    key_bias: Tensor | None = None,
    lse_columns: Tensor | None = None,
    grad_columns: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(grad_queries, grad_keys or None, grad_scale) of similarity_lse for a given lse.

    With p_ij = exp(scale·⟨q_i, k_j⟩ + bias_j − lse_i), which needs not sum to 1: `lse` may be that of a larger set of
    keys of which these are a part, as when the keys of several ranks go round.

    Args:
        queries, keys, scale, exclude, key_bias: as for similarity_lse.
        lse, grad_lse: (M,), the log-sum-exp of each row and the gradient that comes in for it.
        lse_columns, grad_columns: (N,), the same of the columns; both or neither.
    """
    _check(queries, keys, scale, exclude, key_bias)
    for name, t, like in (("lse", lse, queries), ("grad_lse", grad_lse, queries)):
        _check_vector(name, t, like)
    if (lse_columns is None) != (grad_columns is None) or (lse_columns is not None and keys is None):
        raise ValueError("lse_columns, grad_columns: expected both or neither, and neither with keys=None")
    if keys is not None and lse_columns is not None and grad_columns is not None:
        _check_vector("lse_columns", lse_columns, keys)
        _check_vector("grad_columns", grad_columns, keys)
    scale = as_tensor(scale, queries)
    way = route(queries, keys, scale, lse, grad_lse, exclude, key_bias, lse_columns, grad_columns)
    if way == REFERENCE or not has_kernel(queries):
        return reference.similarity_lse.similarity_lse_backward(
            queries, keys, scale, lse, grad_lse, exclude, key_bias, lse_columns, grad_columns
        )
    arguments = queries, keys, scale, lse, grad_lse, exclude, key_bias, lse_columns, grad_columns
    given = [t for t in arguments if t is not None]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    run = _run_backward if way == KERNEL and not needs_grad else torch.ops.sslfast.similarity_lse_backward
    grad_queries, grad_keys, grad_scale = run(*arguments)
    return grad_queries, None if keys is None else grad_keys, grad_scale


def _check(queries, keys, scale, exclude, key_bias) -> None:
    check_rows(queries, queries if keys is None else keys)
    check_scalar("scale", scale, queries)
    if exclude is not None:
        check_dense("exclude", exclude)
        if exclude.dtype != torch.int64:
            raise TypeError(f"exclude: expected an int64 tensor, got {exclude.dtype}")
        if exclude.dim() not in (1, 2) or exclude.shape[0] != queries.shape[0]:
            expected = f"({queries.shape[0]},) or ({queries.shape[0]}, E)"
            raise ValueError(f"exclude: expected shape {expected}, got {tuple(exclude.shape)}")
        if exclude.device != queries.device:
            raise ValueError(f"exclude: expected the device of queries, {queries.device}, got {exclude.device}")
    if key_bias is not None:
        _check_vector("key_bias", key_bias, queries if keys is None else keys)
        if key_bias.requires_grad:
            raise TypeError("key_bias: it gets no gradient; expected a tensor that needs none (detach it)")


def _check_vector(name: str, t: Tensor, rows: Tensor) -> None:
    check_floating(**{name: t})
    if t.shape != rows.shape[:1]:
        raise ValueError(f"{name}: expected shape {tuple(rows.shape[:1])}, got {tuple(t.shape)}")
    if t.device != rows.device:
        raise ValueError(f"{name}: expected the device of the rows, {rows.device}, got {t.device}")


def _compute_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _run_forward(queries, keys, scale, exclude, key_bias, columns, key_sum):
    if exclude is not None:
        exclude = exclude.reshape(len(queries), -1)
    return _C.similarity_lse_forward(queries, keys, scale, exclude, key_bias, columns, key_sum)


def _run_backward(queries, keys, scale, lse, grad_lse, exclude, key_bias, lse_columns, grad_columns):
    if exclude is not None:
        exclude = exclude.reshape(len(queries), -1)
    return _C.similarity_lse_backward(queries, keys, scale, lse, grad_lse, exclude, key_bias, lse_columns, grad_columns)


@torch.library.custom_op("sslfast::similarity_lse_forward", mutates_args=(), device_types=DEVICES)
def _forward(
    queries: Tensor,
    keys: Tensor | None,
    scale: Tensor,
    exclude: Tensor | None,
    key_bias: Tensor | None,
    columns: bool,
    key_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, lse_columns, Σ_j p_ij·k_j); the last two are empty unless asked for."""
    return _run_forward(queries, keys, scale, exclude, key_bias, columns, key_sum)


@_forward.register_fake
def _(queries, keys, scale, exclude, key_bias, columns, key_sum):
    lse = queries.new_empty(queries.shape[0], dtype=torch.float64)
    lse_columns = lse.new_empty(keys.shape[0] if columns else 0)
    return lse, lse_columns, queries.new_empty(queries.shape if key_sum else (0,), dtype=_compute_dtype(queries))


@torch.library.custom_op("sslfast::similarity_lse_backward", mutates_args=(), device_types=DEVICES)
def _backward(
    queries: Tensor,
    keys: Tensor | None,
    scale: Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    exclude: Tensor | None,
    key_bias: Tensor | None,
    lse_columns: Tensor | None,
    grad_columns: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_queries, grad_keys, grad_scale); grad_keys is empty without keys."""
    return _run_backward(queries, keys, scale, lse, grad_lse, exclude, key_bias, lse_columns, grad_columns)


@_backward.register_fake
def _(queries, keys, scale, lse, grad_lse, exclude, key_bias, lse_columns, grad_columns):
    grad_keys = queries.new_empty(0) if keys is None else keys.new_empty(keys.shape)
    return queries.new_empty(queries.shape), grad_keys, torch.empty_like(scale)


def _save(ctx, inputs, output) -> None:
    queries, keys, scale, exclude, key_bias, ctx.columns, ctx.has_key_sum = inputs
    # With the sum of the keys at hand, backward needs no key.
    kept_keys = None if ctx.has_key_sum else keys
    ctx.save_for_backward(queries, kept_keys, scale, exclude, key_bias, *output)


def _setup_context(ctx, inputs, output) -> None:
    _save(ctx, inputs, output)
    _, lse_columns, key_sum = output
    ctx.mark_non_differentiable(key_sum, *(() if ctx.columns else (lse_columns,)))


def _gradients(ctx, run, grad_lse: Tensor, grad_columns: Tensor | None):
    queries, keys, scale, exclude, key_bias, lse, lse_columns, key_sum = ctx.saved_tensors
    if ctx.has_key_sum:
        grads = (key_sum * (grad_lse * scale).to(key_sum.dtype)[:, None]).to(queries.dtype), None, None
    else:
        columns = (lse_columns, grad_columns) if ctx.columns else (None, None)
        grads = run(queries, keys, scale, lse, grad_lse, exclude, key_bias, *columns)
    needed = ctx.needs_input_grad[:3]
    return *(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)), None, None, None, None


def _backward_of_forward(ctx, grad_lse: Tensor, grad_columns: Tensor | None, _grad_key_sum: None):
    return _gradients(ctx, torch.ops.sslfast.similarity_lse_backward, grad_lse, grad_columns)


_forward.register_autograd(_backward_of_forward, setup_context=_setup_context)
refuse_other_derivatives(_forward, _backward)


class _SimilarityLse(torch.autograd.Function):
    """The same without the dispatcher, which costs tens of microseconds a step. It returns only what has a gradient:
    autograd would make zeros as the gradients of other outputs."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _run_forward(*inputs)
        _save(ctx, inputs, output)
        return output[:2] if ctx.columns else output[0]

    @staticmethod
    def backward(ctx, grad_lse: Tensor, grad_columns: Tensor | None = None):
        if torch.is_grad_enabled():
            raise RuntimeError("similarity_lse has no second derivative: call it without create_graph=True")
        plain = route(grad_lse, grad_columns) == KERNEL
        run = _run_backward if plain else torch.ops.sslfast.similarity_lse_backward
        return _gradients(ctx, run, grad_lse, grad_columns)

"""Tensors whose memory does not hold their values, or that are of another kind: a right result or a sentence."""

import itertools
from fractions import Fraction

import pytest
import torch
from op_calls import CALLS
from torch import Tensor

from sslfast import _C
from sslfast.ops import diffusion_loss, group_norm_silu, nt_xent, rotate4, similarity_lse


def outputs(out) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def lazily_negated(t: Tensor) -> Tensor:
    return torch._neg_view(-t)


def imaginary_part(t: Tensor) -> Tensor:
    """The values of t as torch hands out the imaginary part of a conjugate: strided, and negated when it is read."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


# What has the values of t: the result is that for t.
SAME = {"negated": lazily_negated, "imaginary": imaginary_part}
# What is nothing that a kernel could take.
REFUSED = {
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor(list(t)) if t.dim() > 1 else t.to_sparse(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "meta": lambda t: t.to("meta"),
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t.bool(),
    "list": lambda t: [t.tolist()],
}


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("name", CALLS)
def test_values_that_are_computed_when_read(name, kind):
    op, inputs = CALLS[name]
    if kind == "imaginary" and any(t.dtype == torch.bfloat16 for t in inputs):
        return  # torch has no complex numbers of bfloat16
    found = outputs(op(*(SAME[kind](t) for t in inputs)))
    for a, b in zip(found, outputs(op(*inputs)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_zero_tensors(name):
    op, inputs = CALLS[name]
    for place in range(len(inputs)):
        lazy, plain = list(inputs), list(inputs)
        lazy[place] = torch._efficientzerotensor(inputs[place].shape, dtype=inputs[place].dtype)
        plain[place] = torch.zeros_like(inputs[place])
        try:
            expected = outputs(op(*plain))
        except ValueError as error:  # a temperature of 0
            with pytest.raises(ValueError, match=str(error)[:20]):
                op(*lazy)
            continue
        for a, b in zip(outputs(op(*lazy)), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name, (_, inputs) in CALLS.items() if inputs])
def test_zero_tensor_as_incoming_gradient(name):
    op, inputs = CALLS[name]
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = outputs(op(*leaves))[0]
    zero = torch._efficientzerotensor(out.shape, dtype=out.dtype)
    for gradient in torch.autograd.grad(out, leaves, zero):
        assert not gradient.any()
    for lazy, plain in zip(
        torch.autograd.grad(op_output(op, leaves), leaves, lazily_negated(torch.ones_like(out))),
        torch.autograd.grad(op_output(op, leaves), leaves, torch.ones_like(out)),
        strict=True,
    ):
        torch.testing.assert_close(lazy, plain)


def op_output(op, leaves) -> Tensor:
    return outputs(op(*leaves))[0]


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", CALLS)
def test_refused_with_a_sentence(name, kind):
    op, inputs = CALLS[name]
    for place in range(len(inputs)):
        if kind == "bool" and name == "rotate4":
            continue
        odd = list(inputs)
        odd[place] = REFUSED[kind](inputs[place])
        if kind == "meta" and all(t.dim() == 0 for t in inputs[:place] + inputs[place + 1 :]):
            continue  # all is on meta, where shapes are computed, or numbers
        with pytest.raises((TypeError, ValueError), match=r"^\w+( of \w+)?: expected"):
            op(*odd)


Z, X, NUMBER = torch.randn(4, 6), torch.randn(2, 3, 4, 4), torch.tensor(0.5)
STATISTICS, GRADIENT, T = torch.ones(2, 3), torch.randn(4, 3, 4, 4), torch.arange(2)
# function of the extension, arguments, and which of them are made odd
EXTENSION = {
    "nt_xent": ((Z, Z, NUMBER, "mean"), (0, 1, 2)),
    "similarity_lse_forward": ((Z, Z, NUMBER, None, torch.zeros(4), False, False), (0, 1, 2, 4)),
    "sigmoid_loss_forward": ((Z, Z, NUMBER, NUMBER, 0, True), (0, 1, 2, 3)),
    "group_norm_silu_forward": ((X, 3, torch.ones(3), torch.ones(3), 1e-5), (0, 2, 3)),
    "group_norm_silu_backward": ((X, X, 3, None, None, STATISTICS, STATISTICS), (0, 1, 5, 6)),
    "rotate4_forward": ((X,), (0,)),
    "rotate4_backward": ((GRADIENT,), (0,)),
    "diffusion_loss_forward": ((X, X, T, torch.rand(5), "epsilon", None), (0, 1, 3)),
    "diffusion_loss_backward": ((torch.ones(2), X, X, T, torch.rand(5), "epsilon", None), (0, 1, 2, 4)),
    "diffusion_step": ((X, X, torch.rand(12), None, None, [X], X, None, "fixed"), (0, 1, 2, 6)),
    "diffusion_q_sample": ((X, T, torch.rand(5), "epsilon", X, None, 0), (0, 2, 4)),
}
ODD = {
    "negated": lazily_negated,
    "zero": lambda t: torch._efficientzerotensor(t.shape),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", EXTENSION)
def test_extension_refuses_what_the_dispatcher_would_have_computed(name, kind):
    arguments, places = EXTENSION[name]
    getattr(_C, name)(*arguments)
    for place in places:
        odd = [*arguments[:place], ODD[kind](arguments[place]), *arguments[place + 1 :]]
        with pytest.raises((TypeError, ValueError), match=": expected"):
            getattr(_C, name)(*odd)


def test_keys_left_out_by_a_bias_may_hold_anything():
    """Padding of torch.empty: neither result nor gradients of the others know of it."""
    torch.manual_seed(0)
    for dtype, rest, bad in itertools.product(
        (torch.float32, torch.bfloat16, torch.float64), (0, 100), (float("nan"), float("inf"))
    ):
        q, k = torch.randn(5, 4).to(dtype), torch.randn(7 + rest, 4).to(dtype)
        bias = torch.zeros(7 + rest)
        bias[3] = -torch.inf
        results = []
        for value in (0.0, bad):
            padded = k.clone()
            padded[3] = value
            leaves = [q.clone().requires_grad_(), padded.requires_grad_(), torch.tensor(0.5).requires_grad_()]
            lse = similarity_lse(*leaves, key_bias=bias)
            results.append([lse.detach(), *torch.autograd.grad(lse.sum(), leaves)])
            results[-1].append(similarity_lse(q, padded.detach(), 0.5, key_bias=bias, columns=True)[0])
        for a, b in zip(*results, strict=True):
            assert torch.isfinite(a).all()
            assert torch.equal(a, b)


def test_rows_left_out_by_a_bias_without_keys():
    torch.manual_seed(0)
    z = torch.randn(9, 4)
    bias = torch.zeros(9)
    bias[[2, 5]] = -torch.inf  # of which 2 is broken, and 5 is only left out as a key
    broken = z.clone()
    broken[2] = torch.nan
    results = []
    for rows in (z, broken):
        leaf = rows.clone().requires_grad_()
        lse = similarity_lse(leaf, None, 0.7, key_bias=bias)
        others = torch.arange(9) != 2
        results.append((lse.detach()[others], torch.autograd.grad(lse[others].sum(), leaf)[0][others]))
    torch.testing.assert_close(results[0], results[1])
    assert similarity_lse(broken, None, 0.7, key_bias=bias)[2].isnan()


def test_norms_that_overflow_are_as_in_torch():
    """‖z‖² beyond float32: F.normalize gives 0, in every dtype and size; values that are not finite give NaN."""
    torch.manual_seed(0)
    for dtype, batch in itertools.product((torch.float32, torch.bfloat16), (4, 130)):
        for large in (1e19, 3e20):
            z = (torch.randn(2 * batch, 16) * large).to(dtype)
            leaf = z.clone().requires_grad_()
            loss = nt_xent(leaf[:batch], leaf[batch:], 0.5)
            wide = torch.nn.functional.normalize(z.float(), dim=1)
            logits = (wide @ wide.T / 0.5).fill_diagonal_(-torch.inf)
            expected = torch.nn.functional.cross_entropy(logits, torch.arange(2 * batch).roll(batch))
            torch.testing.assert_close(loss.detach(), expected, rtol=1e-3, atol=1e-3)
            assert torch.autograd.grad(loss, leaf)[0].isfinite().all()
        z[1] = torch.inf
        assert nt_xent(z[:batch], z[batch:], 0.5).isnan()


def test_numbers_at_the_edge():
    z = torch.randn(4, 6)
    for temperature in (1e-42, 1e-310, 5e-324, float("inf"), float("nan"), 0.0, -1.0, 10**400):
        with pytest.raises(ValueError, match=r"^temperature: expected a"):
            nt_xent(z, z, temperature)
    for temperature in (torch.tensor(1e-42), torch.tensor(float("nan")), torch.tensor(0.0)):
        with pytest.raises(ValueError, match=r"^temperature: expected a"):
            nt_xent(z, z, temperature)
    assert nt_xent(z.double(), z.double(), 1e-42).isfinite()
    assert torch.equal(nt_xent(z, z, Fraction(1, 2)), nt_xent(z, z, 0.5))
    for scale in (torch.tensor(float("inf")), torch.tensor(float("nan")), 1e39, float("inf"), 10**400):
        with pytest.raises(ValueError, match=r"^scale: expected"):
            similarity_lse(z, z, scale)
    x = torch.randn(2, 4, 3)
    for eps in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^eps: expected"):
            group_norm_silu(x, 2, eps=eps)
        with pytest.raises(ValueError, match=r"^eps: expected"):
            torch.ops.sslfast.group_norm_silu_forward(x, 2, None, None, eps)
    for wrong in ("1", [1.0]):
        with pytest.raises(TypeError, match=r"^eps: expected a number"):
            group_norm_silu(x, 2, eps=wrong)
        with pytest.raises(TypeError, match=r"^snr_gamma: expected a number"):
            diffusion_loss(x, x, torch.arange(2), torch.rand(5), snr_gamma=wrong)


def test_empty_batches_of_the_extension():
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 0)):
        x = torch.randn(shape)
        rotated, labels = _C.rotate4_forward(x)
        assert (tuple(rotated.shape), labels.tolist()) == ((4 * shape[0], *shape[1:]), sorted([*range(4)] * shape[0]))
        assert _C.rotate4_backward(rotated).shape == x.shape
        assert all(torch.equal(a, b) for a, b in zip(rotate4(x), (rotated, labels), strict=True))

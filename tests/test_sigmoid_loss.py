"""sigmoid_loss against its reference in float64 and gradcheck, on every instruction set of this machine and CUDA."""

import math
import subprocess
import sys

import cuda_emulation
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslfast import reference
from sslfast.ops import sigmoid_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Around the padding (32) and the blocks (64, 128, 256); (rows, keys, dim, first_key).
SHAPES = [
    (1, 1, 1, 0),
    (3, 7, 5, 2),
    (33, 65, 40, 0),
    (70, 300, 33, 90),
    (300, 100, 520, -150),
    (600, 40, 16, 20),
    (257, 700, 64, 650),
]

# Relative error (norm of the difference over norm). With bfloat16 and float16 data, the gradients' weights are rounded.
LOSS_TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRAD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 6e-4}


def vectors(rows: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * rows + dim)
    return (torch.randn(rows, dim, generator=generator, dtype=torch.float64) / dim**0.25).to(dtype)


def results(function, queries: Tensor, keys: Tensor, scale: float, bias: float, first_key: int) -> list[Tensor]:
    """The loss and the gradients of queries, keys, scale and bias."""
    scalars = (torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (scale, bias))
    leaves = [queries.clone().requires_grad_(), keys.clone().requires_grad_(), *scalars]
    loss = function(*leaves, first_key=first_key)
    (0.7 * loss).backward()
    return [loss.detach(), *(t.grad for t in leaves)]


def check(shape, dtype, scale, bias) -> None:
    rows, count, dim, first_key = shape
    queries, keys = vectors(rows, dim, dtype), vectors(count, dim, dtype, 1)
    actual = results(sigmoid_loss, queries, keys, scale, bias, first_key)
    expected = results(reference.sigmoid_loss.sigmoid_loss, queries.double(), keys.double(), scale, bias, first_key)
    assert [t.dtype for t in actual] == [torch.float64, dtype, dtype, torch.float64, torch.float64]
    loose = max(1.0, abs(scale) / 10)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        table = GRAD_TOLERANCE if number in (1, 2) else LOSS_TOLERANCE
        size = e.norm().item()
        if number > 2:  # sums over pairs with and without their own key, in which much may cancel
            size = max(size, min(rows, count))
        assert (a.double() - e).norm().item() <= table[dtype] * loose * max(size, 1e-30), (number, a, e)
    with torch.no_grad():
        assert torch.equal(sigmoid_loss(queries, keys, scale, bias, first_key=first_key), actual[0])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
def test_equals_float64_reference(backend, dtype, shape):
    if backend == "cuda-emulated":  # a few tiles each way, or several slices of columns
        small = {300: (130, 70, 520, -40), 600: (300, 40, 16, 20), 257: (70, 300, 64, 290)}
        shape = small.get(shape[0], shape)
    check(shape, dtype, 3.0, -2.0)


@pytest.mark.parametrize(("scale", "bias"), [(0.0, -10.0), (-2.0, 0.0), (10.0, -10.0), (100.0, -15.0), (1.0, 60.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).split(".")[1])
def test_scales(backend, dtype, scale, bias):
    check((40, 90, 24, 20), dtype, scale, bias)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 150), st.integers(1, 100)),
    first_key=st.integers(-200, 200),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(sizes, first_key, dtype):
    check((*sizes, first_key), dtype, 2.0, -3.0)


def test_small_losses_keep_their_digits(backend):
    """1 + exp(−20) is 1 in float32, and so is a thousandfold product of it in bits of rounding."""
    eye = torch.eye(40, 64)
    expected = reference.sigmoid_loss.sigmoid_loss(eye.double(), eye.double(), 40.0, -20.0)
    assert expected < 1e-5
    assert sigmoid_loss(eye, eye, 40.0, -20.0).item() == pytest.approx(expected.item(), rel=2e-5)


@pytest.mark.parametrize("first_key", [5, -5, 2**40, -(2**40)])
def test_no_row_has_its_own_key(backend, first_key):
    queries, keys = vectors(5, 8, torch.float32), vectors(5, 8, torch.float32, 1)
    expected = torch.nn.functional.softplus((2 * queries @ keys.T + 1).double()).sum()
    torch.testing.assert_close(sigmoid_loss(queries, keys, 2.0, 1.0, first_key=first_key), expected, rtol=1e-6, atol=0)


def test_keys_in_blocks_add_up(backend):
    """As over the keys of several ranks."""
    queries, keys = vectors(50, 20, torch.float32), vectors(90, 20, torch.float32, 1)
    whole = results(sigmoid_loss, queries, keys, 2.0, -1.0, 20)
    blocks = zip(keys.split(30), (20, -10, -40), strict=True)
    parts = [results(sigmoid_loss, queries, block, 2.0, -1.0, first_key) for block, first_key in blocks]
    together = [sum(of_parts) for of_parts in zip(*((*part[:2], *part[3:]) for part in parts), strict=True)]
    together.insert(2, torch.cat([part[2] for part in parts]))
    for a, e in zip(together, whole, strict=True):
        assert (a - e).norm() <= 1e-5 * max(e.norm().item(), 50)


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (5, 7, 3, -2), (4, 4, 2, 0)], ids=str)
def test_gradcheck(cpu_capability, shape):
    rows, count, dim, first_key = shape
    inputs = vectors(rows, dim, torch.float64), vectors(count, dim, torch.float64, 1)
    inputs = *inputs, torch.tensor(1.5).double(), torch.tensor([-0.5]).double()
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: sigmoid_loss(*t, first_key=first_key), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).split(".")[1])
def test_same_bits_on_any_number_of_threads(cpu_capability, dtype):
    before = torch.get_num_threads()
    queries, keys = vectors(300, 40, dtype), vectors(700, 40, dtype, 1)
    found = []
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        found.append(results(sigmoid_loss, queries, keys, 3.0, -2.0, 350))
    torch.set_num_threads(before)
    for result in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], result, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_propagate(backend, bad):
    queries, keys = vectors(40, 33, torch.float32), vectors(70, 33, torch.float32, 1)
    queries[7, 3] = bad
    loss, grad_queries, grad_keys, *_ = results(sigmoid_loss, queries, keys, 2.0, -1.0, 0)
    assert not loss.isfinite()
    assert not grad_keys.isfinite().all()
    assert grad_queries[8:].isfinite().all()


def test_scalars_of_any_kind():
    queries, keys = vectors(9, 8, torch.float32), vectors(9, 8, torch.float32, 1)
    scale = torch.nn.Parameter(torch.full((1,), 2.0))
    loss = sigmoid_loss(queries, keys, scale, -1)
    assert loss == sigmoid_loss(queries, keys, 2, torch.tensor(-1.0))
    loss.backward()
    assert scale.grad.shape == (1,)
    assert scale.grad.dtype == torch.float32


def test_only_some_need_gradients():
    queries, keys = vectors(9, 8, torch.float32), vectors(9, 8, torch.float32, 1)
    every = results(sigmoid_loss, queries, keys, 2.0, -1.0, 0)
    leaf = keys.clone().requires_grad_()
    (0.7 * sigmoid_loss(queries, leaf, 2.0, -1.0)).backward()
    assert torch.equal(leaf.grad, every[2])
    assert not sigmoid_loss(queries, keys, 2.0, -1.0).requires_grad


def test_inputs_that_are_not_contiguous(backend):
    queries, keys = vectors(24, 20, torch.float32), vectors(48, 20, torch.float32, 1)
    expected = sigmoid_loss(queries[:, ::2].contiguous(), keys[:, ::2].contiguous(), 2.0, -1.0)
    assert torch.equal(sigmoid_loss(queries[:, ::2], keys[:, ::2], 2.0, -1.0), expected)


# Bad arguments

Q, K = torch.randn(4, 8), torch.randn(5, 8)
BAD_CALLS = {
    "list": ((Q.tolist(), K, 1.0), TypeError, "queries: expected a tensor, got list"),
    "no keys": ((Q, None, 1.0), TypeError, "keys: expected a tensor, got NoneType"),
    "integers": ((Q, K.long(), 1.0), TypeError, "keys: expected float32, .* got torch.int64"),
    "1-D": ((Q[0], K, 1.0), ValueError, r"queries: expected shape \(rows, dim\)"),
    "empty": ((Q, K[:0], 1.0), ValueError, "keys: expected at least one row and one column"),
    "dim": ((Q, K[:, :5], 1.0), ValueError, r"keys: expected 8 columns, as queries, got shape \(5, 5\)"),
    "dtype": ((Q, K.double(), 1.0), TypeError, "keys: expected the dtype of queries"),
    "device": ((Q, K.to("meta"), 1.0), ValueError, "keys: expected the device of queries, cpu, got meta"),
    "nan scale": ((Q, K, math.nan), ValueError, "scale: expected a finite number, got nan"),
    "biases": ((Q, K, 1.0, torch.ones(2)), ValueError, "bias: expected one element"),
    "text bias": ((Q, K, 1.0, "1"), TypeError, "bias: expected a number, got str"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments(name):
    args, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        sigmoid_loss(*args)


def test_bad_first_key():
    with pytest.raises(TypeError, match="first_key: expected an int, got float"):
        sigmoid_loss(Q, K, 1.0, first_key=1.0)


def test_second_derivative_is_refused():
    queries = Q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="sigmoid_loss has no second derivative"):
        torch.autograd.grad(sigmoid_loss(queries, K, 1.0), queries, create_graph=True)


# torch's machinery


def test_opcheck():
    queries, keys = vectors(5, 3, torch.float32).requires_grad_(), vectors(7, 3, torch.float32, 1).requires_grad_()
    scale, bias = (torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (1.5, -1.0))
    torch.library.opcheck(torch.ops.sslfast.sigmoid_loss_forward, (queries, keys, scale, bias, 1, True))


def test_the_short_way_gives_the_bits_of_the_custom_op():
    def op(*leaves, first_key):
        return torch.ops.sslfast.sigmoid_loss_forward(*leaves, first_key, True)[0]

    inputs = vectors(50, 20, torch.bfloat16), vectors(30, 20, torch.bfloat16, 1), 2.0, -1.0, 3
    for a, b in zip(results(sigmoid_loss, *inputs), results(op, *inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_compile():
    torch._dynamo.reset()
    compiled = torch.compile(sigmoid_loss, fullgraph=True)
    inputs = vectors(12, 8, torch.float32), vectors(20, 8, torch.float32, 1), 2.0, -1.0, 4
    for a, e in zip(results(compiled, *inputs), results(sigmoid_loss, *inputs), strict=True):
        torch.testing.assert_close(a, e)


def test_other_devices_run_the_reference():
    assert sigmoid_loss(torch.empty(6, 5, device="meta"), torch.empty(4, 5, device="meta"), 1.0).shape == ()


def test_no_quadratic_memory():
    """8192 × 16384 in float32 would be 512 MiB; the whole step stays far below."""
    script = """
import resource, torch
from sslfast.ops import sigmoid_loss
q, k = torch.randn(8192, 64, requires_grad=True), torch.randn(16384, 64, requires_grad=True)
sigmoid_loss(q[:64], k[:64], 0.1).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sigmoid_loss(q, k, 0.1).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150 * 1024  # KiB


# What only the CUDA kernels have


def test_same_bits_in_any_order_of_threads(emulator):
    queries, keys = vectors(140, 40, torch.bfloat16), vectors(150, 40, torch.bfloat16, 1)
    found = []
    for order in cuda_emulation.ORDERS:
        emulator.set_order(order)
        found.append(results(sigmoid_loss, queries, keys, 3.0, -2.0, 70))
    for result in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], result, strict=True))


@cuda_emulation.on_cuda
def test_tf32_is_an_option(backend):
    """With it float32 is rounded as to tf32, without it a number is the sum of two float16 numbers."""
    queries, keys = vectors(70, 40, torch.float32), vectors(150, 40, torch.float32, 1)
    expected = results(reference.sigmoid_loss.sigmoid_loss, queries.double(), keys.double(), 3.0, -2.0, 60)
    errors = {}
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            actual = results(sigmoid_loss, queries, keys, 3.0, -2.0, 60)
            errors[allowed] = [((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert max(errors[False]) < 5e-6
    assert 1e-5 < max(errors[True]) < 2e-3

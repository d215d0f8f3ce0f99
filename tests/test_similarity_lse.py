"""similarity_lse against its reference in float64 and gradcheck, on every instruction set of this machine and CUDA."""

import math
import subprocess
import sys

import cuda_emulation
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslfast import reference
from sslfast.ops import similarity_lse, similarity_lse_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MODES = ["keys", "fixed keys", "columns", "no keys"]

# Around the padding (32) and the blocks (64, 128, 256); the last ones take several blocks, groups or segments.
SHAPES = [(1, 1, 1), (3, 7, 5), (33, 65, 40), (70, 300, 33), (300, 100, 520), (1100, 40, 16), (257, 700, 64)]

# Relative error (norm of the difference over norm). Gradients are rounded to the dtype, and with bfloat16 products the
# weights are too.
LSE_TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
GRAD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 6e-4}
SCALE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def vectors(rows: int, dim: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * rows + dim)
    return (torch.randn(rows, dim, generator=generator, dtype=torch.float64) / dim**0.25).to(dtype)


def problem(shape: tuple[int, int, int], dtype: torch.dtype, mode: str, exclude: int = 0, bias: bool = False):
    """(queries, keys or None, keyword arguments)."""
    rows, count, dim = shape
    queries = vectors(rows, dim, dtype)
    keys = None if mode == "no keys" else vectors(count, dim, dtype, 1)
    count = rows if keys is None else count
    options = {}
    if exclude:
        generator = torch.Generator().manual_seed(exclude)
        options["exclude"] = torch.randint(-1, count, (rows, exclude), generator=generator)
    if bias:
        options["key_bias"] = vectors(count, 1, torch.float64, 2)[:, 0]
        if count > 2:
            options["key_bias"][1] = -math.inf
    return queries, keys, options


def results(function, queries, keys, scale, mode: str, **options) -> list[torch.Tensor]:
    """lse, that of the columns if asked for, and the gradients of queries, scale and keys, if they get one."""
    queries, scale = queries.clone().requires_grad_(), torch.tensor(scale, dtype=torch.float64)
    scale.requires_grad_(mode != "fixed keys")
    if keys is not None:
        keys = keys.clone().requires_grad_(mode != "fixed keys")
    out = function(queries, keys, scale, columns=mode == "columns", **options)
    out = [t for t in out if t is not None] if isinstance(out, tuple) else [out]
    weights = [torch.linspace(-1, 2, len(t), dtype=torch.float64) for t in out]
    sum((t.masked_fill(t == -math.inf, 0) * w).sum() for t, w in zip(out, weights, strict=True)).backward()
    grads = [t.grad for t in (queries, scale, keys) if t is not None and t.requires_grad]
    return [t.detach() for t in out] + grads


def terms(vectors: torch.Tensor, results: int, scale: float) -> float:
    """The size of the gradient of `results` vectors, to each of which all `vectors` go in with their weights / results;
    what cancels in the sums is rounded all the same."""
    weights = torch.linspace(-1, 2, len(vectors), dtype=torch.float64)[:, None]
    return scale * (weights * vectors).norm().item() / results**0.5


def check(shape, dtype, mode, scale, exclude=0, bias=False) -> None:
    queries, keys, options = problem(shape, dtype, mode, exclude, bias)
    actual = results(similarity_lse, queries, keys, scale, mode, **options)
    double = (queries.double(), None if keys is None else keys.double())
    expected = results(reference.similarity_lse.similarity_lse, *double, scale, mode, **options)
    lses = 2 if mode == "columns" else 1
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        grad = number - lses  # 0: queries, 1: scale, 2: keys
        table = LSE_TOLERANCE if grad < 0 else SCALE_TOLERANCE if grad == 1 and scale != 0 else GRAD_TOLERANCE
        finite = e.isfinite()
        assert torch.equal(a.isfinite(), finite)
        assert torch.equal(a[~finite].double(), e[~finite])
        error = (a.double() - e)[finite].norm().item()
        size = e[finite].norm().item()
        if grad < 0:  # a logarithm near 0 has the absolute error of its argument
            size = max(size, len(e) ** 0.5)
        elif grad == 1:  # a sum over rows and columns in which much cancels
            size = sum(map(len, expected[:lses]))
        elif grad == 2:
            size = max(size, terms(double[0], len(e), scale))
        elif mode == "columns":
            size = max(size, terms(double[1], len(e), scale))
        tolerance = table[dtype]
        if grad in (0, 2) and e.numel() < 16:  # too few to average the roundings of the weights and of the result
            tolerance = max(tolerance, torch.finfo(dtype).eps)
        assert error <= tolerance * max(1, scale / 10) * max(size, 1e-3), (number, error, size)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
def test_equals_float64_reference(backend, dtype, shape, mode):
    if backend == "cuda-emulated":  # a few tiles each way, or several slices of columns
        shape = {300: (130, 70, 520), 1100: (300, 40, 16), 257: (70, 300, 64)}.get(shape[0], shape)
    check(shape, dtype, mode, 3.0, exclude=2, bias=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [0.0, -2.0, 14.3, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).split(".")[1])
def test_scales(backend, dtype, scale, mode):
    check((40, 90, 24), dtype, mode, scale, exclude=1)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 150), st.integers(1, 150), st.integers(1, 100)),
    dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(MODES),
    exclude=st.integers(0, 3),
    bias=st.booleans(),
)
def test_any_shape(shape, dtype, mode, exclude, bias):
    check(shape, dtype, mode, 2.0, exclude, bias)


@pytest.mark.parametrize("mode", MODES)
def test_many_segments_and_groups(backend, mode):
    emulated = backend == "cuda-emulated"
    check((130, 600 if emulated else 9000, 8), torch.float32, "columns" if mode == "no keys" else mode, 2.0)
    check((600 if emulated else 2500, 300, 8), torch.float32, mode, 2.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 2, 1), (5, 7, 3)], ids=str)
def test_gradcheck(cpu_capability, shape, mode):
    rows, count, dim = shape
    queries = vectors(rows, dim, torch.float64).requires_grad_()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=mode != "fixed keys")
    keys = vectors(count, dim, torch.float64, 1) if mode != "no keys" else None
    if mode in ("keys", "columns"):
        keys.requires_grad_()
    bias = vectors(count if keys is not None else rows, 1, torch.float64)[:, 0]
    for exclude in (None, torch.arange(rows) % count, torch.tensor([[-1, 1]] + [[0, 2]] * (rows - 1))):
        if rows == 1 and (keys is None or exclude is not None):
            continue  # −∞ has no numerical derivative

        def f(q, s, k=keys, exclude=exclude):
            return similarity_lse(q, k, s, exclude=exclude, key_bias=bias, columns=mode == "columns")

        inputs = (queries, scale) if keys is None or not keys.requires_grad else (queries, scale, keys)
        assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).split(".")[1])
def test_same_bits_on_any_number_of_threads(cpu_capability, dtype, mode):
    before = torch.get_num_threads()
    found = []
    queries, keys, options = problem((300, 700, 40), dtype, mode, 2)
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        found.append(results(similarity_lse, queries, keys, 3.0, mode, **options))
    torch.set_num_threads(before)
    for result in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], result, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_left_to_sum(backend, mode):
    """−∞ and no gradient; the other rows go on."""
    queries, keys, _ = problem((6, 4, 8), torch.float32, mode)
    count = 6 if keys is None else 4
    exclude = torch.full((6, count), -1)
    exclude[2] = torch.arange(count)
    queries.requires_grad_()
    found = similarity_lse(queries, keys, 2.0, exclude=exclude, columns=mode == "columns")
    lse = found[0] if mode == "columns" else found
    assert lse[2] == -math.inf
    assert lse.isfinite().sum() == 5
    lse.sum().backward()
    assert queries.grad.isfinite().all()
    if keys is not None:
        assert (queries.grad[2] == 0).all()
    masked = similarity_lse(queries.detach(), keys, 2.0, key_bias=torch.full((count,), -math.inf))
    assert (masked == -math.inf).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_propagate(backend, mode, bad):
    queries, keys, options = problem((40, 70, 33), torch.float32, mode)
    queries[7, 3] = bad
    lse, *_ = found = results(similarity_lse, queries, keys, 2.0, mode, **options)
    assert not lse[7].isfinite()
    assert found[-1 if mode == "fixed keys" else -2 if mode == "columns" else 1].isnan().any()


def test_not_normalised_and_far_apart(backend):
    """Rows whose largest logits differ by thousands: each has its own maximum."""
    queries = vectors(50, 20, torch.float32) * torch.logspace(-3, 3, 50)[:, None]
    keys = vectors(80, 20, torch.float32, 1)
    actual = similarity_lse(queries, keys, 10.0, columns=True)
    expected = reference.similarity_lse.similarity_lse(queries.double(), keys.double(), 10.0, columns=True)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-6, atol=1e-6)


def test_backward_for_a_given_lse(backend):
    """Keys in two halves, with the lse of all: the gradients add up."""
    queries, keys, _ = problem((50, 90, 20), torch.float32, "keys")
    scale = torch.tensor(2.0)
    grad = torch.linspace(-1, 1, 50).double()
    lse = similarity_lse(queries, keys, scale)
    whole = similarity_lse_backward(queries, keys, scale, lse, grad)
    halves = [similarity_lse_backward(queries, keys[part], scale, lse, grad) for part in (slice(40), slice(40, None))]
    together = [halves[0][0] + halves[1][0], torch.cat([halves[0][1], halves[1][1]]), halves[0][2] + halves[1][2]]
    for a, e in zip(together, whole, strict=True):
        assert (a - e).norm() <= 1e-5 * e.norm()


def test_reference_backward_is_the_op():
    queries, keys, options = problem((20, 30, 8), torch.float64, "columns", 1, True)
    lse = [t * 1.1 for t in similarity_lse(queries, keys, 2.0, columns=True, **options)]
    grads = [torch.randn_like(t) for t in lse]
    args = (queries, keys, torch.tensor(2.0, dtype=torch.float64), lse[0], grads[0])
    options |= {"lse_columns": lse[1], "grad_columns": grads[1]}
    ours = similarity_lse_backward(*args, **options)
    for a, e in zip(ours, reference.similarity_lse.similarity_lse_backward(*args, **options), strict=True):
        torch.testing.assert_close(a, e)


# Bad arguments

Q, K = torch.randn(4, 8), torch.randn(5, 8)
BAD_CALLS = {
    "list": ((Q.tolist(), K, 1.0), {}, TypeError, "queries: expected a tensor, got list"),
    "integers": ((Q, K.long(), 1.0), {}, TypeError, "keys: expected float32, .* got torch.int64"),
    "1-D": ((Q[0], K, 1.0), {}, ValueError, r"queries: expected shape \(rows, dim\)"),
    "empty": ((Q, K[:0], 1.0), {}, ValueError, "keys: expected at least one row and one column"),
    "dim": ((Q, K[:, :5], 1.0), {}, ValueError, r"keys: expected 8 columns, as queries, got shape \(5, 5\)"),
    "dtype": ((Q, K.double(), 1.0), {}, TypeError, "keys: expected the dtype of queries"),
    "device": ((Q, K.to("meta"), 1.0), {}, ValueError, "keys: expected the device of queries, cpu, got meta"),
    "nan scale": ((Q, K, math.nan), {}, ValueError, "scale: expected a finite number, got nan"),
    "text scale": ((Q, K, "1"), {}, TypeError, "scale: expected a number, got str"),
    "scales": ((Q, K, torch.ones(2)), {}, ValueError, "scale: expected one element"),
    "exclude dtype": ((Q, K, 1.0), {"exclude": torch.zeros(4)}, TypeError, "exclude: expected an int64 tensor"),
    "exclude shape": ((Q, K, 1.0), {"exclude": torch.zeros(5).long()}, ValueError, "exclude: expected shape"),
    "exclude 5": ((Q, K, 1.0), {"exclude": torch.full((4,), 5)}, ValueError, "exclude: .* from 0 to 4.* got 5"),
    "exclude -2": ((Q, K, 1.0), {"exclude": torch.full((4,), -2)}, ValueError, "exclude: .* got -2"),
    "bias shape": ((Q, K, 1.0), {"key_bias": torch.zeros(4)}, ValueError, r"key_bias: expected shape \(5,\)"),
    "bias grad": ((Q, K, 1.0), {"key_bias": torch.zeros(5, requires_grad=True)}, TypeError, "key_bias: .*no gradient"),
    "columns": ((Q, None, 1.0), {"columns": True}, ValueError, "columns: expected False"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments(name):
    args, kwargs, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        similarity_lse(*args, **kwargs)


def test_second_derivative_is_refused():
    queries = Q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="similarity_lse has no second derivative"):
        torch.autograd.grad(similarity_lse(queries, K, 1.0).sum(), queries, create_graph=True)


# torch's machinery


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode):
    queries, keys, options = problem((5, 7, 3), torch.float32, mode, 1, True)
    queries.requires_grad_()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=mode != "fixed keys")
    if keys is not None:
        keys.requires_grad_(mode != "fixed keys")
    options = (options["exclude"], options["key_bias"].nan_to_num(neginf=-5))
    args = (queries, keys, scale, *options, mode == "columns", mode == "fixed keys")
    torch.library.opcheck(torch.ops.sslfast.similarity_lse_forward, args)
    args = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    lse, lse_columns, _ = torch.ops.sslfast.similarity_lse_forward(*args)
    columns = (lse_columns, torch.ones_like(lse_columns)) if mode == "columns" else (None, None)
    args = (*args[:3], lse, torch.ones_like(lse), *options, *columns)
    torch.library.opcheck(torch.ops.sslfast.similarity_lse_backward, args)


def test_the_short_way_gives_the_bits_of_the_custom_op():
    queries, keys, _ = problem((50, 30, 20), torch.float32, "keys")

    def op(q, k, s, columns):
        return torch.ops.sslfast.similarity_lse_forward(q, k, s, None, None, columns, False)[:2]

    for mode in ("keys", "columns"):
        short = results(similarity_lse, queries, keys, 2.0, mode)
        long = results(op, queries, keys, 2.0, mode)
        long = long if mode == "columns" else [long[0], *long[2:]]
        assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compile(mode):
    torch._dynamo.reset()
    queries, keys, options = problem((12, 20, 8), torch.float32, mode, 1, True)
    compiled = torch.compile(similarity_lse, fullgraph=True)
    actual = results(compiled, queries, keys, 2.0, mode, **options)
    for a, e in zip(actual, results(similarity_lse, queries, keys, 2.0, mode, **options), strict=True):
        torch.testing.assert_close(a, e)


def test_other_devices_run_the_reference():
    queries = torch.empty(6, 5, device="meta")
    assert similarity_lse(queries, None, 1.0).shape == (6,)


def test_inputs_that_are_not_contiguous():
    queries, keys, _ = problem((24, 48, 20), torch.float32, "keys")
    expected = similarity_lse(queries[:, ::2].contiguous(), keys[:, ::2].contiguous(), 2.0)
    assert torch.equal(similarity_lse(queries[:, ::2], keys[:, ::2], 2.0), expected)
    exclude = torch.arange(48).view(24, 2)
    expected = similarity_lse(queries, keys, 2.0, exclude=exclude[:, 1].contiguous())
    assert torch.equal(similarity_lse(queries, keys, 2.0, exclude=exclude[:, 1]), expected)


def test_no_quadratic_memory():
    """8192 × 16384 in float32 would be 512 MiB; the whole step stays far below."""
    script = """
import resource, torch
from sslfast.ops import similarity_lse
q, k = torch.randn(8192, 64, requires_grad=True), torch.randn(16384, 64, requires_grad=True)
similarity_lse(q[:64], k[:64], 0.1).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sum(t.sum() for t in similarity_lse(q, k, 0.1, columns=True)).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150 * 1024  # KiB


# What only the CUDA kernels have


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_in_any_order_of_threads(emulator, mode):
    queries, keys, options = problem((140, 150, 40), torch.bfloat16, mode, 2)
    found = []
    for order in cuda_emulation.ORDERS:
        emulator.set_order(order)
        found.append(results(similarity_lse, queries, keys, 3.0, mode, **options))
    for result in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], result, strict=True))


@cuda_emulation.on_cuda
@pytest.mark.parametrize("mode", MODES)
def test_tf32_is_an_option(backend, mode):
    """With it float32 is rounded as to tf32, without it a number is the sum of two float16 numbers."""
    queries, keys, options = problem((70, 150, 40), torch.float32, mode, 2, bias=True)
    double = (queries.double(), None if keys is None else keys.double())
    expected = results(reference.similarity_lse.similarity_lse, *double, 3.0, mode, **options)
    errors = {}
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            actual = results(similarity_lse, queries, keys, 3.0, mode, **options)
            pairs = [(a[e.isfinite()], e[e.isfinite()]) for a, e in zip(actual, expected, strict=True)]
            errors[allowed] = [((a - e).norm() / e.norm()).item() for a, e in pairs]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert max(errors[False]) < 5e-6
    assert 1e-5 < max(errors[True]) < 2e-3


def test_more_elements_than_fit_an_int(emulator):
    """The blocks at the corners of each grid: the last 8 rows, and of their sums the first and the last columns."""
    rows, dim = 2**20, 2100
    queries = emulator.device_tensor([rows, dim], torch.bfloat16)  # zeros: it is that large
    queries[-8:], keys = vectors(8, dim, torch.bfloat16), vectors(8, dim, torch.bfloat16, 1)
    assert queries.numel() > 2**31
    emulator.run_corners(set())
    lse, _, key_sum = emulator.similarity_lse_forward(queries, keys, torch.tensor([2.0]), None, None, False, True)
    logits = 2.0 * queries[-8:].double() @ keys.double().T
    torch.testing.assert_close(lse[-8:], logits.logsumexp(1), rtol=5e-6, atol=0)  # 132 sums, rounded towards zero
    expected = logits.softmax(1) @ keys.double()
    for columns in (slice(256), slice(2048, dim)):
        found, right = key_sum[-8:, columns].double(), expected[:, columns]
        assert (found - right).norm() <= 6e-3 * right.norm()


@cuda_emulation.on_cuda
@pytest.mark.parametrize(("of_queries", "of_keys"), [(1e12, 1e-14), (1e-20, 1e18)])
def test_float32_of_any_size(backend, of_queries, of_keys):
    """On CUDA float32 is two float16 numbers times a power of two."""
    scale = 0.03 / (of_queries * of_keys)
    queries, keys = vectors(40, 50, torch.float32) * of_queries, vectors(140, 50, torch.float32, 1) * of_keys
    leaves = [t.clone().requires_grad_() for t in (queries, keys)]
    double = [t.double().requires_grad_() for t in (queries, keys)]
    lse = similarity_lse(*leaves, scale)
    expected = reference.similarity_lse.similarity_lse(*double, scale)[0]
    torch.testing.assert_close(lse, expected, rtol=2e-6, atol=0)
    grads = torch.autograd.grad(lse.sum(), leaves)
    for grad, right in zip(grads, torch.autograd.grad(expected.sum(), double), strict=True):
        assert (grad - right).norm() <= 1e-5 * right.norm()

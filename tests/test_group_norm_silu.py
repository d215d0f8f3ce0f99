"""Group normalisation + SiLU against a float64 reference and gradcheck, on every instruction set."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sslfast import reference
from sslfast.ops import group_norm_silu

CAPABILITIES = ["default", "avx2", "avx512"]  # the others run the kernels of avx512
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (samples, channels, …) and groups: single numbers, odd sizes, rows longer than a block, groups wider than a task.
CASES = [((1, 2), 1), ((2, 6), 3), ((3, 4, 5), 2), ((2, 8, 7, 9), 4), ((1, 3, 33, 37), 1), ((2, 96, 4, 4), 32)]
CASES += [((1, 130, 3, 3), 1), ((1, 4, 40, 60), 4), ((2, 1200, 2, 2), 2), ((1, 6, 3, 4, 5), 3), ((1, 256, 8, 9), 32)]
FORWARD = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
BACKWARD = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def inputs(shape, dtype, offset=0.0, last=False, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x, grad = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(2, shape[1], generator=generator, dtype=torch.float64)
    x = (2 * x + offset).to(dtype)
    if last:
        x = x.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()])
    return x, weight.to(dtype), bias.to(dtype), grad.to(dtype)


def out_and_grads(function, x, groups, weight, bias, grad, eps=1e-5):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    out = function(leaves[0], groups, *leaves[1:], eps)
    out.backward(grad)
    return out.detach(), *(None if t is None else t.grad for t in leaves)


def float64_reference(x, groups, weight, bias, grad, eps=1e-5):
    wide = [None if t is None else t.double() for t in (x, weight, bias, grad)]
    return out_and_grads(reference.group_norm_silu.group_norm_silu, wide[0], groups, *wide[1:], eps)


def assert_near(actual, expected, tolerance, floor=1e-6):
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm().item()
    assert error <= tolerance * expected.norm().item() + floor * tolerance * math.sqrt(expected.numel()), error


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
def test_equals_float64_reference(backend, dtype, shape, groups, last):
    if last and len(shape) not in (4, 5):
        return
    x, weight, bias, grad = inputs(shape, dtype, last=last)
    actual = out_and_grads(group_norm_silu, x, groups, weight, bias, grad)
    expected = float64_reference(x, groups, weight, bias, grad)
    assert actual[0].dtype == dtype
    assert actual[0].stride() == torch.empty_like(x).stride()
    assert_near(actual[0], expected[0], FORWARD[dtype], 1)
    # A gradient in which everything cancels (a group of one or two numbers) is as large as what rounding leaves.
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert a.dtype == dtype
        assert_near(a, e, BACKWARD[dtype], 1)


@pytest.mark.parametrize("given_parameters", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_may_be_missing_or_float32(backend, dtype, given_parameters):
    x, weight, bias, grad = inputs((3, 12, 5, 6), dtype)
    parameters = [t.float() if g else None for t, g in zip((weight, bias), given_parameters, strict=True)]
    actual = out_and_grads(group_norm_silu, x, 4, *parameters, grad)
    expected = float64_reference(x, 4, *parameters, grad)
    for a, e, tolerance in zip(actual, expected, (FORWARD[dtype], BACKWARD[dtype], 1e-5, 1e-5), strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert_near(a, e, tolerance)
    assert all(a is None or a.dtype == torch.float32 for a in actual[2:])


@pytest.mark.parametrize("offset", [100.0, -3000.0])
def test_a_large_mean_costs_no_digits_of_the_variance(backend, offset):
    x, weight, bias, grad = inputs((2, 8, 30, 30), torch.float32, offset)
    for last in (x, x.to(memory_format=torch.channels_last)):
        actual = out_and_grads(group_norm_silu, last, 4, weight, bias, grad)
        expected = float64_reference(x, 4, weight, bias, grad)
        for a, e in zip(actual[:2], expected[:2], strict=True):
            assert_near(a, e, abs(offset) * 2e-7)


def test_large_values_of_the_normalised_input(backend):
    """The exponential of the sigmoid overflows in float32 beyond 88."""
    x, _, _, grad = inputs((1, 4, 20, 20), torch.float32)
    weight = torch.full((4,), 100.0)
    bias = torch.tensor([0.0, 300.0, -300.0, 1.0])
    actual = out_and_grads(group_norm_silu, x, 2, weight, bias, grad)
    for a, e in zip(actual, float64_reference(x, 2, weight, bias, grad), strict=True):
        assert a.isfinite().all()
        assert_near(a, e, 1e-5)


def test_constant_input(backend):
    x = torch.full((2, 4, 5, 5), 3.0)
    out, grad_x, *_ = out_and_grads(group_norm_silu, x, 2, torch.ones(4), torch.full((4,), 0.5), torch.ones_like(x))
    torch.testing.assert_close(out, torch.full_like(x, 0.5 / (1 + math.exp(-0.5))), rtol=0, atol=1e-4)  # rstd is 316
    assert grad_x.abs().max() < 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_group(backend, dtype, last, bad):
    x, weight, bias, grad = inputs((2, 8, 5, 5), dtype, last=last)
    x[0, 3, 2, 2] = bad
    out, grad_x, *_ = out_and_grads(group_norm_silu, x, 4, weight, bias, grad)
    for t in (out, grad_x):
        assert t[0, 2:4].isnan().all()
        t[0, 2:4] = 0
        assert t.isfinite().all()


@pytest.mark.parametrize("last", [False, True])
def test_same_bits_on_any_number_of_threads(cpu_capability, last):
    x, weight, bias, grad = inputs((5, 96, 17, 19), torch.float32, last=last)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(out_and_grads(group_norm_silu, x, 32, weight, bias, grad))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_gradcheck(cpu_capability):
    for shape, groups in (((2, 4, 5), 2), ((1, 6, 3, 2), 3), ((3, 2), 1)):
        x, weight, bias, _ = inputs(shape, torch.float64)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        assert torch.autograd.gradcheck(lambda x, w, b, g=groups: group_norm_silu(x, g, w, b), leaves)
        if x.dim() == 4:
            last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
            assert torch.autograd.gradcheck(lambda x, w, b, g=groups: group_norm_silu(x, g, w, b), [last, *leaves[1:]])


def test_input_that_is_not_contiguous():
    x, weight, bias, grad = inputs((4, 12, 10, 6), torch.float32)
    for view in (x.transpose(2, 3), x[:, :, ::2], x[:1].expand(4, 12, 10, 6)):
        g = grad[: view.shape[0], :, : view.shape[2], : view.shape[3]].reshape(-1)[: view.numel()]
        g = torch.ones(view.shape) if g.numel() != view.numel() else g.reshape(view.shape)
        actual = out_and_grads(group_norm_silu, view, 3, weight, bias, g.transpose(2, 3).contiguous().transpose(2, 3))
        expected = out_and_grads(group_norm_silu, view.contiguous(), 3, weight, bias, g)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_only_what_needs_a_gradient_gets_one():
    x, weight, bias, grad = inputs((2, 4, 3, 3), torch.float32)
    weight.requires_grad_()
    group_norm_silu(x, 2, weight, bias).backward(grad)
    assert weight.grad is not None
    assert x.grad is None
    assert bias.grad is None


def test_second_derivative_is_refused():
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="group_norm_silu has no second derivative"):
        torch.autograd.grad(group_norm_silu(x, 2).sum(), x, create_graph=True)


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 4),
    groups=st.integers(1, 9),
    width=st.integers(1, 20),
    places=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(samples, groups, width, places, dtype, last, seed):
    assume(samples * width * places > 1)  # which the reference refuses
    x, weight, bias, grad = inputs((samples, groups * width, places, 1), dtype, last=last, seed=seed)
    actual = out_and_grads(group_norm_silu, x, groups, weight, bias, grad)
    for a, e in zip(actual, float64_reference(x, groups, weight, bias, grad), strict=True):
        assert_near(a, e, 2 * BACKWARD[dtype], 100)


# torch's machinery


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, last):
    x, weight, bias, grad = inputs((2, 6, 3, 4), dtype, last=last)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.sslfast.group_norm_silu_forward, (leaves[0], 3, *leaves[1:], 1e-5))
    plain = [t.detach() for t in leaves]
    _, mean, rstd = torch.ops.sslfast.group_norm_silu_forward(plain[0], 3, *plain[1:], 1e-5)
    args = (grad, plain[0], 3, *plain[1:], mean, rstd)
    torch.library.opcheck(torch.ops.sslfast.group_norm_silu_backward, args)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def function(x, groups, weight, bias, eps):
        return group_norm_silu(x * 2, groups, weight, bias, eps) + 1

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for samples in (3, 5):
        x, weight, bias, grad = inputs((samples, 6, 7, 5), torch.float32, last=True)
        actual = out_and_grads(compiled, x, 3, weight, bias, grad)
        expected = out_and_grads(function, x, 3, weight, bias, grad)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


def test_the_short_way_gives_the_bits_of_the_custom_op():
    x, weight, bias, grad = inputs((2, 6, 9, 9), torch.float32)
    short = out_and_grads(group_norm_silu, x, 3, weight, bias, grad)
    op = out_and_grads(lambda *args: torch.ops.sslfast.group_norm_silu_forward(*args)[0], x, 3, weight, bias, grad)
    assert all(torch.equal(a, b) for a, b in zip(short, op, strict=True))


def test_fake_tensors_have_the_real_metadata():
    x, weight, bias, _ = inputs((2, 6, 3, 4), torch.bfloat16, last=True)
    for t in (x, x.contiguous(), x.transpose(2, 3)):
        real = group_norm_silu(t, 3, weight, bias)
        with FakeTensorMode() as mode:
            fake = group_norm_silu(*(mode.from_tensor(a) for a in (t,)), 3, *map(mode.from_tensor, (weight, bias)))
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_other_devices_run_the_reference():
    x = torch.empty(2, 6, 3, 4, device="meta")
    assert group_norm_silu(x, 3).shape == x.shape


X = torch.randn(2, 6, 4)
BAD_CALLS = {
    "list": ((X.tolist(), 2), {}, TypeError, "x: expected a tensor, got list"),
    "integers": ((X.long(), 2), {}, TypeError, "x: expected float32"),
    "1-D": ((X[0, 0], 2), {}, ValueError, r"x: expected \(samples, channels, …\)"),
    "empty": ((X[:0], 2), {}, ValueError, "x: expected at least one element"),
    "groups": ((X, 4), {}, ValueError, "num_groups: expected a divisor of the 6 channels, got 4"),
    "no groups": ((X, 0), {}, ValueError, "num_groups: expected a divisor"),
    "float groups": ((X, 2.0), {}, TypeError, "num_groups: expected an int"),
    "weight": ((X, 2, torch.ones(5)), {}, ValueError, r"weight: expected shape \(6,\), got \(5,\)"),
    "bias": ((X, 2, None, torch.ones(6, 1)), {}, ValueError, r"bias: expected shape \(6,\)"),
    "weight dtype": ((X, 2, torch.ones(6).half()), {}, TypeError, "weight: expected float32 or the dtype of x"),
    "weight device": ((X, 2, torch.ones(6, device="meta")), {}, ValueError, "weight: expected the device of x"),
    "eps": ((X, 2), {"eps": -1.0}, ValueError, "eps: expected a number from 0 on, got -1.0"),
    "nan eps": ((X, 2), {"eps": math.nan}, ValueError, "eps: expected a finite number"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments(name):
    args, kwargs, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        group_norm_silu(*args, **kwargs)


def test_more_elements_than_fit_an_int(emulator):
    """Of the blocks at the ends of the grid: the last group of the last sample."""
    shape = (70_000, 32, 32, 32)
    x, grad = (emulator.device_tensor(shape, torch.float16) for _ in range(2))  # zeros: they are that large
    assert x.numel() > 2**31
    emulator.run_corners(set())
    small_x, _, _, small_grad = inputs((1, 1, 32, 32), torch.float16)
    x[-1, -1], grad[-1, -1] = small_x[0, 0], small_grad[0, 0]
    out, mean, rstd = emulator.group_norm_silu_forward(x, 32, None, None, 1e-5)
    grad_x, _, _ = emulator.group_norm_silu_backward(grad, x, 32, None, None, mean, rstd)
    expected = float64_reference(small_x, 1, None, None, small_grad)
    assert_near(out[-1, -1], expected[0][0, 0], FORWARD[torch.float16])
    assert_near(grad_x[-1, -1], expected[1][0, 0], BACKWARD[torch.float16])

"""NT-Xent against a float64 reference, lightly and gradcheck, on every instruction set of this machine and CUDA."""

import functools
import math
import subprocess
import sys
import threading

import cuda_emulation
import lightly.loss
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sslfast import _C, reference
from sslfast.losses import NTXentLoss
from sslfast.ops import nt_xent

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Around the sizes of tiles (32, 64, 128) and, for CUDA, beyond 128 and 256 columns, where other shapes of block begin,
# and beyond what fits in shared memory.
SHAPES = [(1, 1), (1, 128), (2, 3), (3, 7), (5, 1), (16, 32), (17, 31), (33, 65), (64, 128), (65, 130), (7, 300)]
SHAPES += [(129, 100), (67, 1030)]

# Relative error of the loss and of the gradients (norm of the difference over norm). Inputs are exact in their dtype
# and sums are float32, so the loss is as good for bfloat16; gradients are rounded to their dtype.
LOSS_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRAD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def views(batch: int, dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views that agree in part, as in training, with rows of very different lengths."""
    generator = torch.Generator().manual_seed(seed + 1000 * batch + dim)
    z1, noise = torch.randn(2, batch, dim, generator=generator, dtype=torch.float64)
    longest = 0 if dtype == torch.float16 else 2  # gradients shrink with the length, in float16 out of range
    length = torch.logspace(-1, longest, batch, dtype=torch.float64)[:, None]
    return (z1 * length).to(dtype), ((z1 + noise) * length).to(dtype)


def loss_and_grads(function, z1, z2, temperature, reduction="mean", grad=None):
    leaves = [t.detach().clone().requires_grad_() for t in (z1, z2, torch.as_tensor(temperature, dtype=torch.float64))]
    loss = function(*leaves, reduction)
    loss.backward(torch.ones_like(loss) if grad is None else grad.to(loss.dtype))
    return loss.detach(), *(t.grad for t in leaves)


def float64_reference(z1, z2, temperature, reduction="mean", grad=None):
    return loss_and_grads(reference.info_nce.nt_xent, z1.double(), z2.double(), temperature, reduction, grad)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.01], ids=lambda t: f"t{t}")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
def test_equals_float64_reference(backend, dtype, shape, temperature):
    if backend == "cuda-emulated" and shape == (67, 1030):
        shape = (4, 1030)
    z1, z2 = views(*shape, dtype)
    # float16 gradients are kept in range as a training does it, by a large incoming gradient.
    grad = torch.tensor(128.0 if dtype == torch.float16 else 1.0)
    loss, *grads = loss_and_grads(nt_xent, z1, z2, temperature, grad=grad)
    expected, *expected_grads = float64_reference(z1, z2, temperature, grad=grad)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [g.dtype for g in grads] == [dtype, dtype, torch.float64]
    # Where the loss is a small difference of large numbers, as at low temperatures, nobody's float32 comes nearer:
    # there the bound is a few times the error of the reference itself in float32 (float64 for float64).
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    own, *own_grads = loss_and_grads(reference.info_nce.nt_xent, z1.to(compute), z2.to(compute), temperature, grad=grad)
    assert_near(loss, expected, own, LOSS_TOLERANCE[dtype], 1e-7 / temperature)
    lengths = z1.double().norm(dim=1, keepdim=True), z2.double().norm(dim=1, keepdim=True)  # so that every row counts
    for length, actual, wanted, theirs in zip(lengths, grads, expected_grads, own_grads, strict=False):
        size = grad.item() / (temperature * math.sqrt(shape[0]))  # of a gradient in which nothing cancels
        assert_near(actual * length, wanted * length, theirs * length, GRAD_TOLERANCE[dtype], 1e-7 / temperature * size)
    assert_near(
        grads[2], expected_grads[2], own_grads[2], 20 * LOSS_TOLERANCE[dtype], grad.item() * 1e-6 / temperature**2
    )


def assert_near(actual, expected, own, tolerance, floor) -> None:
    error = (actual.double() - expected).norm().item()
    own_error = (own.double() - expected).norm().item()
    floor *= 1e-8 if own.dtype == actual.dtype == torch.float64 and tolerance < 1e-11 else 1
    assert error <= max(tolerance * expected.norm().item(), 4 * own_error, floor)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [256, 300, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_sizes(backend, dtype, batch):
    # Emulated: two batches of several tiles a block, the second one of several runs a row.
    dim = 128 if backend != "cuda-emulated" else 8 if batch > 300 else 40
    z1, z2 = views(batch, dim, dtype)
    loss, *grads = loss_and_grads(nt_xent, z1, z2, 0.2)
    expected, *expected_grads = float64_reference(z1, z2, 0.2)
    assert relative_error(loss, expected) <= LOSS_TOLERANCE[dtype]
    for actual, wanted in zip(grads[:2], expected_grads[:2], strict=True):
        assert relative_error(actual, wanted) <= GRAD_TOLERANCE[dtype]
    assert relative_error(grads[2], expected_grads[2]) <= 2e-5


@functools.cache
def learnt_views(temperature: float) -> tuple:
    """Views of cosine 0.96, as after a long training, and the reference in float64: the loss is .005 or 2e-9."""
    z1, noise = torch.randn(2, 1024, 128, generator=torch.Generator().manual_seed(0))
    z2 = z1 + 0.3 * noise
    return z1, z2, float64_reference(z1, z2, temperature)


@pytest.mark.parametrize("temperature", [0.07, 0.03])
def test_small_losses_keep_their_digits(cpu_capability, temperature):
    z1, z2, expected = learnt_views(temperature)
    actual = loss_and_grads(nt_xent, z1, z2, temperature)
    for a, e, tolerance in zip(actual, expected, (2e-6, 2e-5, 2e-5, 2e-5), strict=True):
        assert relative_error(a, e) <= tolerance


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("size", [1.0, 65536.0])  # of the incoming gradient: torch.amp.GradScaler starts with 65536
def test_reductions(backend, reduction, dtype, temperature, size):
    z1, z2 = views(37, 24, dtype)
    if dtype == torch.float16:
        z1, z2 = 100 * z1, 100 * z2  # so that gradients stay within float16
    grad = size * (torch.linspace(-1, 2, 74) if reduction == "none" else torch.tensor(0.7))
    actual = loss_and_grads(nt_xent, z1, z2, temperature, reduction, grad)
    expected = float64_reference(z1, z2, temperature, reduction, grad)
    own = loss_and_grads(reference.info_nce.nt_xent, z1.float(), z2.float(), temperature, reduction, grad)
    assert actual[0].shape == expected[0].shape
    for a, e, o, tolerance in zip(actual, expected, own, (2e-6, *2 * [GRAD_TOLERANCE[dtype]], 2e-5), strict=True):
        assert_near(a, e, o, tolerance * max(1, 0.03 / temperature), 0)


def test_bfloat16_is_at_least_as_accurate_as_lightly():
    z1, z2 = views(256, 128, torch.bfloat16)
    expected = float64_reference(z1, z2, 0.5)
    ours = loss_and_grads(nt_xent, z1, z2, 0.5)
    theirs = loss_and_grads(lambda a, b, t, _: lightly.loss.NTXentLoss(t.item())(a, b), z1, z2, 0.5)
    assert relative_error(ours[0], expected[0]) < relative_error(theirs[0], expected[0])
    for a, b, e in zip(ours[1:3], theirs[1:3], expected[1:3], strict=True):
        assert relative_error(a, e) < relative_error(b, e)


@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize("shape", [(1, 4), (8, 16), (200, 128)])
def test_equals_lightly(shape, temperature):
    z1, z2 = views(*shape, torch.float32)
    theirs, ours = lightly.loss.NTXentLoss(temperature=temperature), NTXentLoss(temperature=temperature)
    expected = loss_and_grads(lambda a, b, *_: theirs(a, b), z1, z2, 0.0)[:3]
    actual = loss_and_grads(lambda a, b, *_: ours(a, b), z1, z2, 0.0)[:3]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=2e-5)


def test_gradcheck(cpu_capability):
    for batch, dim, temperature in [(1, 3, 0.5), (5, 4, 0.1), (20, 3, 0.02)]:
        z1, z2 = (z.requires_grad_() for z in views(batch, dim, torch.float64))
        t = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(lambda *z, r=reduction: nt_xent(*z, r), (z1, z2, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_same_bits_on_any_number_of_threads(cpu_capability, dtype, temperature):
    z1, z2 = views(333, 40, dtype)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        results.append(loss_and_grads(nt_xent, z1, z2, temperature))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_calls_from_several_threads():
    """The kept scratch belongs to a thread: concurrent calls do not meet in it."""
    inputs = [views(40 + 9 * k, 33, torch.float32) for k in range(4)]
    expected = [loss_and_grads(nt_xent, *z, 0.2) for z in inputs]
    failed = []

    def work(k):
        for _ in range(30):
            result = loss_and_grads(nt_xent, *inputs[k], 0.2)
            if not all(torch.equal(a, b) for a, b in zip(result, expected[k], strict=True)):
                failed.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 150),
    dim=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    temperature=st.floats(0.005, 5),
    seed=st.integers(0, 1000),
)
def test_any_shape(batch, dim, dtype, temperature, seed):
    z1, z2 = views(batch, dim, dtype, seed)
    loss, *grads = loss_and_grads(nt_xent, z1, z2, temperature)
    expected, *_ = float64_reference(z1, z2, temperature)
    assert abs(loss.item() - expected.item()) <= 3e-6 * max(expected.item(), 0.1 / temperature, 0.1)
    assert all(g.isfinite().all() for g in grads)


def test_views_that_are_not_contiguous(backend):
    z1, z2 = views(24, 48, torch.float32)
    expected = loss_and_grads(nt_xent, z1[:, ::2].contiguous(), z2.T[:24, :].T.contiguous(), 0.3)
    actual = loss_and_grads(lambda a, b, t, r: nt_xent(a[:, ::2], b.T[:24, :].T, t, r), z1, z2, 0.3)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1][:, ::2], expected[1])
    assert torch.equal(actual[2][:, :24], expected[2])
    one_row = z1[:1].expand(24, 48)
    assert torch.equal(nt_xent(one_row, z2), nt_xent(one_row.contiguous(), z2))


def test_rows_that_are_not_aligned(backend):
    """Rows that do not start at multiples of 16 bytes, though their length is one."""
    z1, z2 = views(20, 32, torch.bfloat16)
    shifted = torch.empty(20 * 32 + 1, dtype=torch.bfloat16)[1:].view(20, 32).copy_(z1)
    results = (loss_and_grads(lambda _, *rest, z=z: nt_xent(z, *rest), z1, z2, 0.3) for z in (z1, shifted))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True) if a is not None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_what_needs_a_gradient_gets_one(dtype):
    z1, z2 = views(6, 5, dtype)
    z1.requires_grad_()
    nt_xent(z1, z2, 0.5).backward()
    assert z1.grad is not None
    assert z2.grad is None
    with torch.no_grad():
        assert not nt_xent(z1, z2, 0.5).requires_grad


def test_second_derivative_is_refused():
    z1, z2 = (z.requires_grad_() for z in views(4, 4, torch.float32))
    with pytest.raises(RuntimeError, match="nt_xent has no second derivative"):
        torch.autograd.grad(nt_xent(z1, z2), z1, create_graph=True)


# Values that are not numbers, and rows without a direction


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_nan_and_inf_propagate(backend, dtype, bad, temperature):
    z1, z2 = views(40, 33, dtype)
    z1[7, 3] = bad
    loss, grad1, grad2, _ = loss_and_grads(nt_xent, z1, z2, temperature)
    assert loss.isnan()
    assert grad1.isnan().any()
    assert grad2.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows(backend, dtype):
    z1, z2 = views(20, 16, dtype)
    z1[3] = 0
    z2[5] = 0
    loss, grad1, grad2, _ = loss_and_grads(nt_xent, z1, z2, 0.5)
    expected, wanted1, _, _ = float64_reference(z1, z2, 0.5)
    assert relative_error(loss, expected) <= LOSS_TOLERANCE[dtype]
    assert grad1.isfinite().all()
    assert grad2.isfinite().all()
    if dtype != torch.float16:  # there the gradient, divided by 1e-12, is clamped to the largest number
        assert relative_error(grad1[3], wanted1[3]) <= GRAD_TOLERANCE[dtype]
    others = torch.arange(20) != 3
    assert relative_error(grad1[others], wanted1[others]) <= GRAD_TOLERANCE[dtype]


def test_all_rows_equal(backend):
    z = torch.ones(50, 30)
    loss, grad1, grad2, _ = loss_and_grads(nt_xent, z, z, 0.1)
    assert loss.item() == pytest.approx(math.log(99), rel=1e-5)
    assert grad1.abs().max() < 1e-6
    assert grad2.abs().max() < 1e-6


# Bad arguments: an error that names the argument, before anything runs

Z = torch.randn(4, 8)
BAD_CALLS = {
    "list": ((Z.tolist(), Z), {}, TypeError, "z1: expected a tensor"),
    "1-D": ((Z[0], Z[0]), {}, ValueError, r"z1: expected shape \(batch, dim\)"),
    "3-D": ((Z, Z[None]), {}, ValueError, r"z2: expected shape \(batch, dim\)"),
    "integers": ((Z, Z.long()), {}, TypeError, "z2: expected float32, .* got torch.int64"),
    "complex": ((Z.cfloat(), Z.cfloat()), {}, TypeError, "z1: expected float32"),
    "batch": ((Z, Z[:3]), {}, ValueError, r"z2: expected the shape of z1, \(4, 8\), got \(3, 8\)"),
    "dim": ((Z, Z[:, :3]), {}, ValueError, "z2: expected the shape of z1"),
    "dtype": ((Z, Z.double()), {}, TypeError, "z2: expected the dtype of z1, torch.float32, got torch.float64"),
    "device": ((Z, Z.to("meta")), {}, ValueError, "z2: expected the device of z1, cpu, got meta"),
    "empty batch": ((Z[:0], Z[:0]), {}, ValueError, "z1: expected at least one row"),
    "empty dim": ((Z[:, :0], Z[:, :0]), {}, ValueError, "z1: expected at least one row and one column"),
    "float8": ((Z.to(torch.float8_e5m2),) * 2, {}, TypeError, "z1: expected float32"),
    "zero temperature": ((Z, Z, 0.0), {}, ValueError, "temperature: expected a positive number, got 0.0"),
    "negative temperature": ((Z, Z, -1), {}, ValueError, "temperature: expected a positive number, got -1"),
    "nan temperature": ((Z, Z, math.nan), {}, ValueError, "temperature: expected a positive number, got nan"),
    "infinite temperature": ((Z, Z, math.inf), {}, ValueError, "temperature"),
    "text temperature": ((Z, Z, "0.5"), {}, TypeError, "temperature: expected a number, got str"),
    "tensor temperature": ((Z, Z, torch.tensor(-0.1)), {}, ValueError, "temperature: expected a positive number"),
    "temperatures": ((Z, Z, torch.ones(2)), {}, ValueError, "temperature: expected one element"),
    "integer temperature tensor": ((Z, Z, torch.tensor(1)), {}, TypeError, "temperature: expected float32"),
    "reduction": ((Z, Z), {"reduction": "max"}, ValueError, "reduction: expected one of .*'max'"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments(name):
    args, kwargs, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        nt_xent(*args, **kwargs)


def test_loss_refuses_a_bad_temperature():
    for temperature in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature: expected a"):
            NTXentLoss(temperature)


def test_loss_prints_its_arguments():
    assert repr(NTXentLoss(0.2)) == "NTXentLoss(temperature=0.2)"


# torch's machinery


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(reduction, dtype):
    z1, z2 = (z.requires_grad_() for z in views(5, 7, dtype))
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.sslfast.info_nce_forward, (z1, z2, t, reduction))
    loss, lse = torch.ops.sslfast.info_nce_forward(z1.detach(), z2.detach(), t.detach(), reduction)
    args = (torch.ones_like(loss), z1.detach(), z2.detach(), t.detach(), lse, reduction)
    torch.library.opcheck(torch.ops.sslfast.info_nce_backward, args)


def test_the_short_way_gives_the_bits_of_the_custom_op():
    z1, z2 = views(50, 30, torch.float32)
    short = loss_and_grads(nt_xent, z1, z2, 0.2)
    op = loss_and_grads(lambda *args: torch.ops.sslfast.info_nce_forward(*args)[0], z1, z2, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(short, op, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b, t, r: nt_xent(a * 2, b, t, r) + 1, fullgraph=True, dynamic=dynamic)
    for batch in (12, 20):
        z1, z2 = views(batch, 8, torch.float32)
        actual = loss_and_grads(compiled, z1, z2, 0.2)
        expected = loss_and_grads(lambda a, b, t, r: nt_xent(a * 2, b, t, r) + 1, z1, z2, 0.2)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.slow
def test_export():
    z1, z2 = views(12, 8, torch.float32)
    batch = torch.export.Dim("batch", min=2, max=1024)
    exported = torch.export.export(NTXentLoss(0.2), (z1, z2), dynamic_shapes=({0: batch}, {0: batch}))
    bigger = views(30, 8, torch.float32)
    torch.testing.assert_close(exported.module()(*bigger), NTXentLoss(0.2)(*bigger))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fake_tensors_have_the_real_metadata(reduction):
    z1, z2 = views(6, 5, torch.bfloat16)
    real = nt_xent(z1, z2, 0.5, reduction)
    with FakeTensorMode() as mode:
        fake = nt_xent(mode.from_tensor(z1), mode.from_tensor(z2), 0.5, reduction)
    assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)


def test_other_devices_run_the_reference():
    z = torch.empty(6, 5, device="meta")
    assert nt_xent(z, z).shape == ()


def test_autocast_keeps_full_accuracy():
    z1, z2 = views(30, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(z1, z2, 0.2)
        linear = torch.nn.Linear(16, 8)
        low = nt_xent(linear(z1), linear(z2), 0.2)
    assert torch.equal(loss, nt_xent(z1, z2, 0.2))
    assert low.dtype == torch.float32
    low.backward()
    assert linear.weight.grad.isfinite().all()


def test_capability_is_chosen_by_environment():
    script = "from sslfast import _C; print(_C.cpu_capability())"
    for name in _C.available_cpu_capabilities():
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={"SSLFAST_CPU_CAPABILITY": name},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == name
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"SSLFAST_CPU_CAPABILITY": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "SSLFAST_CPU_CAPABILITY: expected one of default" in done.stderr


def test_no_quadratic_memory():
    """B = 8192 as one float32 matrix would be 1 GiB; the whole step stays far below."""
    script = """
import resource, torch
from sslfast.ops import nt_xent
z1, z2 = (torch.randn(8192, 64, requires_grad=True) for _ in range(2))
nt_xent(z1[:64], z2[:64]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nt_xent(z1, z2).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 * 1024  # KiB


# What only the CUDA kernels have


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_same_bits_in_any_order_of_threads(emulator, dtype, temperature):
    z1, z2 = views(75, 40, dtype)
    results = []
    for order in cuda_emulation.ORDERS:
        emulator.set_order(order)
        results.append(loss_and_grads(nt_xent, z1, z2, temperature))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@cuda_emulation.on_cuda
@pytest.mark.parametrize(("dim", "temperature"), [(64, 0.2), (10, 0.025)])  # at 1/0.025: rows follow their own maximum
def test_tf32_is_an_option(backend, dim, temperature):
    """With it float32 is rounded as to tf32, without it a number is the sum of two float16 numbers."""
    z1, z2 = views(40, dim, torch.float32)
    expected = float64_reference(z1, z2, temperature)
    errors = {}
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            results = loss_and_grads(nt_xent, z1, z2, temperature)
            errors[allowed] = [relative_error(a, e) for a, e in zip(results, expected, strict=True)]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert max(errors[False][:3]) < 2e-6 < errors[True][1] < 2e-3
    assert errors[True][0] < 1e-3


@pytest.mark.slow
def test_more_elements_than_fit_an_int(emulator):
    """The blocks at the corners of each grid stay within their memory; the loop of backward would take hours."""
    batch, dim = 2**18 + 1, 4096
    assert 2 * batch * dim > 2**31
    z1, z2 = (emulator.device_tensor([batch, dim], torch.bfloat16) for _ in range(2))  # zeros: it is that large
    z2[-1] = torch.linspace(-1, 1, dim)
    emulator.run_corners({"info_nce_backward"})
    loss, lse = emulator.info_nce_forward(z1, z2, torch.tensor(0.5), "none")
    assert loss.shape == lse.shape == (2 * batch,)
    grad1, grad2, _ = emulator.info_nce_backward(loss.fill_(1.0), z1, z2, torch.tensor(0.5), lse.fill_(1.0), "none")
    assert grad1.shape == grad2.shape == (batch, dim)
    counts = emulator.counters()
    assert {name for name, c in counts.items() if c["written_bytes"]} >= {
        f"info_nce_{k}" for k in ("prepare", "finish")
    }


@cuda_emulation.on_cuda
def test_too_many_columns(backend):
    with pytest.raises(ValueError, match=r"z1: expected at most .* 4096 columns on CUDA, got shape"):
        nt_xent(*views(1, 4097, torch.float32))


def test_in_a_cuda_graph(cuda_device):
    """Nothing waits for the host."""
    z1, z2 = (z.to(cuda_device).requires_grad_() for z in views(300, 128, torch.bfloat16))
    temperature = torch.tensor(0.2, device=cuda_device)

    def step():
        return torch.autograd.grad(nt_xent(z1, z2, temperature), (z1, z2))

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step()
    graph.replay()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_on_a_device(cuda_device, dtype):
    """The other tests hand CPU tensors to the CUDA kernels; this one goes the way of a user."""
    z1, z2 = views(50, 30, dtype)
    loss, *grads = loss_and_grads(nt_xent, z1.to(cuda_device), z2.to(cuda_device), 0.2)
    expected, *expected_grads = float64_reference(z1, z2, 0.2)
    assert {t.device.type for t in (loss, *grads[:2])} == {"cuda"}
    assert relative_error(loss.cpu(), expected) <= LOSS_TOLERANCE[dtype]
    for actual, wanted in zip(grads[:2], expected_grads[:2], strict=True):
        assert relative_error(actual.cpu(), wanted) <= GRAD_TOLERANCE[dtype]


# Traffic, as the emulator counts it: what the threads ask for, before any cache


@pytest.mark.parametrize("dim", [128, 256])
def test_traffic_is_near_that_of_the_tiles(emulator, dim):
    batch, element = 320, 2
    z1, z2 = views(batch, dim, torch.bfloat16)
    loss, lse = emulator.info_nce_forward(z1, z2, torch.tensor(0.2), "mean")
    emulator.reset_counters()
    emulator.info_nce_forward(z1, z2, torch.tensor(0.2), "mean")
    emulator.info_nce_backward(loss, z1, z2, torch.tensor(0.2), lse, "mean")
    counts = emulator.counters()
    rows, forward, backward = 2 * batch, counts["info_nce_forward"], counts["info_nce_backward"]

    blocks = rows // 128
    tiles = blocks * (blocks + 1) // 2
    assert forward["mma_flops"] == tiles * 2 * 128 * 128 * dim
    assert forward["exponentials"] == tiles * 128 * 128
    # At this size a run is one tile: its two sides of z', and one float for each row and column.
    floor = tiles * 2 * 128 * dim * element + (blocks * blocks) * 128 * 4
    assert forward["read_bytes"] + forward["written_bytes"] <= 1.1 * floor

    block_rows = 128 if dim <= 128 else 64
    assert backward["mma_flops"] == 2 * 2 * rows * rows * dim
    assert backward["exponentials"] == rows * rows
    splits = min(256 // (rows // block_rows), rows // 64 // 2, 8)
    floor = rows // block_rows * (rows + splits * block_rows) * dim * element + splits * rows * dim * 4
    assert backward["read_bytes"] + backward["written_bytes"] <= 1.15 * floor
    assert forward["ldmatrix_conflicts"] == backward["ldmatrix_conflicts"] == 0

"""Rotations against torch.rot90, bit for bit, on every instruction set of this machine and CUDA."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sslfast import _C, reference
from sslfast.ops import rotate4

CAPABILITIES = ("default", "avx2", "avx512")  # the others run the last one's kernels
DTYPES = [torch.uint8, torch.float32, torch.bfloat16, torch.float16, torch.float64]
FLOATS = DTYPES[1:]
# Around the sizes of blocks in registers (2 to 16) and of CUDA's tiles (8 to 32); channels with and without a kernel of
# their own in channels_last.
SHAPES = [(1, 1, 1, 1), (2, 3, 2, 2), (3, 1, 7, 7), (1, 4, 15, 15), (2, 3, 16, 16), (3, 2, 17, 17), (2, 1, 28, 28)]
SHAPES += [(2, 3, 32, 32), (1, 3, 33, 33), (1, 6, 9, 9), (1, 70, 5, 5), (1, 12, 18, 18)]
FORMATS = [torch.contiguous_format, torch.channels_last]
GRAD_TOLERANCE = {torch.float64: 1e-15, torch.float32: 2e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def name(value) -> str:
    return str(value).removeprefix("torch.").replace(", ", "x").strip("()")


def images(shape, dtype, memory_format=torch.contiguous_format, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = (64 * x + 128).clamp(0, 255) if dtype == torch.uint8 else x
    return x.to(dtype).contiguous(memory_format=memory_format)


def assert_rotated(x: torch.Tensor) -> None:
    rotated, labels = rotate4(x)
    expected, expected_labels = reference.rotate4.rotate4(x)
    assert rotated.dtype == x.dtype
    torch.testing.assert_close(rotated, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(labels, expected_labels)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_equals_rot90_bit_for_bit(backend, dtype, shape, memory_format):
    x = images(shape, dtype, memory_format)
    assert_rotated(x)
    assert rotate4(x)[0].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_gradient_is_the_sum_of_all_turned_back(backend, dtype, shape, memory_format):
    x = images(shape, dtype, memory_format).requires_grad_()
    grad = images((4 * shape[0], *shape[1:]), dtype, memory_format, seed=1)
    (actual,) = torch.autograd.grad(rotate4(x)[0], x, grad)
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.rotate4.rotate4(wide)[0], wide, grad.double())
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=memory_format)
    error = (actual.double() - expected).abs().max() / grad.abs().max()
    assert error <= 4 * GRAD_TOLERANCE[dtype]
    if dtype in (torch.bfloat16, torch.float16):  # added in float32 in the documented order, and rounded once
        g = [torch.rot90(part.float(), -k, (2, 3)) for k, part in enumerate(grad.chunk(4))]
        assert torch.equal(actual, ((g[0] + g[2]) + (g[1] + g[3])).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_every_16_bit_number_survives_the_sum(backend, dtype):
    """A gradient that is one number and three zeros comes out as it went in: infinities, subnormal numbers, NaN."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for k in range(4):
        grad = torch.zeros(4, 1, 256, 256, dtype=dtype)
        grad[k] = torch.rot90(every.view(1, 256, 256), k, (1, 2))
        actual = _C.rotate4_backward(grad)
        torch.testing.assert_close(actual.flatten(), every, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
def test_parts_and_strided_images(backend, memory_format):
    x = images((9, 3, 12, 12), torch.float32, memory_format)
    for part in (x[:4], x[3:], x[::3], x[:, 1:2], x[..., ::2, ::2], x.transpose(2, 3), x[:1].expand(3, -1, -1, -1)):
        assert_rotated(part)
    wide = images((2, 3, 12, 20), torch.float32, memory_format)
    assert_rotated(wide[..., 3:15])


def test_nan_and_infinity_are_moved_as_they_are(backend):
    x = images((1, 2, 16, 16), torch.float32)
    x[0, 0, 3, 4], x[0, 1, 0, 15], x[0, 1, 2, 2] = float("nan"), float("inf"), -0.0
    assert_rotated(x)
    assert torch.equal(rotate4(x)[0][:1].view(torch.int32), x.view(torch.int32)), "NaN keeps its bits"


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 0)], ids=name)
def test_nothing_to_rotate(shape):
    x = torch.zeros(shape, requires_grad=True)
    assert_rotated(x)
    rotate4(x)[0].sum().backward()
    assert x.grad.shape == shape


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    memory_format=st.sampled_from(FORMATS),
)
def test_any_shape(shape, dtype, memory_format):
    x = images((*shape, shape[-1]), dtype, memory_format)
    assert_rotated(x)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ([[1.0]], TypeError, "images: expected a tensor, got list"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), TypeError, "images: expected uint8, float32.* got torch.int64"),
        (torch.zeros(3, 8, 8), ValueError, r"images: expected shape \(n, channels, size, size\), got \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 9), ValueError, r"images: expected square images, got shape \(2, 3, 8, 9\)"),
    ],
    ids=["list", "int64", "3-D", "oblong"],
)
def test_wrong_images(wrong, error, message):
    with pytest.raises(error, match=message):
        rotate4(wrong)


@pytest.mark.parametrize(
    ("function", "wrong", "error"),
    [
        ("rotate4_forward", torch.zeros(2, 3, 8, 9), ValueError),
        ("rotate4_forward", torch.zeros(2, 3, 8, 8, dtype=torch.int32), TypeError),
        ("rotate4_backward", torch.zeros(6, 3, 8, 8), ValueError),
        ("rotate4_backward", torch.zeros(4, 3, 8, 8, dtype=torch.uint8), TypeError),
    ],
)
def test_the_extension_checks_too(function, wrong, error):
    with pytest.raises(error):
        getattr(_C, function)(wrong)


@pytest.mark.parametrize("dtype", [torch.float64], ids=name)
def test_gradcheck(backend, dtype):
    for size, memory_format in ((3, torch.contiguous_format), (9, torch.channels_last)):
        x = images((2, 2, size, size), dtype, memory_format).requires_grad_()
        torch.autograd.gradcheck(lambda x: rotate4(x)[0], x)
        torch.autograd.gradgradcheck(lambda x: rotate4(x)[0], x)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
def test_opcheck(memory_format):
    x = images((3, 3, 5, 5), torch.float32, memory_format)
    torch.library.opcheck(torch.ops.sslfast.rotate4_forward, (x.clone().requires_grad_(),))
    torch.library.opcheck(torch.ops.sslfast.rotate4_forward, (x[::2],))
    grad = images((4, 3, 5, 5), torch.float32, memory_format)
    torch.library.opcheck(torch.ops.sslfast.rotate4_backward, (grad.requires_grad_(),))


@pytest.mark.slow
def test_compiles_into_one_graph_with_its_gradient():
    x = images((2, 3, 8, 8), torch.float32).requires_grad_()
    weights = torch.randn(8, 3, 8, 8)

    def loss(x):
        rotated, labels = rotate4(x)
        return (rotated * weights).sum(dim=(1, 2, 3)) @ labels.float()

    compiled = torch.compile(loss, fullgraph=True)(x)
    torch.testing.assert_close(compiled, loss(x))
    torch.testing.assert_close(torch.autograd.grad(compiled, x), torch.autograd.grad(loss(x), x))


def test_fake_tensors_have_the_same_layout():
    for memory_format in FORMATS:
        x = images((2, 3, 8, 8), torch.float16, memory_format)
        rotated, labels = rotate4(x)
        with FakeTensorMode() as mode:
            fake, fake_labels = rotate4(mode.from_tensor(x))
        assert (fake.shape, fake.stride(), fake.dtype) == (rotated.shape, rotated.stride(), rotated.dtype)
        assert (fake_labels.shape, fake_labels.dtype) == (labels.shape, labels.dtype)


def test_the_same_on_any_number_of_threads():
    x = images((40, 3, 32, 32), torch.float32)
    grad = images((160, 3, 32, 32), torch.float32, seed=1)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append((rotate4(x)[0], _C.rotate4_backward(grad)))
    torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
def test_more_elements_than_fit_an_int(emulator, memory_format):
    """Of the blocks at the ends of the grid: the last tile of the last image, 8 by 8 pixels."""
    n, size = 180, 1000
    corners = {0: (-8, -8), 1: (0, -8), 2: (0, 0), 3: (-8, 0)}  # where rotations bring it
    x, g = (emulator.device_tensor([m, 3, size, size], torch.float16) for m in (n, 4 * n))  # zeros: they are that large
    if memory_format == torch.channels_last:
        x, g = (t.view(-1, size, size, 3).movedim(-1, 1) for t in (x, g))
    assert g.numel() > 2**31
    emulator.run_corners(set())
    tile = images((3, 8, 8), torch.float16)
    x[-1, :, -8:, -8:] = tile
    y, _ = emulator.rotate4_forward(x)
    for k, (i, j) in corners.items():
        found = y[k * n + n - 1, :, i % size : i % size + 8, j % size : j % size + 8]
        last = slice(2, 3) if memory_format == torch.contiguous_format else slice(3)  # planes of the last block
        assert torch.equal(found[last], tile.rot90(k, (1, 2))[last]), k
        g[k * n + n - 1, :, i % size : i % size + 8, j % size : j % size + 8] = (k + 1) * tile.rot90(k, (1, 2))
    dx = emulator.rotate4_backward(g)
    torch.testing.assert_close(dx[-1, last, -8:, -8:], 10 * tile[last])

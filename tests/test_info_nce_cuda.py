"""The CUDA kernels of `info_nce`: on the device if there is one, and in any case in the emulator."""

import math

import cuda_emulation
import pytest
import torch
from test_info_nce import (
    GRAD_TOLERANCE,
    LOSS_TOLERANCE,
    assert_near,
    float64_reference,
    loss_and_grads,
    relative_error,
    views,
)

from sslfast import _C, reference
from sslfast.ops import info_nce, nt_xent

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around the sizes of tiles (64, 128) and chunks (32, 64 columns); beyond 128 and 256 columns other shapes of block, and
# beyond what fits in shared memory, chunks that are loaded twice.
SHAPES = [(1, 1), (1, 128), (2, 3), (3, 7), (5, 1), (17, 31), (32, 64), (33, 65), (64, 128), (65, 130), (7, 300)]
SHAPES += [(97, 40), (4, 1030)]


def why_no_device() -> str:
    if not _C.build_info()["cuda"]:
        return f"CUDA kernels were not built: {_C.build_info()['cuda_why_not']}"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device on this machine"


@pytest.fixture(params=["cuda-emulated"] + ([] if why_no_device() else ["cuda"]))
def device(request, monkeypatch):
    """Where tensors of the test live; ops use the CUDA kernels on them."""
    if request.param == "cuda":
        return "cuda"
    emulator = cuda_emulation.load()
    emulator.set_order("shuffled")
    emulator.reset_counters()
    monkeypatch.setattr(info_nce, "_C", emulator)
    return "cpu"


def run(device, z1, z2, temperature, reduction="mean", grad=None):
    grad = None if grad is None else grad.to(device)
    temperature = torch.as_tensor(temperature, dtype=torch.float64).to(device)
    return tuple(t.cpu() for t in loss_and_grads(nt_xent, z1.to(device), z2.to(device), temperature, reduction, grad))


@pytest.mark.skipif(bool(why_no_device()), reason=why_no_device())
def test_in_a_cuda_graph():
    """All tests here run on the device, too, if there is one. This one only there: nothing waits for the host."""
    z1, z2 = (z.cuda().requires_grad_() for z in views(300, 128, torch.bfloat16))
    temperature = torch.tensor(0.2, device="cuda")

    def step():
        return torch.autograd.grad(nt_xent(z1, z2, temperature), (z1, z2))

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step()
    graph.replay()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.01], ids=lambda t: f"t{t}")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
def test_equals_float64_reference(device, dtype, shape, temperature):
    z1, z2 = views(*shape, dtype)
    grad = torch.tensor(128.0 if dtype == torch.float16 else 1.0)
    loss, *grads = run(device, z1, z2, temperature, grad=grad)
    expected, *expected_grads = float64_reference(z1, z2, temperature, grad=grad)
    assert (loss.dtype, [g.dtype for g in grads]) == (torch.float32, [dtype, dtype, torch.float64])
    # Where the bounds come from: test_info_nce.py.
    own, *own_grads = loss_and_grads(reference.info_nce.nt_xent, z1.float(), z2.float(), temperature, grad=grad)
    assert_near(loss, expected, own, LOSS_TOLERANCE[dtype], 1e-7 / temperature)
    lengths = z1.double().norm(dim=1, keepdim=True), z2.double().norm(dim=1, keepdim=True)
    for length, actual, wanted, theirs in zip(lengths, grads, expected_grads, own_grads, strict=False):
        size = grad.item() / (temperature * math.sqrt(shape[0]))
        assert_near(actual * length, wanted * length, theirs * length, GRAD_TOLERANCE[dtype], 1e-7 / temperature * size)
    floor = grad.item() * 1e-6 / temperature**2
    assert_near(grads[2], expected_grads[2], own_grads[2], 20 * LOSS_TOLERANCE[dtype], floor)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "dim"), [(300, 128), (2049, 8)])
def test_several_tiles_of_each_block(device, batch, dim):
    z1, z2 = views(batch, dim, torch.bfloat16)
    actual = run(device, z1, z2, 0.2)
    expected = float64_reference(z1, z2, 0.2)
    tolerances = (2e-6, GRAD_TOLERANCE[torch.bfloat16], GRAD_TOLERANCE[torch.bfloat16], 2e-5)
    for a, e, tolerance in zip(actual, expected, tolerances, strict=True):
        assert relative_error(a, e) <= tolerance


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("size", [1.0, 65536.0])  # of the incoming gradient: torch.amp.GradScaler starts with 65536
def test_reductions(device, reduction, dtype, temperature, size):
    z1, z2 = views(37, 24, dtype)
    if dtype == torch.float16:
        z1, z2 = 100 * z1, 100 * z2  # so that gradients stay within float16
    grad = size * (torch.linspace(-1, 2, 74) if reduction == "none" else torch.tensor(0.7))
    actual = run(device, z1, z2, temperature, reduction, grad)
    expected = float64_reference(z1, z2, temperature, reduction, grad)
    own = loss_and_grads(reference.info_nce.nt_xent, z1.float(), z2.float(), temperature, reduction, grad)
    for a, e, o, tolerance in zip(actual, expected, own, (2e-6, *2 * [GRAD_TOLERANCE[dtype]], 2e-5), strict=True):
        assert_near(a, e, o, tolerance * max(1, 0.03 / temperature), 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_same_bits_in_any_order(device, dtype, temperature):
    z1, z2 = views(75, 40, dtype)
    results = []
    for order in cuda_emulation.ORDERS:
        if device == "cpu":
            cuda_emulation.load().set_order(order)
        results.append(run(device, z1, z2, temperature))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_rows_that_are_not_aligned(device):
    """Rows that do not start at multiples of 16 bytes, though their length is one."""
    z1, z2 = views(20, 32, torch.bfloat16)
    shifted = torch.empty(20 * 32 + 1, dtype=torch.bfloat16)[1:].view(20, 32).copy_(z1)
    assert all(torch.equal(a, b) for a, b in zip(run(device, shifted, z2, 0.3), run(device, z1, z2, 0.3), strict=True))


def test_views_that_are_not_contiguous(device):
    z1, z2 = views(24, 48, torch.float32)
    expected = run(device, z1[:, ::2].contiguous(), z2[:, :24].contiguous(), 0.3)
    actual = run(device, z1[:, ::2], z2.T.contiguous().T[:, :24], 0.3)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_nan_and_inf_propagate(device, dtype, bad, temperature):
    z1, z2 = views(40, 33, dtype)
    z1[7, 3] = bad
    loss, grad1, grad2, _ = run(device, z1, z2, temperature)
    assert loss.isnan()
    assert grad1.isnan().any()
    assert grad2.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows(device, dtype):
    z1, z2 = views(20, 16, dtype)
    z1[3] = 0
    z2[5] = 0
    loss, grad1, grad2, _ = run(device, z1, z2, 0.5)
    expected, wanted1, _, _ = float64_reference(z1, z2, 0.5)
    assert relative_error(loss, expected) <= LOSS_TOLERANCE[dtype]
    assert grad1.isfinite().all()
    assert grad2.isfinite().all()
    others = torch.arange(20) != 3
    assert relative_error(grad1[others], wanted1[others]) <= GRAD_TOLERANCE[dtype]
    if dtype != torch.float16:
        assert relative_error(grad1[3], wanted1[3]) <= GRAD_TOLERANCE[dtype]


def test_tf32_is_an_option(device):
    z1, z2 = views(40, 64, torch.float32)
    expected = float64_reference(z1, z2, 0.2)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        errors = [relative_error(a, e) for a, e in zip(run(device, z1, z2, 0.2), expected, strict=True)]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert 2e-6 < errors[1] < 2e-3
    assert errors[0] < 1e-3


def test_too_many_columns(device):
    with pytest.raises(ValueError, match=r"z1: expected at most .* 4096 columns on CUDA, got shape"):
        run(device, *views(1, 4097, torch.float32), 0.5)


# Traffic, as the emulator counts it: what the threads ask for, before any cache


@pytest.mark.parametrize("dim", [128, 256])
def test_traffic_is_near_that_of_the_tiles(dim):
    emulator = cuda_emulation.load()
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

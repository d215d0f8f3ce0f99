"""The emulator catches what it is there to catch, and its tensor cores compute what the PTX ISA says."""

import cuda_emulation
import pytest
import torch

CORRECT = torch.arange(64.0).flip(0)


def run_kernel(name: str, order: str) -> torch.Tensor:
    """The kernel `name` of cuda_emulator/faulty_kernels.cu: it should reverse 64 numbers."""
    emulator = cuda_emulation.load()
    emulator.set_order(order)
    source, target = (emulator.device_tensor([64], torch.float32) for _ in range(2))
    source.copy_(torch.arange(64.0))
    emulator.run_faulty_kernel(name, source, target)
    return target.clone()


@pytest.mark.parametrize("order", cuda_emulation.ORDERS)
def test_correct_kernel(order):
    assert torch.equal(run_kernel("correct", order), CORRECT)


@pytest.mark.parametrize("order", cuda_emulation.ORDERS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergent_barrier", r"thread \(5, 0, 0\): divergent barrier: has ended"),
        ("different_barriers", r"divergent barrier: waits in another __syncthreads\(\)"),
        ("missing_wait_at_end", "ends with a cp.async that it has not waited for"),
        ("global_write_out_of_bounds", r"thread \(63, 0, 0\): global write of 4 bytes out of bounds"),
        ("global_read_out_of_bounds", r"thread \(63, 0, 0\): global read of 4 bytes out of bounds"),
        ("raw_global_write_out_of_bounds", "outside shared and device memory"),
        ("shared_write_out_of_bounds", "outside shared and device memory"),
        ("misaligned", "global read of 16 bytes at a misaligned address"),
        ("divergent_shuffle", "deadlock: waits in a warp-wide instruction"),
    ],
)
def test_error_is_reported(fault, message, order):
    with pytest.raises(RuntimeError, match=message):
        run_kernel(fault, order)


@pytest.mark.parametrize("fault", ["missing_barrier", "missing_wait", "uninitialised_shared"])
@pytest.mark.parametrize("order", cuda_emulation.ORDERS)
def test_result_is_spoilt(fault, order):
    assert run_kernel(fault, order).isnan().any()


def test_goes_on_after_an_error():
    with pytest.raises(RuntimeError):
        run_kernel("shared_write_out_of_bounds", "ascending")
    assert torch.equal(run_kernel("correct", "ascending"), CORRECT)


def run_feature(name: str, order: str) -> torch.Tensor:
    """The kernel `name` of cuda_emulator/faulty_kernels.cu, which 128 threads run on the numbers 0 … 63."""
    emulator = cuda_emulation.load()
    emulator.set_order(order)
    source, target = (emulator.device_tensor([n], torch.float32) for n in (64, 128))
    source.copy_(torch.arange(64.0))
    emulator.run_feature_kernel(name, source, target)
    return target.clone()


@pytest.mark.parametrize("order", cuda_emulation.ORDERS)
def test_named_barriers(order):
    assert torch.equal(run_feature("named_barriers", order), CORRECT.repeat(2))
    assert run_feature("missing_named_barrier", order)[64:].isnan().any()
    with pytest.raises(RuntimeError, match="waits at a named barrier for threads that never come"):
        run_feature("short_named_barrier", order)
    with pytest.raises(RuntimeError, match="named barrier"):
        run_feature("mixed_counts", order)


@pytest.mark.parametrize("order", cuda_emulation.ORDERS)
def test_votes(order):
    """Lanes 0 … 31 vote on 0 … 31, the next on 32 … 63: how many are below 20, is any 40, are all below 32?"""
    assert torch.equal(run_feature("votes", order), torch.tensor([1020.0, 100.0]).repeat_interleave(32).repeat(2))


@pytest.mark.parametrize("order", cuda_emulation.ORDERS)
def test_atomics(order):
    expected = [32, 32, 32, 32, 124, 125, 126, 127, 128, 7, 0]
    assert run_feature("atomics", order).view(torch.int32)[:11].tolist() == expected


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("empty_grid", "feature: the grid is empty or exceeds the limits"),
        ("too_many_rows_of_blocks", "feature: the grid is empty or exceeds the limits"),
        ("too_much_shared_memory", "feature: too much shared memory: 233472 bytes"),
    ],
)
def test_launches_that_a_gpu_refuses(fault, message):
    with pytest.raises(RuntimeError, match=message):
        run_feature(fault, "ascending")


def test_counters():
    emulator = cuda_emulation.load()
    emulator.reset_counters()
    run_kernel("correct", "ascending")
    counts = emulator.counters()["faulty"]
    assert (counts["launches"], counts["barriers"]) == (1, 1)
    assert (counts["read_bytes"], counts["written_bytes"]) == (256, 256)


@pytest.mark.parametrize("by_rows", [False, True], ids=["a_bt", "a_b"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_matrix_product(dtype, by_rows):
    emulator = cuda_emulation.load()
    generator = torch.Generator().manual_seed(0)
    columns = 16 if by_rows else 128 // dtype.itemsize
    a, b = torch.randn(2, 16, columns, generator=generator).to(dtype)
    emulator.reset_counters()
    actual = emulator.matrix_product(str(dtype).removeprefix("torch."), a, b, by_rows).double()
    expected = a.double() @ (b.double() if by_rows else b.double().T)
    assert (actual - expected).norm() <= 1e-6 * expected.norm()
    if by_rows:  # one product: as the hardware it is rounded towards zero
        assert (actual.abs() <= expected.abs()).all()
    counts = emulator.counters()["product"]
    assert counts["mma_flops"] == 2 * 16 * 16 * columns
    assert counts["ldmatrix_conflicts"] == 0

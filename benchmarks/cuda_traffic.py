"""Bytes and operations of the CUDA kernels as the emulator counts them, beside the least that their tiles need.

    python benchmarks/cuda_traffic.py [batch] [dim]

A count, not a measurement: it says nothing about time. Bytes are those that the threads ask for, before any cache.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import cuda_emulation


def count(batch: int, dim: int, dtype: torch.dtype) -> list[tuple]:
    """→ (kernel, MiB read, MiB written, the least of both, GFLOP of products, M exponentials) of each kernel"""
    emulator = cuda_emulation.load()
    z1, z2 = torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    temperature = torch.tensor(0.2)
    emulator.reset_counters()
    loss, lse = emulator.info_nce_forward(z1, z2, temperature, "mean")
    emulator.info_nce_backward(loss, z1, z2, temperature, lse, "mean")

    rows, row = 2 * batch, dim * z1.element_size()
    blocks = -(-rows // 128)
    tiles = blocks * (blocks + 1) // 2
    block_rows = 128 if z1.element_size() == 2 and dim <= 128 else 64
    least = {  # of the loops over tiles: each tile reads its 128 (64) rows of z', and each block its own rows once
        "info_nce_forward": (tiles + blocks) * 128 * row + blocks * blocks * 128 * 4,
        "info_nce_backward": (rows // block_rows + 1) * rows * row + rows * dim * 4,
    }
    mebi = 2**20
    return [
        (name, c["read_bytes"] / mebi, c["written_bytes"] / mebi, least.get(name, 0) / mebi, c["mma_flops"] / 1e9,
         c["exponentials"] / 1e6)
        for name, c in emulator.counters().items()
    ]  # fmt: skip


def main(batch: int = 512, dim: int = 128) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        print(f"\nNT-Xent, batch {batch} (2·{batch} rows), dim {dim}, {dtype}\n")
        print("| kernel | read, MiB | written, MiB | least of both, MiB | products, GFLOP | exponentials, M |")
        print("|---|--:|--:|--:|--:|--:|")
        for name, read, written, least, products, exponentials in count(batch, dim, dtype):
            bound = f"{least:.2f} (×{(read + written) / least:.2f})" if least else ""
            print(f"| {name} | {read:.2f} | {written:.2f} | {bound} | {products:.2f} | {exponentials:.2f} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

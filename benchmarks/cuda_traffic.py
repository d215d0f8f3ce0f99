"""Bytes and operations of the CUDA kernels as the emulator counts them, beside the least and beside eager PyTorch.

    python benchmarks/cuda_traffic.py info_nce [batch] [dim]
    python benchmarks/cuda_traffic.py augment [images] [size of the view]

A count, not a measurement: it says nothing about time. Bytes are those that the threads ask for, before any cache; of
PyTorch, all inputs and outputs of every operation that is not a view.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import cuda_emulation

from sslfast.ops.augment import STEPS, AugmentDistribution, draw_params, image_sizes

MEBI = 2**20


class EagerTraffic(TorchDispatchMode):
    """Counts the bytes that eager PyTorch moves inside it, and its operations that are no views."""

    bytes = operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        in_place = function._schema.is_mutable
        if in_place or any(x.untyped_storage().data_ptr() not in inputs for x in outputs):
            self.operations += 1
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


def info_nce(batch: int = 512, dim: int = 128) -> None:
    emulator = cuda_emulation.load()
    for dtype in (torch.bfloat16, torch.float32):
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
        print(f"\nNT-Xent, batch {batch} (2·{batch} rows), dim {dim}, {dtype}\n")
        print("| kernel | read, MiB | written, MiB | least of both, MiB | products, GFLOP | exponentials, M |")
        print("|---|--:|--:|--:|--:|--:|")
        for name, c in emulator.counters().items():
            moved = c["read_bytes"] + c["written_bytes"]
            bound = f"{least[name] / MEBI:.2f} (×{moved / least[name]:.2f})" if name in least else ""
            print(
                f"| {name} | {c['read_bytes'] / MEBI:.2f} | {c['written_bytes'] / MEBI:.2f} | {bound} "
                f"| {c['mma_flops'] / 1e9:.2f} | {c['exponentials'] / 1e6:.2f} |"
            )
        with EagerTraffic() as eager:
            leaves = [z.clone().requires_grad_() for z in (z1, z2)]
            z = F.normalize(torch.cat(leaves), dim=1)
            logits = (z @ z.T / 0.2).fill_diagonal_(float("-inf"))
            F.cross_entropy(logits, torch.arange(rows).roll(batch)).backward()
        print(f"\nEager PyTorch, F.cross_entropy: {eager.bytes / MEBI:.0f} MiB in {eager.operations} operations")


def replay_with_torchvision(images: torch.Tensor, params, size: int, kernel_size: int) -> None:
    for v in range(len(params.crop)):
        for i, image in enumerate(images):
            x = TF.resized_crop(
                TF.to_dtype(image, torch.float32, scale=True), *params.crop[v, i].tolist(), [size, size]
            )
            x = TF.horizontal_flip(x) if params.flip[v, i] else x
            for step in params.order[v, i].tolist():
                name = STEPS[step]
                if name in STEPS[:4] and (value := getattr(params, name)[v, i].item()) != (0 if name == "hue" else 1):
                    x = getattr(TF, f"adjust_{name}")(x, value)
                elif name == "grayscale" and params.grayscale[v, i]:
                    x = TF.rgb_to_grayscale(x, num_output_channels=3)
                elif name == "blur" and (sigma := params.sigma[v, i].item()) > 0:
                    x = TF.gaussian_blur(x, [kernel_size] * 2, [sigma] * 2)
            TF.normalize(x, [0.5] * 3, [0.25] * 3)


def augment(count: int = 16, size: int = 224) -> None:
    emulator = cuda_emulation.load()
    simclr = AugmentDistribution(
        brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=0.8, grayscale_p=0.2, blur_p=0.5
    )
    kernel_size = size // 10 // 2 * 2 + 1
    print(f"\nSimCLR's augmentation, {count} images, two views of {size} px; MiB a view\n")
    print("| source | output | read | written | least of both | ratio | torchvision | its operations |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for source in ((32, 32),) if size <= 32 else ((256, 256), (375, 500), (768, 1024)):
        images = torch.randint(0, 256, (count, 3, *source), dtype=torch.uint8)
        params = draw_params([simclr] * 2, image_sizes(images), seed=0)
        with EagerTraffic() as eager:
            replay_with_torchvision(images, params, size, kernel_size)
        for dtype in (torch.float32, torch.bfloat16):
            emulator.reset_counters()
            arguments = (True, size, size, "bilinear", True, kernel_size, [0.5] * 3, [0.25] * 3, dtype, False)
            views = emulator.augment_forward([images], list(params), *arguments)
            read, written = (sum(c[k] for c in emulator.counters().values()) for k in ("read_bytes", "written_bytes"))
            crops = (params.crop[..., 2].double() * params.crop[..., 3]).sum().item()
            least, scale = 3 * crops + views.numel() * views.element_size(), 2 * count * MEBI
            name = str(dtype).removeprefix("torch.")
            print(
                f"| {source[0]} × {source[1]} | {name} | {read / scale:.3f} | {written / scale:.3f} "
                f"| {least / scale:.3f} | {(read + written) / least:.2f} | {eager.bytes / scale:.1f} "
                f"| {eager.operations / (2 * count):.0f} |"
            )


if __name__ == "__main__":
    if sys.argv[1:2] not in (["info_nce"], ["augment"]):
        sys.exit(__doc__)
    {"info_nce": info_nce, "augment": augment}[sys.argv[1]](*map(int, sys.argv[2:]))
